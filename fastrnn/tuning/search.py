"""`tune`: asks this machine which backend is right and fast, and records the answers (`evidence/records.py`).

Every candidate runs in a child process (`trial.py`), is compared with the reference there, and is timed beside
torch.nn, or beside the loop where torch.nn cannot run the call. A child that dies, or shows no life for too long, marks
the candidate that it was running as broken.
"""

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import checks, evidence, modules, ranking
from ..backend_table import BACKENDS, MODES, Request
from ..cell_table import spec_of
from ..evidence import records
from ..evidence.records import Entry, Key
from .job import Job

COMMAND = (sys.executable, "-m", "fastrnn.tuning.trial")
START_SECONDS = 180.0  # for a child to import torch
SECONDS = 0.03  # the least that a candidate and its rival are timed together
LIMITS = {"cpu": 30.0}
LIMIT = 90.0
"""Seconds without a sign of life after which a child is killed, by device type; on a GPU kernels compile meanwhile."""


class Child:
    """A process that tries candidates, one after the other, until one of them takes it down."""

    def __init__(self, command: tuple[str, ...]):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        # A session of its own: Ctrl-C is for the parent, which closes it.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True
        )
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        self.buffer = b""
        if self.receive(START_SECONDS) is None:
            said = self.last_words()
            self.close()
            raise RuntimeError(f"the process that tries candidates does not start: {said}")

    def last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def receive(self, limit: float) -> dict[str, Any] | None:
        """The next message; None where the process ended, or said nothing for so many seconds."""
        deadline = time.monotonic() + limit
        while b"\n" not in self.buffer:
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                return None
            found = os.read(self.process.stdout.fileno(), 1 << 16)
            if not found:
                return None
            self.buffer += found
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def ask(self, job: Job, candidate: str, limit: float, until: float) -> dict[str, Any]:
        """The answer of `trial.py`; or what happened to the process, blamed on what it was running.

        limit: seconds without a sign of life after which the process is killed. until: the time at which it is killed
        in any case, which is no candidate's fault.
        """
        gpu = None if job.device == "cpu" else torch.get_device_module(job.device).current_device()
        request = {"job": job._asdict(), "candidate": candidate, "seconds": SECONDS, "gpu": gpu}
        blame = candidate
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return {"broken": self.end(limit), "blame": blame}
        while True:
            message = self.receive(min(limit, until - time.monotonic()))
            if message is None and time.monotonic() >= until:
                self.close()
                return {"cannot": "the time is up"}
            if message is None:
                return {"broken": self.end(limit), "blame": blame}
            if "running" not in message:
                return message
            blame = message["running"]

    def end(self, limit: float) -> str:
        """How the process ended; it is killed where it still runs."""
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            self.close()
            return f"killed after {limit:.0f} s"
        names = {one.value: one.name for one in signal.Signals}  # the real-time signals have none
        how = f"signal {names.get(-code, -code)}" if code < 0 else f"exit code {code}"
        said = self.last_words()
        self.close()
        return f"its process ended with {how}: {said}".rstrip(": ")

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the compilers that it runs, too
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with suppress(OSError):  # what was not yet written
                stream.close()
        self.selector.close()


# -------------------------------------------------------------------------------------------------- what is asked for


class Bucket(NamedTuple):
    """Calls of one bucket; the slowest of them, relative to the rival, decides."""

    jobs: tuple[Job, ...]

    @property
    def key(self) -> Key:
        return evidence.key_of(self.jobs[0].request())


class Ladder(NamedTuple):
    """Buckets that differ in T, the shorter ones first. A candidate that wins in one counts as faster in longer ones,
    so the search begins at `start` and goes down while it wins, or else up until it does."""

    rungs: tuple[Bucket, ...]
    start: int


# Two corners of each bucket: least B and H, largest B and H.
CORNERS_B = {1: (1, 1), 16: (2, 16), 64: (17, 64), 256: (65, 256)}
CORNERS_H = {32: (8, 32), 128: (33, 128), 512: (129, 512), evidence.LARGER: (513, 1024)}
MOST_WORK = 1e10  # floating-point operations of a call; larger ones are left to what is shipped, or to torch.nn
CELLS = ("gru", "lstm", "rnn_tanh", "rnn_relu")


def _work(job: Job) -> float:
    products = job.steps * job.batch * len(spec_of(job.cell).gates) * job.hidden_size * 2 * job.hidden_size
    return 2 * products * (3 if job.gradients else 1)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"filled": 0.5},
    "tap": {"features": ("tap",)},
    "layer_norm": {"features": ("layer_norm",)},
    "projected": {"proj": True},
    "packed_projected": {"proj": True, "filled": 0.5},
}
"""The kinds of call in the standard set, the more usual ones first. A projection is for the LSTM."""


