"""A training step on a CPU beside processes that compute without a pause.

Beside them a step cannot take less than its fair share: with as many runnable threads as `threads_there`, each of its
threads has a core for `cores / threads_there` of the time. What it takes beyond that is lost: its threads wait for each
other while one of them has no core.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fastrnn.tuning import timing

from .cases import DEVICE, Case
from .direct import Direct
from .memory import training_step

OTHERS = 5  # processes of one thread each
CONTESTANTS = ("torch.nn", "fastrnn")
SECONDS, ROUNDS = 2.0, 7  # of timing, alone and again beside the others


@contextmanager
def beside(processes: int) -> Iterator[None]:
    """Runs them meanwhile."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(0.5)  # until Python has started in all
        yield
    finally:
        for one in running:
            one.kill()
        for one in running:
            one.wait()


def fair_slowdown(cores: int, threads: int, others: int) -> float:
    """How many times longer a call of `threads` threads takes beside `others` if the cores are shared evenly."""
    alone, shared = min(1.0, cores / threads), min(1.0, cores / (threads + others))
    return alone / shared


def measure(case, broken: Mapping[str, str]) -> dict:
    steps = {name: training_step(case.cell, case.B, case.T, case.H, name) for name in CONTESTANTS}
    calls = {name: lambda _, step=step: step() for name, step in steps.items()}
    one_call = 1e-6  # a sample is one call, which may take a hundred times as long as usual
    alone = timing.interleave(calls, DEVICE, SECONDS, set(), rounds=ROUNDS, sample=one_call)
    with beside(OTHERS):
        crowded = timing.interleave(calls, DEVICE, SECONDS, set(), warmup=0.0, rounds=ROUNDS, sample=one_call)
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    fair = fair_slowdown(cores, threads, OTHERS)
    record = {"suite": case.suite, "case": case.name, **case.describe(), "contestants": {}}
    record |= {"others": OTHERS, "cores": cores, "threads": threads, "fair slowdown": round(fair, 3)}
    for name in CONTESTANTS:
        slowdown = timing.figure([seconds / alone[name].median for seconds in crowded[name].seconds])
        over = timing.figure([seconds / alone[name].median / fair for seconds in crowded[name].seconds])
        record["contestants"][name] = {
            "seconds": alone[name].record(), "beside others": crowded[name].record(),
            "slowdown": slowdown.record(), "over fair share": over.record(),
        }  # fmt: skip
    return record


CASES = [Case(cell, 16, 64, 128, 128, suite="busy") for cell in ("lstm", "gru", "rnn_tanh") if DEVICE == "cpu"]
SUITE = Direct(CASES, lambda case, truth: {}, ("torch.nn",), 0.0, session_seconds=60.0, case_seconds=SECONDS)
