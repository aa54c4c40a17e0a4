"""csrc's persistent CUDA kernels on a GPU, against the reference and their own bits."""

import pytest
import torch
from cuda_problems import BY_CLUSTER, TOLERANCE, Problem, check, each_alone, exact_problem, extras_of

from fastrnn.backends import cuda, reference
from fastrnn.cell_table import CELLS
from problems import in_one_call, same_bits


@pytest.fixture
def native(monkeypatch, set_precision):
    """A function that runs a problem on the GPU: by the kernels with that FASTRNN_CUDA_MODE, or by the reference."""
    if cuda.MISSING:
        pytest.skip(f"csrc: {cuda.MISSING}")
    set_precision(torch.backends.cudnn.rnn, "tf32")
    set_precision(torch.backends.cuda.matmul, "tf32")

    def run(problem, mode="all"):
        for name, value in vars(problem).items():
            setattr(problem, name, value.cuda() if torch.is_tensor(value) else value)
        backend = reference if mode == "reference" else cuda
        if backend is cuda:
            monkeypatch.setenv("FASTRNN_CUDA_MODE", mode)
        outputs = problem.forward(backend)
        return outputs + problem.backward(backend, *outputs)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("H", [1, 40, 256, 500, 512, 700, 1000])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ways", ["cluster", "grid"])
def test_gpu_equals_the_reference_and_repeats_its_bits(native, ways, cell, dtype, reverse, H):
    if ways == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no thread-block clusters")
    if ways == "cluster" and H > BY_CLUSTER[cell][dtype == torch.float32]:
        pytest.skip("does not fit by cluster")
    for B in (1, 19, 150):
        problem = Problem(cell, dtype, T=4, B=B, H=H, reverse=reverse, extras=extras_of(dtype))
        first = native(problem, ways)
        check(first, native(problem, "reference"), TOLERANCE[dtype])
        assert same_bits(first, native(problem, ways))


@pytest.mark.gpu
@pytest.mark.parametrize("H", [40, 500, 1000])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_gpu_both_directions_in_one_launch_equal_each_alone(native, cell, H):
    directions = [Problem(cell, torch.bfloat16, B=70, H=H, reverse=d, extras=Problem.ALL, seed=d) for d in range(2)]
    if cuda._group_size(cell, in_one_call(directions).w_hh.cuda()) == 0:
        pytest.skip("this GPU does not hold a group of each direction at once")
    want = each_alone(directions, native)
    assert same_bits(native(in_one_call(directions)), want)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [256, 1000])
def test_gpu_sums_are_exact(native, H):
    problem = exact_problem(torch.bfloat16, B=33, H=H)
    assert same_bits(native(problem), native(problem, "reference"))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("H", [256, 700])
def test_gpu_ten_thousand_launches_beside_a_busy_stream(native, H):
    """No hang, no drift: the same bits at the end as at the start, while another stream keeps the multiprocessors."""
    problem = Problem("lstm", torch.bfloat16, T=8, B=64, H=H, extras=("norms",))
    first = native(problem)
    busy, load = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for k in range(5000):  # forward and backward
        if k % 10 == 0:
            with torch.cuda.stream(busy):
                load @ load
        last = native(problem)
    assert same_bits(first, last)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [256, 700])
def test_gpu_graph_replay(native, H):
    problem = Problem("gru", torch.bfloat16, T=16, B=40, H=H, extras=("norms", "clip_norm"))
    want = native(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = native(problem)
    for _ in range(100):
        graph.replay()
    torch.cuda.synchronize()
    assert same_bits(got, want)
