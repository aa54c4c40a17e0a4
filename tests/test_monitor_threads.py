"""GradientMonitor and threads: calls and backwards side by side, and backwards inside of backwards."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import GradientMonitor

T, B, I, H = 12, 4, 3, 6


class Pause(torch.autograd.Function):
    """Runs a function in the middle of the backward."""

    @staticmethod
    def forward(ctx, x, run):
        ctx.run = run
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.run()
        return grad, None


def in_a_thread(run):
    failed = []

    def guarded():
        try:
            run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    assert not failed


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("elsewhere", [True, False], ids=["thread", "hook"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_a_call_without_gradient_during_a_backward(cell, elsewhere, every):
    kind = getattr(fastrnn, cell)
    lower, upper, x = kind(I, H), kind(H, H), torch.randn(T, B, I)

    def evaluate():
        with torch.no_grad():
            upper(lower(x)[0])

    with GradientMonitor(nn.ModuleList([lower, upper]), every=every) as monitor:
        for _ in range(4):
            y = Pause.apply(lower(x)[0], (lambda: in_a_thread(evaluate)) if elsewhere else evaluate)
            upper(y)[0].sum().backward()
    assert monitor.history.steps == [0, 1, 2, 3][::every]
    for report in monitor.history.reports:
        assert {r.name for r in report} == {"0.l0", "1.l0"}
        assert all(r.valid.tolist() == [B] * T for r in report)


@pytest.mark.parametrize("every", [1, 3])
def test_four_threads_call_at_once(every):
    module, x = fastrnn.LSTM(I, H, 2), torch.randn(T, 8, I)
    with GradientMonitor(module) as alone:
        module(x)[0].sum().backward()
    with GradientMonitor(module, every=every) as monitor, ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            parts = pool.map(lambda part: module(part)[0].sum(), x.split(2, 1))
            sum(parts).backward()
    assert monitor.history.steps == list(range(20))[::every]
    for a, b in zip(monitor.report(), alone.report(), strict=True):
        # the same sequences in four calls; float32 norms in another batch layout: ten roundings
        torch.testing.assert_close(a.total, b.total, rtol=1e-5, atol=0)


def test_four_threads_train_at_once():
    module, x = fastrnn.GRU(I, H), torch.randn(T, B, I)
    steps = 10

    def train(_):
        for _ in range(steps):
            module(x)[0].sum().backward()

    with GradientMonitor(module) as monitor, ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(4)))
    assert monitor._backwards == 4 * steps
    assert all(r.valid.tolist() == [B] * T for report in monitor.history.reports for r in report)


def test_a_backward_that_fails_in_another_thread_is_forgotten():
    module, x = fastrnn.GRU(I, H), torch.randn(T, B, I)

    def fail():
        raise ArithmeticError

    def attempt():
        with pytest.raises(ArithmeticError):
            y = Pause.apply(module(x)[0], lambda: None)
            (module(Pause.apply(x.clone().requires_grad_(), fail))[0].sum() + y.sum()).backward()

    with GradientMonitor(module) as monitor:
        in_a_thread(attempt)
        assert monitor.report() == [] and not monitor._running
        attempt()
        assert monitor.report() == [] and not monitor._running
        module(x)[0].sum().backward()
    assert monitor.history.steps == [0] and monitor.report()[0].valid.tolist() == [B] * T


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpoints_inside_a_checkpoint(every, reentrant):
    lower, upper, x = fastrnn.LSTM(I, H), fastrnn.GRU(H, H), torch.randn(T, B, I, requires_grad=True)
    model = nn.ModuleList([lower, upper])

    def inner(module, x):
        return checkpoint(lambda x: module(x)[0], x, use_reentrant=reentrant)

    with GradientMonitor(model) as plain:
        upper(lower(x)[0])[0].sum().backward()
    with GradientMonitor(model, every=every) as monitor:
        for _ in range(4):
            y = checkpoint(lambda x: inner(upper, inner(lower, x)), x, use_reentrant=reentrant)
            y.sum().backward()
    assert monitor.history.steps == [0, 1, 2, 3][::every]
    for a, b in zip(monitor.report(), plain.report(), strict=True):
        torch.testing.assert_close(a.total, b.total, rtol=1e-5, atol=0)  # float32, ten roundings
        assert a.valid.tolist() == b.valid.tolist()
