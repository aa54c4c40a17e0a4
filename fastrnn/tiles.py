"""Tile sizes and warps of the Triton scan, as data.

Keyed on cell, dtype, hidden size and a bucket of the batch, never on B or T themselves. The rows were found by reading
compiled kernels (registers, spills, shared memory, for sm_80 and sm_90; tests/test_compile_only.py holds them to it).
Nobody has timed them yet.
"""

from typing import NamedTuple

import torch

from .cells import CELLS

SHARED_MEMORY_SM80 = 163 * 1024  # bytes that one program can have; sm_90 has 227 KB
WORKSPACE = 6 * 1024  # what a local program needs in shared memory besides W_hh, at 16 rows


class Tile(NamedTuple):
    """What one program of the scan takes, and how it runs.

    mode: "local": one program holds all of W_hh and walks all steps. "grouped": the programs of a tile of the batch share
        W_hh and walk all steps, with a barrier after each. "stepwise": a launch takes one step.
    block_b, block_h: rows of the batch and hidden units of a tile.
    block_k: units that a product takes at a time; in mode "local", block_h.
    warps, stages: of the compiled program; time loops always have one stage.
    """

    mode: str
    block_b: int
    block_h: int
    block_k: int
    warps: int
    stages: int


# (gates, bytes per element): rows of (largest H, block_h, warps), the first that H and shared memory allow is taken.
# Between powers of two a row of smaller tiles holds what the next power of two cannot. More than 3 x 3 of them take
# half a minute to compile.
LOCAL = {
    (4, 2): ((16, 16, 4), (32, 32, 4), (64, 64, 4), (128, 128, 8)),
    (4, 4): ((16, 16, 4), (32, 32, 4), (64, 64, 8), (96, 32, 8)),
    (3, 2): ((16, 16, 4), (32, 32, 4), (64, 64, 4), (128, 128, 8), (192, 64, 8)),
    (3, 4): ((16, 16, 4), (32, 32, 4), (64, 64, 8), (96, 32, 8)),
    (1, 2): ((16, 16, 4), (32, 32, 4), (64, 64, 4), (128, 128, 8), (256, 256, 8)),
    (1, 4): ((16, 16, 4), (32, 32, 4), (64, 64, 4), (128, 128, 8), (192, 64, 8)),
}

# Bytes per element: rows of (largest B of the bucket, tile).
STEPWISE = {
    2: (
        (16, Tile("stepwise", 16, 32, 64, 4, 3)),
        (64, Tile("stepwise", 32, 32, 64, 8, 3)),
        (None, Tile("stepwise", 64, 32, 64, 8, 3)),
    ),
    4: (
        (16, Tile("stepwise", 16, 32, 64, 4, 3)),
        (64, Tile("stepwise", 32, 32, 32, 8, 3)),
        (None, Tile("stepwise", 64, 32, 32, 8, 3)),
    ),
}


def choose(
    cell: str,
    dtype: torch.dtype,
    hidden_size: int,
    batch_size: int,
    precision: str = "tf32",
    shared_memory: int = SHARED_MEMORY_SM80,
) -> Tile:
    """The tile for one layer. `precision`: of float32 products, tf32 or ieee; `shared_memory`: bytes per program."""
    gates, size = len(CELLS[cell].gates), dtype.itemsize
    for largest, block, warps in LOCAL[gates, size]:
        padded = -(-hidden_size // block) * block
        fits = hidden_size <= largest and gates * padded * padded * size + WORKSPACE <= shared_memory
        # Without tensor cores, products of several tiles keep W_hh in registers, and spill.
        if fits and (padded == block or size == 2 or precision == "tf32"):
            return Tile("local", 16, block, block, warps, 1)
    return next(tile for largest, tile in STEPWISE[size] if largest is None or batch_size <= largest)
