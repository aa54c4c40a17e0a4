"""Short calls, in which what surrounds the arithmetic counts as much as it does; see `short.py`."""

import pytest

from .conftest import bench
from .short import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_short(case, session, benchmark):
    """All contestants agree and are timed."""
    bench(case, session, benchmark)
