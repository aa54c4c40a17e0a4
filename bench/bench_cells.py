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
