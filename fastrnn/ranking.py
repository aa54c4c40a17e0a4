"""The order in which `auto` takes the backends, by evidence (`evidence/`).

Measured here, measured elsewhere, verified here: the stronger goes first. Where nothing is known the order of the table
holds, and a backend that the table does not trust on a device is left out. So on a GPU, before a call would run as a
Python loop, the Triton scan is compared with the reference, once per kernel and bucket (`verification.py`).
"""

import os
from typing import NamedTuple

import torch

from . import aten, evidence
from .backend_table import BACKENDS, MODES, Backend, Request, row
from .backends import sequence
from .backends.triton_mode import tiles_of
from .evidence import records, verification
from .evidence.records import Entry, Key

FIRST_USE = ("cuda", "xpu")
"""The device types on which a kernel is compared with the reference before its first use."""


def _state(device: str):
    """What decides beside a call on a device: the threads; on a GPU, how float32 is multiplied."""
    return torch.get_num_threads() if device == "cpu" else sequence.precision()


def _checks(request: Request) -> dict[str, tuple[Key, int]]:
    """The checks that `triton` needs for this call: by kernel the bucket, and a batch size that takes the kernel."""
    try:
        kernels = tiles_of(request)
    except ValueError:  # no tile takes it
        return {}
    return {kernel: (evidence.key_of_check(request, kernel), batch) for kernel, batch in kernels.items()}


def _first_use(request: Request) -> None:
    verification.first_use(request, "triton", row("triton").launcher, _checks(request))


def _finding(request: Request, name: str, book: evidence.Book) -> evidence.Finding | None:
    """What is known of a backend for this call."""
    finding = book.find(evidence.key_of(request), name)
    if finding is not None and finding.shipped is not None and not row(name).takes(request.device):
        finding = None  # that it is fast elsewhere does not say that it is right here
    if finding is not None or name != "triton" or request.device not in FIRST_USE or not _tuning_is_on():
        return finding
    if row(name).reason(request) is not None:
        return None
    found = [book.find(key, name) for key, _ in _checks(request).values()]
    broken = [one for one in found if one is not None and one.entry.verdict == "broken"]
    return broken[0] if broken else found[0] if found and None not in found else None


def _tuning_is_on() -> bool:
    return os.environ.get("FASTRNN_TUNE") != "0"


class Place(NamedTuple):
    """A backend in the order for a call."""

    row: Backend
    trusted: bool  # whether `choose` may take it
    finding: evidence.Finding | None


def ranked(request: Request) -> list[Place]:
    """The table in the order in which `choose` takes its rows for this call; those that it does not take come last."""
    book = evidence.book(request.device, torch.get_num_threads())
    # A plain call with tensors of a subclass, in forward mode or while it is traced, is torch's.
    torchs = request.subclass or (request.steps == 0 and request.features <= evidence.PLAIN)
    places = []
    for k, candidate in enumerate((*BACKENDS.values(), *MODES.values())):
        finding = None if torchs else _finding(request, candidate.name, book)
        if finding is None and candidate.name in MODES:
            continue
        verdict = None if finding is None else finding.entry.verdict
        trusted = candidate.takes(request.device) if verdict in (None, "verified") else verdict == "measured"
        trusted = trusted or verdict == "verified" or candidate.name == "reference"
        time = finding.time if verdict == "measured" else 1.0
        places.append((not trusted, time, k, Place(candidate, trusted, finding)))
    return [place for *_, place in sorted(places, key=lambda item: item[:3])]


MOST_ORDERS = 4096
_orders: dict[tuple, tuple[str, ...]] = {}
"""The names that `choose` goes through, by call. Emptied when something new is known, and when it has grown large."""


def order(request: Request) -> tuple[str, ...]:
    if torch.compiler.is_compiling():
        features = ",".join(sorted(request.features))
        names = _order_of_traced(*request[:5], features, request.gradients, request.subclass, request.heads)
        return tuple(names.split(","))
    key = (request, _state(request.device))
    found = _orders.get(key)
    if found is None:
        if _needs_check(request):
            _first_use(request)
        found = tuple(place.row.name for place in ranked(request) if place.trusted)
        if len(_orders) >= MOST_ORDERS:
            _orders.clear()
        if not _needs_check(request):  # within a graph capture the question stays open
            _orders[key] = found
    return found


def _order_of_traced(cell, device, dtype, hidden_size, proj_size, features, gradients, subclass, heads) -> str:
    """`order` of a call that is being compiled, whose T and B are not known. It runs while the call is traced."""
    found = frozenset(features.split(",")) - {""}
    request = Request(
        cell, device, dtype, hidden_size, proj_size, found, gradients=gradients, subclass=subclass, heads=heads
    )
    if _needs_check(request):
        _first_use(request)
    return ",".join(place.row.name for place in ranked(request) if place.trusted)


