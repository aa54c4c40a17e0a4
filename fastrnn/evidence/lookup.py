"""What is known of the backends for a call: measured here, measured elsewhere (shipped), or verified here.

A call belongs to a bucket: `Key` of records.py. `Book` holds the records for one device type and number of threads, and
is read from disk once. A measured time is relative to that of torch.nn, or of the loop `reference` where torch.nn
cannot run the call.
"""

import math
from bisect import bisect_left, bisect_right
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

import torch

from ..cell_table import spec_of
from . import records
from .records import Entry, Key

STEPS = (1, 2, 8, 16, 32, 128)
"""The least T of each bucket. A candidate that wins gains with every further step, since the overhead of a call is
spread over more of them: so it counts as faster in all buckets of longer calls that were not measured."""
BATCH = (1, 16, 64, 256)
HIDDEN = (32, 128, 512)
"""The largest B and H of each bucket; `LARGER` where a call exceeds them all."""
LARGER = 1 << 20
USUAL_STEPS, USUAL_BATCH = 32, 16  # of a call whose sizes are not known while it is traced
FASTER = 0.97
"""A candidate is faster where the upper end of its interval is below this: a bucket has calls that were not timed."""
HALVES = ("bfloat16", "float16")
PLAIN = frozenset({"projection"})  # the features of a call that torch.nn can do


class Finding(NamedTuple):
    """An entry and where it was made."""

    entry: Entry
    shipped: records.Where | None  # the machine, where the entry came with a release

    @property
    def time(self) -> float:
        """Relative to the other's; 1 where they cannot be told apart, or nothing was timed."""
        if self.entry.ratio is None:
            return 1.0
        median, low, high = self.entry.ratio
        return median if high < FASTER or low > 1 else 1.0

    @property
    def words(self) -> str:
        entry = self.entry
        if entry.verdict == "broken":
            return f"broken here: {entry.reason}"
        if entry.verdict == "verified":
            return f"verified here {entry.date}, not timed"
        place = f"measured here {entry.date}"
        if self.shipped is not None:
            threads = (
                f", {self.shipped.threads} thread{'s'[: self.shipped.threads != 1]}" if self.shipped.threads else ""
            )
            place = f"shipped ({self.shipped.device}{threads}, {entry.date})"
        other = "torch.nn's" if entry.against == "torch.nn" else "the loop's"
        return f"{place}: {entry.ratio[0]:.2f} of {other} time"


# ------------------------------------------------------------------------------------------------------- the buckets


def _upper(bounds: tuple[int, ...], size: int) -> int:
    k = bisect_left(bounds, size)
    return bounds[k] if k < len(bounds) else LARGER


def kind_of(request) -> str:
    """The class of a call's features."""
    if not request.features <= PLAIN:
        whole_rows = {"layer_norm", "projection"} & request.features
        return "extras over whole rows" if whole_rows else "extras"
    kind = "plain" if request.packed is None else "packed"
    if request.packed == 1 and request.cell == "lstm":  # of which torch may run all steps in one call of oneDNN
        kind = "packed, of one length"
    return kind + (", projected" if request.proj_size else "")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cell_name(cell: str) -> str:
    """A cell in a key: a user's cell by its name and a checksum of its text."""
    spec = spec_of(cell)
    return spec.name if spec.program is None else f"{spec.name}-{crc32(cell.encode()):08x}"


@lru_cache(4096)
def key_of(request) -> Key:
    """The bucket of a call (`dispatch.Request`)."""
    steps = STEPS[bisect_right(STEPS, request.steps or USUAL_STEPS) - 1]
    return Key(
        request.device, cell_name(request.cell), dtype_name(request.dtype), kind_of(request), request.gradients, steps,
        _upper(BATCH, request.batch or USUAL_BATCH), _upper(HIDDEN, int(request.hidden_size)),
    )  # fmt: skip


def key_of_check(request, kernel: str) -> Key:
    """The bucket in which a check of a kernel counts: in both gradient modes and at every T."""
    key, features = key_of(request), ", ".join(sorted(request.features - {"tracing"}))
    return key._replace(kind=f"{kernel}: {features or 'plain'}"[: records.LONGEST], gradients=True, steps=0)


# ---------------------------------------------------------------------------------------------------------- the book


