"""Whether `auto` is ever slower than torch.nn, on calls that `tune` did not measure.

`python -m bench.auto bench/results/auto-grid-cpu.json` times `auto` beside torch.nn on a grid of calls whose sizes are
not those of the standard set, with 1 and with 2 threads, in float32 and bfloat16. Run `python -m fastrnn tune
--threads N` for each number of threads before; the file says how much was known. Both sides run interleaved, so load on
the machine widens the intervals more than it moves the ratios. With one thread the ratio of processor time is kept too.
"""

import argparse
import itertools
import math
import time
import warnings
from pathlib import Path

import torch

import fastrnn
from fastrnn import evidence
from fastrnn.tuning import timing
from fastrnn.tuning.job import Call, Job
from fastrnn.tuning.trial import Trial

from . import files

# B, T, H; none of them is a corner of tune's buckets.
SIZES = ((1, 12, 48), (1, 60, 20), (1, 200, 90), (4, 10, 100), (12, 24, 48), (12, 70, 160), (24, 40, 24), (30, 20, 200),
         (48, 90, 64), (100, 14, 40), (120, 50, 100), (3, 5, 64), (8, 1, 80))  # fmt: skip
KINDS = ({"cell": "gru"}, {"cell": "rnn_tanh"}, {"cell": "lstm"}, {"cell": "lstm", "filled": 0.6})
ROUNDS = 8


def jobs(threads: int, dtype: str, everything: bool) -> list[Job]:
    kinds = KINDS if everything else KINDS[:1]
    return [
        Job("cpu", dtype=dtype, hidden_size=H, steps=T, batch=B, gradients=mode, threads=threads, **kind)
        for kind, (B, T, H), mode in itertools.product(kinds, SIZES, (True, False))
    ]


def processor_ratio(calls: dict, inner: dict[str, int]) -> float:
    """The ratio of processor time, by the least of five rounds."""
    least = dict.fromkeys(calls, math.inf)
    for _ in range(5):
        for name, call in calls.items():
            begin = time.process_time()
            for k in range(inner[name]):
                call(k)
            least[name] = min(least[name], (time.process_time() - begin) / inner[name])
    return least["auto"] / least["torch.nn"]


def measure(job: Job) -> dict:
    trial = Trial(job._replace(steps=min(job.steps, 8)), lambda name: None)  # makes both modules
    call, auto = Call(job), trial.on(None)
    calls = {
        "torch.nn": lambda _: call(trial.rival, job.gradients),
        "auto": lambda _: call(auto, job.gradients),
    }
    samples = timing.interleave(calls, "cpu", 0.0, set(), warmup=0.0, rounds=ROUNDS, sample=2e-3)
    ratio = timing.ratio(samples["auto"], samples["torch.nn"])
    backend = fastrnn.dispatch.choose(job.request())
    row = {**job._asdict(), "takes": backend, "ratio": ratio.record(), "rounds": ROUNDS}
    row["milliseconds"] = float(f"{1e3 * samples['torch.nn'].median:.3g}")
    if job.threads == 1:
        inner = {name: own.inner for name, own in samples.items()}
        row["processor ratio"] = float(f"{processor_ratio(calls, inner):.3g}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
    head, rows = files.head("cpu"), []
    head["command"] = f"python -m bench.auto {options.out}"
    for threads in options.threads:
        torch.set_num_threads(threads)
        here = [one for one in evidence.book("cpu", threads).findings.values() if one.shipped is None]
        head[f"measured here with {threads} threads"] = len(here)
        for job in [*jobs(threads, "float32", True), *jobs(threads, "bfloat16", False)]:
            rows.append(measure(job))
            row = rows[-1]
            low, high = row["ratio"]["interval"]
            sizes = f"B {job.batch}, T {job.steps}, H {job.hidden_size}, {'train' if job.gradients else 'infer'}"
            print(
                f"{threads} {job.dtype} {job.cell} {job.filled or ''} {sizes}: "
                f"{row['takes']} {row['ratio']['median']:.2f} [{low:.2f}, {high:.2f}] {row.get('processor ratio', '')}",
                flush=True,
            )
            files.write(options.out, head, "calls", rows)


if __name__ == "__main__":
    main()
