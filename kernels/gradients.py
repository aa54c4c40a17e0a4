"""What a step of the backward scan is made of: the tile of one program, and what the programs leave for each other.

Shapes: T steps, B batch, H hidden, G gates, S states. Row indices are 64 bits wide.
"""

import triton
import triton.language as tl

from .barrier import unless_stuck
from .memory import (
    PAD,
    RESET,
    START,
    WIDE,
    choose,
    each_row,
    hidden_tile,
    load_flags,
    load_planes,
    load_tile,
    store_as_one,
    store_planes,
)  # fmt: skip
from .norms import clip_scale, row_norm
from .products import grouped_product_back, scaled, streamed_product_back


@triton.jit
def previous_states(ptrs, initial, i, row_before, flags, origin, rows, cols, inside, S: tl.constexpr, H: tl.constexpr):
    """The states before step `i`, from where the step before it put them; zero behind a reset."""
    starts = each_row(i, rows) == 0
    if flags is not None:
        starts = starts | ((flags & START) != 0)
    starts = starts[:, None]
    before = ()
    for s in tl.static_range(S):
        # Each element comes from one of the two places; the other load is masked off.
        state = tl.where(
            starts,
            load_tile(initial[s], origin, rows, cols, inside & starts, H),
            load_tile(ptrs[s], row_before, rows, cols, inside & ~starts, H),
        )
        before = before + (choose(flags, RESET, 0.0, state),)
    return before


@triton.jit
def load_states(
    ptrs, row, rows, cols, inside, S: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, H: tl.constexpr
):
    """A tile of each state; zeros where its pointer is None."""
    states = ()
    for s in tl.static_range(S):
        if ptrs[s] is None:
            states = states + (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)
        else:
            states = states + (load_tile(ptrs[s], row, rows, cols, inside, H),)
    return states


@triton.jit
def clamp(tiles, bound, COUNT: tl.constexpr):
    clamped = ()
    for s in tl.static_range(COUNT):
        x = tiles[s]
        # Not tl.clamp, which need not keep NaN.
        clamped = clamped + (tl.where(x > bound, bound, tl.where(x < -bound, -bound, x)),)
    return clamped


@triton.jit
def through_zoneout(dstate, zone_ptrs, row, rows, cols, inside, S: tl.constexpr, H: tl.constexpr):
    """The gradients that go on to the cell's own outputs, and those that go past it to the states before the step."""
    fresh, past = (), ()
    for s in tl.static_range(S):
        if zone_ptrs[s] is None:
            fresh, past = fresh + (dstate[s],), past + (tl.zeros_like(dstate[s]),)
        else:
            zone = load_tile(zone_ptrs[s], row, rows, cols, inside, H)
            fresh, past = fresh + (dstate[s] * (1 - zone),), past + (dstate[s] * zone,)
    return fresh, past


@triton.jit
def past_weights(past, through_cell, carry, flags, S: tl.constexpr):
    """The part of the gradients of the states before the step that does not pass through W_hh."""
    rest = ()
    for s in tl.static_range(S):
        own = choose(flags, RESET, 0.0, past[s] + through_cell[s])
        rest = rest + (choose(flags, PAD, carry[s], own),)
    return rest


@triton.jit
def drop_padded(planes, flags, COUNT: tl.constexpr):
    kept = ()
    for k in tl.static_range(COUNT):
        kept = kept + (choose(flags, PAD, 0.0, planes[k]),)
    return kept


@triton.jit
def arriving(product, rest, scale, flags, recurrent_ptr, origin, rows, cols, inside, S: tl.constexpr, H: tl.constexpr):
    """The gradients of the states before the step: what came through W_hh, and the rest."""
    if recurrent_ptr is not None:
        product = product * load_tile(recurrent_ptr, origin, rows, cols, inside, H)
    whole = scaled(rest, scale, S)
    carry = ()
    for s in tl.static_range(S):
        state = product + whole[s] if s == 0 else whole[s]
        carry = carry + (choose(flags, PAD, rest[s], choose(flags, RESET, 0.0, state)),)
    return carry


@triton.jit
def tile_norm(tile, flags):
    """The norms `[BLOCK_B]` of the rows of a tile, zero at padding."""
    norm = row_norm(tile)
    if flags is not None:
        norm = tl.where((flags & PAD) != 0, 0.0, norm)
    return norm


@triton.jit
def store_norms(ptr, row, batch, rows, row_inside, tiles, flags, S: tl.constexpr, STRIDE):
    """The norm of this tile of each state; STRIDE rows of the batch lie between states."""
    for s in tl.static_range(S):
        tl.store(ptr + row + s * STRIDE * batch + rows, tile_norm(tiles[s], flags), mask=row_inside)


@triton.jit
def clip_scales(parts, bound_ptr):
    """The factors `[BLOCK_B]` of clipping by norm, from the norms of the parts `[BLOCK_B, WIDTH]`.

    Without a look at the flags: Triton lays out the operand of a product by the smallest type that it came from.
    """
    return clip_scale(row_norm(parts), tl.load(bound_ptr).to(tl.float32))


