"""The benchmark of the monitor's cost: which steps are observed, and the arithmetic."""

import sys
from pathlib import Path

import pytest

import fastrnn

sys.path.append(str(Path(__file__).parents[1]))  # bench/ is not installed

from bench import files, monitor_cost

MILLISECONDS = ("plain ms", "observed ms", "left out ms more")
TINY = {"cell": "GRU", "T": 3, "B": 2, "H": 4, "layers": 1}


def test_every_kind_is_what_it_says(monkeypatch):
    made = []

    class Counted(fastrnn.GradientMonitor):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(fastrnn, "GradientMonitor", Counted)
    found = monitor_cost.times(TINY, 3, monitor_cost.KINDS)
    assert {kind: len(seconds) for kind, seconds in found.items()} == dict.fromkeys(monitor_cost.KINDS, 3)
    left_out, *others = made
    assert len(left_out.history) == 1 and not left_out.observing
    assert sum(len(monitor.history) for monitor in others) == 3 + monitor_cost.WARM_UP


def test_the_arithmetic():
    assert monitor_cost.lowest_tenth([5.0, 1.0, *[9.0] * 18]) == pytest.approx(3.0)
    # 49 steps of 10.1 and one of 15 in place of 50 of 10
    assert monitor_cost.cost(10.0, 15.0, 10.1 - 10.0) == pytest.approx((49 * 10.1 + 15) / 500 - 1)


def test_a_row_and_the_committed_file():
    rows = files.read(monitor_cost.RESULTS)["runs"]
    assert [row["case"] for row in rows] == list(monitor_cost.CASES)
    for row in rows:
        assert row["cost"] == pytest.approx(monitor_cost.cost(*(row[k] for k in MILLISECONDS)), abs=2e-4)
