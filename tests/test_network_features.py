"""Clipping, resets and the tap in the whole-network operation of the C++ library, against the reference backend."""

import pytest
import torch
from one_operation import only_the_operation  # noqa: F401, a fixture
from setups import needs_cpu_library
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import network

pytestmark = needs_cpu_library
KINDS = [("LSTM", {}), ("GRU", {}), ("RNN", {"nonlinearity": "relu"})]
LAYOUTS = [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}]
BOTH_BOUNDS = {"clip_state_grad_norm": 0.3, "clip_state_grad_value": 0.1}
CALLS = {  # the module's options, and what the forward gets
    "value": ({"clip_state_grad_value": 0.1}, ()),
    "norm": ({"clip_state_grad_norm": 0.3}, ()),
    "tap": ({}, ("tap",)),
    "resets": ({}, ("reset_mask",)),
    "all": (BOTH_BOUNDS, ("tap", "reset_mask")),
}
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)


def made(kind, input_size=3, hidden_size=5, **options):
    torch.manual_seed(1)
    return getattr(fastrnn, kind)(input_size, hidden_size, **{"dtype": torch.float64, **options})


def new_tap(module, steps, batch, dtype=torch.float64):
    walks = module.num_layers * (1 + module.bidirectional)
    states = 2 if isinstance(module, fastrnn.LSTM) else 1
    return torch.zeros(walks, 2, states, steps, batch, dtype=dtype, requires_grad=True)


def states_of(module, batch=None):
    walks = module.num_layers * (1 + module.bidirectional)
    shape = (walks, module.hidden_size) if batch is None else (walks, batch, module.hidden_size)
    h, c = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in "hc")
    return (h, c) if isinstance(module, fastrnn.LSTM) else h


def results(module, x, hx, **call):
    """Outputs and gradients, also those of the tap, by a loss that sees every output."""
    outputs = tree_leaves(module(x, hx, **call))
    outputs = [out.data if isinstance(out, PackedSequence) else out for out in outputs]
    outputs = [out for out in outputs if isinstance(out, torch.Tensor) and out.is_floating_point()]
    generator = torch.Generator().manual_seed(3)
    loss = sum((out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum() for out in outputs)
    rows = x.data if isinstance(x, PackedSequence) else x
    taps = [call["tap"]] if "tap" in call else []
    wanted = [t for t in (rows, *tree_leaves(hx), *module.parameters(), *taps) if t is not None and t.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, wanted)]


def agree(module, x, hx, rtol=1e-10, **call):
    """Whether backend `cpu` gives what `reference` does."""
    found = []
    for backend in ("cpu", "reference"):
        module.backend = backend
        torch.manual_seed(2)  # of the masks
        found.append(results(module, x, hx, **call))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)


@kinds
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("extras", "names"), CALLS.values(), ids=CALLS)
@pytest.mark.usefixtures("only_the_operation")
def test_outputs_gradients_and_norms_are_the_references(kind, options, layout, extras, names):
    module = made(kind, **options, **layout, **extras)
    T, B = 6, 4
    x = torch.randn((B, T, 3) if module.batch_first else (T, B, 3), dtype=torch.float64, requires_grad=True)
    mask = torch.rand(x.shape[:2]) > 0.6
    given = {"tap": new_tap(module, T, B), "reset_mask": mask}
    agree(module, x, states_of(module, B), **{name: given[name] for name in names})


@kinds
@pytest.mark.usefixtures("only_the_operation")
def test_an_unbatched_call(kind, options):
    module = made(kind, **options, **BOTH_BOUNDS, bidirectional=True)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, False, True])
    agree(module, x, states_of(module), tap=new_tap(module, 5, 1), reset_mask=mask)


BOUNDARIES = [("LSTM", 130, 129), ("GRU", 173, 171)]  # more rows than one chunk has, and the first step of the second


