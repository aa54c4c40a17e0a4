"""fastrnn against torch.nn and against the Python loop, case by case.

`pytest bench --records=FILE` writes the results. pytest-benchmark's own figures are fastrnn's; the record of all
contestants is each benchmark's `extra_info` as well.
"""

import pytest

from .cases import CASES
from .conftest import accept, bench

BOUNDS = [(case, bound) for case in CASES for bound in case.bounds]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_throughput(case, session, benchmark):
    """All contestants agree and are timed."""
    bench(case, session, benchmark)


@pytest.mark.parametrize(("case", "bound"), BOUNDS, ids=lambda value: getattr(value, "contestant", None) or value.name)
def test_acceptance(case, bound, session):
    """The contestant keeps within its bound of torch.nn's time."""
    accept(case, bound, session)
