"""Compiles the kernels of the GPU cases in as many processes as there are cores, into the caches on the disk.

    python -m bench.warm throughput | features | rivals ...

`pytest bench` would compile one kernel after another, in time that is better spent on timing. Each contestant that
compiles runs once, for a few steps: no kernel is compiled for a length.
"""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from . import measure, rivals
from .cases import DEVICE
from .problem import Problem, call, results
from .suites import SUITES

STEPS = 3  # a first, a last and one between
COMPILED = {row.name for row in rivals.RIVALS}


def compile_case(case) -> list[str]:
    """Runs each contestant that compiles, as its results are compared and as it is timed. Returns what failed."""
    case, entries = replace(case, T=STEPS), {}
    rows = [row for row in SUITES[case.suite].contestants(case) if "triton" in row.name or row.name in COMPILED]
    with measure.precision(case.tf32):
        try:
            problem = Problem(case)
            inputs, models = problem.inputs(), measure.build(problem, rows, {}, entries)
        except Exception as error:  # no memory beside the others, for example
            return [f"{case.name}: {measure.in_words(error)}"]
        for name, model in models.items():
            try:
                results(problem, model, inputs)
                call(problem, model, inputs)
                torch.cuda.synchronize()
            except Exception as error:  # the suite runs it again, and fails on it
                entries[name]["failed"] = measure.in_words(error)
    return [f"{case.name}: {name}: {entry['failed']}" for name, entry in entries.items() if "failed" in entry]


def main() -> None:
    if DEVICE != "cuda" or not sys.argv[1:] or not {*sys.argv[1:]} <= {*SUITES}:
        sys.exit(f"usage: python -m bench.warm {' | '.join(SUITES)} ..., on a machine with a CUDA GPU")
    cases = [case for suite in sys.argv[1:] for case in SUITES[suite].cases]
    begin = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for failed in pool.map(compile_case, cases):
            print(*failed, sep="\n", end="\n" * bool(failed), flush=True)
    print(f"{len(cases)} cases compiled in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