def _ladder(
    device: str, dtype: str, threads: int, cell: str, kind: dict[str, Any], gradients: bool, batch: int, hidden: int
) -> Ladder | None:
    rungs = []
    for steps in evidence.STEPS:
        corners = zip(CORNERS_B[batch], CORNERS_H[hidden], strict=True)
        jobs = tuple(
            Job(
                device, cell, dtype, H, steps, B, gradients, threads,
                proj_size=H // 2 if kind.get("proj") else 0,
                features=kind.get("features", ()),
                filled=kind.get("filled"),
            )
            for B, H in dict.fromkeys(corners)
        )  # fmt: skip
        if all(_work(job) <= MOST_WORK for job in jobs):
            rungs.append(Bucket(jobs))
    if not rungs:
        return None
    start = 0 if kind.get("features") else evidence.STEPS.index(8)
    return Ladder(tuple(rungs), min(start, len(rungs) - 1))


def standard_set(
    device: str,
    threads: int,
    cells: tuple[str, ...] = CELLS,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    kinds: tuple[str, ...] = tuple(KINDS),
) -> list[Ladder]:
    """The calls that `python -m fastrnn tune` asks for: the most usual ones first, because time may run out."""
    found = []
    for dtype in dtypes:
        for hiddens in (128, 512, 32), (evidence.LARGER,):
            for kind, hidden, batch in product((KINDS[name] for name in kinds), hiddens, (16, 1, 64, 256)):
                for cell in cells:
                    if kind.get("proj") and cell != "lstm":
                        continue
                    found += [(device, dtype, threads, cell, kind, mode, batch, hidden) for mode in (True, False)]
    ladders = [_ladder(*asked) for asked in found]
    return [ladder for ladder in ladders if ladder is not None]


class _Listener:
    """In the place of a monitor's watch (`monitoring/watch.py`): collects the calls of a module, which run as ever."""

    def __init__(self, module: modules._Recurrent, calls: list[tuple[modules._Recurrent, Request]]):
        self.module, self.calls = module, calls

    def is_idle(self) -> bool:
        return False

    def begin(self, call: checks.Call) -> tuple[checks.Call, None]:
        self.calls.append((self.module, call.request))
        return call, None

    def end(self, *results: Any) -> None:
        pass


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Within it the module's buffers and torch's random numbers may change; afterwards they are as before."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.random.fork_rng(), torch.no_grad():
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)


def calls_of(module: nn.Module, example: tuple, call: dict[str, Any]) -> list[tuple[modules._Recurrent, Request]]:
    """The calls of fastrnn's networks that `module(*example, **call)` makes."""
    calls: list[tuple[modules._Recurrent, Request]] = []
    networks = [one for one in module.modules() if isinstance(one, modules._Recurrent)]
    watches = [one._watch for one in networks]
    try:
        for one in networks:
            vars(one)["_watch"] = _Listener(one, calls)
        with _as_it_was(module), torch.compiler.set_stance("force_eager"):
            module(*example, **call)
    finally:
        for one, watch in zip(networks, watches, strict=True):
            if watch is None:
                del vars(one)["_watch"]
            else:
                vars(one)["_watch"] = watch
    return calls


def of_call(module: modules._Recurrent, request: Request) -> list[Ladder]:
    """The calls to try for a call of a module, with and without gradients; none for an empty batch."""
    if not request.batch:
        return []
    filled = None
    if request.packed is not None:
        filled = 1.0 if request.batch == 1 else (request.packed * request.batch - 1) / (request.batch - 1)
    return [
        Ladder((Bucket((job,)),), 0)
        for mode in (True, False)
        for job in [
            Job(
                request.device, request.cell, evidence.dtype_name(request.dtype), request.hidden_size, request.steps,
                request.batch, mode, torch.get_num_threads(), request.proj_size, tuple(sorted(request.features)),
                filled, module.input_size, module.num_layers, module.bidirectional, request.heads,
            )
        ]
    ]  # fmt: skip


def candidates(job: Job) -> list[str]:
    """The backends that can run a job, beside its rival; on a GPU also the modes of the Triton scan."""
    request = job.request()
    rows = [*BACKENDS.values(), *(MODES.values() if job.device != "cpu" else ())]
    return [one.name for one in rows if one.launcher and one.name != "reference" and one.reason(request) is None]


# ---------------------------------------------------------------------------------------------------------- the search


class Result(NamedTuple):
    """What came out for a bucket and a candidate, and the calls that were tried."""

    entry: Entry
    jobs: tuple[Job, ...]
    unkept: str | None = None  # why it could not be written


