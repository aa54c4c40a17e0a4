"""The backend table: which backends can run a call, which one should, and why not the others.

`why_not(request)` of a backend says only whether it **can** run the call. `choose` takes the first that can, in the
order of the table. A backend forced by argument, by `with fastrnn.backend(name)` or by the environment variable
`FASTRNN_BACKEND` raises its reason instead of giving way to another.
"""

import math
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from . import aten, recomputation
from .arguments import ScanInputs, Walk
from .backends import cpu, cuda, reference, triton
from .cell_table import spec_of


class Request(NamedTuple):
    """The properties of a call that decide which backends can run it, and which one should."""

    cell: str  # a name of the cell table, or the text of a user's cell
    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype
    hidden_size: int
    proj_size: int = 0
    features: frozenset[str] = frozenset()  # out of FEATURES: what goes beyond torch.nn's plain call
    steps: int = 0  # T; 0 where it is not known (tracing)
    batch: int = 0  # B, likewise
    packed: float | None = None  # of a PackedSequence, the share of T*B that is no padding; None of other input
    gradients: bool = False  # whether a backward may follow
    subclass: bool = False  # whether a tensor's class overrides torch's functions; it knows torch's own, not the scan


FEATURES = (
    "tap", "clip", "lengths", "resets", "return_cells", "return_layers", "layer_norm", "projection",
    "zoneout", "recurrent_dropout", "locked_dropout", "residual",
    "eval_gradient",  # a backward in eval mode on a GPU, which cuDNN refuses
    "autocast_lstm",  # an LSTM that autocast makes half on a CPU whose oneDNN has no half LSTM
    "tracing",  # under torch.compile, torch.export or a torch.func transform
)  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    `auto` names the device types on which `choose` may take this backend without being asked (None: all); `measured`
    names the evidence for that. `directions`: one call of its scan can run both directions of a layer, side by side.
    """

    name: str
    auto: tuple[str, ...] | None
    measured: str
    why_not: Callable[[Request], str | None]
    launcher: ModuleType | None = None  # has forward and backward; aten takes whole calls instead
    directions: bool = False

    def takes(self, device: str) -> bool:
        return self.auto is None or device in self.auto

    def reason(self, request: Request) -> str | None:
        return self.why_not(request)


# In the order in which `choose` takes them, unless `ranked` has evidence for another.
BACKENDS: dict[str, Backend] = {
    row.name: row
    for row in (
        Backend("aten", None, "torch's own kernels, the yardstick", aten.why_not),
        Backend("triton", (), "never run on a GPU yet, so only when asked for", triton.why_not, triton, True),
        Backend("cuda", (), "never run on a GPU yet, so only when asked for", cuda.why_not, cuda, True),
        Backend(
            "cpu",
            ("cpu",),
            "bench/results: beats reference; torch, by `CPU_FIRST`",
            cpu.why_not,
            cpu,
        ),
        Backend("reference", None, "runs everything", reference.why_not, reference),
    )
}


CPU_FIRST = {  # (packed, gradients)
    (False, False): {"lstm": 16, "gru": 16, "rnn_tanh": 32, "rnn_relu": 32},
    (False, True): {"lstm": 8, "gru": 8, "rnn_tanh": 16, "rnn_relu": 16},
    (True, False): {"lstm": 32, "gru": 32, "rnn_tanh": 128, "rnn_relu": 128},
    (True, True): {"lstm": 16, "gru": 16, "rnn_tanh": 32, "rnn_relu": 32},
}
"""The number of steps T from which the C++ scan takes less time than torch, where torch runs a cell step by step on a
CPU, for float32 input (bench/results/auto-cpu.json). In shorter calls the overhead of a call decides, and torch has
less of it."""
MOST_ELEMENTS = {(False, False): 1 << 15, (False, True): 1 << 14, (True, False): 1 << 13, (True, True): 1 << 14}
"""The largest B*H for which that holds."""
WIDE_STEP = 512
"""The H from which the reference is faster than the C++ scan in a single step of one float32 sequence, in calls that
torch.nn cannot run: its products share a row among all threads (bench/results/auto-cpu.json, where no other dtype and
no projection was measured)."""


def _cpu_first(request: Request) -> bool:
    kind = (request.packed is not None, request.gradients)
    fewest = CPU_FIRST[kind].get(request.cell)
    if request.device != "cpu" or request.dtype != torch.float32 or fewest is None or request.subclass:
        return False
    # oneDNN runs all steps of an LSTM in one call, if it has no projection and all sequences have one length.
    at_once = request.cell == "lstm" and not request.proj_size and request.packed in (None, 1)
    few_elements = request.batch * request.hidden_size <= MOST_ELEMENTS[kind]
    return request.steps >= fewest and few_elements and not at_once


def _wide_step(request: Request) -> bool:
    measured = request.dtype == torch.float32 and not request.proj_size
    return measured and request.steps * request.batch == 1 and request.hidden_size >= WIDE_STEP


def most_steps_of_torch(cell: str, proj_size: int, gradients: bool) -> float:
    """The most steps T with which `choose` leaves a plain call to torch, whatever its other sizes.

    0 where a backend is forced or a tapped call is recomputed, infinite where torch always runs the call.
    """
    if forced(None) is not None or cell not in aten.KNOWN_CELLS:
        return 0
    if recomputation.some and recomputation.held("tapped", False, False)[0]:
        return 0
    if cell == "lstm" and not proj_size:
        return math.inf
    return CPU_FIRST[False, gradients][cell] - 1


def ranked(request: Request) -> list[Backend]:
    """The table in the order in which `choose` takes its rows for this call."""
    rows = list(BACKENDS.values())
    if _cpu_first(request):
        rows.sort(key=lambda row: row.name != "cpu")
    elif _wide_step(request):
        rows.sort(key=lambda row: row.name == "cpu")
    return rows


def launcher(name: str) -> ModuleType:
    """The module that runs a backend's scan: it has `forward` and `backward`."""
    return BACKENDS[name].launcher


