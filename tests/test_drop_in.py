"""fastrnn in place of torch.nn: every constructor combination, the same numbers, names, files and objects.

torch.nn is the oracle throughout, in float64 so that a tolerance can be tight.
"""

import copy
import inspect
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn.dispatch import BACKENDS, Request

CPU_REASON = BACKENDS["cpu"].reason(Request("lstm", "cpu", torch.float64, 1, 1))
CHOICES = [
    pytest.param(None, id="auto"),
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(CPU_REASON is not None, reason=f"backend cpu: {CPU_REASON}")),
]
KINDS = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
    "RNN-tanh": ("RNN", {"nonlinearity": "tanh"}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
}
# float64 keeps 16 digits; sums over T*B*G*H < 1e3 terms of order 1 in another order differ by some 1e-13.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
T, B, I, H = 5, 3, 4, 6

every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("backend", CHOICES)


def pair(kind, backend=None, seed=0, **settings):
    """torch.nn's module and fastrnn's with the same weights."""
    name, extra = KINDS[kind]
    torch.manual_seed(seed)
    theirs = getattr(nn, name)(I, H, **{"dtype": torch.float64, **extra, **settings})
    ours = getattr(fastrnn, name)(I, H, **{"dtype": torch.float64, **extra, **settings}, backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def initial(module, batch=B):
    """Random initial states as leaves: `(h0, c0)` for an LSTM, else h0. `batch` None: unbatched."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    sizes = [getattr(module, "proj_size", 0) or H, H][: 2 if type(module).__name__ == "LSTM" else 1]
    rng = torch.Generator().manual_seed(7)
    shapes = [(rows, size) if batch is None else (rows, batch, size) for size in sizes]
    states = tuple(torch.randn(s, generator=rng, dtype=torch.float64, requires_grad=True) for s in shapes)
    return states if len(states) == 2 else states[0]


def leaves_of(hx):
    return () if hx is None else hx if isinstance(hx, tuple) else (hx,)


def random(*shape, seed=3):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True)


def results(module, x, hx, wrap=lambda x: x):
    """Outputs, final states and the gradients of a loss over all of them, by name."""
    y, state = module(wrap(x), hx)
    found = {"y": y.data if isinstance(y, PackedSequence) else y}
    found |= {f"state{k}": s for k, s in enumerate(leaves_of(state))}
    # Weights that differ from element to element, so that a permuted gradient does not pass.
    loss = sum((v * torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype).reshape(v.shape)).sum() for v in found.values())
    leaves = {"x": x, **{f"hx{k}": s for k, s in enumerate(leaves_of(hx))}, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(loss, leaves.values())
    return found | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def agree(theirs, ours):
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


# numbers


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "bf"])
@pytest.mark.parametrize("bias", [True, False], ids=["", "nobias"])
@pytest.mark.parametrize("layers, dropout", [(1, 0.0), (2, 0.0), (2, 0.5)])
@every_kind
def test_outputs_states_and_all_gradients(kind, layers, dropout, bias, batch_first, bidirectional, backend):
    theirs, ours = pair(
        kind, backend, num_layers=layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional,
        dropout=dropout,
    )  # fmt: skip
    if dropout:  # dropout draws in training; in eval mode it must be gone
        theirs.eval(), ours.eval()
    x = random(*((B, T) if batch_first else (T, B)), I)
    for hx in (None, initial(theirs)):
        agree(results(theirs, x, hx), results(ours, x, hx))


@every_backend
@pytest.mark.parametrize("batch_first", [False, True])
@every_kind
def test_unbatched(kind, batch_first, backend):
    theirs, ours = pair(kind, backend, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = random(T, I)
    for hx in (None, initial(theirs, batch=None)):
        agree(results(theirs, x, hx), results(ours, x, hx))


@every_backend
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
@pytest.mark.parametrize("lengths, enforce_sorted", [((5, 4, 2), True), ((2, 5, 4), False), ((4, 4, 4), True)])
@every_kind
def test_packed_sequence(kind, lengths, enforce_sorted, bidirectional, with_hx, backend):
    theirs, ours = pair(kind, backend, num_layers=2, bidirectional=bidirectional)
    x, hx = random(T, B, I), initial(theirs) if with_hx else None

    def pack(x):
        return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)

    agree(results(theirs, x, hx, pack), results(ours, x, hx, pack))
    expected, got = theirs(pack(x), hx)[0], ours(pack(x), hx)[0]
    assert isinstance(got, PackedSequence)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        a, b = getattr(expected, field), getattr(got, field)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("steps", [10, 70])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_TANH"])
def test_dropout_of_a_packed_batch_draws_what_torch_nn_draws(kind, steps):
    """The same masks from the same seed, and as many random numbers, also where the C++ scan runs."""
    theirs = getattr(nn, kind.split("_")[0])(I, H, 3, dropout=0.5, bidirectional=True)
    ours = fastrnn.convert(copy.deepcopy(theirs))
    packed = pack_padded_sequence(torch.randn(steps, 3, I), torch.tensor([steps, 7, 3]))
    found = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        found.append((module(packed)[0].data, torch.rand(3)))
    # Three layers of up to 70 float32 steps, contracting, in another order of sums.
    torch.testing.assert_close(*(y for y, _ in found), rtol=0, atol=1e-5)
    assert torch.equal(*(after for _, after in found))


@every_backend
@every_kind
def test_empty_batch(kind, backend):
    theirs, ours = pair(kind, backend, num_layers=2, bidirectional=True)
    x = torch.zeros(T, 0, I, dtype=torch.float64)
    expected, got = theirs(x), ours(x)
    for a, b in zip((expected[0], *leaves_of(expected[1])), (got[0], *leaves_of(got[1])), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    got[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


@every_backend
def test_a_single_step_and_a_single_unit(backend):
    for sizes in ((1, 1), (1, 5), (7, 1)):
        theirs = nn.LSTM(*sizes, dtype=torch.float64)
        ours = fastrnn.LSTM(*sizes, dtype=torch.float64, backend=backend)
        ours.load_state_dict(theirs.state_dict())
        x = random(1, 2, sizes[0])
        agree(results(theirs, x, None), results(ours, x, None))


@every_backend
def test_noncontiguous_input_and_states(backend):
    theirs, ours = pair("LSTM", backend)
    x = random(I, B, T).permute(2, 1, 0).detach().requires_grad_()
    hx = tuple(random(H, B, 1, seed=s).permute(2, 1, 0).detach().requires_grad_() for s in (1, 2))
    assert not x.is_contiguous()
    agree(results(theirs, x, hx), results(ours, x, hx))


@every_backend
@every_kind
def test_no_grad_and_frozen_weights(kind, backend):
    theirs, ours = pair(kind, backend)
    x = random(T, B, I)
    with torch.no_grad():
        expected, got = theirs(x)[0], ours(x)[0]
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, **TOLERANCE)
    theirs.requires_grad_(False), ours.requires_grad_(False)
    (expected,) = torch.autograd.grad(theirs(x)[0].sum(), x)
    (got,) = torch.autograd.grad(ours(x)[0].sum(), x)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("backend", CHOICES[1:])
def test_dropout_between_the_layers_in_training(backend):
    """A two-layer ReLU network of identities shows the mask itself: kept values are doubled, half are dropped."""
    width, steps = 64, 50
    module = fastrnn.RNN(width, width, 2, bias=False, nonlinearity="relu", dropout=0.5, backend=backend)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.eye(width) if "_ih_" in name else torch.zeros(width, width))
    y = module(torch.ones(steps, 1, width))[0]
    assert set(y.unique().tolist()) == {0.0, 2.0}
    # 3200 draws: the standard deviation of the mean is 0.009, and six of them leave one false alarm in 1e9.
    assert abs((y == 0).float().mean() - 0.5) < 0.054
    assert not torch.equal(y[0], y[1]), "the mask should be drawn anew for each step"
    assert torch.equal(module.eval()(torch.ones(steps, 1, width))[0], torch.ones(steps, 1, width))


# parameters and checkpoints


SETTINGS = [
    dict(zip(("num_layers", "bias", "bidirectional"), values, strict=True))
    for values in itertools.product((1, 2), (True, False), (False, True))
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@every_kind
def test_parameters_have_torch_nns_names_order_shapes_and_initial_values(kind, settings):
    name, extra = KINDS[kind]
    torch.manual_seed(11)
    theirs = getattr(nn, name)(I, H, **extra, **settings)
    torch.manual_seed(11)
    ours = getattr(fastrnn, name)(I, H, **extra, **settings)
    expected, got = list(theirs.named_parameters()), list(ours.named_parameters())
    assert [n for n, _ in got] == [n for n, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(got, expected, strict=True)), "same seed, same bits"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [[p.shape for p in row] for row in ours.all_weights] == [
        [p.shape for p in row] for row in theirs.all_weights
    ]
    assert ours._all_weights == theirs._all_weights and ours.mode == theirs.mode


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@every_kind
def test_state_dict_goes_both_ways(kind, settings):
    name, extra = KINDS[kind]
    theirs, ours = getattr(nn, name)(I, H, **extra, **settings), getattr(fastrnn, name)(I, H, **extra, **settings)
    for source, target in ((theirs, ours), (ours, getattr(nn, name)(I, H, **extra, **settings))):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file), strict=True)
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_extras_add_names_and_strict_loading_says_so():
    module = fastrnn.LSTM(I, H, bidirectional=True, layer_norm=True)
    plain = nn.LSTM(I, H, bidirectional=True).state_dict()
    added = set(module.state_dict()) - set(plain)
    kinds = ("ln_ih", "ln_hh", "ln_c", "ln_c_bias")
    assert added == {f"{kind}_l0{end}" for kind in kinds for end in ("", "_reverse")}
    with pytest.raises(RuntimeError, match="ln_ih_l0"):
        module.load_state_dict(plain, strict=True)
    missing, unexpected = module.load_state_dict(plain, strict=False)
    assert set(missing) == added and not unexpected


@every_kind
def test_reset_parameters_draws_what_torch_nn_draws(kind):
    theirs, ours = pair(kind)
    torch.manual_seed(5)
    theirs.reset_parameters()
    torch.manual_seed(5)
    ours.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


# the object


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_layers": 2, "dropout": 0.25}, {"bias": False, "batch_first": True}, {"bidirectional": True}],
    ids=str,
)
@every_kind
def test_repr_is_torch_nns(kind, settings):
    theirs, ours = pair(kind, **settings)
    note = ", nonlinearity=relu)"  # torch.nn does not show it; fastrnn has more of them, so it does
    assert repr(ours).replace(note, ")") == repr(theirs)


def test_repr_shows_the_extras():
    module = fastrnn.LSTM(I, H, layer_norm=True, zoneout=(0.5, 0.05), clip_state_grad_norm=1.0, backend="reference")
    expected = "LSTM(4, 6, layer_norm=True, zoneout=(0.5, 0.05), clip_state_grad_norm=1.0, backend=reference)"
    assert repr(module) == expected


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@every_kind
def test_copies_compute_the_same_and_share_nothing(kind, clone):
    _, ours = pair(kind, num_layers=2, bidirectional=True)
    twin = clone(ours)
    x = random(T, B, I)
    assert torch.equal(twin(x)[0], ours(x)[0])
    assert repr(twin) == repr(ours) and type(twin) is type(ours)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in ours.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_kind
def test_to_dtype(kind, dtype):
    theirs, ours = pair(kind)
    theirs.to(dtype), ours.to(dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    x = random(T, B, I).detach().to(dtype)
    expected, got = theirs(x), ours(x)
    for a, b in zip((expected[0], *leaves_of(expected[1])), (got[0], *leaves_of(got[1])), strict=True):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape


@every_kind
def test_modes_and_flatten_parameters(kind):
    _, ours = pair(kind)
    assert ours.training and not ours.eval().training and ours.train() is ours
    assert ours.flatten_parameters() is None
    empty = getattr(fastrnn, KINDS[kind][0])(I, H, device="meta", **KINDS[kind][1])
    assert all(p.is_meta for p in empty.parameters())
    assert empty.to_empty(device="cpu")(torch.zeros(T, B, I))[0].shape[:2] == (T, B)


@every_kind
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
    beyond = {"nonlinearity"} if name == "RNN" else set()
    assert set(shown) == set(of_lstm) - {"proj_size"} | beyond
    args = (I, H, 2, *("relu" for _ in beyond), False, True, 0.5, True, "cpu", torch.float64)
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


# cells


CELLS = {
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "RNNCell-tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "RNNCell-relu": ("RNNCell", {"nonlinearity": "relu"}),
}


def cell_pair(kind, backend, **settings):
    name, extra = CELLS[kind]
    theirs = getattr(nn, name)(I, H, dtype=torch.float64, **extra, **settings)
    ours = getattr(fastrnn, name)(I, H, dtype=torch.float64, **extra, **settings, backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@every_backend
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias, batched, backend):
    theirs, ours = cell_pair(kind, backend, bias=bias)
    shape = (B,) if batched else ()
    x, h, c = random(*shape, I), random(*shape, H, seed=1), random(*shape, H, seed=2)

    def found(cell, hx):
        out = cell(x, hx)
        values = leaves_of(out)
        leaves = (x, *leaves_of(hx), *cell.parameters())
        loss = sum((k + 1) * (v * torch.linspace(1, 2, H, dtype=v.dtype)).sum() for k, v in enumerate(values))
        return dict(enumerate((*values, *torch.autograd.grad(loss, leaves))))

    assert type(theirs(x)) is type(ours(x))
    for hx in (None, (h, c) if kind == "LSTMCell" else h):
        agree(found(theirs, hx), found(ours, hx))


@pytest.mark.parametrize("kind", CELLS)
def test_a_cells_step_is_torch_nns_operation_by_operation(kind):
    """A whole call of torch's prepares the weights for many steps, which a single one does not pay back."""

    class Called(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.ops.append(str(function))
            return function(*args, **(kwargs or {}))

    def found(cell):
        x, h, c = (random(B, width, seed=k).float().detach() for k, width in enumerate((I, H, H)))
        with Called() as called:
            y = leaves_of(cell(x, (h, c) if kind == "LSTMCell" else h))
            gradients = torch.autograd.grad(sum(v.sum() for v in y), list(cell.parameters()))
        return called.ops, (*y, *gradients)

    theirs, ours = cell_pair(kind, None)
    (expected_ops, expected), (ops, got) = found(theirs.float()), found(ours.float())
    assert ops == expected_ops
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_backend
@pytest.mark.parametrize("kind", CELLS)
def test_cells_under_transforms_and_compilation(kind, backend):
    theirs, ours = cell_pair(kind, backend)
    x, h, c = random(B, I), random(B, H, seed=1), random(B, H, seed=2)

    def gradient(cell):
        def loss(params, x, h, c):
            y = functional_call(cell, params, (x, (h, c) if kind == "LSTMCell" else h))
            return sum(v.square().sum() for v in leaves_of(y))

        return torch.func.grad(loss, argnums=(0, 1, 2))

    def second(cell):
        params = dict(cell.named_parameters())
        first = gradient(cell)(params, x, h, c)
        penalty = sum(g.square().sum() for g in (*first[0].values(), *first[1:]))
        return dict(enumerate(torch.autograd.grad(penalty, (x, h, *cell.parameters()))))

    agree(second(theirs), second(ours))
    params = {name: p.detach() for name, p in theirs.named_parameters()}
    samples = x.detach(), h.detach(), c.detach()
    per_sample = torch.func.vmap(gradient(ours), in_dims=(None, 0, 0, 0))(params, *samples)
    each = [gradient(theirs)(params, *(s[b] for s in samples)) for b in range(B)]
    agree({n: torch.stack([e[0][n] for e in each]) for n in params}, per_sample[0])
    torch._dynamo.reset()  # it counts the compilations of a forward over all modules
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    hx = (h, c) if kind == "LSTMCell" else h
    agree(*(dict(enumerate(leaves_of(cell(x, hx)))) for cell in (theirs, compiled)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_parameters_repr_and_positional_arguments(kind, bias):
    name, extra = CELLS[kind]
    args = (I, H, bias, *extra.values(), "cpu", torch.float64)
    torch.manual_seed(0)
    theirs = getattr(nn, name)(*args)
    torch.manual_seed(0)
    ours = getattr(fastrnn, name)(*args)
    expected, got = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert list(got) == list(expected) and all(torch.equal(got[k], expected[k]) for k in got)
    assert repr(ours) == repr(theirs)
    assert ours.bias_ih is None if not bias else ours.bias_ih.dtype == torch.float64
    assert torch.equal(pickle.loads(pickle.dumps(ours))(random(B, I))[0], ours(random(B, I))[0])


# convert


class Model(nn.Module):
    """Nested, shared, in a list, a cell, and something that is none of convert's business."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(I, I), nn.ModuleDict({"rnn": nn.LSTM(I, H, 2, dropout=0.5)})["rnn"])
        self.stack = nn.ModuleList([nn.GRU(H, H, bidirectional=True), nn.RNN(2 * H, H, nonlinearity="relu")])
        self.tied = self.stack[0]
        self.cell = nn.GRUCell(H, H, bias=False)
        self.projected = nn.LSTM(H, H, proj_size=2, batch_first=True)

    def forward(self, x):
        x = self.encoder[0](x)
        x = self.encoder[1](x)[0]
        x = self.tied(self.stack[0](x)[0][..., :H])[0]
        x = self.stack[1](x)[0]
        x = torch.stack([self.cell(step) for step in x])
        return self.projected(x)[0]


RECURRENT = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


def libraries(model):
    return {type(m).__module__.split(".")[0] for m in model.modules() if type(m).__name__ in RECURRENT}


def test_convert_there_and_back():
    torch.manual_seed(0)
    model = Model().double().eval()
    reference = copy.deepcopy(model)
    parameters, x = dict(model.named_parameters()), random(T, B, I)
    expected = results_of_model(reference, x)

    assert fastrnn.convert(model) is model
    assert libraries(model) == {"fastrnn"}
    assert model.stack[0] is model.tied, "a module shared by two names stays shared"
    assert not any(m.training for m in model.modules())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(reference.state_dict())
    agree(expected, results_of_model(model, x))
    assert model.encoder[1].dropout == 0.5

    assert fastrnn.convert(model, "torch") is model
    assert libraries(model) == {"torch"}
    assert model.stack[0] is model.tied and repr(model) == repr(reference)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    agree(expected, results_of_model(model, x))


def results_of_model(model, x):
    y = model(x)
    return {"y": y, **dict(enumerate(torch.autograd.grad(y.square().sum(), (x, *model.parameters()))))}


def test_convert_keeps_an_optimisers_references():
    torch.manual_seed(0)
    model = Model().double().eval()
    twin = copy.deepcopy(model)
    optimisers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, twin)]
    fastrnn.convert(model)
    for _ in range(2):
        for m, optimiser in zip((model, twin), optimisers, strict=True):
            optimiser.zero_grad()
            m(random(T, B, I)).square().sum().backward()
            optimiser.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        # Adam divides by sqrt(v): gradients near zero magnify rounding, so a looser float64 bound.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@every_kind
def test_convert_of_a_bare_module(kind):
    theirs, _ = pair(kind)
    ours = fastrnn.convert(theirs)
    assert type(ours) is getattr(fastrnn, KINDS[kind][0])
    assert ours.weight_hh_l0 is theirs.weight_hh_l0
    back = fastrnn.convert(ours, "torch")
    assert type(back) is type(theirs) and repr(back) == repr(theirs)
    x = random(T, B, I)
    agree(results(theirs, x, None), results(back, x, None))


@pytest.mark.parametrize(
    "extra, name",
    [
        ({"zoneout": 0.1}, "zoneout"),
        ({"layer_norm": True}, "layer_norm"),
        ({"clip_state_grad_norm": 1.0}, "clip_state_grad_norm"),
        ({"clip_state_grad_norm": torch.tensor(1.0)}, "clip_state_grad_norm"),
        ({"residual": True, "num_layers": 2}, "residual"),
        ({"weight_dropout": 0.5, "recurrent_dropout": 0.5}, "recurrent_dropout, weight_dropout"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_convert_back_refuses_what_torch_nn_has_not(extra, name):
    with pytest.raises(ValueError, match=name):
        fastrnn.convert(nn.Sequential(fastrnn.LSTM(I, H, **extra)), "torch")


def test_convert_back_refuses_other_nonlinearities_and_unknown_libraries():
    with pytest.raises(ValueError, match="leaky_relu"):
        fastrnn.convert(fastrnn.RNN(I, H, nonlinearity="leaky_relu"), "torch")
    with pytest.raises(ValueError, match="'fastrnn' or 'torch'"):
        fastrnn.convert(nn.LSTM(I, H), "jax")


def test_convert_leaves_subclasses_alone_and_warns():
    class Own(nn.LSTM):
        pass

    model = nn.Sequential(Own(I, H))
    with pytest.warns(UserWarning, match="Own"):
        fastrnn.convert(model)
    assert type(model[0]) is Own


def drop_weight(module, name):
    """As wrappers that drop weights do it: the parameter renamed, and set as an attribute before every call."""
    raw = module._parameters.pop(name)
    module.register_parameter(f"{name}_raw", nn.Parameter(raw.data))
    return lambda: setattr(module, name, F.dropout(module._parameters[f"{name}_raw"], 0.5))


def test_a_weight_that_is_not_there_before_the_call():
    """Moved to another dtype in between, as torch.nn's module may be."""
    theirs, ours = pair("LSTM")
    results = []
    for module in (theirs, ours):
        set_weight = drop_weight(module, "weight_hh_l0")
        module.to(torch.float32).flatten_parameters()
        torch.manual_seed(0)
        set_weight()
        results.append(module(torch.ones(T, B, I))[0])
    assert torch.equal(*results)


def test_flattening_does_not_look_at_computed_weights():
    """Spectral norm's estimate moves on with every look in training."""
    ours = nn.utils.parametrizations.spectral_norm(fastrnn.GRU(I, H), "weight_hh_l0")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours.flatten_parameters()
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: torch.nn.utils.spectral_norm(m, "weight_hh_l0"),
        lambda m: prune.l1_unstructured(m, "weight_hh_l0", 0.5),
        lambda m: drop_weight(m, "weight_hh_l0"),
    ],
    ids=["spectral_norm", "prune", "weight drop"],
)
def test_convert_leaves_modules_alone_whose_weights_hooks_compute(change):
    model = torch.nn.Sequential(torch.nn.GRU(3, 4))
    change(model[0])
    with pytest.warns(UserWarning, match="hooks or a wrapper compute"):
        fastrnn.convert(model)
    assert type(model[0]) is torch.nn.GRU and not any(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="hooks or a wrapper compute"):
        fastrnn.init.orthogonal_(model)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "GRUCell"])
