"""What only shows over time or beside others: memory over many steps, very long sequences, threads, streams, graphs."""

import copy
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from setups import every_backend, needs_cpu_library

import fastrnn
from fastrnn import GradientMonitor
from fastrnn.dispatch import BACKENDS, Request
from fastrnn.monitoring import history

# --------------------------------------------------------------------------------------------------------------- memory


def all_tensors():
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def live_tensors():
    return len(all_tensors())


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the process's memory from Linux's /proc")
@every_backend
def test_memory_does_not_grow_over_hundreds_of_steps(backend):
    """With all that allocates on the way: monitor, a tap of the caller's, dropouts, lengths, clipping, an optimizer.

    Python sees the tensors that something in Python still holds; the process's size also those that only a graph holds.
    """
    T, B, I, H = 2, 32, 16, 64
    others = all_tensors()  # of tests before this one, held so that none of them goes while these are counted
    torch.manual_seed(0)
    lstm = fastrnn.LSTM(I, H, recurrent_dropout=0.1, zoneout=0.1, clip_state_grad_norm=1.0, backend=backend)
    optimizer = torch.optim.Adam(lstm.parameters(), 1e-3)
    monitor, lengths = GradientMonitor(lstm), torch.arange(B) % (T + 1)
    x = torch.randn(T, B, I)

    def train(steps):
        for step in range(steps):
            tap = torch.zeros(1, 2, 2, T, B, requires_grad=True) if step % 3 else None
            with monitor:
                y, _ = lstm(x, lengths=lengths, tap=tap)
                if step % 10:  # a call now and then that never goes backward
                    optimizer.zero_grad()
                    y.square().mean().backward()
                    optimizer.step()
            if step % 100 == 0:
                monitor.scalars()

    def remembered():
        """Tensors in the monitor's history, whose room is bounded; `live_tensors` would count them."""
        records = [r for report in monitor.history.reports for r in report]
        return sum(isinstance(value, torch.Tensor) for r in records for value in vars(r).values())

    train(150)  # pools and caches fill up, by some 3 MiB
    tensors, size = -remembered() + live_tensors(), resident_bytes()  # first what makes the history's reports
    train(250)
    assert -remembered() + live_tensors() == tensors and len(monitor.history) < history.ROOM
    # One step's pre-activations of the LSTM alone are T * B * 4H * 4 = 64 KiB, so a graph that stays would add 16 MiB.
    # A quarter of that is room for the allocator's own untidiness.
    assert resident_bytes() - size < 4 * 2**20
    del others


# ------------------------------------------------------------------------------------------------------- long sequences


@pytest.mark.slow
@needs_cpu_library
def test_seventy_thousand_steps():
    """More than the 65,535 at which cuDNN fails. Outputs and gradients agree with torch.nn's; the tap, which it lacks,
    with the reference's on the last steps: the network forgets, so what is before them does not matter."""
    T, B, last = 70_000, 1, 500
    torch.manual_seed(0)
    module, theirs = fastrnn.RNN(1, 2, backend="cpu"), torch.nn.RNN(1, 2)
    theirs.load_state_dict(module.state_dict())
    x, tap = torch.randn(T, B, 1), torch.zeros(1, 2, 1, T, B, requires_grad=True)
    found = []
    for network, more in ((theirs, {}), (module, {"tap": tap})):
        y, h = network(x, **more)
        gradients = torch.autograd.grad(y.square().mean() + h.sum(), (*network.parameters(), *more.values()))
        found.append([y.detach(), h.detach(), *gradients])
        assert (y != 0).all()
    norms = found[1].pop()
    for got, want in zip(found[1], found[0], strict=True):
        # The network forgets, so float32 errors of 6e-8 do not pile up; sums over T*B of like terms: 1e-5 of them.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    end = torch.zeros(1, 2, 1, last, B, requires_grad=True)
    with fastrnn.backend("reference"):
        y, h = module(x[-last:], found[0][0][-last - 1][None], tap=end)
    (wanted,) = torch.autograd.grad(y.square().sum() / y[0].numel() / T + h.sum(), (end,))
    assert (norms[:, 0] > 0).all()
    torch.testing.assert_close(norms[..., -last:, :], wanted, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- threads


def work(kind, sizes, backend, steps, barrier):
    """The outputs and gradients of `steps` calls on one backend, of a network of its own."""
    T, B, I, H = sizes
    rng = torch.Generator().manual_seed(T)
    module = getattr(fastrnn, kind)(I, H, 2, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    found = []
    barrier.wait()
    with fastrnn.backend(backend), GradientMonitor(module) as monitor:
        for _ in range(steps):
            x = torch.randn(T, B, I, generator=rng, dtype=torch.float64, requires_grad=True)
            y, _ = module(x, lengths=torch.arange(B) % (T + 1))
            found += [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))]
            found += [r.total for r in monitor.report()]
    return found


@needs_cpu_library
def test_threads_with_their_own_backends_and_sizes_get_their_own_results():
    jobs = [
        ("LSTM", (5, 3, 2, 4), "cpu", 20),
        ("GRU", (9, 2, 3, 7), "reference", 20),
        ("RNN", (3, 8, 1, 5), "cpu", 20),
    ]
    expected = [work(*job, threading.Barrier(1)) for job in jobs]
    barrier = threading.Barrier(len(jobs), timeout=60)
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: work(*job, barrier), jobs))
    for got, want in zip(found, expected, strict=True):
        assert len(got) == len(want) and all(map(torch.equal, got, want))


