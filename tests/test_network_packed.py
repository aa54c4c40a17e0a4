"""The whole-network operation on packed rows against torch.nn."""

import pytest
import torch
from setups import needs_cpu_library
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import functional, network

pytestmark = needs_cpu_library
KINDS = [("LSTM", {}), ("GRU", {}), ("RNN", {"nonlinearity": "tanh"}), ("RNN", {"nonlinearity": "relu"})]
LAYOUTS = [{}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "batch_first": True, "bias": False}]
LENGTHS = {"sorted": [6, 4, 4, 1], "shuffled": [1, 6, 3, 6, 2], "of one length": [3, 3], "one sequence": [5]}


@pytest.fixture(autouse=True)
def only_the_operation(monkeypatch):
    """Makes the general path fail."""
    monkeypatch.setattr(functional, "recurrent", None)


def twins(kind, input_size=3, hidden_size=5, dtype=torch.float64, **options):
    """torch.nn's module and ours, with the same weights."""
    torch.manual_seed(1)
    theirs = getattr(torch.nn, kind)(input_size, hidden_size, dtype=torch.float64, **options)
    ours = getattr(fastrnn, kind)(input_size, hidden_size, dtype=dtype, backend="cpu", **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def packed_rows(lengths, input_size=3) -> PackedSequence:
    x = torch.randn(len(lengths), max(lengths), input_size, dtype=torch.float64)
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=lengths == sorted(lengths, reverse=True))


def states_of(module, batch):
    walks = module.num_layers * (1 + module.bidirectional)
    h, c = (torch.randn(walks, batch, module.hidden_size, dtype=torch.float64) for _ in "hc")
    return (h, c) if isinstance(module, torch.nn.LSTM) else (h,)


def results(module, packed, states, dtype=torch.float64):
    """Outputs, and gradients of rows, states and parameters, by a loss that sees every output."""
    rows, *states = (t.to(dtype).requires_grad_() for t in (packed.data, *states))
    hx = None if not states else tuple(states) if len(states) == 2 else states[0]
    y, hidden = module(PackedSequence(rows, *packed[1:]), hx)
    assert type(y) is PackedSequence
    for ours, theirs in zip(y[1:], packed[1:], strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    outputs = [y.data, *tree_leaves(hidden)]
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(out.shape, dtype=torch.float64, generator=generator) for out in outputs]
    loss = sum((out * factor).sum() for out, factor in zip(outputs, factors, strict=True))
    return [*outputs, *torch.autograd.grad(loss, [rows, *states, *module.parameters()])]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_outputs_and_all_gradients_are_torch_nns(kind, options, layout, lengths, given):
    theirs, ours = twins(kind, **options, **layout)
    packed = packed_rows(lengths)
    states = states_of(theirs, len(lengths)) if given else ()
    for got, want in zip(results(ours, packed, states), results(theirs, packed, states), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        y, hidden = ours(packed)
        again, hidden_again = theirs(packed)
    for got, want in zip((y.data, *tree_leaves(hidden)), (again.data, *tree_leaves(hidden_again)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)]
)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("LSTM", {"num_layers": 2, "bidirectional": True}), ("GRU", {"bidirectional": True, "bias": False}), ("RNN", {})],
    ids=str,
)
def test_many_rows_go_in_chunks_of_steps(monkeypatch, kind, options, dtype, tolerance):
    """As where the C++ library's product is the fastest. The sequences end, and begin, in different chunks."""
    monkeypatch.setattr(network, "takes_long_calls", lambda: True)
    lengths = torch.randint(1, 150, (17,), generator=torch.Generator().manual_seed(5)).tolist()
    theirs, ours = twins(kind, 33, 72, dtype, **options)
    theirs.load_state_dict(ours.state_dict())
    packed, states = packed_rows(lengths, 33), states_of(theirs, len(lengths))
    found = results(ours, packed, states, dtype), results(theirs, packed, states)
    for got, want in zip(*found, strict=True):
        assert got.dtype == dtype
        assert (got - want).norm() <= tolerance * want.norm()


