"""fastrnn in place of torch.nn: every constructor combination gives the same numbers, names and files.

torch.nn is the oracle throughout, in float64 so that a tolerance can be tight.
"""

import copy
import io
import itertools

import pytest
import torch
from setups import (
    BACKENDS_HERE,
    DOUBLE,
    KINDS,
    H,
    I,
    agree,
    every_choice,
    every_torch_kind,
    flat,
    initial,
    pair,
    random,
    results,
)
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

T, B = 5, 3


# -------------------------------------------------------------------------------------------------------------- numbers


@every_choice
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "bf"])
@pytest.mark.parametrize("bias", [True, False], ids=["", "nobias"])
@pytest.mark.parametrize("layers, dropout", [(1, 0.0), (2, 0.0), (2, 0.5)])
@every_torch_kind
def test_outputs_states_and_all_gradients(kind, layers, dropout, bias, batch_first, bidirectional, backend):
    theirs, ours = pair(
        kind, backend, num_layers=layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional,
        dropout=dropout,
    )  # fmt: skip
    if dropout:  # dropout draws in training; in eval mode it must be gone
        theirs.eval(), ours.eval()
    x = random(*((B, T) if batch_first else (T, B)), I)
    for hx in (None, initial(theirs, B)):
        agree(results(theirs, x, hx), results(ours, x, hx))


@every_choice
@pytest.mark.parametrize("batch_first", [False, True])
@every_torch_kind
def test_unbatched(kind, batch_first, backend):
    theirs, ours = pair(kind, backend, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = random(T, I)
    for hx in (None, initial(theirs)):
        agree(results(theirs, x, hx), results(ours, x, hx))


@every_choice
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
@pytest.mark.parametrize("lengths, enforce_sorted", [((5, 4, 2), True), ((2, 5, 4), False), ((4, 4, 4), True)])
@every_torch_kind
def test_packed_sequence(kind, lengths, enforce_sorted, bidirectional, with_hx, backend):
    theirs, ours = pair(kind, backend, num_layers=2, bidirectional=bidirectional)
    x, hx = random(T, B, I), initial(theirs, B) if with_hx else None

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
    """The same seed gives the same masks, and takes as many random numbers, also where the C++ scan runs."""
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


@every_choice
@every_torch_kind
def test_empty_batch(kind, backend):
    theirs, ours = pair(kind, backend, num_layers=2, bidirectional=True)
    x = torch.zeros(T, 0, I, dtype=torch.float64)
    expected, got = theirs(x), ours(x)
    for a, b in zip((expected[0], *flat(expected[1])), (got[0], *flat(got[1])), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    got[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


@every_choice
def test_a_single_step_and_a_single_unit(backend):
    for sizes in ((1, 1), (1, 5), (7, 1)):
        theirs = nn.LSTM(*sizes, dtype=torch.float64)
        ours = fastrnn.LSTM(*sizes, dtype=torch.float64, backend=backend)
        ours.load_state_dict(theirs.state_dict())
        x = random(1, 2, sizes[0])
        agree(results(theirs, x, None), results(ours, x, None))


@every_choice
def test_noncontiguous_input_and_states(backend):
    theirs, ours = pair("LSTM", backend)
    x = random(I, B, T).permute(2, 1, 0).detach().requires_grad_()
    hx = tuple(random(H, B, 1, seed=s).permute(2, 1, 0).detach().requires_grad_() for s in (1, 2))
    assert not x.is_contiguous()
    agree(results(theirs, x, hx), results(ours, x, hx))


@every_choice
@every_torch_kind
def test_no_grad_and_frozen_weights(kind, backend):
    theirs, ours = pair(kind, backend)
    x = random(T, B, I)
    with torch.no_grad():
        expected, got = theirs(x)[0], ours(x)[0]
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, **DOUBLE)
    theirs.requires_grad_(False), ours.requires_grad_(False)
    (expected,) = torch.autograd.grad(theirs(x)[0].sum(), x)
    (got,) = torch.autograd.grad(ours(x)[0].sum(), x)
    torch.testing.assert_close(got, expected, **DOUBLE)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
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


# ------------------------------------------------------------------------------------------- parameters and checkpoints


SETTINGS = [
    dict(zip(("num_layers", "bias", "bidirectional"), values, strict=True))
    for values in itertools.product((1, 2), (True, False), (False, True))
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@every_torch_kind
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
@every_torch_kind
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


@every_torch_kind
def test_reset_parameters_draws_what_torch_nn_draws(kind):
    theirs, ours = pair(kind)
    torch.manual_seed(5)
    theirs.reset_parameters()
    torch.manual_seed(5)
    ours.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
