"""The sequence kernels: one forward, one backward, generic over the cell, over a range of steps `[t_begin, t_end)`.

They run in two modes of the same code, which give the same bits at equal tiles:

- step by step: a program takes one tile of the batch and one of the hidden units, a launch takes one step. The launch
  is the barrier: what the programs need of each other, h or the gradients of the gates, the launch before has written.
- LOCAL: a program takes a tile of the batch and all of the hidden units, keeps W_hh on the chip and walks all steps.

Steps are counted in scan order: `i` counts up, and t is T - 1 - i where the scan walks back. The time loop never has a
negative step, and takes `num_stages=1`, so that nothing written in one step is fetched ahead of the write.

Shapes: T steps, B batch, H hidden, G gates, S states, K saved planes. Row indices are 64 bits wide.
"""

import triton
import triton.language as tl

from .gradients import (
    arriving,
    clamp,
    clip_scales,
    drop_padded,
    leave,
    past_weights,
    previous_states,
    receive,
    store_norms,
    through_zoneout,
)  # fmt: skip
from .memory import PAD, RESET, choose, hidden_tile, load_flags, load_planes, load_tile, store_planes, store_tile
from .norms import place, row_norm
from .products import (
    load_weights,
    local_product,
    local_product_back,
    recurrent_operand,
    scaled,
    streamed_product,
)  # fmt: skip

# -------------------------------------------------------------------------------------------------------- forward


@triton.jit
def carry_over(
    fresh, before, carried, flags, zone_ptrs, row, rows, cols, inside, dtype, S: tl.constexpr, H: tl.constexpr
):
    """The states after the step: zoneout mixes the state before it in, padding carries the old one unchanged."""
    states = ()
    for s in tl.static_range(S):
        state = fresh[s]
        if zone_ptrs[s] is not None:
            zone = load_tile(zone_ptrs[s], row, rows, cols, inside, H)
            state = (1 - zone) * state + zone * before[s]
        if s == 0:
            state = state.to(dtype)
        states = states + (choose(flags, PAD, carried[s], state),)
    return states


