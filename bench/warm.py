"""Compiles the Triton kernels of the GPU cases in as many processes as there are cores, into Triton's cache.

    python -m bench.warm [throughput | features | rivals ...]

`pytest bench` does so itself, but one kernel after another, and its time is better spent on timing. Each contestant on
Triton runs once, for a few steps: no kernel is compiled for a length.
"""

import multiprocessing
import os
import sys
import time
from dataclasses import replace

import torch

from . import feature_cases, features, measure, rivals
from .cases import CASES, DEVICE
from .contestants import CONTESTANTS, CannotRun, yardstick_module

STEPS = 3  # a first, a last and one between
SUITES = {"throughput": CASES, "features": feature_cases.CASES, "rivals": rivals.RIVAL_CASES}


def plain(case) -> dict:
    """By name, what runs each contestant on Triton once: as its results are checked, and as it is timed."""
    module, inputs = yardstick_module(case, DEVICE), measure.random_inputs(case)

    def run(row):
        model = row.model(case, module)
        for outputs_used in (len(inputs.gradients), 1):
            measure.call(case, model, inputs, outputs_used)

    return {row.name: lambda row=row: run(row) for row in CONTESTANTS if "triton" in row.name}


def featured(case) -> dict:
    problem, x, gradients = features.given(case)
    builders = features.contestants(problem)
    return {
        name: lambda build=build: features.results(problem, build(), x, gradients)
        for name, build in builders.items()
        if "triton" in name
    }


def compile_case(case) -> list[str]:
    """What did not run, in words."""
    case, failed = replace(case, T=STEPS), []
    with measure.precision(case.tf32):
        runs = featured(case) if isinstance(case, feature_cases.FeatureCase) else plain(case)
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
    if DEVICE != "cuda" or not {*sys.argv[1:]} <= {*SUITES}:
        sys.exit(f"usage: python -m bench.warm [{' | '.join(SUITES)} ...], on a machine with a CUDA GPU")
    cases = [case for suite in sys.argv[1:] or SUITES for case in SUITES[suite]]
    begin = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count(), len(cases))) as pool:
        for failed in pool.imap_unordered(compile_case, cases):
            print(*failed, sep="\n", end="\n" * bool(failed), flush=True)
    print(f"{len(cases)} cases compiled in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
