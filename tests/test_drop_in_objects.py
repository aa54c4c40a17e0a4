"""fastrnn's modules as Python objects in place of torch.nn's: repr, copies, dtypes, signatures."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from setups import KINDS, H, I, every_torch_kind, flat, pair, random
from torch import nn

import fastrnn

T, B = 5, 3


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_layers": 2, "dropout": 0.25}, {"bias": False, "batch_first": True}, {"bidirectional": True}],
    ids=str,
)
@every_torch_kind
def test_repr_is_torch_nns(kind, settings):
    theirs, ours = pair(kind, **settings)
    note = ", nonlinearity=relu)"  # torch.nn does not show it; fastrnn has more of them, so it does
    assert repr(ours).replace(note, ")") == repr(theirs)


def test_repr_shows_the_extras():
    module = fastrnn.LSTM(I, H, layer_norm=True, zoneout=(0.5, 0.05), clip_state_grad_norm=1.0, backend="reference")
    expected = "LSTM(3, 5, layer_norm=True, zoneout=(0.5, 0.05), clip_state_grad_norm=1.0, backend=reference)"
    assert repr(module) == expected


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@every_torch_kind
def test_copies_compute_the_same_and_share_nothing(kind, clone):
    _, ours = pair(kind, num_layers=2, bidirectional=True)
    twin = clone(ours)
    x = random(T, B, I)
    assert torch.equal(twin(x)[0], ours(x)[0])
    assert repr(twin) == repr(ours) and type(twin) is type(ours)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in ours.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_torch_kind
def test_to_dtype(kind, dtype):
    theirs, ours = pair(kind)
    theirs.to(dtype), ours.to(dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    x = random(T, B, I).detach().to(dtype)
    expected, got = theirs(x), ours(x)
    for a, b in zip((expected[0], *flat(expected[1])), (got[0], *flat(got[1])), strict=True):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape


@every_torch_kind
def test_modes_and_flatten_parameters(kind):
    _, ours = pair(kind)
    assert ours.training and not ours.eval().training and ours.train() is ours
    assert ours.flatten_parameters() is None
    empty = getattr(fastrnn, KINDS[kind][0])(I, H, device="meta", **KINDS[kind][1])
    assert all(p.is_meta for p in empty.parameters())
    assert empty.to_empty(device="cpu")(torch.zeros(T, B, I))[0].shape[:2] == (T, B)


@every_torch_kind
def test_it_is_no_torch_nn_rnn(kind):
    """Dynamo breaks the graph on instances of torch.nn's classes."""
    _, ours = pair(kind)
    assert isinstance(ours, nn.Module) and not isinstance(ours, nn.RNNBase)


POSITIONAL = [
    ("LSTM", (I, H, 2, False, True, 0.0, True, 3, "cpu", torch.float64)),
    ("LSTM", (I, H, 1, True, False, 0.0, False, 0)),
    ("GRU", (I, H, 2, False, True, 0.0, True)),
    # torch.nn.GRU and RNN hand *args to RNNBase, whose eighth argument is proj_size, whatever their overloads say.
    ("GRU", (I, H, 2, False, True, 0.0, True, 0, "cpu", torch.float64)),
    ("RNN", (I, H, 2, "relu", False, True, 0.0, True)),
    ("RNN", (I, H, 1, "tanh", True, False, 0.0, False, 0, "cpu", torch.float64)),
]


@pytest.mark.parametrize("name, args", POSITIONAL, ids=lambda v: v if isinstance(v, str) else str(len(v)))
def test_positional_constructor_arguments(name, args):
    theirs, ours = getattr(nn, name)(*args), getattr(fastrnn, name)(*args)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    fields = ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
    assert [getattr(ours, f) for f in fields] == [getattr(theirs, f) for f in fields]
    assert ours.weight_ih_l0.dtype == theirs.weight_ih_l0.dtype
    assert getattr(ours, "nonlinearity", None) == getattr(theirs, "nonlinearity", None)
    x = torch.randn(T, B, I, dtype=theirs.weight_ih_l0.dtype)
    # float32 outputs below 1 keep 1e-7; T = 5 steps and another order of summing stay within 1e-5.
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_device_and_dtype_stand_where_torch_nns_signature_shows_them(name):
    """torch.nn's documented signature of GRU and RNN has no proj_size: device comes eighth (RNN: ninth)."""
    args = (I, H, 1, True, False, 0.0, False) if name == "GRU" else (I, H, 1, "tanh", True, False, 0.0, False)
    assert getattr(fastrnn, name)(*args, "cpu", torch.float64).weight_ih_l0.dtype == torch.float64


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_signature_shows_every_argument_in_torch_nns_order(name):
    shown, of_lstm = (list(inspect.signature(module).parameters) for module in (getattr(fastrnn, name), fastrnn.LSTM))
    beyond = {"nonlinearity", "leak", "learn_leak"} if name == "RNN" else set()
    lacking = {"proj_size"} | ({"activation", "gate_activation"} if name == "RNN" else set())
    assert set(shown) == set(of_lstm) - lacking | beyond
    args = (I, H, 2, *(["relu"] if name == "RNN" else []), False, True, 0.5, True, "cpu", torch.float64)
    inspect.signature(getattr(fastrnn, name)).bind(*args)
    module = getattr(fastrnn, name)(*args)
    given = dict(zip(shown, args, strict=False))
    assert given.pop("device") == "cpu" and given.pop("dtype") == module.weight_hh_l1.dtype
    assert {argument: getattr(module, argument) for argument in given} == given


def test_dropout_on_one_layer_warns_as_torch_nn_does():
    for library in (nn, fastrnn):
        with pytest.warns(UserWarning, match="non-zero dropout expects"):
            library.GRU(I, H, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.GRU(I, H, 2, dropout=0.5)
