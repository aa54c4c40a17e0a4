"""The memory of a `GradientMonitor`: the records of the training steps that it observed, evenly thinned."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .diagnosis import Record, Report

ROOM = 256
"""Observed steps that are kept: as many rows as a heat map can show. Each takes 32 bytes per state and time step."""


class Pending(NamedTuple):
    """A report that is made when somebody reads it: to make one takes longer than a short training step."""

    make: Callable[[], Report]
    names: tuple[tuple[str, str], ...]  # name and state of every record


class History:
    """Reports by training step.

    When ROOM is full, every second report is dropped, and from then on only every second step is kept.

    Attributes:
        steps: the training steps (counted from 0) of `reports`.
    """

    def __init__(self):
        self.steps: list[int] = []
        self._reports: list[Report | Pending] = []
        self._seen, self._stride = 0, 1
        self._known: set[tuple[str, str]] = set()  # name and state of every record, also of reports that were dropped

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def reports(self) -> list[Report]:
        """One `Report` per step of `steps`, without findings."""
        self._reports = [report.make() if isinstance(report, Pending) else report for report in self._reports]
        return self._reports

    def append(self, step: int, report: Report | Pending) -> None:
        pending = isinstance(report, Pending)
        self._known.update(report.names if pending else [(record.name, record.state) for record in report])
        if self._seen % self._stride == 0:
            self.steps.append(step)
            self._reports.append(report)
        self._seen += 1
        if len(self.steps) == ROOM:
            self.steps, self._reports, self._stride = self.steps[::2], self._reports[::2], 2 * self._stride

    @property
    def names(self) -> list[str]:
        """The `Record.name` of every layer and direction that occurs."""
        return list(dict.fromkeys(record.name for report in self.reports for record in report))

    def states(self, name: str) -> list[str]:
        """The states of which there are records under a `Record.name`: "h", "c"."""
        return list(dict.fromkeys(r.state for report in self.reports for r in report if r.name == name))

    def _records(self, name: str, state: str) -> list[Record | None]:
        if self._known and (name, state) not in self._known:
            raise ValueError(f"no record of state {state!r} of {name!r}; there are {sorted(self._known)}")
        return [next((r for r in report if (r.name, r.state) == (name, state)), None) for report in self.reports]

    def map(self, name: str, state: str, quantity: str = "total") -> Tensor:
        """`total`, `carried` or `gain` by observed step, float64 `[steps, T]`; NaN beyond a shorter call's end.

        ValueError for a name or state that was never observed.
        """
        rows = [torch.empty(0) if r is None else getattr(r, quantity) for r in self._records(name, state)]
        table = torch.full((len(rows), max(map(len, rows), default=0)), math.nan, dtype=torch.float64)
        for row, values in zip(table, rows, strict=True):
            row[: len(values)] = values
        return table

    def curve(self, name: str, state: str, quantity: str = "gain_median") -> list[float]:
        """One number per observed step, like `gain_median`, `horizon` or `clip_rate`; NaN where there is none.

        ValueError for a name or state that was never observed.
        """
        values = (None if r is None else getattr(r, quantity) for r in self._records(name, state))
        return [math.nan if v is None else float(v) for v in values]

    def as_list(self) -> list[dict]:
        """`Report.as_dict()` of every observed step, with the step under "step"; for `json.dumps`."""
        return [{"step": step, **r.as_dict()} for step, r in zip(self.steps, self.reports, strict=True)]

    def first_nonfinite(self) -> int | None:
        """The first observed training step with an infinite or NaN norm."""
        for step, report in zip(self.steps, self.reports, strict=True):
            if any(r.first_nonfinite is not None for r in report):
                return step
        return None