@triton.jit(do_not_specialize=["T", "B", "t_begin", "t_end"])
def forward_kernel(
    gx_ptr,  # [T, B, G*H]
    w_ptr,  # [G*H, H]
    b_ptr,  # [G*H] or None
    flags_ptr,  # [T, B] uint8 or None
    recurrent_ptr,  # [B, H] or None
    zone_h_ptr,  # [T, B, H] or None
    zone_c_ptr,  # [T, B, H] or None
    h_in_ptr,  # [B, H]: the states before step t_begin
    c_in_ptr,  # [B, H] float32, or None for a cell without c
    h_out_ptr,  # [B, H]: the states after step t_end - 1; step by step, other memory than h_in
    c_out_ptr,  # [B, H] float32 or None
    y_ptr,  # [T, B, H]
    c_ptr,  # [T, B, H] float32 or None
    saved_ptr,  # [T, B, K*H] or None
    T,
    B,
    t_begin,
    t_end,
    CELL_FORWARD: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,  # step by step: units that a product takes at a time
    LOCAL: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    OWN: tl.constexpr = TILES if LOCAL else 1
    batch = B.to(tl.int64)
    origin = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.arange(0, BLOCK_B)
    row_inside = origin + rows < batch
    first = tl.program_id(1)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    states_out = (h_out_ptr, c_out_ptr)
    zone_ptrs = (zone_h_ptr, zone_c_ptr)

    weights = ()
    if LOCAL:
        weights = load_weights(w_ptr, G, H, BLOCK_H, True)
    states = ()
    for n in tl.static_range(OWN):
        cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
        state = (load_tile(h_in_ptr, origin, rows, cols, inside, H).to(dtype),)
        if S == 2:
            state = state + (load_tile(c_in_ptr, origin, rows, cols, inside, H),)
        states = states + (state,)

    for i in tl.range(t_begin, t_end, num_stages=1):
        t = T - 1 - i if REVERSE else i
        row = t * batch + origin
        flags = load_flags(flags_ptr, row, rows, row_inside)
        operands = ()
        if LOCAL:
            for n in tl.static_range(OWN):
                cols, inside = hidden_tile(n, row_inside, BLOCK_H, H)
                operand = recurrent_operand(states[n][0], flags, recurrent_ptr, origin, rows, cols, inside, H)
                operands = operands + (operand,)
        states_after = ()
        for n in tl.static_range(OWN):
            cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
            gx = load_planes(gx_ptr, row, rows, cols, inside, G, H)
            if LOCAL:
                products = local_product(operands, weights, n, G, TILES, PRECISION)
            else:
                products = streamed_product(
                    h_in_ptr, w_ptr, flags, recurrent_ptr, origin, rows, row_inside, cols,
                    G, H, BLOCK_H, BLOCK_K, PRECISION,
                )  # fmt: skip
            gh = ()
            for g in tl.static_range(G):
                if b_ptr is None:
                    gh = gh + (products[g],)
                else:
                    bias = tl.load(b_ptr + g * H + cols, mask=cols < H, other=0.0).to(tl.float32)
                    gh = gh + (products[g] + bias[None, :],)
            before = ()
            for s in tl.static_range(S):
                before = before + (choose(flags, RESET, 0.0, states[n][s].to(tl.float32)),)
            fresh, saved = CELL_FORWARD(gx, gh, before)
            state = carry_over(fresh, before, states[n], flags, zone_ptrs, row, rows, cols, inside, dtype, S, H)
            states_after = states_after + (state,)
            store_tile(y_ptr, row, rows, cols, inside, choose(flags, PAD, 0.0, state[0]), H)
            if c_ptr is not None:
                store_tile(c_ptr, row, rows, cols, inside, choose(flags, PAD, 0.0, state[1]), H)
            if saved_ptr is not None:
                store_planes(saved_ptr, row, rows, cols, inside, saved, K, H)
        states = states_after

    for n in tl.static_range(OWN):
        cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
        for s in tl.static_range(S):
            store_tile(states_out[s], origin, rows, cols, inside, states[n][s], H)


# ------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["T", "B", "t_begin", "t_end"])
def backward_kernel(
    dy_ptr,  # [T, B, H] or None
    dc_ptr,  # [T, B, H] float32 or None
    saved_ptr,  # [T, B, K*H]
    y_ptr,  # [T, B, H]
    c_ptr,  # [T, B, H] float32, or None for a cell without c
    h0_ptr,  # [B, H]
    c0_ptr,  # [B, H] float32 or None
    w_ptr,  # [G*H, H]
    flags_ptr,  # [T, B] uint8 or None
    recurrent_ptr,  # [B, H] or None
    zone_h_ptr,  # [T, B, H] or None
    zone_c_ptr,  # [T, B, H] or None
    bound_ptr,  # [] or None: clipping by norm
    clip_value,  # float or None
    dh_in_ptr,  # [B, H] or None: the gradients of the states after step t_end - 1; step by step, the part of them
    dc_in_ptr,  # [B, H] float32 or None    that did not pass through W_hh, unless t_end is T
    dh_out_ptr,  # [B, H]: the same of the states before step t_begin; step by step, the part of them that does not
    dc_out_ptr,  # [B, H] float32 or None    pass through W_hh, unless t_begin is t_end
    dgx_ptr,  # [T, B, G*H]
    dgh_ptr,  # [T, B, G*H], or None where it equals dgx
    norms_ptr,  # [2, S, T, TILES, B] float32 or None: total and carried, of each tile
    sent_x_ptr,  # [2, B, G*H] float32: step by step under clipping by norm, the gate gradients before they are
    sent_h_ptr,  # [2, B, G*H] float32    scaled, for even and odd steps; else None
    parts_ptr,  # [2, S*TILES, B] float32 or None: the tiles' norms to scale them by
    T,
    B,
    t_begin,
    t_end,
    CELL_TOTAL: tl.constexpr,
    CELL_BACKWARD: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,  # step by step: units that a product takes at a time
    WIDTH: tl.constexpr,  # S * TILES, rounded up to a power of two
    LOCAL: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    OWN: tl.constexpr = TILES if LOCAL else 1
    batch = B.to(tl.int64)
    origin = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.arange(0, BLOCK_B)
    row_inside = origin + rows < batch
    first = tl.program_id(1)
    arriving_ptrs, leaving_ptrs = (dh_in_ptr, dc_in_ptr), (dh_out_ptr, dc_out_ptr)
    direct_ptrs, zone_ptrs = (dy_ptr, dc_ptr), (zone_h_ptr, zone_c_ptr)

    weights = ()
    if LOCAL:
        weights = load_weights(w_ptr, G, H, BLOCK_H, False)
    carries = ()
    for n in tl.static_range(OWN):
        cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
        carry = ()
        for s in tl.static_range(S):
            if arriving_ptrs[s] is None:
                carry = carry + (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)
            else:
                carry = carry + (load_tile(arriving_ptrs[s], origin, rows, cols, inside, H),)
        carries = carries + (carry,)
    if not LOCAL:
        if t_end < T:
            carries = (
                receive(
                    carries[0], t_end, sent_x_ptr, sent_h_ptr, parts_ptr, bound_ptr, dgx_ptr, dgh_ptr, w_ptr,
                    flags_ptr, recurrent_ptr, T, batch, origin, rows, row_inside, first,
                    G, S, H, BLOCK_H, BLOCK_K, WIDTH, REVERSE, PRECISION,
                ),
            )  # fmt: skip

    for j in tl.range(0, t_end - t_begin, num_stages=1):
        i = t_end - 1 - j
        t = T - 1 - i if REVERSE else i
        row = t * batch + origin
        flags = load_flags(flags_ptr, row, rows, row_inside)
        gates_x, gates_h, rests = (), (), ()
        parts = tl.zeros((BLOCK_B, WIDTH), tl.float32)
        for n in tl.static_range(OWN):
            cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
            saved = load_planes(saved_ptr, row, rows, cols, inside, K, H)
            row_before = (t + 1 if REVERSE else t - 1) * batch + origin
            before = previous_states(
                (y_ptr, c_ptr), (h0_ptr, c0_ptr), i, row_before, flags, origin, rows, cols, inside, S, H
            )
            carry = carries[n]
            dstate = ()
            for s in tl.static_range(S):
                if direct_ptrs[s] is None:
                    dstate = dstate + (carry[s],)
                else:
                    dstate = dstate + (carry[s] + load_tile(direct_ptrs[s], row, rows, cols, inside, H),)
            fresh, past = through_zoneout(dstate, zone_ptrs, row, rows, cols, inside, S, H)
            total = CELL_TOTAL(saved, before, fresh)
            if norms_ptr is not None:
                at = (t * batch) * TILES + (first + n) * batch + origin
                store_norms(norms_ptr, at, batch, rows, row_inside, (dstate[0],) + total[1:], flags, S, T * TILES)
                at += S * T * batch * TILES
                store_norms(norms_ptr, at, batch, rows, row_inside, carry, flags, S, T * TILES)
            if clip_value is not None:
                dstate = clamp(dstate, clip_value, S)
                fresh, past = through_zoneout(dstate, zone_ptrs, row, rows, cols, inside, S, H)
                total = CELL_TOTAL(saved, before, fresh)
            if bound_ptr is not None:
                whole = (dstate[0],) + total[1:]
                for s in tl.static_range(S):
                    parts += place(row_norm(whole[s]), s * TILES + first + n, WIDTH)
            dgx, dgh, through_cell = CELL_BACKWARD(saved, before, total)
            dgx, dgh = drop_padded(dgx, flags, G), drop_padded(dgh, flags, G)
            gates_x, gates_h = gates_x + (dgx,), gates_h + (dgh,)
            rests = rests + (past_weights(past, through_cell, carry, flags, S),)

        scale = None
        if LOCAL:
            operands = ()
            if bound_ptr is not None:
                scale = clip_scales(parts, bound_ptr, flags)
            for n in tl.static_range(OWN):
                cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
                store_planes(dgx_ptr, row, rows, cols, inside, scaled(gates_x[n], scale, G), G, H)
                sent = scaled(gates_h[n], scale, G)
                if dgh_ptr is not None:
                    store_planes(dgh_ptr, row, rows, cols, inside, sent, G, H)
                operands = operands + (sent,)
            carries = ()
            for n in tl.static_range(OWN):
                cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
                product = local_product_back(operands, weights, n, G, TILES, PRECISION)
                carry = arriving(product, rests[n], scale, flags, recurrent_ptr, origin, rows, cols, inside, S, H)
                carries = carries + (carry,)
        else:
            leave(
                gates_x[0], gates_h[0], parts, i, row, sent_x_ptr, sent_h_ptr, parts_ptr, dgx_ptr, dgh_ptr,
                batch, origin, rows, row_inside, first, G, S, H, BLOCK_H, WIDTH,
            )  # fmt: skip
            carries = rests

    for n in tl.static_range(OWN):
        cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
        for s in tl.static_range(S):
            store_tile(leaving_ptrs[s], origin, rows, cols, inside, carries[n][s], H)