def test_convert_keeps_what_was_added_to_a_module(kind):
    theirs = getattr(nn, kind)(I, H)
    theirs.register_buffer("seen", torch.ones(1))
    theirs.register_buffer("scratch", torch.zeros(1), persistent=False)
    theirs.head, theirs.inner, theirs.label = nn.Linear(H, 1), nn.GRU(I, H), "encoder"
    theirs.extra = nn.Parameter(torch.ones(2))
    names = [set(theirs.state_dict()), {name for name, _ in theirs.named_buffers()}]
    ours = fastrnn.convert(theirs)
    back = fastrnn.convert(ours, "torch")
    for module, library in ((ours, fastrnn), (back, nn)):
        assert type(module) is getattr(library, kind) and module.label == "encoder"
        assert module.seen is theirs.seen and module.extra is theirs.extra and module.head is theirs.head
        assert [set(module.state_dict()), {name for name, _ in module.named_buffers()}] == names
    assert type(back.inner) is nn.GRU and back.inner.weight_hh_l0 is theirs.inner.weight_hh_l0


@pytest.mark.parametrize("name", ["bias_ih_l0", "weight_hr_l1_reverse"])
def test_convert_misses_no_weight_that_is_not_there_before_the_call(name):
    model = nn.Sequential(nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2))
    drop_weight(model[0], name)
    with pytest.warns(UserWarning, match="hooks or a wrapper compute"):
        fastrnn.convert(model)
    assert type(model[0]) is nn.LSTM


