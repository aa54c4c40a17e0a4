"""The suites, as data: which contestants are timed on which cases, against what, and how long."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import busy, cases, contestants, feature_cases, grid, heads, memory, own_cells, packed, rivals, short, streams
from .contestants import LOOPS, Contestant
from .problem import Model, Problem


@dataclass(frozen=True)
class Suite:
    """A row.

    Attributes:
        contestants: case -> rows.
        truth: computes the case with its features; in float64 it is what the results are compared with.
        against: the contestants whose fastest is what the others' time is relative to.
        figure: the name of the figure: "ratio", the time over that of `against`; or "speed_up", the inverse.
        session_seconds: of wall time, after which no further case starts.
        case_seconds: of the timing within one case; checks and compilation come on top.
        warmup: seconds per contestant.
        longest: a case on a GPU that takes more seconds in all is given up, because something in it hangs.
        rounding: factors on the floor of the 2x rule, by dtype.
    """

    cases: list
    contestants: Callable[..., tuple[Contestant, ...]]
    truth: Callable[[Problem], Model]
    against: tuple[str, ...]
    figure: str
    session_seconds: float
    case_seconds: float
    warmup: float = 0.2
    longest: float = 90.0
    rounding: dict[torch.dtype, float] = field(default_factory=dict)


_gpu = cases.DEVICE == "cuda"

# All suites must end within some ten minutes on two CPU cores.
SUITES = {
    "throughput": Suite(
        cases.CASES, lambda case: contestants.THROUGHPUT, contestants.reference, ("torch.nn",), "ratio",
        session_seconds=390.0 if _gpu else 170.0, case_seconds=2.5 if _gpu else 5.0,
    ),
    # The truth is the loop, which shares no code with fastrnn. In float32 the gradient of a bias is one sum over T*B in
    # torch.nn and in fastrnn and T small sums in the loop, which err less: seen at 8 eps against 1.4.
    "features": Suite(
        feature_cases.CASES, contestants.features, contestants.loop("ops"), LOOPS, "speed_up",
        session_seconds=240.0 if _gpu else 70.0, case_seconds=2.0 if _gpu else 1.0, warmup=0.1 if _gpu else 0.0,
        rounding={torch.float32: 4.0},
    ),
    "cells": Suite(
        own_cells.CASES, lambda case: own_cells.CONTESTANTS, contestants.reference, (own_cells.BUILT_IN,), "ratio",
        session_seconds=120.0, case_seconds=5.0,
    ),
    "heads": Suite(
        heads.CASES, lambda case: heads.CONTESTANTS, heads.reference, (heads.DENSE,), "ratio", session_seconds=60.0,
        case_seconds=10.0,
    ),
    "grid": Suite(
        grid.CASES, lambda case: short.CONTESTANTS, contestants.reference, ("torch.nn",), "ratio",
        session_seconds=180.0, case_seconds=3.0,
    ),
    "short": Suite(
        short.CASES, lambda case: short.CONTESTANTS, contestants.reference, ("torch.nn",), "ratio",
        session_seconds=60.0, case_seconds=0.5, warmup=0.05,
    ),
    "streams": streams.SUITE,
    "packed": packed.SUITE,
    "memory": memory.SUITE,
    "busy": busy.SUITE,
    # FlashRNN runs nvcc several times per shape where `warm.py` has not done it: hence the long limit.
    "rivals": Suite(
        rivals.CASES, lambda case: rivals.CONTESTANTS, contestants.reference, ("torch.nn",), "ratio",
        session_seconds=300.0, case_seconds=2.5 if _gpu else 5.0, longest=240.0,
    ),
}  # fmt: skip
