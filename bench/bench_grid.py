"""Plain calls from small to large; see `grid.py`."""

import pytest

from .conftest import bench
from .grid import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_grid(case, session, benchmark):
    """All contestants agree and are timed."""
    bench(case, session, benchmark)
