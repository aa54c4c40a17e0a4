"""What each feature that torch.nn lacks gains: fastrnn against the Python loop, one case per feature."""

import pytest

from .cases import DEVICE
from .conftest import bench
from .feature_cases import CASES, OVERHEAD


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_feature(case, session, benchmark):
    """All contestants agree and are timed. The gain is reported and not bounded."""
    bench(case, session, benchmark)


@pytest.mark.skipif(DEVICE == "cpu", reason="a bound for GPUs: on a CPU the overhead is only recorded")
@pytest.mark.parametrize("case", [case for case in CASES if case.feature.overhead], ids=lambda case: case.name)
def test_overhead(case, session):
    """A feature costs next to nothing on its backend: it fails where even the lower end of the interval lies above the
    bound."""
    entries = session.record(case)["contestants"]
    found = {name: entry["overhead"] for name, entry in entries.items() if "overhead" in entry}
    if not found:
        pytest.skip("no backend of its own ran the plain call")
    high = {name: cost["median"] for name, cost in found.items() if cost["interval"][0] > OVERHEAD}
    assert not high, f"{case.name}: against the plain call {high}, allowed {OVERHEAD}"
