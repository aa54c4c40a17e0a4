"""fastrnn against torch.nn and against the Python loop, case by case.

`pytest bench --records=FILE` writes the results. pytest-benchmark's own figures are fastrnn's; the record of all
contestants is each benchmark's `extra_info` as well.
"""

import pytest

from .cases import CASES
from .conftest import bench

BOUNDS = [(case, bound) for case in CASES for bound in case.bounds]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_throughput(case, session, benchmark):
    """All contestants agree and are timed."""
    bench(case, session, benchmark)


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
    median, (low, high) = entry["ratio"].values()
    assert low <= bound.ratio, (
        f"{case.name}: {bound.contestant} takes {median:.3f} ({low:.3f} to {high:.3f}) of torch.nn's time, "
        f"allowed {bound.ratio}"
    )
