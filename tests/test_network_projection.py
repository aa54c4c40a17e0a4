"""An LSTM with projection in the whole-network operation of the C++ library, against torch.nn and the reference."""

import pytest
import torch
from one_operation import only_the_operation  # noqa: F401, a fixture
from setups import needs_cpu_library
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import network

pytestmark = needs_cpu_library
I, H, P = 3, 5, 2
LAYOUTS = [
    {}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "batch_first": True, "bias": False},
]  # fmt: skip
BOUNDS = {"clip_state_grad_norm": 0.3, "clip_state_grad_value": 0.1}
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def made(dtype=torch.float64, sizes=(I, H, P), **options):
    torch.manual_seed(1)
    input_size, hidden_size, proj_size = sizes
    return fastrnn.LSTM(input_size, hidden_size, proj_size=proj_size, dtype=dtype, backend="cpu", **options)


def twin(ours, dtype=torch.float64):
    """torch.nn's module with the weights of `ours`."""
    names = ("num_layers", "bias", "batch_first", "bidirectional", "proj_size")
    options = {name: getattr(ours, name) for name in names}
    theirs = torch.nn.LSTM(ours.input_size, ours.hidden_size, dtype=dtype, **options)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def states_of(module, *batch):
    walks = module.num_layers * (1 + module.bidirectional)
    return tuple(
        torch.randn(walks, *batch, width, dtype=torch.float64) for width in (module.proj_size, module.hidden_size)
    )


def results(module, x, states=(), **call):
    """Outputs and gradients, also those of a tap, by a loss that sees every output. A packed x keeps its form."""
    dtype = module.weight_ih_l0.dtype
    rows, *states = (t.to(dtype).requires_grad_() for t in (x.data if isinstance(x, PackedSequence) else x, *states))
    given = PackedSequence(rows, *x[1:]) if isinstance(x, PackedSequence) else rows
    y, hidden = module(given, tuple(states) or None, **call)
    outputs = [y.data if isinstance(y, PackedSequence) else y, *hidden]
    generator = torch.Generator().manual_seed(3)
    loss = sum((out * torch.randn(out.shape, dtype=torch.float64, generator=generator)).sum() for out in outputs)
    taps = [call["tap"]] if "tap" in call else []
    return [*outputs, *torch.autograd.grad(loss, [rows, *states, *module.parameters(), *taps])]


def equal(found, wanted, tolerance=1e-11):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@layouts
@pytest.mark.parametrize(("batch", "given"), [((2,), True), ((2,), False), ((), True)], ids=str)
@pytest.mark.usefixtures("only_the_operation")
def test_outputs_and_all_gradients_are_torch_nns(layout, batch, given):
    ours = made(**layout)
    theirs = twin(ours)
    x = torch.randn((2, 4, I) if batch and ours.batch_first else (4, *batch, I), dtype=torch.float64)
    states = states_of(ours, *batch) if given else ()
    equal(results(ours, x, states), results(theirs, x, states))
    with torch.no_grad():
        equal(tree_leaves(ours(x)), tree_leaves(theirs(x)))


@layouts
@pytest.mark.parametrize(
    ("bounds", "extras"), [({}, ("tap",)), (BOUNDS, ()), (BOUNDS, ("tap", "reset_mask"))], ids=["tap", "clip", "all"]
)
@pytest.mark.usefixtures("only_the_operation")
def test_clipping_resets_and_norms_are_the_references(layout, bounds, extras):
    """The norm of dL/dh is over P elements, that of dL/dc over H."""
    ours, steps, batch = made(**layout, **bounds), 6, 4
    x = torch.randn((batch, steps, I) if ours.batch_first else (steps, batch, I), dtype=torch.float64)
    walks, states = ours.num_layers * (1 + ours.bidirectional), states_of(ours, batch)
    tap = torch.zeros(walks, 2, 2, steps, batch, dtype=torch.float64, requires_grad=True)
    given = {"tap": tap, "reset_mask": torch.rand(x.shape[:2]) > 0.6}
    call = {name: given[name] for name in extras}
    found = results(ours, x, states, **call)
    ours.backend = "reference"
    equal(found, results(ours, x, states, **call), 1e-10)


