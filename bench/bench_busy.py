"""A training step beside busy processes; see `busy.py`."""

import pytest

from . import busy


@pytest.mark.parametrize("case", busy.CASES, ids=lambda case: case.name)
def test_beside_busy_processes(case, session):
    """fastrnn suffers no more than torch.nn, beyond noise. The goal is 1.5 times the fair share."""
    entries = session.record(case, busy.measure)["contestants"]
    ours, theirs = (entries[name]["slowdown"] for name in ("fastrnn", "torch.nn"))
    assert ours["interval"][0] <= theirs["interval"][1], (ours, theirs)
