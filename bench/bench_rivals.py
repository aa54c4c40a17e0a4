"""fastrnn beside other projects' fused kernels; see `rivals.py`."""

from importlib.util import find_spec

import pytest
import torch

from . import rivals
from .conftest import bench
from .contestants import torch_nn
from .problem import SEED, Problem, results

ADAPTERS = {
    "flashrnn": ("flashrnn", rivals.flashrnn("vanilla")),
    "compiled loop": (None, rivals.compiled_loop("aot_eager")),
}


@pytest.mark.parametrize("case", rivals.CASES, ids=lambda case: case.name)
def test_against_rivals(case, session, benchmark):
    """A rival that fails or is wrong is recorded so; only our own failures fail the test."""
    bench(case, session, benchmark, {row.name for row in rivals.OURS})


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_compute_what_torch_nn_computes(name, cell):
    """On the CPU, with FlashRNN's plain PyTorch backend, which reads the same arguments as its kernels."""
    package, build = ADAPTERS[name]
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if cell == "gru" and package is None:
        pytest.skip("the compiled loop is an LSTM's")
    torch.manual_seed(SEED)
    problem = Problem(rivals.small_case(cell))
    inputs, twin = problem.inputs(), problem.double()
    want = results(twin, torch_nn(twin), inputs)
    got = results(problem, build(problem), inputs)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=0, atol=rivals.SMALL_TOLERANCE, msg=name)