@triton.jit
def store_gates(ptr, row, rows, cols, inside, gates, G: tl.constexpr, H: tl.constexpr, GROUPED: tl.constexpr):
    """With as few barriers as it goes where the programs of a group wait for it."""
    if GROUPED and G >= 3 and cols.shape[0] >= WIDE:
        store_as_one(ptr, row, rows, cols, inside, gates, G, H)
    else:
        store_planes(ptr, row, rows, cols, inside, gates, G, H)


@triton.jit
def leave(
    dgx, dgh, parts, i, row, sent_x_ptr, sent_h_ptr, parts_ptr, dgx_ptr, dgh_ptr,
    slot, origin, rows, row_inside, tile,
    G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """The gate gradients of step `i`, where the other programs of the group look for them at the step that follows.

    Under clipping by norm they lie in one of two slots of `slot` rows. The one that step `i` fills was read by the
    programs before they left what step `i + 1` has left, and all of that has been waited for: nobody reads it any more.
    """
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    cols, inside = hidden_tile(tile, row_inside, BLOCK_H, H)
    if parts_ptr is None:
        store_gates(dgx_ptr, row, rows, cols, inside, dgx, G, H, GROUPED)
        if dgh_ptr is not None:
            store_gates(dgh_ptr, row, rows, cols, inside, dgh, G, H, GROUPED)
    else:
        at = i % 2 * slot
        store_gates(sent_x_ptr, at + origin, rows, cols, inside, dgx, G, H, GROUPED)
        if dgh_ptr is not None:
            store_gates(sent_h_ptr, at + origin, rows, cols, inside, dgh, G, H, GROUPED)
        columns = tl.arange(0, WIDTH)
        own = (columns < S * TILES) & (columns % TILES == tile)
        offsets = at * (S * TILES) + columns[None, :] * slot + origin + rows[:, None]
        tl.store(parts_ptr + offsets, parts, mask=row_inside[:, None] & own[None, :])


@triton.jit
def receive(
    rest, alive, i, sent_x_ptr, sent_h_ptr, parts_ptr, bound_ptr, dgx_ptr, dgh_ptr, w_ptr, weights, flags_ptr,
    recurrent_ptr, T, row, slot, origin, rows, row_inside, tile,
    G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the states before step `i`, which is at `row`, from what the programs of the group have left;
    `rest`, if i is T.

    Under clipping by norm they left gate gradients that are not scaled yet, and the norms of their tiles. NaN where
    not all of them are `alive`.
    """
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    row_inside = row_inside & (each_row(i, rows) < T)
    cols, inside = hidden_tile(tile, row_inside, BLOCK_H, H)
    flags = load_flags(flags_ptr, row, rows, row_inside)
    if bound_ptr is None:
        scale = None
        sent_ptr, sent_row = dgx_ptr if dgh_ptr is None else dgh_ptr, row
    else:
        at = i % 2 * slot
        columns = tl.arange(0, WIDTH)
        parts = tl.load(
            parts_ptr + at * (S * TILES) + columns[None, :] * slot + origin + rows[:, None],
            mask=row_inside[:, None] & (columns < S * TILES)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        scale = clip_scales(parts, bound_ptr)
        sent = load_planes(sent_x_ptr, at + origin, rows, cols, inside, G, H, ".cg")
        store_planes(dgx_ptr, row, rows, cols, inside, scaled(sent, scale, G), G, H)
        if dgh_ptr is not None:
            sent = load_planes(sent_h_ptr, at + origin, rows, cols, inside, G, H, ".cg")
            store_planes(dgh_ptr, row, rows, cols, inside, scaled(sent, scale, G), G, H)
        sent_ptr, sent_row = sent_x_ptr if dgh_ptr is None else sent_h_ptr, at + origin
    if GROUPED:
        product = grouped_product_back(
            sent_ptr, sent_row, weights, scale, rows, row_inside, G, H, BLOCK_H, BLOCK_K, PRECISION
        )  # fmt: skip
    else:
        product = streamed_product_back(
            sent_ptr, sent_row, w_ptr, scale, rows, row_inside, cols, G, H, BLOCK_H, BLOCK_K, PRECISION
        )
    carry = arriving(
        unless_stuck(alive, (product,), 1)[0], rest, scale, flags, recurrent_ptr, origin, rows, cols, inside, S, H
    )
    return where_all(i < T, carry, rest, S)


@triton.jit
def beside(tile, tiles, i, COUNT: tl.constexpr):
    """The `tiles`, in the layout of `tile`. Always, but the compiler does not know that no step comes before -1.

    Triton 3.6 else keeps what is loaded in a layout for loads, and changes that of each factor computed from it where
    it meets a product with W_hh: behind the wait, with two barriers for each.
    """
    moved = ()
    for k in tl.static_range(COUNT):
        moved = moved + (tl.where(i >= -1, tiles[k], tile),)
    return moved


@triton.jit
def where_all(condition, tiles, others, COUNT: tl.constexpr):
    chosen = ()
    for s in tl.static_range(COUNT):
        chosen = chosen + (tl.where(condition, tiles[s], others[s]),)
    return chosen
