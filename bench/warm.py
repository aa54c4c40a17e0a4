"""Compiles the kernels of the GPU cases in as many processes as there are cores, into the caches on the disk.

    python -m bench.warm throughput | features | rivals ...

`pytest bench` does so itself, but one kernel after another, and its time is better spent on timing. Each contestant
that compiles runs once, for a few steps: no kernel is compiled for a length.
"""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from . import feature_cases, features, measure, rivals
from .cases import CASES, DEVICE
from .contestants import CONTESTANTS, CannotRun, yardstick_module

STEPS = 3  # a first, a last and one between
SUITES = {"throughput": CASES, "features": feature_cases.CASES, "rivals": rivals.RIVAL_CASES}


def plain(case, suite: str) -> dict:
    """By name, what runs each contestant that compiles once: as its results are checked, and as it is timed."""
    module, inputs = yardstick_module(case, DEVICE), measure.random_inputs(case)

    def run(row):
        model = row.model(case, module)
        for outputs_used in (len(inputs.gradients), 1):
            measure.call(case, model, inputs, outputs_used)

    rows = [row for row in CONTESTANTS if "triton" in row.name]
    rows += rivals.RIVALS if suite == "rivals" else ()
    return {row.name: lambda row=row: run(row) for row in rows}


def featured(case) -> dict:
    problem, x, gradients = features.given(case)
    builders = features.contestants(problem)
    return {
        name: lambda build=build: features.results(problem, build(), x, gradients)
        for name, build in builders.items()
        if "triton" in name
    }


def compile_case(suite: str, case) -> list[str]:
    """What did not run, in words."""
    case, failed = replace(case, T=STEPS), []
    with measure.precision(case.tf32):
        try:
            runs = featured(case) if suite == "features" else plain(case, suite)
        except Exception as error:  # no memory beside the others, say
            return [f"{case.name}: {measure.in_words(error)}"]
        for name, run in runs.items():
            try:
                run()
                torch.cuda.synchronize()
            except CannotRun:
                continue
            except Exception as error:  # the suite runs it again, and fails on it
                failed.append(f"{case.name}: {name}: {measure.in_words(error)}")
    return failed


def main() -> None:
    if DEVICE != "cuda" or not sys.argv[1:] or not {*sys.argv[1:]} <= {*SUITES}:
        sys.exit(f"usage: python -m bench.warm {' | '.join(SUITES)} ..., on a machine with a CUDA GPU")
    jobs = [(suite, case) for suite in sys.argv[1:] for case in SUITES[suite]]
    begin = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for failed in pool.map(compile_case, *zip(*jobs, strict=True)):
            print(*failed, sep="\n", end="\n" * bool(failed), flush=True)
    print(f"{len(jobs)} cases compiled in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
