"""A user's cell against the built-in cell and against the loops that it replaces; see `own_cells.py`."""

import pytest

from .conftest import accept, bench
from .own_cells import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_own_cell(case, session, benchmark):
    """All contestants agree and are timed."""
    bench(case, session, benchmark, {"fastrnn:cpu", "own cell"})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_acceptance(case, session):
    """The text of a cell costs little beside equations that were compiled."""
    for bound in case.bounds:
        accept(case, bound, session)


@pytest.mark.parametrize(("loop", "times"), [("loop", 3.0), ("compiled loop", 1.2)], ids=lambda value: str(value))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed_up_over_loops(case, loop, times, session):
    """At least three times as fast as the loop, and 1.2 times as that loop under torch.compile; its compilation is not
    counted. The ends of the two intervals, so that noise alone does not fail it."""
    entries = session.record(case)["contestants"]
    for name in ("own cell", loop):
        assert "ratio" in entries[name], entries[name]
    slowest, fastest = entries[loop]["ratio"]["interval"][1], entries["own cell"]["ratio"]["interval"][0]
    assert slowest >= times * fastest, f"{case.name}: {slowest / fastest:.2f} times as fast as the {loop}"
