"""What a picture shows of a long sequence: the steps whose norms are on the axis, and few enough points."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_COLUMNS = 1000
"""A longer sequence is drawn in blocks of steps: of each the smallest and the largest norm; in a heat map the largest.
A panel has fewer pixels than this."""
ZOOM = 0.25
"""Where the norms that can be shown take less than this part of the sequence, only that part is drawn."""
MAX_DECADES = 30
"""Norms that are more powers of ten below the largest in the picture are left out. float32 reaches down to 1e-38."""


class StepsShown(NamedTuple):
    """The part of a sequence of T steps that is drawn: from `first` to before `end`."""

    first: int
    end: int
    T: int

    @property
    def is_zoomed(self) -> bool:
        return self.end - self.first < self.T


def steps_shown(records) -> StepsShown:
    """All steps; or those whose norm is on the axis (see `plots._log_scale`), where they are a small part."""
    T = max((len(r.total) for r in records), default=1)
    norms = torch.zeros(T, dtype=torch.float64)
    for r in records:
        for values in (r.total, r.carried):
            values = values.nan_to_num(0, 0, 0)
            norms[: len(values)] = torch.maximum(norms[: len(values)], values)
    steps = ((norms > 0) & (norms >= norms.max() * 10.0**-MAX_DECADES)).nonzero().flatten()
    if len(steps) == 0 or int(steps[-1] - steps[0]) + 1 >= ZOOM * T or T <= MAX_COLUMNS // 10:
        return StepsShown(0, T, T)
    return StepsShown(int(steps[0]), int(steps[-1]) + 1, T)


def limit_steps(axes, shown: StepsShown) -> None:
    if shown.is_zoomed:
        margin = 0.03 * (shown.end - shown.first)
        axes.set_xlim(shown.first - margin, shown.end - 1 + margin)


def steps_label(shown: StepsShown) -> str:
    if not shown.is_zoomed:
        return "time step t"
    if shown.end == shown.T:
        return f"time step t, the last {shown.end - shown.first} of {shown.T}"
    return f"time step t, {shown.first} to {shown.end - 1} of {shown.T}"


def thinned(values: Tensor, shown: StepsShown) -> tuple[list[float], list[float]]:
    """The steps and values of a line; of a long one, the smallest and the largest value of each block of steps."""
    part = values[shown.first : shown.end]
    width = math.ceil(2 * len(part) / MAX_COLUMNS)
    if width <= 2:
        return [float(shown.first + t) for t in range(len(part))], part.tolist()
    blocks = F.pad(part, (0, -len(part) % width), value=math.nan).unflatten(0, (-1, width))
    known = ~blocks.isnan()
    low = blocks.nan_to_num(math.inf, math.inf, -math.inf).masked_fill(~known, math.inf).amin(1)
    high = blocks.masked_fill(~known, -math.inf).amax(1)
    ends = torch.stack((low, high), 1).masked_fill(~known.any(1, keepdim=True), math.nan)
    steps = [shown.first + (block + part_of) * width for block in range(len(ends)) for part_of in (0.25, 0.75)]
    return steps, ends.flatten().tolist()
