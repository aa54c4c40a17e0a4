"""The pieces of a backward step, and the gate gradients that the programs of a group exchange.

Shapes: T steps, B batch, H hidden, G gates, S states.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .barrier import unless_stuck
from .cells import lstm_output_backward
from .layer_norm import normalize_backward
from .memory import (
    PAD,
    RESET,
    START,
    WIDE,
    choose,
    each_row,
    load_flags,
    load_planes,
    load_state,
    load_tile,
    masked,
    store_as_one,
    store_planes,
    zero_tile,
)  # fmt: skip
from .norms import clip_scale, row_norm
from .products import grouped_product_back, scaled, streamed_product_back


@triton.jit
def previous_states(ptrs, initial_ptrs, i, row_before, flags, tile, S: tl.constexpr, H: tl.constexpr):
    """The states before step `i`, which the step before it left at `row_before`; zero after a reset."""
    starts = each_row(i, tile.rows) == 0
    if flags is not None:
        starts = starts | ((flags & START) != 0)
    starts = starts[:, None]
    before = ()
    for s in tl.static_range(S):
        # Each element comes from one of the two places; the other load is masked off.
        state = tl.where(
            starts,
            load_state(initial_ptrs, tile.origin, masked(tile, starts), s, S, H),
            load_state(ptrs, row_before, masked(tile, ~starts), s, S, H),
        )
        before = before + (choose(flags, RESET, 0.0, state),)
    return before


@triton.jit
def planes_or_zeros(ptr, row, tile, PLANES: tl.constexpr, H: tl.constexpr):
    """The tiles of all planes; zeros where the pointer is None."""
    planes = ()
    if ptr is None:
        for _ in tl.static_range(PLANES):
            planes = planes + (zero_tile(tile),)
    else:
        planes = load_planes(ptr, row, tile, PLANES, H)
    return planes


@triton.jit
def load_states(ptrs, row, tile, S: tl.constexpr, H: tl.constexpr):
    """A tile of each state, from the tensor of h and that of the others; zeros where a pointer is None."""
    states = planes_or_zeros(ptrs[0], row, tile, 1, H)
    if S > 1:
        states = states + planes_or_zeros(ptrs[1], row, tile, S - 1, H)
    return states


@triton.jit
def clamp(tiles, limit, COUNT: tl.constexpr):
    clamped = ()
    for s in tl.static_range(COUNT):
        x = tiles[s]
        # tl.clamp is not used because it need not keep NaN.
        clamped = clamped + (tl.where(x > limit, limit, tl.where(x < -limit, -limit, x)),)
    return clamped


@triton.jit
def through_zoneout(dstate, zone_ptrs, tile, S: tl.constexpr, H: tl.constexpr):
    """Splits the gradients of the states after a step: into those of the cell's outputs, and those of the states before
    the step, past the cell."""
    to_cell, past_cell = (), ()
    for s in tl.static_range(S):
        if zone_ptrs[0 if s == 0 else 1] is None:
            to_cell, past_cell = to_cell + (dstate[s],), past_cell + (tl.zeros_like(dstate[s]),)
        else:
            zone = load_state(zone_ptrs, tile.row, tile, s, S, H)
            to_cell, past_cell = to_cell + (dstate[s] * (1 - zone),), past_cell + (dstate[s] * zone,)
    return to_cell, past_cell


@triton.jit
def cell_total(
    saved, before, dstate, beside, ln_c, zone_ptrs, tile, CELL_TOTAL: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    LN_CARRIED: tl.constexpr = False,
):  # fmt: skip
    """`through_zoneout`, and after it the cell's `total`.

    ln_c: None, or of the layer norm on c its weight, the normalised c, 1 / std, and u = tanh of its output. With
    LN_CARRIED its output is the state itself.
    """
    to_cell, past_cell = through_zoneout(dstate, zone_ptrs, tile, S, H)
    if ln_c is None:
        total = CELL_TOTAL(saved, before, to_cell, beside)
    else:
        weight, c_hat, rstd, u = ln_c
        dc = lstm_output_backward(saved, u, to_cell[0])
        if not LN_CARRIED:
            dc = normalize_backward((dc * weight,), (c_hat,), rstd, tile.inside, 1, H)[0]
        total = (to_cell[0], to_cell[1] + dc)
    return to_cell, past_cell, total


@triton.jit
def state_gradient(
    dstate, carry, dh_clamped_ptr, saved, before, beside, ln_c, zone_ptrs, clip_value, norms_ptr, norms_row,
    state_stride, flags, tile,
    CELL_TOTAL: tl.constexpr, S: tl.constexpr, H: tl.constexpr, LN_CARRIED: tl.constexpr = False,
):  # fmt: skip
    """From the gradients of the states after a step to those that the cell's `backward` takes.

    dstate: carry, the gradients carried back from the next step, plus those of the outputs. Their norms go to
    `norms_ptr`, and after that they are clamped. With a projection, the kernel before this one has done both to h;
    dstate[0] is the gradient of the cell's own h, and `dh_clamped_ptr [B, H]` has the same after clamping.

    Returns dL/d(cell's outputs), the part that goes past the cell, the cell's `total`, and dL/d(state) of each state.
    """
    FIRST: tl.constexpr = 0 if dh_clamped_ptr is None else 1  # the first state whose norms are taken here
    to_cell, past_cell, total = cell_total(
        saved, before, dstate, beside, ln_c, zone_ptrs, tile, CELL_TOTAL, S, H, LN_CARRIED
    )
    if norms_ptr is not None:
        for s in tl.static_range(FIRST, S):
            store_norm(norms_ptr + norms_row + s * state_stride, dstate[0] if s == 0 else total[s], flags, tile)
        norms_row += S * state_stride
        for s in tl.static_range(FIRST, S):
            store_norm(norms_ptr + norms_row + s * state_stride, carry[s], flags, tile)
    if clip_value is not None:
        dstate = clamp(dstate, clip_value, S)
        if dh_clamped_ptr is not None:
            dstate = (load_tile(dh_clamped_ptr, tile.origin, tile, H),) + dstate[1:]
        to_cell, past_cell, total = cell_total(
            saved, before, dstate, beside, ln_c, zone_ptrs, tile, CELL_TOTAL, S, H, LN_CARRIED
        )
    return to_cell, past_cell, total, (dstate[0],) + total[1:]


@triton.jit
def gradient_past_weights(past_cell, through_cell, carry, flags, S: tl.constexpr):
    """The part of the gradients of the states before the step that does not pass through W_hh."""
    past_weights = ()
    for s in tl.static_range(S):
        gradient = choose(flags, RESET, 0.0, past_cell[s] + through_cell[s])
        past_weights = past_weights + (choose(flags, PAD, carry[s], gradient),)
    return past_weights


@triton.jit
def drop_padded(planes, flags, COUNT: tl.constexpr):
    kept = ()
    for k in tl.static_range(COUNT):
        kept = kept + (choose(flags, PAD, 0.0, planes[k]),)
    return kept


@triton.jit
def through_decay(gradients, decay_ptr, decayed_grad_ptr, row, flags, tile, COUNT: tl.constexpr, H: tl.constexpr):
    """The gradients of the states before they decay, from those after it, which are stored, zero at padding."""
    store_planes(decayed_grad_ptr, row, tile, drop_padded(gradients, flags, COUNT), COUNT, H)
    factors, before = load_planes(decay_ptr, row, tile, COUNT, H), ()
    for s in tl.static_range(COUNT):
        before = before + (choose(flags, PAD, gradients[s], gradients[s] * factors[s]),)
    return before


@triton.jit
def carried_gradient(product, past_weights, scale, flags, recurrent_mask_ptr, tile, S: tl.constexpr, H: tl.constexpr):
    """The gradients of the states before a step: the part that passed through W_hh, `product`, and the part past it.

    product: None for a cell without W_hh. scale: the factors of clipping by norm, which `product` has already; None
    without clipping.
    """
    if product is not None and recurrent_mask_ptr is not None:
        product = product * load_tile(recurrent_mask_ptr, tile.origin, tile, H)
    clipped = scaled(past_weights, scale, S)
    carry = ()
    for s in tl.static_range(S):
        gradient = product + clipped[s] if s == 0 and product is not None else clipped[s]
        carry = carry + (choose(flags, PAD, past_weights[s], choose(flags, RESET, 0.0, gradient)),)
    return carry


@triton.jit
def tile_norm(values, flags):
    """The norms `[BLOCK_B]` of the rows of a tile, zero at padding."""
    norm = row_norm(values)
    if flags is not None:
        norm = tl.where((flags & PAD) != 0, 0.0, norm)
    return norm


@triton.jit
def store_norm(ptr, values, flags, tile):
    """The norms of the rows of a tile, to `ptr [BLOCK_B]`."""
    tl.store(ptr + tile.rows, tile_norm(values, flags), mask=tile.row_inside)


@triton.jit
def clip_scales(partial_norms, clip_norm_ptr):
    """The factors `[BLOCK_B]` of clipping by norm, from the norms `[BLOCK_B, WIDTH]` of the parts of a row.

    The flags are not read here, because Triton lays out the operand of a product by the smallest type it came from.
    """
    return clip_scale(row_norm(partial_norms), tl.load(clip_norm_ptr).to(tl.float32))


class GateGradients(NamedTuple):
    """Where the gate gradients of all steps are, and where the programs of a group exchange those of one step.

    Without clipping by norm they read each other's gradients from dgx or dgh. Under it, no program can scale its own
    before it has the norms of all tiles. So they exchange float32 gradients without the scale, and the tiles' norms, in
    two slots for even and odd steps. Each reader scales what it reads, and stores its own tile of dgx and dgh. The
    gradients of the cell's parameters and inputs take the same way, although only their own program reads them.
    """

    dgx_ptr: tl.tensor  # [D, T, B, G*H]
    dgh_ptr: tl.tensor  # the same, or None where it equals dgx
    dcell_ptr: tl.tensor  # [D, T, B, (Q+N)*H], or None for a cell without parameters and inputs
    unscaled_x_ptr: tl.tensor  # [2, D, B, G*H] float32, or None without clipping by norm
    unscaled_h_ptr: tl.tensor  # the same; None also where dgh is
    unscaled_cell_ptr: tl.tensor  # [2, D, B, (Q+N)*H] float32; None also where dcell is
    partial_norms_ptr: tl.tensor  # [2, S*TILES, D, B] float32, or None without clipping by norm
    slot: tl.tensor  # rows of a slot, D*B


@triton.jit
def store_gates(ptr, row, tile, gates, G: tl.constexpr, H: tl.constexpr, GROUPED: tl.constexpr):
    """Stores a plane for every gate. In a group, where other programs wait for it, with as few barriers as possible."""
    if GROUPED and (G == 3 or G == 4) and tile.cols.shape[0] >= WIDE:
        store_as_one(ptr, row, tile, gates, G, H)
    else:
        store_planes(ptr, row, tile, gates, G, H)


@triton.jit
def publish_gate_grads(
    dgx, dgh, dcell, partial_norms, i, gate_grads, tile, index,
    G: tl.constexpr, S: tl.constexpr, BESIDE: tl.constexpr, H: tl.constexpr, H_TILES: tl.constexpr,
    WIDTH: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Stores the gate gradients of step `i` where `gather_gate_grads` looks for them. `tile` is number `index` of the
    H_TILES of H.

    Slot `i % 2` still holds step i + 2. Reusing it is safe: every program read it before it published step i + 1, and
    this program has waited for all arrivals of step i + 1.
    """
    if gate_grads.partial_norms_ptr is None:
        store_gates(gate_grads.dgx_ptr, tile.row, tile, dgx, G, H, GROUPED)
        if gate_grads.dgh_ptr is not None:
            store_gates(gate_grads.dgh_ptr, tile.row, tile, dgh, G, H, GROUPED)
        store_planes(gate_grads.dcell_ptr, tile.row, tile, dcell, BESIDE, H)
    else:
        slot = i % 2 * gate_grads.slot
        store_gates(gate_grads.unscaled_x_ptr, slot + tile.origin, tile, dgx, G, H, GROUPED)
        if gate_grads.dgh_ptr is not None:
            store_gates(gate_grads.unscaled_h_ptr, slot + tile.origin, tile, dgh, G, H, GROUPED)
        store_planes(gate_grads.unscaled_cell_ptr, slot + tile.origin, tile, dcell, BESIDE, H)
        columns = tl.arange(0, WIDTH)
        of_tile = (columns < S * H_TILES) & (columns % H_TILES == index)
        offsets = slot * (S * H_TILES) + columns[None, :] * gate_grads.slot + tile.origin + tile.rows[:, None]
        mask = tile.row_inside[:, None] & of_tile[None, :]
        tl.store(gate_grads.partial_norms_ptr + offsets, partial_norms, mask=mask)


@triton.jit
def gather_gate_grads(
    past_weights, alive, i, gate_grads, weights, clip_norm_ptr, flags_ptr, recurrent_mask_ptr, tile,
    G: tl.constexpr, S: tl.constexpr, BESIDE: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, H_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the states before step `i`, at `tile`, from the gate gradients that the group published.

    weights: of a grouped program, its part of W_hh; else the pointer to that of its head. NaN unless the programs are
    `alive`.
    """
    flags = load_flags(flags_ptr, tile)
    scale = None
    row = tile.row
    dgh_ptr = gate_grads.dgx_ptr if gate_grads.dgh_ptr is None else gate_grads.dgh_ptr
    if clip_norm_ptr is not None:
        slot = i % 2 * gate_grads.slot
        columns = tl.arange(0, WIDTH)
        offsets = slot * (S * H_TILES) + columns[None, :] * gate_grads.slot + tile.origin + tile.rows[:, None]
        mask = tile.row_inside[:, None] & (columns < S * H_TILES)[None, :]
        norms = tl.load(gate_grads.partial_norms_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        scale, row = clip_scales(norms, clip_norm_ptr), slot + tile.origin
        unscaled = load_planes(gate_grads.unscaled_x_ptr, row, tile, G, H, ".cg")
        store_planes(gate_grads.dgx_ptr, tile.row, tile, scaled(unscaled, scale, G), G, H)
        if gate_grads.dgh_ptr is not None:
            unscaled = load_planes(gate_grads.unscaled_h_ptr, row, tile, G, H, ".cg")
            store_planes(gate_grads.dgh_ptr, tile.row, tile, scaled(unscaled, scale, G), G, H)
        unscaled = load_planes(gate_grads.unscaled_cell_ptr, row, tile, BESIDE, H, ".cg")
        store_planes(gate_grads.dcell_ptr, tile.row, tile, scaled(unscaled, scale, BESIDE), BESIDE, H)
        dgh_ptr = gate_grads.unscaled_x_ptr if gate_grads.dgh_ptr is None else gate_grads.unscaled_h_ptr
    if GROUPED:
        product = grouped_product_back(dgh_ptr, row, weights, scale, tile, G, H, HEADS, BLOCK_K, PRECISION)
    else:
        product = streamed_product_back(dgh_ptr, row, weights, scale, tile, G, H, HEADS, BLOCK_K, PRECISION)
    product = unless_stuck(alive, (product,), 1)[0]
    return carried_gradient(product, past_weights, scale, flags, recurrent_mask_ptr, tile, S, H)


@triton.jit
def match_layout(tiles, like, i, COUNT: tl.constexpr):
    """Forces `tiles` into the register layout of `like`.

    i >= -1 is always true, but the compiler cannot prove it. Without this, Triton 3.6 converts every factor computed
    from these loads where it meets a product with W_hh: after the wait, at two barriers each.
    """
    matched = ()
    for k in tl.static_range(COUNT):
        matched = matched + (tl.where(i >= -1, tiles[k], like),)
    return matched


@triton.jit
def where_all(condition, tiles, others, COUNT: tl.constexpr):
    chosen = ()
    for s in tl.static_range(COUNT):
        chosen = chosen + (tl.where(condition, tiles[s], others[s]),)
    return chosen
