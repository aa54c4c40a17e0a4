"""Packed batches; see `packed.py`."""

import pytest

from . import packed
from .direct import check


@pytest.mark.parametrize("case", packed.CASES, ids=lambda case: case.name)
def test_packed(case, session):
    """All contestants agree and are timed."""
    check(case, session, packed.SUITE, {"torch.nn", "fastrnn"})
