"""Eight heads against a dense W_hh; see `heads.py`."""

import pytest

from .conftest import accept, bench
from .heads import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_heads(case, session, benchmark):
    """Both agree and are timed."""
    bench(case, session, benchmark, {"dense", "heads"})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_acceptance(case, session):
    """Eight heads at H = 512 are at least 2.5 times as fast as dense."""
    for bound in case.bounds:
        accept(case, bound, session)
