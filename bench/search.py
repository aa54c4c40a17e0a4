"""Finds tiles for the Triton scan on this GPU: every candidate is checked, then timed, forward and backward.

    python -m bench.search bench/results --hidden 512 1024 --batch 64 --seconds 300

writes tiles-<device>.json there and prints, per cell, dtype, H and B, the best of each mode: what goes into the tables
of `fastrnn/tiles.py` by hand. Nothing is searched at import or at a call. Compilation takes most of the time, so the
candidates come in random order (seeded), and what the budget leaves out is counted.
"""

import argparse
import json
import random
import time
from itertools import product
from pathlib import Path

import torch

from fastrnn import tiles
from fastrnn.arguments import IncomingGradients, Kept, ScanInputs, Walk
from fastrnn.backends import triton as launcher
from fastrnn.cell_table import CELLS

from . import machine

STEPS = 64  # enough for a steady state, whatever T will be
REPEATS = 5
# In units of the dtype's eps and of the largest element: two tiles add the same products in another order.
TOLERANCE = {torch.bfloat16: 16.0, torch.float16: 16.0, torch.float32: 2.0**13 * 4}  # TF32 has 13 bits less


def candidates(cell: str, dtype: torch.dtype, H: int, B: int) -> list[tuple]:
    """All tiles worth a look, by mode; those that do not fit the chip fail when they are tried."""
    most_rows = max(16, 1 << (B - 1).bit_length())
    rows = [b for b in (16, 32, 64, 128) if b <= most_rows]
    own = tiles.choose(cell, dtype, H, B)
    found = [own] if own.mode == "local" else []
    for mode in ("stepwise", "grouped"):
        for block_b, block_h, block_k, warps in product(rows, (16, 32, 64), (32, 64, 128), (4, 8)):
            stages = (2, 3, 4) if mode == "stepwise" else (1,)
            found += [tiles.Tile(mode, block_b, block_h, block_k, warps, n) for n in stages]
    found += [tiles.GemmTile(block_b, warps) for block_b, warps in product((1, 2, 4, 8), (4, 8, 16))]
    random.Random(0).shuffle(found)
    return found


class Layer:
    """Random arguments of one layer, and the calls that a tile is timed on."""

    def __init__(self, cell: str, dtype: torch.dtype, H: int, B: int):
        spec = CELLS[cell]
        G = len(spec.gates)

        def randn(*shape, dtype=dtype):
            return torch.randn(shape, device="cuda").to(dtype)

        self.walk, self.incoming = Walk(cell, reverse=False, backend="triton"), IncomingGradients(dy=randn(STEPS, B, H))
        self.inputs = ScanInputs(
            gx=randn(STEPS, B, G * H),
            w_hh=(torch.randn(G * H, H, device="cuda") / H**0.5).to(dtype),
            h0=randn(B, H),
            c0=randn(B, H, dtype=torch.float32) if "c" in spec.states else None,
            b_hh=randn(G * H) if spec.distinct_dgh else None,
        )

    def forward(self, tile):
        return launcher.forward(self.inputs, self.walk, save=True, tile=tile)

    def backward(self, tile, kept: Kept):
        inputs = self.inputs._replace(gx=None)
        return launcher.backward(self.incoming, kept, inputs, self.walk, norms=False, tile=tile)


def microseconds(call) -> float:
    """Of one step: the median of several runs."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(REPEATS):
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / STEPS)
    return sorted(found)[REPEATS // 2]


def wrong(got, want, dtype: torch.dtype) -> bool:
    """Whether any output is off by more than rounding."""
    tolerance = TOLERANCE[dtype] * torch.finfo(dtype).eps
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if b is not None and b.numel()]
    return any(not (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1) for a, b in pairs)


def search(cell: str, dtype: torch.dtype, H: int, B: int, until: float) -> dict:
    """The record of one key: every tile that was tried, fastest first, and how many were not."""
    torch.manual_seed(0)
    problem, tried = Layer(cell, dtype, H, B), []
    base = tiles.choose(cell, dtype, H, B)
    outputs = problem.forward(base)
    kept = Kept(outputs.y, outputs.c, outputs.saved)
    gradients = problem.backward(base, kept)
    left = candidates(cell, dtype, H, B)
    while left and time.monotonic() < until:
        tile = left.pop()
        row = {"mode": tile.mode, "tile": list(tile)}
        try:
            forward, backward = problem.forward(tile), problem.backward(tile, kept)
            if wrong(forward, outputs, dtype) or wrong(backward, gradients, dtype):
                row["failed"] = "wrong"
            else:
                row["forward_us"] = microseconds(lambda tile=tile: problem.forward(tile))
                row["backward_us"] = microseconds(lambda tile=tile: problem.backward(tile, kept))
        except Exception as error:  # a tile that does not fit is what most of them are
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        tried.append(row)
    tried.sort(key=lambda row: row["forward_us"] + row["backward_us"] if "forward_us" in row else float("inf"))
    key = {"cell": cell, "dtype": str(dtype).removeprefix("torch."), "H": H, "B": B, "chosen now": list(base)}
    return {**key, "not tried": len(left), "tiles": tried}


def summary(record: dict) -> str:
    """The best of each mode."""
    lines = [f"{record['cell']} {record['dtype']} H={record['H']} B={record['B']}, {record['not tried']} not tried"]
    good = [row for row in record["tiles"] if "forward_us" in row]
    for mode in dict.fromkeys(row["mode"] for row in good):
        row = next(row for row in good if row["mode"] == mode)
        lines.append(f"  {mode:9s} {row['forward_us']:8.2f} + {row['backward_us']:8.2f} us a step  {row['tile']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", nargs="+", default=["lstm", "gru"], choices=CELLS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 256, 512, 1024])
    parser.add_argument("--batch", nargs="+", type=int, default=[64])
    parser.add_argument("--seconds", type=float, default=300.0, help="of the whole search, shared by the keys")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a search needs a CUDA GPU")
    keys = list(product(arguments.cells, arguments.dtypes, arguments.hidden, arguments.batch))
    records, share = [], arguments.seconds / len(keys)
    for cell, dtype, H, B in keys:
        records.append(search(cell, getattr(torch, dtype), H, B, time.monotonic() + share))
        print(summary(records[-1]), flush=True)
    name = machine.device_name("cuda").replace(" ", "-")
    content = {"machine": machine.describe("cuda"), "commit": machine.commit(), "steps": STEPS, "keys": records}
    (arguments.out / f"tiles-{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