def takes_directions(name: str, inputs: ScanInputs, walk: Walk) -> bool:
    """Whether one launch of a backend takes both directions of these inputs."""
    row = BACKENDS[name]
    return row.directions and row.launcher.takes_directions(inputs, walk)


class _Forced(threading.local):
    name: str | None = None


_forced = _Forced()


def check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
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
    name = argument or by_block or os.environ.get("FASTRNN_BACKEND")
    if not name or name == "auto":
        return None
    source = "backend" if argument else "fastrnn.backend" if by_block else "FASTRNN_BACKEND"
    return check_name(name, source)


def _chosen(request: Request, argument: str | None) -> str:
    name = forced(argument)
    if name is not None:
        reason = BACKENDS[name].reason(request)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
        return name
    rows = [row for row in ranked(request) if row.takes(request.device)]
    name = next((row.name for row in rows if row.reason(request) is None), None)
    if name is None:
        reasons = "; ".join(f"{row.name}: {row.reason(request)}" for row in rows)
        raise RuntimeError(f"no backend can run this call: {reasons}")
    return name


def choose(request: Request, argument: str | None = None) -> str:
    """The name of the backend that runs `request`; `argument` is the name that the user gave, if any.

    Warns where nothing was asked for, once per device type when it falls back to the slow loop of `reference`, and once
    when a call runs on torch's slow kernels because the C++ library is missing.

    Raises:
        ValueError: the name of a forced backend is unknown.
        RuntimeError: a forced backend cannot run the call, or none can (complex numbers, in more than a plain call).
    """
    name = _chosen(request, argument)
    if name in ("reference", "aten") and request.device != "meta" and forced(argument) is None:
        if name == "aten" and _cpu_first(request) and cpu.MISSING is not None:
            _warn_of_torch(request)
        if name == "reference" and request.steps > 1 and request.dtype != torch.float64:
            _warn_of_loop(request)
    return name


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
        f"{row.name}: {row.reason(request) or row.measured}"
        for row in BACKENDS.values()
        if row.launcher and row.name != "reference" and (row.takes(request.device) or row.reason(request) is None)
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


def explanation(request: Request, argument: str | None = None) -> Explanation:
    chosen = _chosen(request, argument)
    rows = []
    for rank, row in enumerate(ranked(request), 1):
        place = f"{rank}: {row.measured}" if row.takes(request.device) else f"no: {row.measured}"
        rows.append((row.name, row.reason(request) or "yes", place))
    return Explanation(request, chosen, tuple(rows))
