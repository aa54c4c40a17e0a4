"""What the monitor costs a long training: `python -m bench.monitor_cost` counts the instructions of training steps.

Valgrind counts them, so the result does not depend on what else the machine does. A child process trains for 1 and for
101 steps, without and with `GradientMonitor(model, every=50)`; the difference is 100 steps, of which the monitor
observes 2. An observed step runs the scan in place of torch's own kernels, and makes a report.
"""

import argparse
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from . import files

RESULTS = Path(__file__).parent / "results" / "monitor-cost.json"
EVERY, STEPS = 50, 100
CASES = {
    "small": {"cell": "GRU", "T": 50, "B": 16, "H": 32, "layers": 1},
    "middle": {"cell": "LSTM", "T": 100, "B": 32, "H": 128, "layers": 1},
}


def train(case: dict, steps: int, watched: bool) -> None:
    """Adam on a squared output, in one thread."""
    import torch

    import fastrnn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(fastrnn, case["cell"])(case["H"], case["H"], case["layers"])
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(case["T"], case["B"], case["H"])
    with fastrnn.GradientMonitor(model, every=EVERY) if watched else nullcontext():
        for _ in range(steps):
            optimizer.zero_grad()
            model(x)[0].square().mean().backward()
            optimizer.step()


def instructions(name: str, steps: int, watched: bool) -> int:
    """Of a child process that trains, from start to end."""
    child = [sys.executable, "-m", "bench.monitor_cost", "--case", name, "--steps", str(steps)]
    tool = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    done = subprocess.run(
        tool + child + ["--watched"] * watched,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)[1].replace(",", ""))


def measure(name: str) -> dict:
    """Instructions of STEPS steps without and with the monitor, and the share that it adds."""
    plain, watched = (instructions(name, 1 + STEPS, w) - instructions(name, 1, w) for w in (False, True))
    return CASES[name] | {
        "case": name, "every": EVERY, "steps": STEPS, "plain": plain, "watched": watched,
        "cost": round(watched / plain - 1, 5),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.monitor_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="JSON", help="the results")
    parser.add_argument("--case", choices=CASES, help="train this one for --steps steps, and count nothing")
    parser.add_argument("--steps", type=int, default=1, help="of --case")
    parser.add_argument("--watched", action="store_true", help="with the monitor")
    options = parser.parse_args(argv)
    if options.case:
        train(CASES[options.case], options.steps, options.watched)
        return
    rows = []
    for name in CASES:
        rows.append(measure(name))
        print(
            f"{name}: {100 * rows[-1]['cost']:.2f} % more instructions with the monitor every {EVERY} steps", flush=True
        )
        files.write(options.out, files.head("cpu"), "runs", rows)


if __name__ == "__main__":
    main()
