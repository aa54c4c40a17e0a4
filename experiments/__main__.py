"""Trains the runs of the table that have no result yet: `python -m experiments [NAME ...] [--seeds N] [--full]`.

Every finished run is written at once to experiments/results/NAME.json, so a session may be interrupted and resumed.
`python -m experiments.page` then makes docs/experiments.md and its pictures.
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import store
from .table import EXPERIMENTS, plan
from .training import train


def run(name: str, full: bool = False, seeds: int | None = None, folder: Path = store.RESULTS) -> None:
    """Trains the runs of one experiment that have no result; `seeds`: only the first N seeds."""
    file = store.path(name, full, folder)
    finished = store.done(file, name, full)
    runs = [r for r in plan(EXPERIMENTS[name], full) if seeds is None or r.seed < seeds]
    open_runs = [r for r in runs if store.key(r._asdict()) not in finished]
    with tqdm(total=sum(r.settings["steps"] for r in open_runs), unit="step", mininterval=1, desc=name) as bar:
        for r in open_runs:
            label, begin, end = f"{r.arm} {r.point}".strip(), time.perf_counter(), bar.n + r.settings["steps"]

            def progress(steps: int, text: str, label=f"{label}, seed {r.seed}") -> None:
                bar.update(steps)
                bar.set_postfix_str(f"{label}, {text}")

            result = train(r.settings, r.seed, progress)
            bar.update(end - bar.n)  # a run that met its goal stops early
            record = {**r._asdict(), "seconds": round(time.perf_counter() - begin, 1), **result}
            finished[store.key(record)] = record
            store.save(file, list(finished.values()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(f"{name} ({experiment.title})" for name, experiment in EXPERIMENTS.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{names}; none means all")
    parser.add_argument("--seeds", type=int, metavar="N", help="the first N seeds of each arm only")
    parser.add_argument("--full", action="store_true", help="the sizes for a large machine, kept in files of their own")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the tensors are too small to share")
    options = parser.parse_args(argv)
    unknown = set(options.names) - EXPERIMENTS.keys()
    if unknown:
        parser.error(f"unknown experiment {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    torch.set_num_threads(options.threads)
    for name in options.names or EXPERIMENTS:
        run(name, options.full, options.seeds)


if __name__ == "__main__":
    main()
