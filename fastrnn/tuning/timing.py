"""Interleaved timing: all contestants of a case in one process, round by round, so that whatever the machine does to
one of them (clocks, other load) it does to all.

A sample is the mean of `inner` calls in a row, so that a sample of a short call is long enough to be timed, and a GPU's
queue stays as full as in training. Results keep medians, their intervals, and the number of rounds.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 6, 40  # six is the least that gives a 95 % interval of a median
SAMPLE_SECONDS = {"cpu": 5e-3, "cuda": 10e-3}
WARMUP_SECONDS = 0.2
MAX_INNER = 200


class Figure(NamedTuple):
    """The median of some values, and the 95 % interval of that median."""

    median: float
    low: float
    high: float

    def record(self) -> dict:
        median, low, high = (float(f"{value:.5g}") for value in self)
        return {"median": median, "interval": [low, high]}


@dataclass
class Samples:
    """Seconds per call of one contestant. `rounds[k]` is the round of `seconds[k]`."""

    inner: int
    seconds: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def record(self) -> dict:
        return figure(self.seconds).record() | {"rounds": len(self.rounds), "inner": self.inner}


def figure(values: list[float]) -> Figure:
    """The interval is by order statistics, which assume nothing about the distribution: from the k-th smallest to the
    k-th largest value, k from the binomial distribution. Up to five values: from the smallest to the largest."""
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n // 2 and (outside := outside + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    k = max(k, 1)
    return Figure(statistics.median(values), ordered[k - 1], ordered[n - k])


def shares(samples: Samples, other: Samples) -> list[float]:
    """The first's time over the second's, within each round that both were timed in."""
    seconds = dict(zip(other.rounds, other.seconds, strict=True))
    pairs = zip(samples.rounds, samples.seconds, strict=True)
    return [s / seconds[k] for k, s in pairs if k in seconds]


def ratio(samples: Samples, other: Samples) -> Figure:
    """The first's time over the second's, from the ratios within the rounds."""
    return figure(shares(samples, other))


def stopwatch(device: str) -> Callable[[Callable[[], None]], float]:
    """A function that runs another and returns the seconds that it took, on the device's own clock where it has one."""
    if device == "cpu":

        def watch(run):
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin

        return watch

    gpu = torch.get_device_module(device)
    begin, end = (gpu.Event(enable_timing=True) for _ in range(2))

    def watch_events(run):
        gpu.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return watch_events


def input_sets(bytes_per_set: int, device: str) -> int:
    """How many input sets to rotate through: on a GPU, twice the size of its cache."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(8, math.ceil(2 * cache / bytes_per_set)))


def _warm(call: Callable[[int], None], watch, seconds: float) -> float:
    """Seconds per call after the first, which may compile: the least of some repeats."""
    watch(lambda: call(0))
    spent, least, k = 0.0, math.inf, 1
    while k < 3 or (spent < seconds and k < 20):
        took = watch(lambda k=k: call(k))
        spent, least, k = spent + took, min(least, took), k + 1
    return least


def interleave(
    calls: dict[str, Callable[[int], None]],
    device: str,
    seconds: float,
    brief: set[str],
    warmup: float = WARMUP_SECONDS,
    rounds: int = MIN_ROUNDS,
    sample: float | None = None,
    after: Callable[[str], None] = lambda name: None,
    rest: float = 0.0,
) -> dict[str, Samples]:
    """Times `calls` (each takes a running number, to choose its input set) round by round for about `seconds`.

    The order rotates from round to round. After `rounds` of them, the calls in `brief` drop out and leave their time to
    the others. `sample`: the least seconds of a sample. `after` is told of each sample, and is not timed.
    `rest`: seconds before each sample, in which the threads of the one before fall asleep; the calls then run once
    before they are timed.
    """
    watch = stopwatch(device)
    samples = {}
    for name, call in calls.items():
        least = _warm(call, watch, warmup)
        wanted = sample or SAMPLE_SECONDS["cpu" if device == "cpu" else "cuda"]
        samples[name] = Samples(inner=min(MAX_INNER, max(1, math.ceil(wanted / least))))
    names, spent, number = list(calls), 0.0, 0
    for turn in range(MAX_ROUNDS):
        if turn >= rounds and spent > seconds:
            break
        shift = turn % len(names)
        running = [n for n in names[shift:] + names[:shift] if turn < rounds or n not in brief]
        for name in running:
            inner, call = samples[name].inner, calls[name]
            first, number = number, number + inner

            def repeat(call=call, first=first, inner=inner):
                for k in range(inner):
                    call(first + k)

            if rest:
                time.sleep(rest)
                repeat()
            took = watch(repeat)
            spent += took
            samples[name].seconds.append(took / inner)
            samples[name].rounds.append(turn)
            after(name)
    return samples
