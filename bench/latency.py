"""How long CTAs take to agree on this GPU, by each means: `limit.py` estimates these figures where they are missing.

    python -m bench.latency bench/results        measures, and writes latency-<device>.json there

It needs nvcc and a GPU. Each figure is the median of several runs of many rounds that contain only the agreement.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import machine

SOURCE = Path(__file__).with_name("latency.cu")
KINDS = ("counter", "flag", "cluster", "cluster barrier", "kernel edge")  # in the order of `Kind` in latency.cu
CTAS = {
    "counter": (2, 4, 8, 16, 32, 64, 132),
    "flag": (2, 4, 8, 16, 32, 64),
    "cluster": (2, 4, 8, 16),  # as the scan does it; `cluster barrier` is the alternative
    "cluster barrier": (2, 4, 8, 16),
    "kernel edge": (132,),
}
ROUNDS, REPEATS = 2000, 7
EDGES = 64  # kernels in the graph
TYPICAL = {"flag": 32, "cluster": 8, "kernel edge": 132}  # CTAs of a group


def compile_line(out: str, architectures: tuple[str, ...] = ("80", "90")) -> list[str]:
    line = ["nvcc", "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
    return [*line, *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures), str(SOURCE), "-o", out]


def seconds(library: ctypes.CDLL, kind: str, ctas: int, groups: int) -> float:
    """Of one agreement. RuntimeError where the device cannot do it, or where a wait gave up."""
    rounds = EDGES if kind == "kernel edge" else ROUNDS
    found = []
    while len(found) < REPEATS:
        found.append(library.agreement_seconds(KINDS.index(kind), ctas, groups, rounds))
        if found[-1] < 0:
            raise RuntimeError(f"{kind}, {groups} groups of {ctas}: code {found[-1]:.0f} (see latency.cu)")
    return statistics.median(found)


def measure() -> dict:
    """`{kind: {"<CTAs> x <groups>": seconds}}`: one group alone, and as many groups as run at once, one CTA an SM."""
    found: dict[str, dict[str, float | str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "latency.so"))
        subprocess.run(compile_line(out), check=True)
        library = ctypes.CDLL(out)
        library.agreement_seconds.restype = library.groups_at_once.restype = ctypes.c_double
        for kind in KINDS:
            rows = found[kind] = {}
            for ctas in CTAS[kind]:
                most = int(library.groups_at_once(KINDS.index(kind), ctas))
                for groups in dict.fromkeys((1, max(1, most))):
                    try:
                        rows[f"{ctas} x {groups}"] = seconds(library, kind, ctas, groups)
                    except RuntimeError as reason:
                        rows[f"{ctas} x {groups}"] = str(reason)
    return found


def typical(folder: str | Path, device_name: str) -> dict[str, float]:
    """By means, the seconds of groups of the usual size (`TYPICAL`) on a full device; empty where there is no file."""
    file = path(folder, device_name)
    found = json.loads(file.read_text())["seconds"] if file.exists() else {}
    full = {}
    for kind, ctas in TYPICAL.items():
        values = [v for size, v in found.get(kind, {}).items() if int(size.split()[0]) == ctas]
        full |= {kind: values[-1]} if values and isinstance(values[-1], float) else {}
    return full


def path(folder: str | Path, device_name: str) -> Path:
    return Path(folder, f"latency-{device_name.replace(' ', '-')}.json")


def main() -> None:
    if len(sys.argv) != 2 or not torch.cuda.is_available():
        sys.exit("usage: python -m bench.latency FOLDER, on a machine with a CUDA GPU and nvcc")
    record = {"machine": machine.describe("cuda"), "commit": machine.commit(), "seconds": measure()}
    out = path(sys.argv[1], machine.device_name("cuda"))
    out.write_text(json.dumps(record, indent=1) + "\n")
    for kind, rows in record["seconds"].items():
        for size, value in rows.items():
            print(f"{kind:16s} {size:>9s}  {value if isinstance(value, str) else f'{value * 1e6:.3f} us'}")
    print(out)


if __name__ == "__main__":
    main()
