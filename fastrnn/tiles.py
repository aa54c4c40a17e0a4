"""Tile sizes and warps of the Triton scan, as data.

The keys are the number of gates, the element size, the hidden size and a bucket of the batch, never B or T themselves.
The rows were found by reading compiled kernels (registers, spills and shared memory, for sm_80 and sm_90), and
tests/test_compile_only.py checks them. They have not been timed yet.
"""

from typing import NamedTuple

import torch

from .cell_table import spec_of

SHARED_MEMORY_SM80 = 163 * 1024  # bytes that one program can have; sm_90 has 227 KB
WORKSPACE = 6 * 1024  # bytes of shared memory that a local program needs besides W_hh, at 16 rows
PROCESSORS_H100 = 132  # multiprocessors
MODES = ("local", "grouped", "stepwise", "gemm")


class Tile(NamedTuple):
    """The part of the scan that one program takes, and how it runs.

    mode: "local": one program holds all of W_hh, or one head of it, and walks all steps. "grouped": the programs of a
        tile of the batch share W_hh and walk all steps, with a barrier after each. "stepwise": a launch takes one step.
    block_b, block_h: rows of the batch and hidden units of a tile.
    block_k: units that a product takes at a time; in mode "local", equal to block_h.
    warps, stages: of the compiled program; time loops always have one stage.
    """

    mode: str
    block_b: int
    block_h: int
    block_k: int
    warps: int
    stages: int

    def across(self, hidden_size: int, heads: int = 1) -> int:
        """The number of tiles of the hidden units; no tile has units of two heads."""
        return heads * -(-(hidden_size // heads) // self.block_h)


class GemmTile(NamedTuple):
    """The same in mode "gemm", where PyTorch multiplies: `block_b` rows of the batch, all of H."""

    block_b: int
    warps: int
    mode = "gemm"


# A cell whose number of gates is not in a table takes the rows of the next larger number, which needs more registers.
# Shared memory is computed for the cell's own gates.

# (gates, bytes per element): rows of (largest H, block_h, warps). The first that H and shared memory allow is taken.
# Between two powers of two, several smaller tiles fit where the next power of two does not. More than 3 x 3 of them
# take half a minute to compile.
LOCAL = {
    (4, 2): ((16, 16, 4), (32, 32, 4), (64, 64, 4), (128, 128, 8)),
    (4, 4): ((16, 16, 4), (32, 32, 4), (64, 64, 8), (96, 32, 8)),
    (3, 2): ((16, 16, 4), (32, 32, 4), (64, 64, 4), (128, 128, 8), (192, 64, 8)),
    (3, 4): ((16, 16, 4), (32, 32, 4), (64, 64, 8), (96, 32, 8)),
    (1, 2): ((16, 16, 4), (32, 32, 4), (64, 64, 4), (128, 128, 8), (256, 256, 8)),
    (1, 4): ((16, 16, 4), (32, 32, 4), (64, 64, 4), (128, 128, 8), (192, 64, 8)),
}

# (gates, bytes per element): rows of (largest H, or units of a head, block_b, block_h, block_k, warps). The first row
# that H, shared memory and the number of multiprocessors allow is taken. Triton gives all warps to the longer side of a
# product, 16 rows or 8 columns each; further warps repeat the work of the others (docs/notes/compiler.md).
GROUPED = {
    (4, 2): ((512, 16, 32, 64, 4), (768, 16, 32, 128, 4), (1024, 16, 16, 128, 2), (1024, 32, 16, 64, 2)),
    (4, 4): ((384, 16, 32, 64, 4), (512, 16, 16, 64, 2)),
    (3, 2): ((512, 16, 32, 64, 4), (1024, 16, 32, 128, 4), (1024, 16, 16, 128, 2)),
    (3, 4): ((512, 16, 32, 64, 4), (768, 16, 16, 64, 2)),
    (1, 2): ((256, 16, 32, 64, 4), (512, 16, 32, 128, 4), (1024, 16, 64, 128, 4)),
    (1, 4): ((1024, 16, 32, 64, 4),),
}

# (bytes per element, whether tensor cores multiply): rows of (largest B of the bucket, tile). Without tensor cores a
# product takes its operands from registers, all BLOCK_K units at once: twice as many spill, most under Triton 3.5.
STEPWISE = {
    (2, True): (
        (16, Tile("stepwise", 16, 32, 64, 4, 3)),
        (64, Tile("stepwise", 32, 64, 32, 8, 3)),
        (None, Tile("stepwise", 64, 32, 64, 8, 3)),
    ),
    (4, True): (
        (16, Tile("stepwise", 16, 32, 64, 4, 3)),
        (64, Tile("stepwise", 32, 64, 32, 8, 3)),
        (None, Tile("stepwise", 64, 32, 32, 8, 3)),
    ),
    (4, False): (
        (16, Tile("stepwise", 16, 32, 32, 8, 3)),
        (64, Tile("stepwise", 32, 64, 16, 8, 3)),
        (None, Tile("stepwise", 64, 32, 16, 8, 3)),
    ),
}

# Rows of (largest H, tile) of mode "gemm". Beyond H = 2048, the backward with layer norm spills.
GEMM = (
    (64, GemmTile(4, 4)),
    (512, GemmTile(1, 4)),
    (1024, GemmTile(1, 8)),
    (None, GemmTile(1, 16)),
)


def _rows_for(table: dict[tuple[int, int], tuple], gates: int, size: int) -> tuple:
    """The rows of the table for this number of gates, or for the next larger one; none where there is no larger one."""
    larger = [known for known, known_size in table if known_size == size and known >= gates]
    return table[min(larger), size] if larger else ()


def _gemm(hidden_size: int) -> GemmTile:
    return next(tile for largest, tile in GEMM if largest is None or hidden_size <= largest)


def _local(gates: int, size: int, hidden_size: int, tensor_cores: bool, shared_memory: int) -> Tile | None:
    for largest, block, warps in _rows_for(LOCAL, gates, size):
        padded = -(-hidden_size // block) * block
        fits = hidden_size <= largest and gates * padded * padded * size + WORKSPACE <= shared_memory
        # Without tensor cores, products of several tiles keep W_hh in registers, and spill.
        if fits and (padded == block or tensor_cores):
            return Tile("local", 16, block, block, warps, 1)
    return None


def _without_w_hh(hidden_size: int) -> Tile:
    """Of a cell without W_hh: every program is alone, whatever H is."""
    block = min(64, max(16, 1 << (hidden_size - 1).bit_length()))
    return Tile("local", 16, block, block, 4, 1)


def _grouped(
    gates: int,
    size: int,
    hidden_size: int,
    heads: int,
    batch_size: int,
    tensor_cores: bool,
    shared_memory: int,
    processors: int,
) -> Tile | None:
    units = hidden_size // heads
    if not tensor_cores:
        return None  # products of several tiles keep W_hh in registers, and spill
    for largest, block_b, block_h, block_k, warps in _rows_for(GROUPED, gates, size):
        tile = Tile("grouped", block_b, block_h, block_k, warps, 1)
        padded = -(-units // block_k) * block_k
        weights = gates * block_h * padded * size
        operand = 2 * gates * block_b * block_k * size  # of the backward's product, two tiles at a time
        programs = -(-batch_size // block_b) * tile.across(hidden_size, heads)
        # All programs must run at once, and W_hh leaves no room for two on a multiprocessor.
        if units <= largest and weights + operand <= shared_memory and programs <= processors:
            return tile
    return None


def _stepwise(gates: int, size: int, batch_size: int, tensor_cores: bool, shared_memory: int) -> Tile | None:
    rows = STEPWISE[size, tensor_cores]
    tile = next(tile for largest, tile in rows if largest is None or batch_size <= largest)
    # Bytes of the backward, per unit. Triton keeps a stage less in shared memory (on sm_90, which has the room, all).
    operands = (tile.stages - 1) * gates * (tile.block_b + tile.block_h) * size
    while operands * tile.block_k > shared_memory and tile.block_k > 16:
        tile = tile._replace(block_k=tile.block_k // 2)
    return tile if operands * tile.block_k <= shared_memory else None


def why_not_mode(cell: str, mode: str | None) -> str | None:
    """Why a mode cannot run a cell, whatever its sizes."""
    if mode in ("grouped", "stepwise") and not spec_of(cell).recurrent:
        return f"mode {mode!r} of the Triton scan is for the product with W_hh, and {spec_of(cell).name} has none"
    return None


def choose(
    cell: str,
    dtype: torch.dtype,
    hidden_size: int,
    batch_size: int,
    precision: str = "tf32",
    mode: str | None = None,
    shared_memory: int = SHARED_MEMORY_SM80,
    processors: int = PROCESSORS_H100,
    heads: int = 1,
) -> Tile | GemmTile:
    """The tile for one layer: local where W_hh, or a head of it, fits one program, else stepwise, or gemm where that
    fits neither. `mode` asks for one of them.

    precision: of float32 products, tf32 or ieee. shared_memory: bytes per program. processors: multiprocessors.
    heads: the number of blocks of W_hh.
    Raises ValueError for an unknown mode, and for a mode or dtype that cannot take this layer.
    """
    spec = spec_of(cell)
    gates, size = len(spec.gates), dtype.itemsize
    tensor_cores = size == 2 or precision == "tf32"
    if mode not in (None, *MODES):
        raise ValueError(f"mode {mode!r} of the Triton scan; known are {', '.join(MODES)}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the Triton scan has no tile for a {spec.name} of {dtype}; it takes float32 and half types")
    tile = None
    reason = why_not_mode(cell, mode)
    if reason:
        raise ValueError(reason)
    if not spec.recurrent:
        return _gemm(hidden_size) if mode == "gemm" else _without_w_hh(hidden_size)
    if mode in (None, "local"):
        tile = _local(gates, size, hidden_size // heads, tensor_cores, shared_memory)
    if mode == "grouped":
        tile = _grouped(gates, size, hidden_size, heads, batch_size, tensor_cores, shared_memory, processors)
    if mode == "stepwise" or (mode is None and tile is None):
        tile = _stepwise(gates, size, batch_size, tensor_cores, shared_memory)
    if mode == "gemm" or (mode is None and tile is None):
        tile = _gemm(hidden_size)
    if tile is None:
        width = f"{hidden_size} in {heads} heads" if heads > 1 else str(hidden_size)
        raise ValueError(
            f"mode {mode!r} of the Triton scan cannot take a {spec.name} of {dtype}, hidden size {width} and "
            f"batch size {batch_size}: {shared_memory} bytes of shared memory on {processors} multiprocessors hold no "
            f"such tile (float32 products: {precision})"
        )
    return tile
