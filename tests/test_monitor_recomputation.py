"""What a forward chose holds in its backward and in a checkpoint's recomputation: backend, tap and bound."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import GradientMonitor, recomputation
from fastrnn.monitoring import watch

B, I, H = 4, 3, 6
STEPS = [1, 5, 40]  # short calls go another way than long ones
KINDS = {
    "LSTM": lambda: fastrnn.LSTM(I, H, 2),
    "GRU": lambda: fastrnn.GRU(I, H),
    "GRU, both directions": lambda: fastrnn.GRU(I, H, bidirectional=True),
    "RNN": lambda: fastrnn.RNN(I, H, nonlinearity="leaky_relu"),
    "dropped": lambda: fastrnn.LSTM(I, H, 2, zoneout=0.1, recurrent_dropout=0.2, dropout=0.3),
}
kinds = pytest.mark.parametrize("kind", KINDS)
steps = pytest.mark.parametrize("T", STEPS)
reentrant = pytest.mark.parametrize("use_reentrant", [False, True])


def made(kind):
    torch.manual_seed(0)
    return KINDS[kind]()


def gradients(module):
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return found


def same(a, b):
    for x, y in zip(a, b, strict=True):
        # float32 sums over T * B terms, of order 1 to 10, by two kinds of kernels
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def forward(module, x, use_reentrant, seed=0):
    torch.manual_seed(seed)
    return checkpoint(lambda x: module(x)[0], x, use_reentrant=use_reentrant)


def expected(module, x):
    torch.manual_seed(0)
    module(x)[0].sum().backward()
    return gradients(module)


@kinds
@steps
@reentrant
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_backend_around_the_forward_only(kind, T, use_reentrant, name):
    module, x = made(kind), torch.randn(T, B, I, requires_grad=True)
    want = expected(module, x)
    with fastrnn.backend(name):
        y = forward(module, x, use_reentrant)
    y.sum().backward()
    same(gradients(module), want)


@kinds
@steps
@reentrant
def test_a_backend_around_the_backward_only(kind, T, use_reentrant):
    module, x = made(kind), torch.randn(T, B, I, requires_grad=True)
    want = expected(module, x)
    y = forward(module, x, use_reentrant)
    with fastrnn.backend("reference"):
        y.sum().backward()
    same(gradients(module), want)


@kinds
@steps
@reentrant
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_monitor_around_one_of_them_only(kind, T, use_reentrant, where):
    module, x = made(kind), torch.randn(T, B, I, requires_grad=True)
    want = expected(module, x)
    monitor = GradientMonitor(module)
    if where == "forward":
        with monitor:
            y = forward(module, x, use_reentrant)
        y.sum().backward()
    else:
        y = forward(module, x, use_reentrant)
        with monitor:
            y.sum().backward()
    same(gradients(module), want)
    if not use_reentrant:  # the taps are those of the forward; with True the recomputation makes them
        assert bool(monitor.report()) == (where == "forward")


@kinds
@steps
@reentrant
@pytest.mark.parametrize("every", [2, 3])
def test_two_forwards_before_two_backwards(kind, T, use_reentrant, every):
    module, x = made(kind), torch.randn(T, B, I, requires_grad=True)
    want = expected(module, x)
    with GradientMonitor(module, every=every) as monitor:
        for _ in range(3):
            losses = [forward(module, x, use_reentrant).sum() for _ in range(2)]
            for loss in losses:
                loss.backward()
                same(gradients(module), want)
    # With every=3 the call of step 3 was made in step 2, before its turn: the next one is seen.
    assert monitor.history.steps == ([0, 2, 4] if every == 2 else [0, 3] if use_reentrant else [0, 4])


def test_a_choice_in_another_thread():
    """As a GPU's engine does it: the recomputation runs in a thread that was in no block."""
    module, x, failed = made("LSTM"), torch.randn(5, B, I, requires_grad=True), []
    want = expected(module, x)
    with fastrnn.backend("cpu"), GradientMonitor(module):
        y = forward(module, x, False)

        def backward():
            try:
                y.sum().backward()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert not failed
    same(gradients(module), want)


