"""Instruction counts of short calls, by valgrind's callgrind: unlike times, they are the same on a busy machine.

    python -m bench.instructions bench/results/instructions.json

counts in a process under valgrind, with one thread. "With a graph": a forward that a backward may follow. The
counting is switched on and off from Python by a small C library, which is compiled here against valgrind's headers.
"""

import argparse
import ctypes
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import fastrnn

from . import files

REPEATS, WARM = 20, 30
SWITCH = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


def why_not() -> str | None:
    """Why nothing can be counted here."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if shutil.which("cc") is None:
        return "there is no C compiler"
    return None


def _both(kind: str, H: int):
    """torch.nn's module and fastrnn's, with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(H, H)
    return theirs, fastrnn.convert(theirs)


def calls() -> dict[str, Callable[[], object]]:
    """What is counted, by name: one sequence, H = 64."""
    found = {}
    for kind in ("LSTM", "GRU", "RNN"):
        theirs, ours = _both(kind, 64)
        found |= _calls_of(f"{kind} T=1", theirs, ours, torch.randn(1, 1, 64))
    theirs, ours = _both("LSTM", 64)
    x = torch.randn(20, 1, 64)
    found |= {"LSTM T=20: torch.nn, training": _train(theirs, x), "LSTM T=20: fastrnn, training": _train(ours, x)}
    return found


def _infer(module, x, hx, **arguments) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            module(x, hx, **arguments)

    return run


def _train(module, x, hx=None, **arguments) -> Callable[[], object]:
    return lambda: module(x, hx, **arguments)[0].sum().backward()


def _calls_of(name: str, theirs, ours, x) -> dict[str, Callable[[], object]]:
    h, mask = torch.zeros(1, 1, x.shape[2]), torch.zeros(len(x), 1, dtype=torch.bool)
    hx, frame = (h, h) if isinstance(theirs, torch.nn.LSTM) else h, x[0]
    found = {
        "torch.nn": _infer(theirs, x, hx),
        "fastrnn": _infer(ours, x, hx),
        "fastrnn, step": lambda: ours.step(frame, hx),
        "torch.nn, with a graph": lambda: theirs(x, hx),
        "fastrnn, with a graph": lambda: ours(x, hx),
        "torch.nn, training": _train(theirs, x, hx),
        "fastrnn, training": _train(ours, x, hx),
    }
    if not isinstance(theirs, torch.nn.RNN):
        found["fastrnn, reset_mask, with a graph"] = lambda: ours(x, hx, reset_mask=mask)
        found["fastrnn, reset_mask, training"] = _train(ours, x, hx, reset_mask=mask)
    return {f"{name}: {what}": run for what, run in found.items()}


def _run_all(switch: str) -> None:
    """Under valgrind."""
    library = ctypes.CDLL(switch)
    torch.set_num_threads(1)
    gc.disable()
    for name, run in calls().items():
        for _ in range(WARM):
            run()
        library.begin()
        for _ in range(REPEATS):
            run()
        library.end(name.encode())


def _counted(folder: Path) -> dict[str, int]:
    """Of callgrind's files: the name of each dump, and the instructions of one call."""
    found = {}
    for file in sorted(folder.glob("counts.*"), key=lambda path: path.stat().st_mtime_ns):
        lines = file.read_text(errors="replace").splitlines()
        name = next((line.partition("Client Request: ")[2] for line in lines if line.startswith("desc: Trigger")), "")
        total = next((line.split()[1] for line in lines if line.startswith(("totals:", "summary:"))), None)
        if name and total is not None:
            found[name] = round(int(total) / REPEATS)
    return found


def count() -> dict[str, int]:
    """Instructions of one call each, by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "switch.c").write_text(SWITCH)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "switch.so", folder / "switch.c"], check=True)
        line = [
            "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/counts",
            sys.executable, "-m", "bench.instructions", "--under-valgrind", str(folder / "switch.so"),
        ]  # fmt: skip
        process = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if process.returncode:
            sys.exit(f"valgrind ended with {process.returncode}: {process.stderr[-2000:]}")
        return _counted(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--under-valgrind", metavar="SWITCH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.under_valgrind:
        return _run_all(options.under_valgrind)
    if reason := why_not():
        return print(f"nothing counted: {reason}")
    rows = [{"call": name, "instructions": number} for name, number in count().items()]
    for row in rows:
        print(f"{row['instructions']:>12,}  {row['call']}")
    if options.out:
        files.write(options.out, files.head("cpu"), "calls", rows)


if __name__ == "__main__":
    main()
