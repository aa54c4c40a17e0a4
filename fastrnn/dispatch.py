"""The choice of a backend for a call: forced by the user, or `auto`, which goes by evidence (`ranking.py`).

A backend forced by argument, by `with fastrnn.backend(name)` or by the environment variable `FASTRNN_BACKEND` raises
its reason instead of giving way to another.
"""

import os
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import aten, ranking, recomputation
from .backend_table import BACKENDS, FEATURES, MODES, Backend, Request, launcher, row, takes_directions
from .backends import cpu
from .cell_table import spec_of
from .linear import MOST_ROWS_IN_PLACE, in_forward_mode

__all__ = [
    "BACKENDS", "FEATURES", "Backend", "Explanation", "Request", "backend", "choose", "chosen_for_plain",
    "chosen_for_step", "explanation", "forced", "launcher", "most_steps_of_torch", "row", "takes_directions",
]  # fmt: skip


class _Forced(threading.local):
    name: str | None = None


_forced = _Forced()

VARIABLE = "FASTRNN_BACKEND"
# os.environ raises and catches an error where a variable is missing, which takes a tenth of a short call.
_VARIABLES, _ENCODED = os.environ._data, os.environ.encodekey(VARIABLE)


def check_name(name: str, source: str) -> str:
    if name not in BACKENDS and name not in MODES:
        raise ValueError(f"{source}: unknown backend {name!r}; known are auto, {', '.join(BACKENDS)}")
    return name


@contextmanager
def backend(name: str):
    """Context manager: within it, every fastrnn call of this thread runs on one backend.

    Args:
        name: of the backend table; "auto" lifts the choice of an outer block.

    Raises:
        ValueError: there is no backend of this name. (A call that the backend cannot run raises RuntimeError with the
            reason.)
    """
    previous, _forced.name = _forced.name, None if name == "auto" else check_name(name, "fastrnn.backend")
    try:
        yield
    finally:
        _forced.name = previous


def forced(argument: str | None) -> str | None:
    """The name of the backend that the argument, the context or the environment forces, in this order, or None."""
    by_block = _forced.name
    if (by_block is not None or recomputation.some) and not torch.compiler.is_compiling():
        by_block, _ = recomputation.held("backend", by_block, None)
    name = argument or by_block or (os.environ.get(VARIABLE) if _ENCODED in _VARIABLES else None)
    if not name or name == "auto":
        return None
    source = "backend" if argument else "fastrnn.backend" if by_block else VARIABLE
    return check_name(name, source)


def most_steps_of_torch(cell, proj_size, gradients, dtype, device, hidden_size, batch) -> int:
    """The most steps T with which `choose` leaves a plain call to torch.

    0 where a backend is forced or a tapped call is recomputed, very many where torch always runs the call.
    """
    if forced(None) is not None or cell not in aten.KNOWN_CELLS:
        return 0
    if recomputation.some and recomputation.held("tapped", False, False)[0]:
        return 0
    return ranking.first_steps(cell, proj_size, gradients, dtype, device, hidden_size, batch) - 1


def chosen_for_plain(
    argument, cell, gradients, dtype, hidden_size, proj_size, steps, batch, packed, features=frozenset()
) -> str | None:
    """The backend that `choose` takes for a call on a CPU; None where a tapped call is recomputed.

    `packed`: of a PackedSequence 1 if its sequences are of one length, else 0; None of other input. `features`: out of
    FEATURES, but for "projection".
    """
    if recomputation.some and recomputation.held("tapped", False, False)[0]:
        return None
    name = forced(argument)
    if name is not None:
        return name
    return ranking.first_for_plain(cell, gradients, dtype, hidden_size, proj_size, steps, batch, packed, features)


def chosen_for_step(argument: str | None, cell, dtype, hidden_size, proj_size, batch: int) -> str | None:
    """The backend of `step`; None where the choice is left to the module's call."""
    name = forced(argument)
    if name is not None:
        return name
    usable = batch <= MOST_ROWS_IN_PLACE and not ranking.is_broken_for_step(cell, dtype, hidden_size, proj_size, batch)
    return "cpu" if usable else None


def _chosen(request: Request, argument: str | None) -> str:
    name = forced(argument)
    if name is not None:
        reason = row(name).reason(request)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
        return name
    names = ranking.order(request)
    if in_forward_mode():  # which torch's kernels know, and the loop in torch's operations
        names = [name for name in names if name in ("aten", "reference")]
    for name in names:
        if row(name).reason(request) is None:
            return name
    reasons = "; ".join(f"{name}: {row(name).reason(request)}" for name in names)
    raise RuntimeError(f"no backend can run this call: {reasons}")