def _shipped(device: str, here: records.Where) -> tuple[records.Where | None, list[Entry]]:
    """The shipped record that is nearest to this machine: of a GPU only the same one's, of a CPU by its instructions,
    then by the threads. Of the half types, a CPU's counts only where all instructions are the same."""
    found = []
    for file in records.files(records.SHIPPED):
        record = records.read(file)
        if record is None or not any(entry.key.device == device for entry in record[1]):
            continue
        if device == "cpu":
            threads = abs(math.log2(max(here.threads, 1) / max(record[0].threads, 1)))
            differs = record[0].architecture != here.architecture, _vectors(record[0]) != _vectors(here)
            found.append((sum(differs), threads, len(found), *record))
        elif record[0].device == here.device:
            found.append((0, 0.0, len(found), *record))
    if not found:
        return None, []
    *_, machine, entries = min(found)
    same = device != "cpu" or machine.architecture == here.architecture
    return machine, [
        entry for entry in entries if entry.key.device == device and (same or entry.key.dtype not in HALVES)
    ]


def _vectors(where: records.Where) -> str:
    return where.architecture.partition(",")[0]


def _at_any_steps(key: Key, candidate: str) -> tuple[Key, str]:
    """The place of a candidate in `Book.broken`: what is broken at one T is not trusted at another."""
    return key._replace(gradients=True, steps=0), candidate


class Book:
    """The records for calls on one device type."""

    def __init__(self, device: str, threads: int):
        self.where = records.where(device, threads)
        machine, shipped = _shipped(device, self.where)
        self.findings: dict[tuple[Key, str], Finding] = {}
        self.broken: dict[tuple[Key, str], dict[Key, Finding]] = {}  # by the bucket of all T, then by the bucket
        self.wins: dict[tuple[tuple, str], dict[Key, Finding]] = {}  # by all but the sizes, then by the bucket
        self.candidates: set[str] = set()
        for entry in shipped:
            if entry.verdict == "measured":
                self.add(entry, machine)
        for entry in sorted(records.load(self.where), key=lambda entry: entry.date):
            self.add(entry)

    def add(self, entry: Entry, shipped: records.Where | None = None) -> None:
        finding = Finding(entry, shipped)
        self.candidates.add(entry.candidate)
        broken = self.broken.setdefault(_at_any_steps(entry.key, entry.candidate), {})
        broken.pop(entry.key, None)
        wins = self.wins.setdefault((entry.key[:5], entry.candidate), {})
        wins.pop(entry.key, None)
        if finding.time < 1:
            wins[entry.key] = finding
        if entry.verdict == "broken":
            broken[entry.key] = finding
            self.findings.pop((entry.key, entry.candidate), None)
        else:
            self.findings[entry.key, entry.candidate] = finding

    def find(self, key: Key, candidate: str) -> Finding | None:
        """What is known of a candidate for a bucket; that it is broken goes before everything else."""
        broken = self.broken.get(_at_any_steps(key, candidate))
        if broken:
            return next(iter(broken.values()))
        if key.steps == 0:  # a check, which has no T
            return self.findings.get((key, candidate))
        carried = None
        for steps in reversed([steps for steps in STEPS if steps <= key.steps]):
            finding = self.findings.get((key._replace(steps=steps), candidate))
            if finding is None or finding.entry.verdict != "measured":
                continue
            if steps == key.steps and finding.shipped is None:
                return finding
            # What was measured here, at fewer steps, goes before what was measured elsewhere.
            better = carried is None or (finding.shipped is None and carried.shipped is not None)
            if better and (steps == key.steps or finding.time < 1):
                carried = finding
        return carried or self._between(key, candidate)

    def _between(self, key: Key, candidate: str) -> Finding | None:
        """The weaker of two buckets in which a candidate wins, one with no larger B and H, one with no smaller ones: it
        wins between them, too."""
        below: list[Finding] = []
        above: list[Finding] = []
        for finding in self.wins.get((key[:5], candidate), {}).values():
            other = finding.entry.key
            if other.steps <= key.steps:
                if other.batch <= key.batch and other.hidden <= key.hidden:
                    below.append(finding)
                if other.batch >= key.batch and other.hidden >= key.hidden:
                    above.append(finding)
        if not below or not above:
            return None
        return max((min(side, key=lambda one: one.time) for side in (below, above)), key=lambda one: one.time)


_books: dict[tuple[str, int], Book] = {}


def book(device: str, threads: int) -> Book:
    """The records for a device type; `threads`: torch.get_num_threads(), which counts on a CPU only."""
    place = (device, threads if device == "cpu" else 0)
    found = _books.get(place)
    if found is None:
        found = _books[place] = Book(*place)
    return found


def clear() -> None:
    """Forgets what was read, so that the next call reads the files again."""
    _books.clear()


def keep(entry: Entry, threads: int) -> str | None:
    """Adds an entry to the book and to the cache folder; the reason where it cannot be written."""
    open_book = book(entry.key.device, threads)
    open_book.add(entry)
    return records.save(open_book.where, entry)
