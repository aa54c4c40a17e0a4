"""The record that ships for CPUs, from the measurements in `bench/results/auto-cpu.json`.

`python -m bench.shipped fastrnn/evidence/shipped/cpu-2-threads.json` writes it: the slowest call of each bucket
counts, as in `fastrnn tune`. On a quiet machine, `python -m fastrnn tune --threads 2
--minutes 60 --out FILE` makes a fuller record of the same form in its place.
"""

import argparse
from pathlib import Path

import torch

from fastrnn import evidence
from fastrnn.backend_table import Request
from fastrnn.evidence import records

from . import files

SOURCE = Path(__file__).parent / "results/auto-cpu.json"
DATE = "2026-11-25"  # of the commit that was measured


def request(row: dict) -> Request:
    """The call of a row."""
    features = frozenset({"layer_norm"} if row["layer_norm"] else ())
    return Request(
        row["cell"], "cpu", torch.float32, row["H"], row["H"] // 2 if row["projected"] else 0, features, row["T"],
        row["B"], row["packed"], row["mode"] == "train",
    )  # fmt: skip


def record() -> str:
    found = files.read(SOURCE)
    machine, slowest = found["machine"], {}
    for row in found["calls"]:
        ratio = (row["ratio"]["median"], *row["ratio"]["interval"])
        key, against = evidence.key_of(request(row)), "reference" if row["layer_norm"] else "torch.nn"
        if key not in slowest or ratio[2] > slowest[key].ratio[2]:
            slowest[key] = records.Entry(key, "cpu", "measured", DATE, against, ratio)
    where = records.Where(
        machine["device"], machine["cpu"]["capability"], machine["cpu"]["threads"], machine["versions"]["torch"],
        machine["versions"]["triton"], "0.1.0",
    )  # fmt: skip
    return records.text_of(where, [slowest[key] for key in sorted(slowest)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    records.write(parser.parse_args().out, record())


if __name__ == "__main__":
    main()