TRUSTED = ("aten", "cpu", "reference")
"""The backends that are not on trial anywhere that they can run."""


def choose(request: Request, argument: str | None = None) -> str:
    """The name of the backend that runs `request`; `argument` is the name that the user gave, if any.

    Warns where nothing was asked for, once per device type when it falls back to the slow loop of `reference`, and once
    when a call runs on torch's slow kernels because the C++ library is missing.

    Raises:
        ValueError: the name of a forced backend is unknown.
        RuntimeError: a forced backend cannot run the call, or none can (complex numbers, in more than a plain call).
    """
    name = _chosen(request, argument)
    if name not in TRUSTED and not torch.compiler.is_compiling() and not row(name).takes(request.device):
        ranking.count_use(request, name)
    if name in ("reference", "aten") and request.device != "meta" and forced(argument) is None:
        if name == "aten" and cpu.MISSING is not None and ranking.order(request)[0] == "cpu":
            _warn_of_torch(request)
        if name == "reference" and request.steps > 1 and request.dtype != torch.float64 and not in_forward_mode():
            _warn_of_loop(request)
    return name


def after_failure(request: Request, argument: str | None, name: str, error: Exception) -> str:
    """The backend to fall back to after a kernel that only this machine's evidence trusts failed in its first use.

    Raises the error where that is not so: where the backend was asked for or ran before, or where memory ran out.
    """
    asked = forced(argument) is not None or row(name).takes(request.device)
    if asked or isinstance(error, torch.OutOfMemoryError) or not ranking.mark_failure(request, name, error):
        raise error
    other = _chosen(request, argument)
    warnings.warn(
        f"the first call on backend {name!r} failed, and runs on {other!r} now: {type(error).__name__}: {error}. "
        "`python -m fastrnn tune --forget` lets it be tried again",
        stacklevel=3,
    )
    return other


_warned: set[str] = set()
"""What has been warned of: a device type for the loop of `reference`, "aten" for torch's slow kernels."""


def _warn_of_torch(request: Request) -> None:
    if "aten" in _warned:
        return
    _warned.add("aten")
    warnings.warn(
        f"this {request.cell} runs on torch's kernels, step by step; fastrnn has a faster one, but {cpu.MISSING}. "
        "backend='aten' asks for torch's, and is silent",
        stacklevel=2,
    )


def _warn_of_loop(request: Request) -> None:
    if request.device in _warned:
        return
    _warned.add(request.device)
    others = [
        f"{one.row.name}: {one.row.reason(request) or _evidence(one)}"
        for one in ranking.ranked(request)
        if one.row.launcher
        and one.row.name != "reference"
        and (one.row.takes(request.device) or one.row.reason(request) is None)
    ]
    warnings.warn(
        f"this call runs as a Python loop over its steps (backend 'reference'); {'; '.join(others) or 'no other can'}. "
        "fastrnn.explain(module, input) says more; backend='reference' asks for the loop, and is silent",
        stacklevel=2,
    )


@dataclass(frozen=True)
class Explanation:
    """The result of `fastrnn.explain`; prints as a table."""

    request: Request
    chosen: str
    rows: tuple[tuple[str, str, str], ...]  # backend; "yes" or why it cannot; its rank and the evidence for that

    def __str__(self) -> str:
        features = ", ".join(sorted(self.request.features)) or "plain"
        cell, request = spec_of(self.request.cell).name, self.request
        head = f"{cell}, {request.device}, {request.dtype}, {features}: runs on {self.chosen}"
        table = [("backend", "can it run this?", "in auto"), *self.rows]
        widths = [max(len(row[k]) for row in table) for k in range(3)]
        lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in table)
        return "\n".join([head, *lines])


def _evidence(place: ranking.Place) -> str:
    return place.row.about if place.finding is None else place.finding.words


def explanation(request: Request, argument: str | None = None) -> Explanation:
    chosen = _chosen(request, argument)
    rows = []
    rank = 0
    for place in ranking.ranked(request):
        reason = place.row.reason(request)
        taken = place.trusted and reason is None
        rank += taken
        rows.append((place.row.name, reason or "yes", f"{rank if taken else 'no'}: {_evidence(place)}"))
    return Explanation(request, chosen, tuple(rows))