def test_convert_goes_into_what_was_added_to_a_module():
    theirs = nn.LSTM(I, H)
    theirs.inner = nn.GRU(I, H)
    assert type(fastrnn.convert(theirs).inner) is fastrnn.GRU


@pytest.mark.parametrize(
    "register",
    [
        lambda m, hook: m.register_forward_hook(hook),
        lambda m, hook: m.register_forward_pre_hook(hook),
        lambda m, hook: m.register_full_backward_hook(hook),
        lambda m, hook: m.register_full_backward_pre_hook(hook),
        lambda m, hook: m.register_state_dict_pre_hook(hook),
        lambda m, hook: m.register_state_dict_post_hook(hook),
        lambda m, hook: m.register_load_state_dict_pre_hook(hook),
        lambda m, hook: m.register_load_state_dict_post_hook(hook),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre", "state_pre", "state_post", "load_pre", "load_post"],
)
def test_convert_says_that_hooks_stay_behind(register):
    model = nn.Sequential(nn.GRU(I, H))
    register(model[0], lambda *_: None)
    with pytest.warns(UserWarning, match="GRU has hooks, which its twin does not get"):
        fastrnn.convert(model)


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    "compiled", [compiled_in_place, lambda m: torch.compile(m, backend="eager")], ids=["in place", "wrapped"]
)
def test_convert_leaves_a_module_alone_that_is_compiled_by_itself(compiled):
    """Its compiled call would go on running the old module."""
    model = nn.Sequential(compiled(nn.LSTM(I, H)))
    with pytest.warns(UserWarning, match="LSTM is compiled and was left as it is"):
        fastrnn.convert(model)
    assert not any(isinstance(module, fastrnn.LSTM) for module in model.modules())


