"""What the monitor costs a long training: `python -m bench.monitor_cost` writes bench/results/monitor-cost.json.

Three kinds of training steps take turns in one process: without a monitor, and inside one that leaves the step out or
observes it. An observed step runs the scan in place of torch's own kernels, and makes a report. The time is that of the
processor in this process; of each kind the lowest tenth counts, since other work on the machine only adds to it. The
cost of `every=50` is 49/50 of what a step that is left out takes longer, and 1/50 of what an observed one does.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

import fastrnn

from . import files

RESULTS = Path(__file__).parent / "results" / "monitor-cost.json"
EVERY, WARM_UP = 50, 5
KINDS = ("plain", "left out", "observed")
CASES = {
    "small": {"cell": "GRU", "T": 100, "B": 32, "H": 64, "layers": 1},
    "middle": {"cell": "LSTM", "T": 100, "B": 32, "H": 128, "layers": 1},
    "deep": {"cell": "LSTM", "T": 100, "B": 32, "H": 128, "layers": 3},
}


def times(case: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of every step, by kind: Adam on a squared output, in one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(fastrnn, case["cell"])(case["H"], case["H"], case["layers"])
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(case["T"], case["B"], case["H"])

    def step() -> float:
        began = time.process_time()
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
        return time.process_time() - began

    left_out = fastrnn.GradientMonitor(model, every=10**9)
    with left_out:
        step()  # the only one that it observes
    found = {kind: [] for kind in KINDS}
    for _ in range(WARM_UP + repeats):
        found["plain"].append(step())
        with left_out:
            found["left out"].append(step())
        with fastrnn.GradientMonitor(model):
            found["observed"].append(step())
    return {kind: seconds[WARM_UP:] for kind, seconds in found.items()}


def lowest_tenth(seconds: list[float]) -> float:
    return statistics.fmean(sorted(seconds)[: max(1, len(seconds) // 10)])


def cost(plain: float, left_out: float, observed: float) -> float:
    """The share that a monitor with `every=EVERY` adds to the time of a training."""
    return ((EVERY - 1) * (left_out - plain) + (observed - plain)) / (EVERY * plain)


def measure(name: str, repeats: int) -> dict:
    seconds = {kind: lowest_tenth(found) for kind, found in times(CASES[name], repeats).items()}
    row = {"case": name, **CASES[name], "every": EVERY, "repeats": repeats}
    row |= {f"{kind} ms": round(1e3 * value, 4) for kind, value in seconds.items()}
    return row | {"cost": round(cost(*seconds.values()), 5)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.monitor_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="JSON", help="the results")
    parser.add_argument("--repeats", type=int, default=200, metavar="N", help="steps of each kind")
    options = parser.parse_args(argv)
    rows = []
    for name in CASES:
        rows.append(measure(name, options.repeats))
        print(f"{name}: {100 * rows[-1]['cost']:+.2f} % with the monitor every {EVERY} steps: {rows[-1]}", flush=True)
        files.write(options.out, files.head("cpu"), "runs", rows)


if __name__ == "__main__":
    main()
