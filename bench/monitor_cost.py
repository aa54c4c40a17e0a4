"""What the monitor costs a long training: `python -m bench.monitor_cost` writes bench/results/monitor-cost.json.

Kinds of training steps take turns in one process: without a monitor, and inside one that observes the step or leaves it
out. An observed step runs the scan in place of torch's own kernels, and makes a report. A step that is left out
runs the same operations as without a monitor, and some Python that does not depend on the sizes; that is measured on a
tiny network, where it is not lost in the noise. The time is that of the processor in this process; of each kind the
lowest tenth counts, since other work on the machine only adds to it.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch

import fastrnn

from . import files

RESULTS = Path(__file__).parent / "results" / "monitor-cost.json"
EVERY, WARM_UP = 50, 5
KINDS = ("plain", "left out", "observed")
TINY, TINY_REPEATS = {"cell": "GRU", "T": 1, "B": 1, "H": 4, "layers": 1}, 2000
CASES = {
    "small": {"cell": "GRU", "T": 100, "B": 32, "H": 64, "layers": 1},
    "middle": {"cell": "LSTM", "T": 100, "B": 32, "H": 128, "layers": 1},
}


def times(case: dict, repeats: int, kinds: tuple[str, ...]) -> dict[str, list[float]]:
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
    found = {kind: [] for kind in kinds}
    for _ in range(WARM_UP + repeats):
        for kind, seconds in found.items():
            monitor = {"plain": nullcontext(), "left out": left_out, "observed": fastrnn.GradientMonitor(model)}[kind]
            with monitor:
                seconds.append(step())
    return {kind: seconds[WARM_UP:] for kind, seconds in found.items()}


def lowest_tenth(seconds: list[float]) -> float:
    return statistics.fmean(sorted(seconds)[: max(1, len(seconds) // 10)])


def cost(plain: float, observed: float, left_out: float) -> float:
    """The share that a monitor with `every=EVERY` adds to the time of a training.

    Args:
        plain, observed: the time of a step.
        left_out: what a step takes longer that the monitor leaves out.
    """
    return ((EVERY - 1) * left_out + observed - plain) / (EVERY * plain)


def fixed_part() -> float:
    """Seconds that a step takes longer which the monitor leaves out."""
    plain, left_out = map(lowest_tenth, times(TINY, TINY_REPEATS, ("plain", "left out")).values())
    return left_out - plain


def measure(name: str, repeats: int, left_out: float) -> dict:
    plain, observed = map(lowest_tenth, times(CASES[name], repeats, ("plain", "observed")).values())
    return {
        "case": name, **CASES[name], "every": EVERY, "repeats": repeats, "plain ms": round(1e3 * plain, 4),
        "observed ms": round(1e3 * observed, 4), "left out ms more": round(1e3 * left_out, 4),
        "cost": round(cost(plain, observed, left_out), 5),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.monitor_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="JSON", help="the results")
    parser.add_argument("--repeats", type=int, default=100, metavar="N", help="steps of each kind")
    options = parser.parse_args(argv)
    rows, left_out = [], fixed_part()
    for name in CASES:
        rows.append(measure(name, options.repeats, left_out))
        print(f"{name}: {100 * rows[-1]['cost']:+.2f} % with the monitor every {EVERY} steps: {rows[-1]}", flush=True)
        files.write(options.out, files.head("cpu"), "runs", rows)


if __name__ == "__main__":
    main()
