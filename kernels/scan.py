"""The sequence kernels: one forward, one backward, generic over the cell, over a range of steps `[t_begin, t_end)`.

They run in three modes of the same code, which give the same bits at equal tiles:

- stepwise: a program takes one tile of the batch and one of the hidden units, a launch takes one step. The launch is
  the barrier: what the programs need of each other, h or the gradients of the gates, the launch before has written.
- grouped: the same program keeps its part of W_hh on the chip and walks all steps. The programs of a tile of the batch
  are a group, and a barrier among them stands between two steps (`barrier.py`). Without one, a launch takes one step.
- local: a program takes a tile of the batch and all of the hidden units, keeps all of W_hh and walks all steps.

Steps are counted in scan order: `i` counts up, and t is T - 1 - i where the scan walks back. The time loop never has a
negative step, and takes `num_stages=1`, so that nothing written in one step is fetched ahead of the write.

A grid holds all directions of a layer: a program walks one of them, with the weights of its own, back where the number
of the direction is odd, or even if `reverse`. The programs of different directions do not wait for each other.

Shapes: D directions, T steps, B batch, H hidden, G gates, S states, K saved planes. Row indices are 64 bits wide.
"""

import triton
import triton.language as tl

from .barrier import LINE, arrive, unless_stuck, wait
from .gradients import (
    arriving,
    beside,
    clamp,
    clip_scales,
    drop_padded,
    leave,
    load_states,
    past_weights,
    previous_states,
    receive,
    store_norms,
    through_zoneout,
    tile_norm,
    where_all,
)  # fmt: skip
from .memory import (
    PAD,
    RESET,
    WIDE,
    choose,
    each_row,
    hidden_tile,
    load_flags,
    load_planes,
    load_tile,
    of_direction,
    step_at,
    store_planes,
    store_tile,
)  # fmt: skip
from .norms import place
from .products import (
    grouped_product,
    load_biases,
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


@triton.jit(do_not_specialize=["T", "B", "t_begin", "t_end", "reverse"])
def forward_kernel(
    gx_ptr,  # [D, T, B, G*H]
    w_ptr,  # [D, G*H, H]
    b_ptr,  # [D, G*H] or None
    flags_ptr,  # [D, T, B] uint8 or None
    recurrent_ptr,  # [D, B, H] or None
    zone_h_ptr,  # [D, T, B, H] or None
    zone_c_ptr,  # [D, T, B, H] or None
    h_in_ptr,  # [D, B, H]: the states before step t_begin
    c_in_ptr,  # [D, B, H] float32, or None for a cell without c
    h_out_ptr,  # [D, B, H]: the states after step t_end - 1; may be the same memory
    c_out_ptr,  # [D, B, H] float32 or None
    sent_ptr,  # [2, D, B, H]: what W_hh multiplies in even and odd steps, for the programs of the group; None if local
    arrived_ptr,  # [D, groups, LINE] int32, zeros: the barrier of each group; None where a launch takes one step
    report_ptr,  # [] int32 or None: set where a wait was too long
    y_ptr,  # [D, T, B, H]
    c_ptr,  # [D, T, B, H] float32 or None
    saved_ptr,  # [D, T, B, K*H] or None
    T,
    B,
    t_begin,
    t_end,
    reverse,  # whether direction 0 walks back
    CELL_FORWARD: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,  # units that a product takes at a time
    MODE: tl.constexpr,  # "local", "grouped" or "stepwise"
    PRECISION: tl.constexpr,
):
    LOCAL: tl.constexpr = MODE == "local"
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    OWN: tl.constexpr = TILES if LOCAL else 1
    batch, direction = B.to(tl.int64), tl.program_id(2).to(tl.int64)
    back = direction % 2 != reverse
    forth = tl.where(back, -batch, batch)  # rows from a step to the one that follows it
    top = tl.program_id(0).to(tl.int64) * BLOCK_B  # the tile's first row in the batch
    origin = direction * batch + top  # and in that of all directions
    slot = tl.num_programs(2) * batch  # rows of a slot of what is exchanged
    rows = tl.arange(0, BLOCK_B)
    row_inside = top + rows < batch
    first = tl.program_id(1)
    w_ptr = of_direction(w_ptr, direction, G * H * H)
    arrived = of_direction(arrived_ptr, direction * tl.num_programs(0) + tl.program_id(0), LINE)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    states_out = (h_out_ptr, c_out_ptr)
    zone_ptrs = (zone_h_ptr, zone_c_ptr)
    b_ptr = of_direction(b_ptr, direction, G * H)

    weights = ()
    if MODE != "stepwise":
        weights = load_weights(w_ptr, first, G, OWN, H, BLOCK_H, BLOCK_K, False)
    states = ()
    for n in tl.static_range(OWN):
        cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
        state = (load_tile(h_in_ptr, origin, rows, cols, inside, H).to(dtype),)
        if S == 2:
            state = state + (load_tile(c_in_ptr, origin, rows, cols, inside, H),)
        states = states + (state,)

    for i in tl.range(t_begin, t_end, num_stages=1):
        row = (direction * T + step_at(i, T, back)) * batch + top
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
            start = load_biases(b_ptr, rows, cols, G, H, BLOCK_H)
            if not LOCAL:
                flags_next = load_flags(flags_ptr, row + forth, rows, row_inside & (each_row(i, rows) + 1 < T))
                alive = wait(arrived, (i - t_begin) * tl.num_programs(1), report_ptr)
                sent = sent_ptr + i % 2 * slot * H
            if LOCAL:
                gh = local_product(start, operands, weights, n, G, TILES, PRECISION)
            elif MODE == "grouped":
                gh = grouped_product(start, sent, weights, origin, rows, row_inside, G, H, BLOCK_K, PRECISION)
            else:
                gh = streamed_product(
                    start, sent, w_ptr, origin, rows, row_inside, cols, G, H, BLOCK_H, BLOCK_K, PRECISION
                )
            if not LOCAL:
                gh = unless_stuck(alive, gh, G)
            before = ()
            for s in tl.static_range(S):
                before = before + (choose(flags, RESET, 0.0, states[n][s].to(tl.float32)),)
            fresh, saved = CELL_FORWARD(gx, gh, before)
            state = carry_over(fresh, before, states[n], flags, zone_ptrs, row, rows, cols, inside, dtype, S, H)
            states_after = states_after + (state,)
            if not LOCAL:
                # Who read this slot did so at step i - 1, before it arrived, and that has been waited for.
                operand = recurrent_operand(state[0], flags_next, recurrent_ptr, origin, rows, cols, inside, H)
                store_tile(sent_ptr + (i + 1) % 2 * slot * H, origin, rows, cols, inside, operand, H)
                arrive(arrived)
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


@triton.jit(do_not_specialize=["T", "B", "t_begin", "t_end", "reverse"])
def backward_kernel(
    dy_ptr,  # [D, T, B, H] or None
    dc_ptr,  # [D, T, B, H] float32 or None
    saved_ptr,  # [D, T, B, K*H]
    y_ptr,  # [D, T, B, H]
    c_ptr,  # [D, T, B, H] float32, or None for a cell without c
    h0_ptr,  # [D, B, H]
    c0_ptr,  # [D, B, H] float32 or None
    w_ptr,  # [D, G*H, H]
    flags_ptr,  # [D, T, B] uint8 or None
    recurrent_ptr,  # [D, B, H] or None
    zone_h_ptr,  # [D, T, B, H] or None
    zone_c_ptr,  # [D, T, B, H] or None
    bound_ptr,  # [] or None: clipping by norm
    clip_value,  # float or None
    dh_in_ptr,  # [D, B, H] or None: the gradients of the states after step t_end - 1; unless local, the part of them
    dc_in_ptr,  # [D, B, H] float32 or None    that did not pass through W_hh, but for t_end = T
    dh_out_ptr,  # [D, B, H]: the same of the states before step t_begin, whole for t_begin = -1; may be the same memory
    dc_out_ptr,  # [D, B, H] float32 or None
    dgx_ptr,  # [D, T, B, G*H]
    dgh_ptr,  # [D, T, B, G*H], or None where it equals dgx
    norms_ptr,  # [D, 2, S, T, TILES, B] float32 or None: total and carried, of each tile
    sent_x_ptr,  # [2, D, B, G*H] float32: under clipping by norm, the gate gradients of even and odd steps before they
    sent_h_ptr,  # [2, D, B, G*H] float32    are scaled, for the programs of the group; None if local
    parts_ptr,  # [2, S*TILES, D, B] float32 or None: the tiles' norms to scale them by
    arrived_ptr,  # [D, groups, LINE] int32, zeros: the barrier of each group; None where a launch takes one step
    report_ptr,  # [] int32 or None: set where a wait was too long
    T,
    B,
    t_begin,  # unless local, -1 stands for a step before the first, which only receives what step 0 has left
    t_end,
    reverse,  # whether direction 0 walks back
    CELL_TOTAL: tl.constexpr,
    CELL_BACKWARD: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,  # units that a product takes at a time
    WIDTH: tl.constexpr,  # S * TILES, rounded up to a power of two
    MODE: tl.constexpr,  # "local", "grouped" or "stepwise"
    PRECISION: tl.constexpr,
):
    LOCAL: tl.constexpr = MODE == "local"
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    OWN: tl.constexpr = TILES if LOCAL else 1
    batch, direction = B.to(tl.int64), tl.program_id(2).to(tl.int64)
    back = direction % 2 != reverse
    forth = tl.where(back, -batch, batch)  # rows from a step to the one that follows it
    top = tl.program_id(0).to(tl.int64) * BLOCK_B  # the tile's first row in the batch
    origin = direction * batch + top  # and in that of all directions
    slot = tl.num_programs(2) * batch  # rows of a slot of what is exchanged
    rows = tl.arange(0, BLOCK_B)
    row_inside = top + rows < batch
    first = tl.program_id(1)
    w_ptr = of_direction(w_ptr, direction, G * H * H)
    arrived = of_direction(arrived_ptr, direction * tl.num_programs(0) + tl.program_id(0), LINE)
    arriving_ptrs, leaving_ptrs = (dh_in_ptr, dc_in_ptr), (dh_out_ptr, dc_out_ptr)
    direct_ptrs, zone_ptrs = (dy_ptr, dc_ptr), (zone_h_ptr, zone_c_ptr)

    weights = ()
    if MODE != "stepwise":
        weights = load_weights(w_ptr, first, G, OWN, H, BLOCK_H, BLOCK_K, True)
    carries = ()
    for n in tl.static_range(OWN):
        cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
        carries = carries + (load_states(arriving_ptrs, origin, rows, cols, inside, S, BLOCK_B, BLOCK_H, H),)

    for j in tl.range(0, t_end - t_begin, num_stages=1):
        i = t_end - 1 - j
        row = (direction * T + step_at(i, T, back)) * batch + top
        live = row_inside if LOCAL else row_inside & (each_row(i, rows) >= 0)
        flags = load_flags(flags_ptr, row, rows, live)
        gates_x, gates_h, rests = (), (), ()
        parts = tl.zeros((BLOCK_B, WIDTH), tl.float32)
        for n in tl.static_range(OWN):
            cols, inside = hidden_tile(first + n, live, BLOCK_H, H)
            saved = load_planes(saved_ptr, row, rows, cols, inside, K, H)
            before = previous_states(
                (y_ptr, c_ptr), (h0_ptr, c0_ptr), i, row - forth, flags, origin, rows, cols, inside, S, H
            )
            direct = load_states(direct_ptrs, row, rows, cols, inside, S, BLOCK_B, BLOCK_H, H)
            carry = carries[n]
            if MODE == "grouped" and BLOCK_H >= WIDE:
                saved, before = beside(carry[0], saved, i, K), beside(carry[0], before, i, S)
                direct = beside(carry[0], direct, i, S)
            if not LOCAL:
                alive = wait(arrived, j * tl.num_programs(1), report_ptr)
                carry = receive(
                    carry, alive, i + 1, sent_x_ptr, sent_h_ptr, parts_ptr, bound_ptr, dgx_ptr, dgh_ptr, w_ptr, weights,
                    flags_ptr, recurrent_ptr, T, row + forth, slot, origin, rows, row_inside, first,
                    G, S, H, BLOCK_H, BLOCK_K, WIDTH, MODE == "grouped", PRECISION,
                )  # fmt: skip
            dstate = ()
            for s in tl.static_range(S):
                dstate = dstate + (carry[s] + direct[s],)
            fresh, past = through_zoneout(dstate, zone_ptrs, row, rows, cols, inside, S, H)
            total = CELL_TOTAL(saved, before, fresh)
            if norms_ptr is not None:
                at = (2 * S * T * direction + step_at(i, T, back)) * batch * TILES + (first + n) * batch + top
                store_norms(norms_ptr, at, batch, rows, live, (dstate[0],) + total[1:], flags, S, T * TILES)
                at += S * T * batch * TILES
                store_norms(norms_ptr, at, batch, rows, live, carry, flags, S, T * TILES)
            if clip_value is not None:
                dstate = clamp(dstate, clip_value, S)
                fresh, past = through_zoneout(dstate, zone_ptrs, row, rows, cols, inside, S, H)
                total = CELL_TOTAL(saved, before, fresh)
            if bound_ptr is not None:
                whole = (dstate[0],) + total[1:]
                for s in tl.static_range(S):
                    parts += place(tile_norm(whole[s], flags), s * TILES + first + n, WIDTH)
            dgx, dgh, through_cell = CELL_BACKWARD(saved, before, total)
            dgx, dgh = drop_padded(dgx, flags, G), drop_padded(dgh, flags, G)
            gates_x, gates_h = gates_x + (dgx,), gates_h + (dgh,)
            rest = past_weights(past, through_cell, carry, flags, S)
            rests = rests + (rest if LOCAL else where_all(i >= 0, rest, carry, S),)

        scale = None
        if LOCAL:
            operands = ()
            if bound_ptr is not None:
                scale = clip_scales(parts, bound_ptr)
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
                product = local_product_back(operands, weights, n, rows, G, TILES, BLOCK_H, PRECISION)
                carry = arriving(product, rests[n], scale, flags, recurrent_ptr, origin, rows, cols, inside, S, H)
                carries = carries + (carry,)
        else:
            leave(
                gates_x[0], gates_h[0], parts, i, row, sent_x_ptr, sent_h_ptr, parts_ptr, dgx_ptr, dgh_ptr,
                slot, origin, rows, live, first, G, S, H, BLOCK_H, WIDTH, MODE == "grouped",
            )  # fmt: skip
            arrive(arrived)
            carries = rests

    for n in tl.static_range(OWN):
        cols, inside = hidden_tile(first + n, row_inside, BLOCK_H, H)
        for s in tl.static_range(S):
            store_tile(leaving_ptrs[s], origin, rows, cols, inside, carries[n][s], H)
