"""One step of a stream; see `streams.py`."""

import pytest

from . import streams
from .conftest import accept
from .direct import check


@pytest.mark.parametrize("case", streams.CASES, ids=lambda case: case.name)
def test_step(case, session):
    """All contestants agree and are timed."""
    check(case, session, streams.SUITE, {"torch.nn", "fastrnn"})


@pytest.mark.parametrize("case", [case for case in streams.CASES if case.bounds], ids=lambda case: case.name)
def test_acceptance(case, session):
    check(case, session, streams.SUITE, {"torch.nn", "fastrnn"})  # measures it, where no other test has
    for bound in case.bounds:
        accept(case, bound, session)