@layouts
@pytest.mark.usefixtures("only_the_operation")
def test_packed_rows_and_lengths_are_torch_nns(layout):
    ours, lengths = made(**layout), [2, 5, 1, 5]
    theirs = twin(ours)
    x, states = torch.randn(4, 5, I, dtype=torch.float64), states_of(ours, 4)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    want = results(theirs, packed, states)
    equal(results(ours, packed, states), want)
    ours.backend = "aten"  # torch's kernel, at once
    assert all(map(torch.equal, results(ours, packed), results(theirs, packed)))
    ours.backend = "cpu"
    with torch.no_grad():
        y, hidden = ours(x if ours.batch_first else x.transpose(0, 1), states, lengths=torch.tensor(lengths))
    rows = pack_padded_sequence(y, lengths, batch_first=ours.batch_first, enforce_sorted=False)
    equal([rows.data, *hidden], want[:3])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)]
)
@pytest.mark.parametrize(("layout", "lengths"), [({"bidirectional": True, "num_layers": 2}, False), ({}, True)])
@pytest.mark.usefixtures("only_the_operation")
def test_a_long_call_goes_in_chunks_of_steps(monkeypatch, dtype, tolerance, layout, lengths):
    """With the products that only some processors take, on any; of no size that is a multiple of a panel's width."""
    monkeypatch.setattr(network, "takes_long_calls", lambda: True)
    ours = made(dtype, (33, 96, 40), **layout)
    theirs = twin(ours)
    x, states = torch.randn(100, 13, 33, dtype=torch.float64), states_of(ours, 13)
    if lengths:
        x = pack_padded_sequence(x, torch.arange(13) * 8 + 4, enforce_sorted=False)
    for got, want in zip(results(ours, x, states), results(theirs, x, states), strict=True):
        assert got.dtype == dtype
        assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives(bias):
    ours = made(num_layers=2, bidirectional=True, bias=bias)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)

    def penalty(backend):
        ours.backend = backend
        (dx,) = torch.autograd.grad(ours(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, ours.weight_hr_l0, ours.weight_hr_l1_reverse])

    equal(penalty("cpu"), penalty("reference"), 1e-9)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("only_the_operation")
def test_the_user_may_not_change_the_projection_before_the_backward(bias):
    ours = made(bias=bias)
    loss = ours(torch.randn(4, 2, I, dtype=torch.float64))[0].sum()
    with torch.no_grad():
        ours.weight_hr_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("batch", [(3,), ()])
@pytest.mark.usefixtures("only_the_operation")
def test_one_step_without_gradients_reads_the_weights_in_place(monkeypatch, options, batch):
    monkeypatch.setattr(network, "LEAST_WEIGHTS", 4 * H * P)
    ours = made(**options)
    x = torch.randn((3, 1, I) if batch and ours.batch_first else (1, *batch, I), dtype=torch.float64)
    for states in (None, states_of(ours, *batch)):
        want = tree_leaves(twin(ours)(x, states))
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(network, "run", None)
            equal(tree_leaves(ours(x, states)), want)
        assert ours(x, states)[0].requires_grad


@pytest.mark.usefixtures("only_the_operation")
def test_a_monitor_reports_what_it_does_on_the_reference():
    ours, x = made(num_layers=2), torch.randn(6, 4, I, dtype=torch.float64)
    found = []
    for backend in ("cpu", "reference"):
        ours.backend = backend
        with fastrnn.GradientMonitor(ours) as monitor:
            ours(x)[0].square().sum().backward()
        found.append(monitor.report())
    for got, want in zip(*found, strict=True):
        equal([got.total, got.carried], [want.total, want.carried], 1e-9)
        assert got.horizon == want.horizon


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("faster", ["cpu", "aten"])
def test_auto_goes_by_the_record_of_projected_calls(recorded, packed, faster):
    ours, x = made(torch.float32), torch.randn(20, 3, I)
    ours.backend = None
    x = pack_padded_sequence(x, [20, 12, 7]) if packed else x
    recorded(fastrnn.explain(ours, x).request, "cpu", 0.5 if faster == "cpu" else 1.5)
    recorded(fastrnn.explain(fastrnn.LSTM(I, H), x).request, "cpu", 1.5 if faster == "cpu" else 0.5)
    y, _ = ours(x)
    y = y.data if packed else y
    assert (type(y.grad_fn).__name__ == "NetworkBackward") == (faster == "cpu")


def test_the_operation_refuses_what_it_would_misread():
    x, forward = torch.zeros(4, 2, I), torch.ops.fastrnn_c.network_forward

    def refused(message, w_hr, h0=None, cell="lstm", rows=4 * H):
        weights = [torch.zeros(rows, I), torch.zeros(rows, P), w_hr]
        with pytest.raises(RuntimeError, match=message):
            forward(x, None, None, h0, None, weights, cell, 1, False, False, True, False, True)

    refused(r"w_hr must have shape \[2, 5\], got \[3, 5\]", torch.zeros(3, H))
    refused(r"w_hr must have shape \[P, H\]", torch.zeros(H))
    refused(r"w_ih must have shape \[16, 3\]", torch.zeros(P, 4))
    refused("w_hr must be", torch.zeros(P, H).double())
    refused(r"h0 must have shape \[1, 2, 2\]", torch.zeros(P, H), h0=torch.zeros(1, 2, H))
    refused("a projection is for the LSTM", torch.zeros(P, H), cell="gru", rows=3 * H)
