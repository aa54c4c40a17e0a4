"""fastrnn against torch.nn and against the Python loop, case by case.

`pytest bench --benchmark-json=FILE`. pytest-benchmark's own figures are fastrnn's; the interleaved samples of all
contestants, their ratios to torch.nn and to the limit stand in each benchmark's `extra_info`.
"""

import pytest
import torch

from .cases import CASES, DEVICE
from .contestants import CONTESTANTS
from .measure import call, precision, random_inputs, yardstick_module

ROUNDS = 5  # of pytest-benchmark's own timing, which is not interleaved and decides nothing
BOUNDS = [(case, bound) for case in CASES for bound in case.bounds]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_throughput(case, session, benchmark):
    """All contestants agree; their interleaved times go into the JSON."""
    record = session.record(case)
    benchmark.extra_info.update(record)
    benchmark.group = case.name
    failed = {name: entry["failed"] for name, entry in record["contestants"].items() if "failed" in entry}
    if "fastrnn" not in failed:
        with precision(case.tf32):
            benchmark.pedantic(_fastrnn(case), rounds=ROUNDS, warmup_rounds=1)
    assert not failed, "\n".join(f"{case.name}: {name}: {why}" for name, why in failed.items())


def _fastrnn(case):
    """A call of fastrnn on the backend that it chooses, waited for."""
    row = next(row for row in CONTESTANTS if row.name == "fastrnn")
    model, inputs = row.model(case, yardstick_module(case, DEVICE)), random_inputs(case)

    def run():
        call(case, model, inputs, 1)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize(("case", "bound"), BOUNDS, ids=lambda value: getattr(value, "contestant", None) or value.name)
def test_acceptance(case, bound, session):
    """The contestant keeps within its bound of torch.nn's time: it fails where even the lower end of the 95 % interval
    of the median ratio lies above the bound, so that noise alone does not fail it."""
    entries = session.record(case)["contestants"]
    entry = entries[bound.contestant]
    entry = entries[entry.get("same_as") or bound.contestant]
    if "cannot" in entry:
        pytest.skip(f"{bound.contestant} cannot run {case.name}: {entry['cannot']}")
    assert "failed" not in entry, entry["failed"]
    low, high = entry["interval"]
    assert low <= bound.ratio, (
        f"{case.name}: {bound.contestant} takes {entry['ratio']:.3f} ({low:.3f} to {high:.3f}) of torch.nn's time, "
        f"allowed {bound.ratio}"
    )