def test_convert_leaves_a_module_alone_that_is_compiled_beside_itself():
    model = nn.Module()
    model.rnn = nn.GRU(I, H)
    model.fast = torch.compile(model.rnn, backend="eager")
    with pytest.warns(UserWarning, match="GRU is compiled and was left as it is"):
        fastrnn.convert(model)
    assert type(model.rnn) is nn.GRU and model.fast._orig_mod is model.rnn


def test_convert_goes_into_a_compiled_model():
    model, x = nn.Sequential(nn.LSTM(I, H)), torch.randn(T, B, I)
    expected = torch.compile(model, backend="eager")(x)[0]
    ours = fastrnn.convert(torch.compile(model, backend="eager"))
    assert type(model[0]) is fastrnn.LSTM
    torch.testing.assert_close(ours(x)[0], expected)
    model[0].zoneout = 0.9
    assert not torch.allclose(ours(x)[0], expected)


def test_convert_takes_modules_only():
    with pytest.raises(TypeError, match="convert takes a module, got"):
        fastrnn.convert({"encoder": nn.GRU(I, H)})


def test_convert_leaves_a_module_alone_whose_method_was_replaced():
    model = nn.Sequential(nn.LSTM(I, H))
    model[0].forward = lambda x: x
    with pytest.warns(UserWarning, match="LSTM has its own forward and was left as it is"):
        fastrnn.convert(model)
    assert type(model[0]) is nn.LSTM
