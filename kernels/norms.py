"""Row norms that neither overflow nor underflow, and the finishing reduction over the tiles of a row.

A norm is the norm of the norms of its parts, so a program that holds a tile of a row writes one number, the tile's own
norm, and the reader takes `row_norm` of those numbers. No atomics, a fixed order, and no pair (maximum, sum) to carry.
"""

import triton
import triton.language as tl


@triton.jit
def square(x):
    """In float64, where the square of no float32 over- or underflows."""
    wide = x.to(tl.float64)
    return wide * wide


@triton.jit
def root(x):
    """The square root of a float64 in float32, without one in float64: a factor of four to some power comes before, its
    root after."""
    up = tl.where(x < 1e-30, 2.0**192, tl.where(x > 1e30, 2.0**-192, 1.0))
    down = tl.where(x < 1e-30, 2.0**-96, tl.where(x > 1e30, 2.0**96, 1.0))
    return tl.sqrt((x * up).to(tl.float32)) * down


@triton.jit
def row_norms(tiles, COUNT: tl.constexpr):
    """Euclidean norms over the last dimension of 1, 2 or 4 tiles: each `[R, N] -> [R]`, float32; NaN stays NaN.

    All in one reduction, because every reduction makes the warps of a program wait for each other.
    """
    if COUNT == 1:
        sums = (tl.sum(square(tiles[0]), 1),)
    elif COUNT == 2:
        sums = tl.split(tl.sum(tl.join(square(tiles[0]), square(tiles[1])), 1))
    else:
        tl.static_assert(COUNT == 4)
        first, second = tl.join(square(tiles[0]), square(tiles[1])), tl.join(square(tiles[2]), square(tiles[3]))
        first, second = tl.split(tl.sum(tl.join(first, second), 1))
        sums = tl.split(first) + tl.split(second)
    norms = ()
    for k in tl.static_range(COUNT):
        norms = norms + (root(sums[k]),)
    return norms


@triton.jit
def row_norm(x):
    return row_norms((x,), 1)[0]


@triton.jit
def place(values, column, WIDTH: tl.constexpr):
    """`[R] -> [R, WIDTH]`: the values in one column, zeros elsewhere."""
    return tl.where(tl.arange(0, WIDTH)[None, :] == column, values[:, None], 0.0)


@triton.jit
def clip_scale(norm, bound):
    """min(1, bound / norm). `[R] -> [R]`. A NaN norm gives NaN, so that it stays visible."""
    return tl.where(norm <= bound, 1.0, bound / norm)


@triton.jit
def finish_kernel(
    partial_ptr,  # [R, TILES, B] float32: norms of the tiles
    norm_ptr,  # [R, B] float32
    B,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,  # TILES, rounded up to a power of two
    BLOCK_B: tl.constexpr,
):
    """The norms of whole rows from those of their tiles; a program takes one of the R rows and BLOCK_B of the batch."""
    columns = tl.arange(0, BLOCK_B) + tl.program_id(1) * BLOCK_B
    tiles = tl.arange(0, WIDTH)
    row = tl.program_id(0).to(tl.int64)
    inside = (columns < B)[:, None] & (tiles < TILES)[None, :]
    partial = tl.load(partial_ptr + (row * TILES + tiles[None, :]) * B + columns[:, None], mask=inside, other=0.0)
    tl.store(norm_ptr + row * B + columns, row_norm(partial), mask=columns < B)