def test_cells_and_functions_hold_their_backend_too():
    cell, net, x = fastrnn.GRUCell(I, H), made("LSTM"), torch.randn(5, B, I, requires_grad=True)

    def run(x):
        y, _ = fastrnn.functional.lstm(x, None, dict(net.named_parameters()), num_layers=2)
        return cell(x[0]).sum() + y.sum()

    with fastrnn.backend("cpu"):
        loss = checkpoint(run, x, use_reentrant=False)
    loss.backward()
    assert all(p.grad is not None for p in (*cell.parameters(), *net.parameters()))


def test_each_of_several_calls_has_its_own_choice():
    module, x = made("GRU"), torch.randn(5, B, I, requires_grad=True)

    def run(x):
        with fastrnn.backend("reference"):
            first = module(x)[0]
        second = module(x)[0]
        with torch.no_grad(), fastrnn.backend("cpu"):
            module(x)
        with fastrnn.backend("cpu"):
            return first + second + module(x)[0]

    run(x).sum().backward()
    want = gradients(module)
    with GradientMonitor(module):
        y = checkpoint(run, x, use_reentrant=False)
    with fastrnn.backend("aten"):
        y.sum().backward()
    same(gradients(module), want)


def test_nested_checkpoints_and_other_hooks():
    module, x = made("LSTM"), torch.randn(5, B, I, requires_grad=True)
    want = expected(module, x)

    def inner(x):
        with torch.autograd.graph.save_on_cpu():
            return module(x)[0]

    def outer(x):
        return checkpoint(inner, x * 1.0, use_reentrant=False) * 1.0

    with fastrnn.backend("reference"):
        y = checkpoint(outer, x, use_reentrant=False)
    y.sum().backward()
    same(gradients(module), want)
    with GradientMonitor(module) as monitor:
        y = checkpoint(outer, x, use_reentrant=False)
    y.sum().backward()
    same(gradients(module), want)
    assert monitor.history.steps == [0]


def test_choices_die_with_their_graph():
    module, x = made("LSTM"), torch.randn(5, B, I, requires_grad=True)
    for _ in range(3):
        with fastrnn.backend("reference"):
            y = forward(module, x, False)
        assert recomputation.some
        y.sum().backward()
        del y
        gc.collect()
        assert not recomputation.some and not recomputation._stored


def test_a_frozen_first_layer():
    """A tap alone makes a layer save what its backward needs; it must be there in the recomputation."""
    module, x = made("LSTM"), torch.randn(5, B, I)
    for name, p in module.named_parameters():
        p.requires_grad_(name.endswith("l1"))
    with GradientMonitor(module):
        y = forward(module, x, False)
    y.sum().backward()
    assert module.weight_hh_l1.grad is not None


# ------------------------------------------------------------------------------------------------- adaptive bounds


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_a_bound_is_the_one_that_the_forward_saw(cell, checkpointed):
    clip = fastrnn.penalties.AdaptiveClip(percentile=50)
    clip.threshold.fill_(0.5)
    torch.manual_seed(0)
    module = getattr(fastrnn, cell)(I, H, clip_state_grad_norm=clip.threshold)
    fixed, x = copy.deepcopy(module), torch.randn(8, B, I, requires_grad=True)
    fixed.clip_state_grad_norm = 0.5
    want = [p * 2 for p in expected(fixed, x)]
    monitor = GradientMonitor(module)
    monitor.norms_to(lambda name, norms: clip.update(norms))
    with monitor:
        losses = [(forward(module, x, False) if checkpointed else module(x)[0]).sum() for _ in range(2)]
        for loss in losses:
            loss.backward()
            assert clip.threshold != 0.5
    same(gradients(module), want)
    first, second = monitor.history.reports
    assert first[0].clipped == second[0].clipped > 0


def test_a_hook_of_another_kind_is_no_checkpoint():
    frame, target_frame_ref, gid = 3, 4, 5

    def pack(x):
        return x + 0 * frame

    def pack_again(x):
        return x + 0 * target_frame_ref * gid

    for hook in (pack, pack_again, abs, nn.Identity()):
        assert recomputation._level(hook) is None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), fastrnn.backend("cpu"):
        made("GRU")(torch.randn(5, B, I))[0].sum().backward()
    assert watch.Backward(print).counts is False
