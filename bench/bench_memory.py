"""Peak memory of a training step on a CPU; see `memory.py`."""

import pytest

from . import memory


@pytest.mark.parametrize("case", memory.CASES, ids=lambda case: case.name)
def test_peak_memory(case, session):
    """Both are measured. The bound leaves room for noise: the memory allocator keeps some pages."""
    entries = session.record(case, memory.measure)["contestants"]
    failed = {name: entry["failed"] for name, entry in entries.items() if "failed" in entry}
    assert not failed, failed
    peaks = {name: entry["peak_bytes"] for name, entry in entries.items()}
    assert peaks["fastrnn"] <= 1.15 * peaks["torch.nn"], peaks
