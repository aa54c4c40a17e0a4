"""The most memory that a training step takes on a CPU, by Linux's account of a process of its own.

`python -m bench.memory CELL B T H CONTESTANT` is that process: it prints the bytes that its memory grew by, at most,
during two training steps. A step of a tiny batch comes before them, which loads what both need. Memory that the first
step leaves with the allocator counts, as it does for the user: torch's own loop keeps its many small tensors there.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

import fastrnn

from .cases import DEVICE, Case
from .direct import Direct

CONTESTANTS = ("torch.nn", "fastrnn")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _from_status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def grown(step) -> int:
    """Bytes that the resident memory grew by, at most, while `step` ran."""
    CLEAR.write_text("5")  # the peak starts again from what is resident now
    before = _from_status("VmRSS")
    step()
    return _from_status("VmHWM") - before


def training_step(cell: str, B: int, T: int, H: int, contestant: str):
    torch.manual_seed(0)
    library = torch.nn if contestant == "torch.nn" else fastrnn
    module, x = getattr(library, cell.partition("_")[0].upper())(H, H), torch.randn(T, B, H, requires_grad=True)

    def step():
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x)[0].sum().backward()

    return step


def measure(case, broken: Mapping[str, str]) -> dict:
    record = {"suite": case.suite, "case": case.name, **case.describe(), "contestants": {}}
    for name in CONTESTANTS:
        sizes = map(str, (case.B, case.T, case.H))
        line = [sys.executable, "-m", "bench.memory", case.cell, *sizes, name]
        process = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if process.returncode:
            record["contestants"][name] = {"failed": process.stderr[-1000:]}
        else:
            record["contestants"][name] = {"peak_bytes": int(process.stdout)}
    return record


CASES = [
    Case(cell, 64, 100, 256, 256, suite="memory")
    for cell in ("lstm", "gru", "rnn_tanh")
    if DEVICE == "cpu" and CLEAR.exists()
]
SUITE = Direct(CASES, lambda case, truth: {}, ("torch.nn",), 0.0, session_seconds=60.0, case_seconds=0.0)


if __name__ == "__main__":
    _cell, *_sizes, _contestant = sys.argv[1:]
    _B, _T, _H = map(int, _sizes)
    training_step(_cell, 2, 2, _H, _contestant)()
    _step = training_step(_cell, _B, _T, _H, _contestant)
    print(grown(lambda: [_step() for _ in range(2)]))