class Search:
    """Tries candidates in a child process until the time is up; `keep` is given each entry as soon as it is known."""

    def __init__(self, seconds: float, keep: Callable[[Entry, int], str | None], command: tuple[str, ...] = COMMAND):
        self.deadline, self.keep, self.command = time.monotonic() + seconds, keep, command
        self.child: Child | None = None

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.deadline

    def _ask(self, job: Job, candidate: str) -> dict[str, Any]:
        if self.child is None:
            self.child = Child(self.command)
        limit = LIMITS.get(job.device, LIMIT)
        found = self.child.ask(job, candidate, limit, self.deadline + limit)
        # What a broken one left in the process must not reach the next candidate.
        if "broken" in found or self.child.process.poll() is not None:
            self.close()
        return found

    def close(self) -> None:
        if self.child is not None:
            self.child.close()
            self.child = None

    def bucket(self, bucket: Bucket, candidate: str) -> Result | None:
        """Tries a candidate in a bucket; None where it cannot run these calls."""
        worst: tuple[float, float, float] | None = None
        key, threads = bucket.key, bucket.jobs[0].threads
        tried: list[Job] = []
        for job in bucket.jobs:
            found = self._ask(job, candidate)
            if "cannot" in found:
                return None
            tried.append(job)
            if "broken" in found:
                reason = records.printable(found["broken"])
                # torch's own kernels and the reference are slow where the machine is; they do not hang.
                if found["blame"] == "reference" or (found["blame"] == "aten" and reason.startswith("killed")):
                    return None
                entry = Entry(key, found["blame"], "broken", records.today(), reason=reason)
                return Result(entry, tuple(tried), self.keep(entry, threads))
            median, low, high = found["ratio"]
            worst = max(worst or (median, low, high), (median, low, high), key=lambda ratio: ratio[2])
            if low > 1:
                break
        against = "torch.nn" if bucket.jobs[0].rival == "aten" else "reference"
        entry = Entry(key, candidate, "measured", records.today(), against, worst)
        return Result(entry, tuple(tried), self.keep(entry, threads))

    def ladder(self, ladder: Ladder, candidate: str) -> Iterator[Result]:
        """Searches a ladder for the shortest calls in which a candidate wins."""
        k, up = ladder.start, None
        while 0 <= k < len(ladder.rungs) and not self.is_over:
            result = self.bucket(ladder.rungs[k], candidate)
            if result is None:
                return
            yield result
            if result.entry.verdict == "broken":
                return
            won = evidence.Finding(result.entry, None).time < 1
            if up is None:
                up = not won
            elif won == up:
                return
            k += 1 if up else -1

    def run(self, ladders: list[Ladder], progress: Callable[[str], None] = lambda text: None) -> list[Result]:
        """All of it, as far as the time allows. Ctrl-C ends it early; what is known by then is kept and returned."""
        found: list[Result] = []
        try:
            for ladder in ladders:
                job = ladder.rungs[ladder.start].jobs[0]
                for candidate in candidates(job):
                    if self.is_over:
                        return found
                    for result in self.ladder(ladder, candidate):
                        found.append(result)
                progress(in_words(evidence.key_of(job.request())))
        except KeyboardInterrupt:
            progress("interrupted")
        finally:
            self.close()
            ranking.renew()
        return found


def in_words(key: Key) -> str:
    mode = "training" if key.gradients else "inference"
    larger = evidence.LARGER
    sizes = ", ".join(
        f"{name} > {bounds[-1]}" if bound == larger else f"{name} <= {bound}"
        for name, bound, bounds in (("B", key.batch, evidence.BATCH), ("H", key.hidden, evidence.HIDDEN))
    )
    return f"{key.cell} {key.dtype} {key.kind} {mode}, T >= {key.steps}, {sizes}"


class Results(list):
    """What `tune` found out; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "nothing was measured"
        rows = [("call", "candidate", "what came out")]
        rows += [(in_words(r.entry.key), r.entry.candidate, evidence.Finding(r.entry, None).words) for r in self]
        widths = [max(len(line[k]) for line in rows) for k in range(3)]
        text = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in rows]
        unkept = {result.unkept for result in self} - {None}
        return "\n".join([*text, *(f"not kept for the next process: {reason}" for reason in sorted(unkept))])


def tune(module: nn.Module, *example: Any, minutes: float = 2.0, **call: Any) -> Results:
    """Measures the backends for the calls that `module(*example, **call)` makes, and records what came out.

    From then on, in this process and in later ones, `auto` takes what was right and fastest. Each candidate runs in a
    child process first, so that one which crashes or hangs does no harm. `explain` shows the evidence.

    Args:
        module: a `fastrnn.LSTM`, `GRU`, `RNN` or `Recurrent`, or any module that has some inside. It is called once,
            without gradients; its buffers and torch's random numbers are then as before.
        example, call: the arguments of its call; their values do not matter, but sizes, dtypes and options do.
        minutes: the most time to spend.

    Returns:
        The results, a list that prints as a table.

    Raises:
        TypeError: `module` is not a module.
        ValueError: no fastrnn network is called, or only with an empty batch or on meta tensors; or `minutes` is not
            positive.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"tune takes a module and the arguments of its call, got {module!r}")
    if isinstance(minutes, bool) or not isinstance(minutes, Real) or not 0 < minutes < math.inf:
        raise ValueError(f"minutes should be a positive number, got {minutes!r}")
    calls = calls_of(module, example, call)
    if any(request.device == "meta" for _, request in calls):
        raise ValueError("tune: nothing can be measured on meta tensors, which hold no numbers")
    ladders = [ladder for seen in calls for ladder in of_call(*seen)]
    if not ladders:
        raise ValueError(
            "tune: the module calls no fastrnn.LSTM, GRU, RNN or Recurrent"
            + (" with a batch that is not empty" if calls else "")
        )
    return Results(Search(60 * minutes, evidence.keep).run(list(dict.fromkeys(ladders))))
