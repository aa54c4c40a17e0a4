"""Row norms that neither overflow nor underflow, and the last reduction, over the tiles of a row.

The norm of a row is the norm of the norms of its tiles. So a program writes one number per tile of a row, and the
reader takes `row_norm` of those numbers: no atomics, a fixed order, and no pair (maximum, sum) to carry.
"""

import triton
import triton.language as tl


@triton.jit
def row_norm(x):
    """Euclidean norm over the last dimension. `[R, N] -> [R]`, float32; right from 1e-45 to 3e38, NaN stays NaN.

    x is squared after a multiplication by a power of two, which is exact, so the largest square stays in range.
    """
    largest = tl.max(tl.abs(x), 1)
    up = tl.where(largest < 1e-15, 2.0**96, tl.where(largest > 1e15, 2.0**-96, 1.0))
    down = tl.where(largest < 1e-15, 2.0**-96, tl.where(largest > 1e15, 2.0**96, 1.0))
    scaled = x * up[:, None]
    return tl.sqrt(tl.sum(scaled * scaled, 1)) * down


@triton.jit
def into_column(values, column, WIDTH: tl.constexpr):
    """`[R] -> [R, WIDTH]`: the values in one column, zeros elsewhere."""
    return tl.where(tl.arange(0, WIDTH)[None, :] == column, values[:, None], 0.0)


@triton.jit
def clip_scale(norm, clip_norm):
    """min(1, clip_norm / norm). `[R] -> [R]`. A NaN norm gives NaN, so that it stays visible."""
    return tl.where(norm <= clip_norm, 1.0, clip_norm / norm)


@triton.jit
def finish_kernel(
    partial_ptr,  # [R, TILES, B] float32: norms of the tiles
    norm_ptr,  # [R, B] float32
    B,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,  # TILES, rounded up to a power of two
    BLOCK_B: tl.constexpr,
):
    """The norms of rows from the norms of their tiles. A program takes one of the R rows and BLOCK_B of the batch."""
    columns = tl.arange(0, BLOCK_B) + tl.program_id(1) * BLOCK_B
    tiles = tl.arange(0, WIDTH)
    row = tl.program_id(0).to(tl.int64)
    inside = (columns < B)[:, None] & (tiles < TILES)[None, :]
    partial = tl.load(partial_ptr + (row * TILES + tiles[None, :]) * B + columns[:, None], mask=inside, other=0.0)
    tl.store(norm_ptr + row * B + columns, row_norm(partial), mask=columns < B)
