"""fastrnn beside other people's fused kernels; see `rivals.py`."""

from importlib.util import find_spec

import pytest
import torch

from . import measure, rivals
from .cases import DEVICE
from .contestants import yardstick_module

OURS = {row.name for row in rivals.OURS}
ADAPTERS = {
    "flashrnn": ("flashrnn", rivals.flashrnn("vanilla")),
    "compiled loop": (None, rivals.compiled_loop("aot_eager")),
}


def measure_with_rivals(case, broken) -> dict:
    return measure.measure(case, broken, rivals.CONTESTANTS_OF_RIVAL_CASES) | {"suite": "rivals"}


@pytest.mark.parametrize("case", rivals.RIVAL_CASES, ids=lambda case: case.name)
def test_against_rivals(case, session, benchmark):
    """A rival that fails or is wrong is recorded so; only our own failures fail the test."""
    record = session.record(case, measure_with_rivals, rivals.SESSION_SECONDS, rivals.LONGEST_CASE)
    benchmark.extra_info.update(record)
    benchmark.group = f"rivals-{case.name}"
    failed = {name: e["failed"] for name, e in record["contestants"].items() if name in OURS and "failed" in e}
    assert not failed, "\n".join(f"{case.name}: {name}: {why}" for name, why in failed.items())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_compute_what_torch_nn_computes(name, cell):
    """On the CPU, with FlashRNN's plain PyTorch backend, which reads the same arguments as its kernels."""
    package, build = ADAPTERS[name]
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if cell == "gru" and package is None:
        pytest.skip("the compiled loop is an LSTM's")
    case = rivals.small_case(cell)
    torch.manual_seed(measure.SEED)
    module = yardstick_module(case, DEVICE)
    inputs = measure.random_inputs(case)
    want = measure.truth(case, module, inputs, frozenset())
    got = measure.results(case, build(case, module), module, inputs)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=0, atol=rivals.SMALL_TOLERANCE, msg=name)
