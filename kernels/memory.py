"""Tiles of `[..., B, planes * H]` tensors in and out of registers, and the flags of a step.

A tile is BLOCK_B rows of the batch by BLOCK_H hidden units. Its place is `row`, the 64-bit index of its first row among
all rows of the tensor, and small 32-bit offsets `rows`, `cols` from there.
"""

import triton
import triton.language as tl

# The bits of fastrnn/cells.py.
PAD = tl.constexpr(1)
RESET = tl.constexpr(2)
START = tl.constexpr(4)

WIDE = tl.constexpr(32)  # columns: changes of layout are avoided from here on; narrower tiles would spill

EVERY_CACHE = tl.constexpr("")  # a plain string cannot be a default in Triton 3.6


@triton.jit
def of_direction(ptr, direction, size):
    """Where the part of a direction begins, of so many elements each; None where there is no such tensor."""
    part = ptr
    if ptr is not None:
        part = ptr + direction * size
    return part


@triton.jit
def step_at(i, T, back):
    """The index t of the i-th step of a scan."""
    return tl.where(back, T - 1 - i, i)


@triton.jit
def hidden_tile(index, row_inside, BLOCK_H: tl.constexpr, H: tl.constexpr):
    """The columns `[BLOCK_H]` of a tile of the hidden units, and which of its elements exist."""
    cols = index * BLOCK_H + tl.arange(0, BLOCK_H)
    return cols, row_inside[:, None] & (cols < H)[None, :]


@triton.jit
def each_row(i, rows):
    """A number, once per row, for conditions on it: in Triton's interpreter the mask of a tile & one of a scalar has no
    type that a load takes."""
    return tl.zeros_like(rows) + i


@triton.jit
def load_stored(ptr, row, rows, cols, inside, PLANES: tl.constexpr, H: tl.constexpr, CACHE: tl.constexpr = EVERY_CACHE):
    """The tiles of all planes, in the dtype they are stored in; zero outside. CACHE: see `tl.load`."""
    tiles = ()
    for k in tl.static_range(PLANES):
        offsets = rows[:, None] * (PLANES * H) + (k * H + cols)[None, :]
        tile = tl.load(ptr + row * (PLANES * H) + offsets, mask=inside, other=0.0, cache_modifier=CACHE)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def load_planes(ptr, row, rows, cols, inside, PLANES: tl.constexpr, H: tl.constexpr, CACHE: tl.constexpr = EVERY_CACHE):
    """The tiles of `load_stored`, as float32.

    Triton puts the change of layout, which waits for its tile, where the next operation on it stands, or behind its
    load where there is none. `where` is one, for float32, too: so all loads are on their way before the first wait.
    """
    tiles, planes = load_stored(ptr, row, rows, cols, inside, PLANES, H, CACHE), ()
    for k in tl.static_range(PLANES):
        planes = planes + (tl.where(inside, tiles[k], 0.0).to(tl.float32),)
    return planes


@triton.jit
def load_tile(ptr, row, rows, cols, inside, H: tl.constexpr):
    return load_planes(ptr, row, rows, cols, inside, 1, H)[0]


@triton.jit
def store_planes(ptr, row, rows, cols, inside, planes, PLANES: tl.constexpr, H: tl.constexpr):
    for k in tl.static_range(PLANES):
        offsets = rows[:, None] * (PLANES * H) + (k * H + cols)[None, :]
        tl.store(ptr + row * (PLANES * H) + offsets, planes[k].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_as_one(ptr, row, rows, cols, inside, planes, PLANES: tl.constexpr, H: tl.constexpr):
    """Three or four planes, joined to one tile: every change of layout on the way to memory takes barriers."""
    tl.static_assert(PLANES == 3 or PLANES == 4)
    dtype: tl.constexpr = ptr.dtype.element_ty
    first = tl.join(planes[0].to(dtype), planes[1].to(dtype))
    last = tl.join(planes[2].to(dtype), planes[PLANES - 1].to(dtype))
    plane = (tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :])[None, None, :, :]
    offsets = rows[:, None, None, None] * (PLANES * H) + plane * H + cols[None, :, None, None]
    exists = inside[:, :, None, None] & (plane < PLANES)
    tl.store(ptr + row * (PLANES * H) + offsets, tl.join(first, last), mask=exists)


@triton.jit
def store_tile(ptr, row, rows, cols, inside, tile, H: tl.constexpr):
    store_planes(ptr, row, rows, cols, inside, (tile,), 1, H)


@triton.jit
def load_flags(flags_ptr, row, rows, row_inside):
    """The flags `[BLOCK_B]` of one step; None where the call has none."""
    flags = None
    if flags_ptr is not None:
        flags = tl.load(flags_ptr + row + rows, mask=row_inside, other=0)
    return flags


@triton.jit
def choose(flags, BIT: tl.constexpr, where_set, otherwise):
    """Row by row: `where_set` where the bit is set, else `otherwise`. Without flags, `otherwise`."""
    chosen = otherwise
    if flags is not None:
        chosen = tl.where(((flags & BIT) != 0)[:, None], where_set, otherwise)
    return chosen