@pytest.mark.parametrize(("kind", "steps", "second"), BOUNDARIES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.usefixtures("only_the_operation")
def test_resets_meet_a_chunks_boundary(monkeypatch, kind, steps, second, bidirectional):
    monkeypatch.setattr(network, "LARGEST_PRODUCT", 1 << 40)
    module = made(kind, 1, 128, bidirectional=bidirectional, clip_state_grad_norm=0.5)
    B = 4
    x = torch.randn(steps, B, 1, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(steps, B, dtype=torch.bool)
    mask[second, 0] = mask[second - 1, 1] = mask[second + 1 if second + 1 < steps else 0, 2] = True
    agree(module, x, states_of(module, B), rtol=1e-9, reset_mask=mask, tap=new_tap(module, steps, B))


@pytest.mark.usefixtures("only_the_operation")
def test_threads_give_the_same_bits():
    module = made("LSTM", backend="cpu", dtype=torch.float32, **BOTH_BOUNDS)
    x, mask, threads = torch.randn(20, 40, 3), torch.rand(20, 40) > 0.8, torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            tap = new_tap(module, 20, 40, torch.float32)
            found.append(results(module, x, None, reset_mask=mask, tap=tap))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("only_the_operation")
def test_other_dtypes(dtype):
    module = made("LSTM", backend="cpu", dtype=dtype, clip_state_grad_norm=0.3)
    exact = made("LSTM", backend="reference", clip_state_grad_norm=0.3)
    exact.load_state_dict(module.state_dict())
    x, mask = torch.randn(4, 2, 3).to(dtype), torch.rand(4, 2) > 0.5
    norms = []
    for one, inputs in ((module, x), (exact, x.double())):
        tap = new_tap(one, 4, 2, torch.float64 if one is exact else torch.float32)
        one(inputs, reset_mask=mask, tap=tap)[0].sum().backward()
        norms.append(tap.grad)
    torch.testing.assert_close(norms[0].double(), norms[1], rtol=0.03, atol=0.03)


def rows_of(lengths, input_size=3):
    x = torch.randn(len(lengths), max(lengths), input_size, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return PackedSequence(packed.data.requires_grad_(), *packed[1:])


@kinds
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
@pytest.mark.usefixtures("only_the_operation")
def test_packed_rows_with_bounds_and_a_tap(kind, options, layout):
    module = made(kind, **options, **layout, **BOTH_BOUNDS)
    agree(module, rows_of([1, 6, 3, 4]), states_of(module, 4), tap=new_tap(module, 6, 4))


@kinds
@pytest.mark.usefixtures("only_the_operation")
def test_lengths_with_bounds(kind, options):
    module = made(kind, **options, **BOTH_BOUNDS, bidirectional=True)
    x = torch.randn(6, 3, 3, dtype=torch.float64, requires_grad=True)
    agree(module, x, states_of(module, 3), lengths=torch.tensor([2, 6, 3]))


def test_other_combinations_take_the_general_path(monkeypatch):
    module = made("LSTM", **BOTH_BOUNDS)
    x = torch.randn(6, 3, 3, dtype=torch.float64, requires_grad=True)
    lengths, mask = torch.tensor([2, 6, 3]), torch.rand(6, 3) > 0.5
    monkeypatch.setattr(network, "run", None)
    agree(module, x, None, lengths=lengths, reset_mask=mask, tap=new_tap(module, 6, 3))
    agree(module, x, None, lengths=lengths, tap=new_tap(module, 6, 3))
    agree(module, rows_of([2, 6, 3]), None, reset_mask=mask)
    agree(module, x, None, reset_mask=mask.tolist())
    agree(made("LSTM", zoneout=0.1, **BOTH_BOUNDS).eval(), x, None, reset_mask=mask)


@kinds
def test_second_derivatives(kind, options):
    module = made(kind, num_layers=2, bidirectional=True, **options, clip_state_grad_norm=1.0)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 2) > 0.5
    found = []
    for backend in ("cpu", "reference"):
        module.backend, tap = backend, new_tap(module, 4, 2)
        y = module(x, reset_mask=mask, tap=tap)[0]
        assert (type(y.grad_fn).__name__ == "NetworkBackward") == (backend == "cpu")
        dx, norms = torch.autograd.grad(y.square().sum(), [x, tap], create_graph=True)
        assert not norms.requires_grad
        found.append([norms, *torch.autograd.grad(dx.square().sum(), [x, module.weight_hh_l0, module.weight_ih_l1])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("only_the_operation")
def test_a_mask_and_a_bound_may_change_before_the_backward():
    bound = torch.tensor(0.3)
    module = made("LSTM", backend="cpu", clip_state_grad_norm=bound)
    x, mask = torch.randn(4, 2, 3, dtype=torch.float64), torch.rand(4, 2) > 0.5
    want = torch.autograd.grad(module(x, reset_mask=mask)[0].sum(), module.parameters())
    loss = module(x, reset_mask=mask)[0].sum()
    mask.logical_not_(), bound.fill_(1e-3)
    assert all(map(torch.equal, torch.autograd.grad(loss, module.parameters()), want))
    bound.fill_(-1.0)


@pytest.mark.usefixtures("only_the_operation")
def test_several_backwards_add_the_norms_up_and_frozen_weights_have_norms():
    module = made("GRU", backend="cpu").requires_grad_(False)
    x, tap = torch.randn(4, 2, 3, dtype=torch.float64), new_tap(module, 4, 2)
    loss = module(x, tap=tap)[0].sum()
    loss.backward(retain_graph=True)
    once = tap.grad.clone()
    loss.backward()
    assert once.any() and torch.equal(tap.grad, 2 * once)
    assert module.weight_hh_l0.grad is None
    with torch.no_grad():
        assert not module(x, tap=tap)[0].requires_grad


def test_bad_extras_are_refused_in_the_general_paths_words():
    module, x = made("LSTM", backend="cpu"), torch.randn(4, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="reset_mask should have shape"):
        module(x, reset_mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="tap should have shape"):
        module(x, tap=new_tap(module, 4, 3))
    with pytest.raises(ValueError, match="tap should require grad"):
        module(x, tap=new_tap(module, 4, 2).detach())
    for bound in (-1.0, torch.tensor(-1.0), float("nan")):
        module.clip_state_grad_norm = bound
        with pytest.raises(ValueError, match="clip_state_grad_norm should be"):
            module(x)


def test_the_operation_refuses_a_mask_that_it_would_misread():
    weights, x = [torch.zeros(20, 3), torch.zeros(20, 5)], torch.zeros(4, 2, 3)
    forward, shape = torch.ops.fastrnn_c.network_forward, ("lstm", 1, False, False, False, False)
    for mask in (torch.zeros(2, 4).bool(), torch.zeros(4, 2)):
        with pytest.raises(RuntimeError, match=r"reset_mask must be bool \[4, 2\]"):
            forward(x, None, mask, None, None, weights, *shape, True)
    with pytest.raises(RuntimeError, match="no resets"):
        forward(x[:, 0], torch.tensor([2, 2]), torch.zeros(2, 2).bool(), None, None, weights, *shape, True)


@kinds
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.usefixtures("only_the_operation")
def test_a_monitor_reports_what_it_does_on_the_reference(kind, options, layout):
    module = made(kind, **options, **layout, clip_state_grad_norm=1.0)
    x, mask = torch.randn(6, 6, 3, dtype=torch.float64), torch.rand(6, 6) > 0.8
    found = []
    for backend in ("cpu", "reference"):
        module.backend = backend
        with fastrnn.GradientMonitor(module) as monitor:
            module(x, reset_mask=mask)[0].square().sum().backward()
            module(x)[0].square().sum().backward()
        found.append(monitor)
    assert found[0].history.steps == found[1].history.steps == [0, 1]
    for ours, theirs in zip(found[0].history.reports, found[1].history.reports, strict=True):
        for got, want in zip(ours, theirs, strict=True):
            for name in ("total", "carried", "gain"):
                torch.testing.assert_close(getattr(got, name), getattr(want, name), equal_nan=True)
            assert (got.horizon, got.longest, got.clipped) == (want.horizon, want.longest, want.clipped)
            assert torch.equal(got.valid, want.valid)


def test_a_report_that_is_made_later_is_of_its_own_step():
    """Neither the mask nor the norms of the user's own tap are shared with it; in float64 there is no conversion."""
    module, found = made("GRU", backend="cpu"), []
    x, lengths = torch.randn(4, 3, 3, dtype=torch.float64), torch.tensor([4, 3, 2])
    mask = torch.tensor([[False, False, False], [True, False, True], [False] * 3, [False] * 3])
    for changes in (False, True):
        own, tap = mask.clone(), new_tap(module, 4, 3)
        with fastrnn.GradientMonitor(module) as monitor:
            module(x, lengths=lengths, reset_mask=own, tap=tap)[0].sum().backward()
            if changes:
                own.fill_(True), tap.grad.zero_()
        (report,) = monitor.history.reports
        found.append((report[0].total, report[0].gain, report[0].longest))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)
    assert found[0][0].any()


@pytest.mark.parametrize("of_output", [False, True])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.usefixtures("only_the_operation")
def test_a_monitor_follows_a_state_and_not_an_output_into_the_call_before(kind, batched, of_output):
    """Output and states come from one node here."""
    module = made(kind, backend="cpu")
    x = torch.randn((4, 2, 3) if batched else (4, 3), dtype=torch.float64)
    with fastrnn.GradientMonitor(module) as monitor:
        y, state = module(x)
        if of_output:
            last = y[-1:]
            state = (last, state[1]) if kind == "LSTM" else last
        module(x, state)[0].sum().backward()
    (record, *_) = monitor.report()
    assert record.cut == of_output
    assert len(record.total) == (4 if of_output else 8)


@pytest.mark.usefixtures("only_the_operation")
def test_a_monitor_of_packed_rows():
    module = made("LSTM", num_layers=2)
    packed, found = rows_of([1, 6, 3, 4]), []
    for backend in ("cpu", "reference"):
        module.backend = backend
        with fastrnn.GradientMonitor(module) as monitor:
            _, (h_n, _) = module(packed)
            h_n.sum().backward()
        found.append(monitor.report())
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.total, want.total)
        assert (got.horizon, got.longest) == (want.horizon, want.longest) and torch.equal(got.valid, want.valid)


def test_auto_takes_the_operation_for_what_torch_cannot_do():
    module, x = fastrnn.LSTM(3, 5, clip_state_grad_value=1.0), torch.randn(4, 2, 3)
    assert type(module(x)[0].grad_fn).__name__ == "NetworkBackward"
    plain = fastrnn.LSTM(3, 5)
    assert type(plain(x, reset_mask=torch.zeros(4, 2).bool())[0].grad_fn).__name__ == "NetworkBackward"