def test_a_gradient_of_the_gradient_takes_the_general_path(monkeypatch):
    monkeypatch.undo()
    theirs, ours = twins("LSTM", bidirectional=True)
    packed = packed_rows([2, 4, 1])
    found = []
    for module in (theirs, ours):
        rows = packed.data.clone().requires_grad_()
        y, _ = module(PackedSequence(rows, *packed[1:]))
        (dx,) = torch.autograd.grad(y.data.square().sum(), rows, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [rows, *module.parameters()]))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_the_operation_refuses_what_is_not_packed():
    x, weights = torch.zeros(5, 3), [torch.zeros(20, 3), torch.zeros(20, 5)]
    shape = ("lstm", 1, False, False, False, False)
    for sizes, message in (
        (torch.tensor([2, 2]), "a row for each"),
        (torch.tensor([2, 3]), "none larger"),
        (torch.tensor([5, 0]), "positive"),
        (torch.tensor([3.0, 2.0]), "int64"),
        (torch.tensor([], dtype=torch.int64), "at least one step|a row for each"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastrnn_c.network_forward(x, sizes, None, None, None, weights, *shape, True)
    with pytest.raises(RuntimeError, match="two if packed"):
        torch.ops.fastrnn_c.network_forward(x[None], torch.tensor([5]), None, None, None, weights, *shape, True)


def with_lengths_by_torch(module, x, lengths):
    time = 1 if module.batch_first else 0
    packed = pack_padded_sequence(x, lengths, batch_first=module.batch_first, enforce_sorted=False)
    y, hidden = module(packed)
    padded, _ = pad_packed_sequence(y, batch_first=module.batch_first, total_length=x.shape[time])
    return [padded, *tree_leaves(hidden)]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_plain_call_with_lengths_goes_by_packed_rows(kind, options, layout, dtype):
    theirs, ours = twins(kind, **options, **layout)
    lengths = torch.tensor([2, 5, 1, 5, 3], dtype=dtype)
    x = torch.randn((5, 7, 3) if ours.batch_first else (7, 5, 3), dtype=torch.float64)
    step = torch.arange(7)
    after = step >= lengths.unsqueeze(1) if ours.batch_first else step.unsqueeze(1) >= lengths
    padding = torch.where(after.unsqueeze(-1), torch.nan, x).requires_grad_()
    x.requires_grad_()
    found = []
    for outputs, module, inputs in (
        (tree_leaves(ours(padding, lengths=lengths)), ours, padding),
        (with_lengths_by_torch(theirs, x, lengths), theirs, x),
    ):
        assert not outputs[0]._is_view()
        generator = torch.Generator().manual_seed(3)
        factors = [torch.randn(out.shape, dtype=torch.float64, generator=generator) for out in outputs]
        loss = sum((out * factor).sum() for out, factor in zip(outputs, factors, strict=True))
        found.append([*outputs, *torch.autograd.grad(loss, [inputs, *module.parameters()])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lengths", [[2, 0], [2, 5], [-1, 2], [2]], ids=str)
def test_other_lengths_are_left_to_the_general_path(monkeypatch, lengths):
    monkeypatch.undo()
    ours = fastrnn.GRU(3, 5, backend="cpu")
    x, lengths = torch.randn(4, 2, 3), torch.tensor(lengths)
    if lengths.tolist() == [2, 0]:
        y, h_n = ours(x, lengths=lengths)
        assert not y[:, 1].any() and not h_n[:, 1].any()
    else:
        with pytest.raises(ValueError, match="lengths should"):
            ours(x, lengths=lengths)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_a_packed_call_that_is_torchs_runs_torchs_kernel_at_once(kind, options, given):
    """The same bits as torch.nn, and without the general path."""
    theirs, ours = twins(kind, **options, num_layers=2, bidirectional=True)
    ours.backend = "aten"
    packed = packed_rows([1, 6, 3])
    states = states_of(theirs, 3) if given else ()
    for got, want in zip(results(ours, packed, states), results(theirs, packed, states), strict=True):
        assert torch.equal(got, want)