# ----------------------------------------------------------------------------------------------- streams, graphs, syncs

ON_GPU = {"recurrent_dropout": 0.2, "zoneout": 0.1, "clip_state_grad_value": 1.0}


def on_gpu(kind, backend="triton", **settings):
    reason = BACKENDS[backend].reason(Request(kind.lower(), "cuda", torch.float32, 64))
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")
    torch.manual_seed(0)
    return getattr(fastrnn, kind)(16, 64, backend=backend, device="cuda", **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_two_streams_at_once_give_the_results_of_one(kind, backend):
    modules = [on_gpu(kind, backend), on_gpu(kind, backend, num_layers=2)]
    inputs = [torch.randn(T, 32, 16, device="cuda") for T in (50, 20)]

    def once(module, x):
        y, _ = module(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), list(module.parameters()))]

    expected = [once(*pair) for pair in zip(modules, inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in modules]
    for _ in range(5):
        found = []
        for stream, module, x in zip(streams, modules, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(once(module, x))
        torch.cuda.synchronize()
        for got, want in zip(found, expected, strict=True):
            assert all(map(torch.equal, got, want))


CAPTURED = [("local", {}), ("grouped", {}), ("stepwise", {}), ("gemm", {}), ("gemm", {"layer_norm": True})]


@pytest.fixture
def mode(request, monkeypatch, set_precision):
    """The mode of the Triton scan; grouped takes float32 as TF32 only."""
    monkeypatch.setenv("FASTRNN_TRITON_MODE", request.param)
    set_precision(torch.backends.cudnn.rnn, "tf32")


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "settings"), CAPTURED, indirect=["mode"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_forward_and_backward_in_a_cuda_graph(kind, mode, settings):
    """The whole step is captured, so it nowhere waits for the GPU; replayed on new input it gives what eager gives."""
    # eval: without masks, which a replay draws afresh
    module = on_gpu(kind, bidirectional=True, zoneout=0.1, clip_state_grad_norm=0.5, **settings).eval()
    T, B = 12, 8
    x, lengths = torch.randn(T, B, 16, device="cuda"), torch.arange(B, device="cuda") + 5
    tap = torch.zeros(2, 2, len(module(x)[1]) if kind == "LSTM" else 1, T, B, device="cuda", requires_grad=True)
    leaves = [tap, *module.parameters()]

    def step():
        y, _ = module(x, lengths=lengths, tap=tap)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles the kernels, sets cuBLAS up
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        lengths.copy_(torch.randint(0, T + 1, (B,), device="cuda"))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            # float32; cuBLAS may choose another GEMM while capturing, which sums some 1e2 terms in another order.
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "settings"), CAPTURED, indirect=["mode"])
def test_make_graphed_callables(mode, settings):
    """PyTorch's own capture of a module, forward and backward apart."""
    module = on_gpu("LSTM", **settings)
    x = torch.randn(12, 8, 16, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(module), (torch.randn_like(x, requires_grad=True),))
    for _ in range(2):
        results = []
        for each in (module, graphed):
            y, (h, c) = each(x)
            loss = y.square().sum() + h.sum() + c.sum()
            results.append([y.detach().clone(), *torch.autograd.grad(loss, (x, *each.parameters()))])
        for want, got in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # as above
        x = torch.randn_like(x, requires_grad=True)


@pytest.mark.gpu
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("clip_norm", ["none", "float", "tensor"])
@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_nothing_waits_for_the_gpu(kind, backend, clip_norm, layer_norm):
    """Lengths, resets, masks, clipping, a tap: no value is read back, nothing is copied from pageable memory."""
    bound = {"none": None, "float": 0.5, "tensor": torch.tensor(0.5, device="cuda")}[clip_norm]
    options = {**ON_GPU, "clip_state_grad_norm": bound, "layer_norm": layer_norm}
    module = on_gpu(kind, backend, num_layers=2, bidirectional=True, **options)
    T, B = 12, 8
    x, lengths = torch.randn(T, B, 16, device="cuda"), torch.arange(B, device="cuda")
    reset = torch.rand(T, B, device="cuda") < 0.2
    tap = torch.zeros(4, 2, 2 if kind == "LSTM" else 1, T, B, device="cuda", requires_grad=True)

    def step():
        y, _ = module(x, lengths=lengths, reset_mask=reset, tap=tap)
        y.square().sum().backward()

    step()  # compiles the kernels, loads modules
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tap.grad.isfinite().all()


@pytest.mark.gpu
def test_lengths_beyond_the_range_are_clamped_on_the_gpu():
    module = on_gpu("GRU", "reference")
    x, T = torch.randn(6, 3, 16, device="cuda"), 6
    wrong, right = torch.tensor([-2, 9, 4], device="cuda"), torch.tensor([0, T, 4], device="cuda")
    assert torch.equal(module(x, lengths=wrong)[0], module(x, lengths=right)[0])