# As torch.compiler.assume_constant_result does, which would import the compiler, and that takes a second.
_order_of_traced._dynamo_marked_constant = True


def _needs_check(request: Request) -> bool:
    """Whether the call would run as a Python loop beside a kernel of which nothing is known yet."""
    if request.device not in FIRST_USE or request.subclass or request.dtype == torch.float64 or not _tuning_is_on():
        return False
    if aten.why_not(request) is None or row("triton").reason(request) is not None:
        return False
    if os.environ.get("FASTRNN_TRITON_MODE") == "grouped" or not torch.get_device_module(request.device).is_available():
        return False  # grouped: its programs wait for each other: only `tune`, in a child process, tries it
    book = evidence.book(request.device, torch.get_num_threads())
    return _finding(request, "triton", book) is None and bool(_checks(request))


_first_steps: dict[tuple, int] = {}


def renew() -> None:
    """Chooses anew in the next call: something new is known."""
    _orders.clear()
    _first_steps.clear()
    _firsts.clear()
    _broken.clear()


def first_steps(cell, proj_size, gradients, dtype, device, hidden_size, batch) -> int:
    """The least T from which `auto` may take another backend than torch's for a plain call; `NEVER` if it never does.

    `gradients`: the mode. Where nothing requires a gradient, none follows.
    """
    key = (cell, proj_size, gradients, dtype, device, hidden_size, batch, torch.get_num_threads())
    found = _first_steps.get(key)
    return _read_first_steps(*key) if found is None else found


NEVER = 1 << 60


def _read_first_steps(cell, proj_size, gradients, dtype, device, hidden_size, batch, threads) -> int:
    features = frozenset({"projection"} if proj_size else ())
    request = Request(cell, device, dtype, hidden_size, proj_size, features, batch=batch)
    calls = [
        request._replace(steps=steps, gradients=mode)
        for steps in evidence.STEPS
        for mode in ((False, True) if gradients else (False,))
    ]
    found = next((call.steps for call in calls if ranked(call)[0].row.name != "aten"), NEVER)
    if len(_first_steps) >= MOST_ORDERS:
        _first_steps.clear()
    _first_steps[cell, proj_size, gradients, dtype, device, hidden_size, batch, threads] = found
    return found


_firsts: dict[tuple, str | None] = {}


def first_for_plain(
    cell, gradients, dtype, hidden_size, proj_size, steps, batch, packed, features: frozenset[str]
) -> str | None:
    """The first of `order` that can run a call on a CPU; None where none can. `features`: beside the projection."""
    key = (cell, gradients, dtype, hidden_size, proj_size, steps, batch, packed, features, torch.get_num_threads())
    found = _firsts.get(key)
    if found is None:
        request = Request(
            cell, "cpu", dtype, hidden_size, proj_size, features | {"projection"} if proj_size else features, steps,
            batch, packed, gradients,
        )  # fmt: skip
        if len(_firsts) >= MOST_ORDERS:
            _firsts.clear()
        found = next((name for name in order(request) if row(name).reason(request) is None), None)
        _firsts[key] = found
    return found


_broken: dict[tuple, bool] = {}


def is_broken_for_step(cell, dtype, hidden_size, proj_size, batch) -> bool:
    """Whether backend `cpu` was found broken here for plain calls of one step."""
    key = (cell, dtype, hidden_size, proj_size, batch, torch.get_num_threads())
    found = _broken.get(key)
    if found is None:
        features = frozenset({"projection"} if proj_size else ())
        request = Request(cell, "cpu", dtype, hidden_size, proj_size, features, steps=1, batch=batch, gradients=False)
        finding = _finding(request, "cpu", evidence.book("cpu", key[-1]))
        if len(_broken) >= MOST_ORDERS:
            _broken.clear()
        found = _broken[key] = finding is not None and finding.entry.verdict == "broken"
    return found


_uses: dict[tuple[str, Key], int] = {}


def count_use(request: Request, name: str) -> None:
    """Counts the calls on a backend that only evidence from this machine trusts."""
    place = (name, evidence.key_of(request))
    _uses[place] = _uses.get(place, 0) + 1


def mark_failure(request: Request, name: str, error: Exception) -> bool:
    """Whether the call that failed was the first of its bucket; then the backend is broken for it from now on."""
    key = evidence.key_of(request)
    if _uses.get((name, key)) != 1:
        return False
    reason = records.printable(f"its first call raised {type(error).__name__}: {error}")
    evidence.keep(Entry(key, name, "broken", records.today(), reason=reason), torch.get_num_threads())
    renew()
    return True
