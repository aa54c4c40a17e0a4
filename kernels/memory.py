"""Loads and stores of tiles of `[..., B, planes * H]` tensors, and the flags of a step.

A tile is BLOCK_B rows of the batch by BLOCK_H hidden units. `Tile` says which elements these are. Its first row is a
64-bit index among all rows of a tensor; the offsets from there are 32 bits wide.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# The bits of fastrnn/cell_table.py.
PAD = tl.constexpr(1)
RESET = tl.constexpr(2)
START = tl.constexpr(4)

# Tiles of at least this many columns avoid changes of layout. Narrower ones would spill registers.
WIDE = tl.constexpr(32)

EVERY_CACHE = tl.constexpr("")  # a plain string cannot be a default in Triton 3.6


class BatchTile(NamedTuple):
    """BLOCK_B rows of the batch at one step. A named tuple exists in the compiler only; no code is made for it."""

    row: tl.tensor  # int64, the index of the first row in a tensor [D, T, B, ...]
    origin: tl.tensor  # int64, the index of the first row in a tensor [D, B, ...]
    rows: tl.tensor  # [BLOCK_B] offsets from the first row
    row_inside: tl.tensor  # [BLOCK_B] whether the batch has that row


class Tile(NamedTuple):
    """The same rows by BLOCK_H hidden units."""

    row: tl.tensor
    origin: tl.tensor
    rows: tl.tensor
    row_inside: tl.tensor
    head: tl.tensor  # the number of their head; 0 without heads
    units: tl.tensor  # [BLOCK_H] hidden units, counted in the head
    cols: tl.tensor  # [BLOCK_H] the same, counted in the layer
    col_inside: tl.tensor  # [BLOCK_H] whether the layer, or the head, has that unit
    inside: tl.tensor  # [BLOCK_B, BLOCK_H] whether the tensor has that element


@triton.jit
def head_tile(batch_tile, head, index, BLOCK_H: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr):
    """The rows of `batch_tile` (a BatchTile or a Tile) by the hidden units of tile `index` of a head."""
    UNITS: tl.constexpr = H // HEADS
    units = index * BLOCK_H + tl.arange(0, BLOCK_H)
    cols, col_inside = units, units < UNITS
    if HEADS > 1:
        cols = head * UNITS + units
    inside = batch_tile.row_inside[:, None] & col_inside[None, :]
    return Tile(
        batch_tile.row, batch_tile.origin, batch_tile.rows, batch_tile.row_inside, head, units, cols, col_inside, inside
    )


@triton.jit
def hidden_tile(batch_tile, index, BLOCK_H: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr = 1):
    """The same by the units of tile `index` of all heads. The tiles of a head follow those of the head before it; no
    tile has units of two heads."""
    head, of_head = 0, index
    if HEADS > 1:
        TILES: tl.constexpr = (H // HEADS + BLOCK_H - 1) // BLOCK_H
        head, of_head = index // TILES, index % TILES
    return head_tile(batch_tile, head, of_head, BLOCK_H, H, HEADS)


@triton.jit
def masked(tile, mask):
    """The tile without the elements where `mask` is false."""
    return Tile(
        tile.row, tile.origin, tile.rows, tile.row_inside, tile.head, tile.units, tile.cols, tile.col_inside,
        tile.inside & mask,
    )  # fmt: skip


@triton.jit
def zero_tile(tile):
    return tl.zeros((tile.rows.shape[0], tile.cols.shape[0]), tl.float32)


@triton.jit
def offset(ptr, elements):
    """The pointer, moved on by `elements`; None where there is no tensor."""
    moved = ptr
    if ptr is not None:
        moved = ptr + elements
    return moved


@triton.jit
def step_at(i, T, walks_back):
    """The index t of the i-th step of a scan."""
    return tl.where(walks_back, T - 1 - i, i)


@triton.jit
def each_row(i, rows):
    """A number, once per row, for conditions on it: in Triton's interpreter, the mask of a tile combined with a scalar
    condition has no type that a load takes."""
    return tl.zeros_like(rows) + i


@triton.jit
def load_stored(ptr, row, tile, PLANES: tl.constexpr, H: tl.constexpr, CACHE: tl.constexpr = EVERY_CACHE):
    """The tiles of all planes from `row` on, in the dtype they are stored in; zero outside. CACHE: see `tl.load`."""
    planes = ()
    for k in tl.static_range(PLANES):
        offsets = tile.rows[:, None] * (PLANES * H) + (k * H + tile.cols)[None, :]
        plane = tl.load(ptr + row * (PLANES * H) + offsets, mask=tile.inside, other=0.0, cache_modifier=CACHE)
        planes = planes + (plane,)
    return planes


@triton.jit
def load_planes(ptr, row, tile, PLANES: tl.constexpr, H: tl.constexpr, CACHE: tl.constexpr = EVERY_CACHE):
    """The tiles of `load_stored`, as float32.

    Triton puts a change of layout, which waits for its tile, at the next operation on the tile, or directly after the
    load if there is none. `where` is such an operation, for float32 too, so all loads are issued before the first wait.
    """
    stored, planes = load_stored(ptr, row, tile, PLANES, H, CACHE), ()
    for k in tl.static_range(PLANES):
        planes = planes + (tl.where(tile.inside, stored[k], 0.0).to(tl.float32),)
    return planes


@triton.jit
def load_tile(ptr, row, tile, H: tl.constexpr):
    return load_planes(ptr, row, tile, 1, H)[0]


@triton.jit
def load_plane(ptr, row, tile, k: tl.constexpr, PLANES: tl.constexpr, H: tl.constexpr):
    """The tile of plane k of PLANES, as float32."""
    offsets = tile.rows[:, None] * (PLANES * H) + (k * H + tile.cols)[None, :]
    plane = tl.load(ptr + row * (PLANES * H) + offsets, mask=tile.inside, other=0.0)
    return tl.where(tile.inside, plane, 0.0).to(tl.float32)


@triton.jit
def load_state(ptrs, row, tile, s: tl.constexpr, S: tl.constexpr, H: tl.constexpr):
    """The tile of state s: from the tensor of h, `ptrs[0]`, or from that of the planes of the others, `ptrs[1]`."""
    if s == 0:
        state = load_tile(ptrs[0], row, tile, H)
    else:
        state = load_plane(ptrs[1], row, tile, s - 1, S - 1, H)
    return state


@triton.jit
def decayed(states, decay_ptrs, row, tile, S: tl.constexpr, H: tl.constexpr):
    """The states before a step times their factors; unchanged where there are none."""
    found = states
    if decay_ptrs[0] is not None:
        found = ()
        for s in tl.static_range(S):
            found = found + (states[s] * load_state(decay_ptrs, row, tile, s, S, H),)
    return found


@triton.jit
def load_vectors(ptr, tile, COUNT: tl.constexpr, H: tl.constexpr):
    """A parameter `[COUNT * H]` as COUNT tiles `[1, BLOCK_H]`, float32."""
    vectors = ()
    for k in tl.static_range(COUNT):
        vector = tl.load(ptr + k * H + tile.cols, mask=tile.col_inside, other=0.0).to(tl.float32)
        vectors = vectors + (vector[None, :],)
    return vectors


@triton.jit
def load_beside(parameters_ptr, step_inputs_ptr, row, tile, Q: tl.constexpr, N: tl.constexpr, H: tl.constexpr):
    """The planes that a user's cell reads besides its gates and states: those of its Q parameters, then those of its N
    inputs at this step."""
    vectors, beside = load_vectors(parameters_ptr, tile, Q, H), ()
    for q in tl.static_range(Q):
        beside = beside + (tl.broadcast_to(vectors[q], tile.inside.shape),)
    return beside + load_planes(step_inputs_ptr, row, tile, N, H)


@triton.jit
def partly_inside(tile, UNITS: tl.constexpr):
    """A tuple of the mask of a tile; an empty one where no tile reaches beyond the units of the layer or head."""
    TILES: tl.constexpr = (UNITS + tile.cols.shape[0] - 1) // tile.cols.shape[0]
    inside = ()
    if TILES * tile.cols.shape[0] != UNITS:
        inside = (tile.inside,)
    return inside


@triton.jit
def store_planes(ptr, row, tile, planes, PLANES: tl.constexpr, H: tl.constexpr):
    for k in tl.static_range(PLANES):
        offsets = tile.rows[:, None] * (PLANES * H) + (k * H + tile.cols)[None, :]
        tl.store(ptr + row * (PLANES * H) + offsets, planes[k].to(ptr.dtype.element_ty), mask=tile.inside)


@triton.jit
def store_as_one(ptr, row, tile, planes, PLANES: tl.constexpr, H: tl.constexpr):
    """Three or four planes, joined to one tile: each change of layout on the way to memory takes barriers."""
    tl.static_assert(PLANES == 3 or PLANES == 4)
    dtype: tl.constexpr = ptr.dtype.element_ty
    first = tl.join(planes[0].to(dtype), planes[1].to(dtype))
    last = tl.join(planes[2].to(dtype), planes[PLANES - 1].to(dtype))
    plane = (tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :])[None, None, :, :]
    offsets = tile.rows[:, None, None, None] * (PLANES * H) + plane * H + tile.cols[None, :, None, None]
    exists = tile.inside[:, :, None, None] & (plane < PLANES)
    tl.store(ptr + row * (PLANES * H) + offsets, tl.join(first, last), mask=exists)


@triton.jit
def store_tile(ptr, row, tile, values, H: tl.constexpr):
    store_planes(ptr, row, tile, (values,), 1, H)


@triton.jit
def load_flags(flags_ptr, batch_tile):
    """The flags `[BLOCK_B]` of the tile's step; None where the call has none."""
    flags = None
    if flags_ptr is not None:
        flags = tl.load(flags_ptr + batch_tile.row + batch_tile.rows, mask=batch_tile.row_inside, other=0)
    return flags


@triton.jit
def choose(flags, BIT: tl.constexpr, where_set, otherwise):
    """Row by row: `where_set` where the bit is set, else `otherwise`. Without flags, `otherwise`."""
    chosen = otherwise
    if flags is not None:
        chosen = tl.where(((flags & BIT) != 0)[:, None], where_set, otherwise)
    return chosen
