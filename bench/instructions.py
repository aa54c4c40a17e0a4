"""Instruction counts of short calls, by valgrind's callgrind: unlike times, they are the same on a busy machine.

    python -m bench.instructions bench/results/instructions.json

counts in a process under valgrind, one thread, with two results: `instructions` of each call, and the versions. The
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
    """What is counted, by name, at B = 1."""
    found = {}
    for kind in ("LSTM", "GRU", "RNN"):
        for H in (64, 256):
            theirs, ours = _both(kind, H)
            for steps in (1, 20) if H == 64 else (1,):
                found |= _calls_of(f"{kind} T={steps} H={H}", theirs, ours, torch.randn(steps, 1, H))
    return found


def _calls_of(name: str, theirs, ours, x) -> dict[str, Callable[[], object]]:
    T, _, H = x.shape
    h, mask = torch.zeros(1, 1, H), torch.zeros(T, 1, dtype=torch.bool)
    hx = (h, h) if isinstance(theirs, torch.nn.LSTM) else h

    def infer(module, **arguments):
        def run():
            with torch.no_grad():
                module(x, hx, **arguments)

        return run

    def train(module, **arguments):
        return lambda: module(x, hx, **arguments)[0].sum().backward()

    found = {"torch.nn": infer(theirs), "fastrnn": infer(ours), "fastrnn, reset_mask": infer(ours, reset_mask=mask)}
    found |= {"torch.nn, with graph": lambda: theirs(x, hx), "fastrnn, with graph": lambda: ours(x, hx)}
    found["fastrnn, reset_mask, with graph"] = lambda: ours(x, hx, reset_mask=mask)
    if T == 1:
        found["fastrnn.step"] = lambda: ours.step(x[0], hx)
    found |= {"torch.nn, training": train(theirs), "fastrnn, training": train(ours)}
    found["fastrnn, reset_mask, training"] = train(ours, reset_mask=mask)
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
