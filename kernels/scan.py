"""The sequence kernels: one forward, one backward, generic over the cell, over a range of steps `[t_begin, t_end)`.

They run in three modes of the same code, which give the same bits at equal tiles:

- stepwise: a program takes one tile of the batch and one of the hidden units, a launch takes one step. The launch is
  the barrier: the programs exchange h, or the gradients of the gates, from one launch to the next.
- grouped: the same program keeps its part of W_hh on the chip and walks all steps. The programs of a tile of the batch
  are a group, with a barrier among them between two steps (`barrier.py`). Without a barrier, a launch takes one step.
- local: a program takes a tile of the batch and all of the hidden units, keeps all of W_hh and walks all steps.

Steps are counted in scan order: `i` counts up, and t is T - 1 - i where the scan walks back. The time loop never has a
negative step, and takes `num_stages=1`, so that nothing written in one step is fetched ahead of the write.

A grid holds all directions of a layer. A program walks one direction, with the weights of that direction: back if the
number of the direction is odd, or even under `reverse`. Programs of different directions do not wait for each other.

A cell without W_hh (`w_ptr` is None) has no product and exchanges nothing. It runs in mode local, but a program takes
one tile of the hidden units, as many programs as there are.

With HEADS > 1, W_hh is in blocks (`fastrnn/heads.py`). In mode local a program takes one head; in the others, a tile
of one, and the programs of a head are a group of their own. Only clipping by norm joins the heads: then a group has all
of them, and mode local cannot. Norms of heads are added as those of tiles are.

Shapes: D directions, T steps, B batch, H hidden, G gates, S states, K saved planes, Q parameters and N inputs of the
cell. The states beyond h are planes of one tensor: `[.., (S-1)*H]`. Row indices are 64 bits wide.
"""

import triton
import triton.language as tl

from .barrier import arrive, counter_of, unless_stuck, wait
from .gradients import (
    GateGradients,
    carried_gradient,
    clip_scales,
    drop_padded,
    gather_gate_grads,
    gradient_past_weights,
    load_states,
    match_layout,
    previous_states,
    publish_gate_grads,
    state_gradient,
    tile_norm,
    where_all,
)  # fmt: skip
from .memory import (
    PAD,
    RESET,
    WIDE,
    BatchTile,
    choose,
    each_row,
    hidden_tile,
    load_beside,
    load_flags,
    load_plane,
    load_planes,
    load_tile,
    offset,
    partly_inside,
    step_at,
    store_planes,
    store_tile,
)  # fmt: skip
from .norms import into_column
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
def next_state(
    cell_state, before, carried, flags, zone_ptr, tile, dtype, k: tl.constexpr, PLANES: tl.constexpr, H: tl.constexpr
):
    """A state after the step: zoneout mixes the state before the step in, padding carries the old one unchanged.

    The state is plane k of the PLANES at `zone_ptr`.
    """
    state = cell_state
    if zone_ptr is not None:
        zone = load_plane(zone_ptr, tile.row, tile, k, PLANES, H)
        state = (1 - zone) * state + zone * before
    return choose(flags, PAD, carried, state.to(dtype))


@triton.jit
def next_states(cell_states, before, carried, flags, zone_ptrs, tile, dtype, S: tl.constexpr, H: tl.constexpr):
    """`next_state` of all states. h is rounded to `dtype`, the others stay float32."""
    states = (next_state(cell_states[0], before[0], carried[0], flags, zone_ptrs[0], tile, dtype, 0, 1, H),)
    for s in tl.static_range(1, S):
        state = next_state(
            cell_states[s], before[s], carried[s], flags, zone_ptrs[1], tile, tl.float32, s - 1, S - 1, H
        )
        states = states + (state,)
    return states


@triton.jit(do_not_specialize=["T", "B", "t_begin", "t_end", "reverse"])
def forward_kernel(
    gx_ptr,  # [D, T, B, G*H]
    w_ptr,  # [D, G*H, H], or in heads [D, HEADS, G*UNITS, UNITS]; None for a cell without W_hh
    b_ptr,  # [D, G*H] or None
    parameters_ptr,  # [D, Q*H] or None
    step_inputs_ptr,  # [D, T, B, N*H] or None
    flags_ptr,  # [D, T, B] uint8 or None
    recurrent_mask_ptr,  # [D, B, H] or None
    zone_h_ptr,  # [D, T, B, H] or None
    zone_c_ptr,  # [D, T, B, (S-1)*H] or None
    h_in_ptr,  # [D, B, H]: the states before step t_begin
    c_in_ptr,  # [D, B, (S-1)*H] float32, or None for a cell whose only state is h
    h_out_ptr,  # [D, B, H]: the states after step t_end - 1; may be the same memory
    c_out_ptr,  # [D, B, (S-1)*H] float32 or None
    operand_ptr,  # [2, D, B, H]: the operand of W_hh in even and odd steps, which a group exchanges; None if local
    arrived_ptr,  # [D, tiles of B, groups, LINE] int32, zeros: the barriers; None where a launch takes one step
    timeout_flag_ptr,  # [] int32 or None: set where a wait was too long
    y_ptr,  # [D, T, B, H]
    c_ptr,  # [D, T, B, (S-1)*H] float32 or None
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
    Q: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,  # units that a product takes at a time
    MODE: tl.constexpr,  # "local", "grouped" or "stepwise"
    PRECISION: tl.constexpr,
):
    LOCAL: tl.constexpr = MODE == "local"
    RECURRENT: tl.constexpr = w_ptr is not None
    UNITS: tl.constexpr = H // HEADS
    H_TILES: tl.constexpr = HEADS * ((UNITS + BLOCK_H - 1) // BLOCK_H)
    TILES: tl.constexpr = H_TILES // HEADS if LOCAL and RECURRENT else 1  # of this program
    PROGRAMS: tl.constexpr = H_TILES // HEADS // TILES  # of a head
    batch, direction = B.to(tl.int64), tl.program_id(2).to(tl.int64)
    walks_back = direction % 2 != reverse
    next_step = tl.where(walks_back, -batch, batch)  # rows from a step to the one that follows it
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B  # of the tile, in the batch
    origin = direction * batch + first_row
    slot = tl.num_programs(2) * batch  # rows of a slot of what is exchanged
    rows = tl.arange(0, BLOCK_B)
    row_inside = first_row + rows < batch
    start = BatchTile(origin, origin, rows, row_inside)
    first = tl.program_id(1) * TILES  # the program's first tile of the hidden units
    w_ptr = offset(w_ptr, direction * G * H * UNITS)
    head, of_head = 0, first  # the program's first tile, in its head
    if HEADS > 1:
        head, of_head = tl.program_id(1) // PROGRAMS, tl.program_id(1) % PROGRAMS * TILES
        w_ptr = offset(w_ptr, head * G * UNITS * UNITS)
    b_ptr = offset(b_ptr, direction * G * H)
    parameters_ptr = offset(parameters_ptr, direction * Q * H)
    arrived = offset(arrived_ptr, counter_of(direction, head, HEADS))
    members = tl.num_programs(1) // HEADS  # of a group
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    zone_ptrs = (zone_h_ptr, zone_c_ptr)

    weights = ()
    if MODE != "stepwise" and RECURRENT:
        weights = load_weights(w_ptr, of_head, G, TILES, UNITS, BLOCK_H, BLOCK_K, False)
    states = ()
    for n in tl.static_range(TILES):
        initial = hidden_tile(start, first + n, BLOCK_H, H, HEADS)
        h = load_tile(h_in_ptr, origin, initial, H).to(dtype)
        states = states + ((h,) + load_planes(c_in_ptr, origin, initial, S - 1, H),)

    for i in tl.range(t_begin, t_end, num_stages=1):
        row = (direction * T + step_at(i, T, walks_back)) * batch + first_row
        now = BatchTile(row, origin, rows, row_inside)
        flags = load_flags(flags_ptr, now)
        operands = ()
        if LOCAL and RECURRENT:
            for n in tl.static_range(TILES):
                tile = hidden_tile(now, first + n, BLOCK_H, H, HEADS)
                operands = operands + (recurrent_operand(states[n][0], flags, recurrent_mask_ptr, tile, H),)
        states_after = ()
        for n in tl.static_range(TILES):
            tile = hidden_tile(now, first + n, BLOCK_H, H, HEADS)
            gx = load_planes(gx_ptr, row, tile, G, H)
            bias = load_biases(b_ptr, tile, G, H)
            beside = load_beside(parameters_ptr, step_inputs_ptr, row, tile, Q, N, H)
            if not LOCAL:
                following = BatchTile(row + next_step, origin, rows, row_inside & (each_row(i, rows) + 1 < T))
                flags_next = load_flags(flags_ptr, following)
                alive = wait(arrived, (i - t_begin) * members, timeout_flag_ptr)
                operand_now = operand_ptr + i % 2 * slot * H
            if not RECURRENT:
                gh = ()
            elif LOCAL:
                gh = local_product(bias, operands, weights, n, G, TILES, PRECISION)
            elif MODE == "grouped":
                gh = grouped_product(bias, operand_now, weights, tile, G, H, HEADS, BLOCK_K, PRECISION)
            else:
                gh = streamed_product(bias, operand_now, w_ptr, tile, G, H, HEADS, BLOCK_K, PRECISION)
            if not LOCAL:
                gh = unless_stuck(alive, gh, G)
            before = ()
            for s in tl.static_range(S):
                before = before + (choose(flags, RESET, 0.0, states[n][s].to(tl.float32)),)
            cell_states, saved = CELL_FORWARD(gx, gh, before, beside + partly_inside(tile, UNITS))
            state = next_states(cell_states, before, states[n], flags, zone_ptrs, tile, dtype, S, H)
            states_after = states_after + (state,)
            if not LOCAL:
                # The programs that read this slot did so at step i - 1, before they arrived. All of them have arrived.
                operand = recurrent_operand(state[0], flags_next, recurrent_mask_ptr, tile, H)
                store_tile(operand_ptr + (i + 1) % 2 * slot * H, origin, tile, operand, H)
                arrive(arrived)
            store_tile(y_ptr, row, tile, choose(flags, PAD, 0.0, state[0]), H)
            if c_ptr is not None:
                store_planes(c_ptr, row, tile, drop_padded(state[1:], flags, S - 1), S - 1, H)
            if saved_ptr is not None:
                store_planes(saved_ptr, row, tile, drop_padded(saved, flags, K), K, H)
        states = states_after

    for n in tl.static_range(TILES):
        last = hidden_tile(start, first + n, BLOCK_H, H, HEADS)
        store_tile(h_out_ptr, origin, last, states[n][0], H)
        store_planes(c_out_ptr, origin, last, states[n][1:], S - 1, H)


# ------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["T", "B", "t_begin", "t_end", "reverse"])
def backward_kernel(
    dy_ptr,  # [D, T, B, H] or None
    dc_ptr,  # [D, T, B, (S-1)*H] float32 or None
    saved_ptr,  # [D, T, B, K*H]
    y_ptr,  # [D, T, B, H]
    c_ptr,  # [D, T, B, (S-1)*H] float32, or None for a cell whose only state is h
    h0_ptr,  # [D, B, H]
    c0_ptr,  # [D, B, (S-1)*H] float32 or None
    w_ptr,  # [D, G*H, H], or in heads [D, HEADS, G*UNITS, UNITS]; None for a cell without W_hh
    parameters_ptr,  # [D, Q*H] or None
    step_inputs_ptr,  # [D, T, B, N*H] or None
    flags_ptr,  # [D, T, B] uint8 or None
    recurrent_mask_ptr,  # [D, B, H] or None
    zone_h_ptr,  # [D, T, B, H] or None
    zone_c_ptr,  # [D, T, B, (S-1)*H] or None
    clip_norm_ptr,  # [] or None
    clip_value,  # float or None
    dh_in_ptr,  # [D, B, H] or None
    dc_in_ptr,  # [D, B, (S-1)*H] float32 or None
    dh_out_ptr,  # [D, B, H]
    dc_out_ptr,  # [D, B, (S-1)*H] float32 or None
    dgx_ptr,  # [D, T, B, G*H]
    dgh_ptr,  # [D, T, B, G*H], or None where it equals dgx
    dcell_ptr,  # [D, T, B, (Q+N)*H]: of the parameters, at each step, and of the inputs; None where there are neither
    norms_ptr,  # [D, 2, S, T, H_TILES, B] float32 or None: total and carried, of each tile
    unscaled_x_ptr,  # [2, D, B, G*H] float32: see GateGradients; None if local or without clipping by norm
    unscaled_h_ptr,  # [2, D, B, G*H] float32 or None
    unscaled_cell_ptr,  # [2, D, B, (Q+N)*H] float32 or None
    partial_norms_ptr,  # [2, S*H_TILES, D, B] float32 or None
    arrived_ptr,  # [D, tiles of B, groups, LINE] int32, zeros: the barriers; None where a launch takes one step
    timeout_flag_ptr,  # [] int32 or None: set where a wait was too long
    T,
    B,
    t_begin,  # -1, unless local: a step before the first, which only takes the gradients that step 0 published
    t_end,
    reverse,  # whether direction 0 walks back
    CELL_TOTAL: tl.constexpr,
    CELL_BACKWARD: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,  # units that a product takes at a time
    WIDTH: tl.constexpr,  # S * H_TILES, rounded up to a power of two
    MODE: tl.constexpr,  # "local", "grouped" or "stepwise"
    PRECISION: tl.constexpr,
):
    """`dh_in`, `dc_in`: the gradients of the states after step t_end - 1; unless local, and if t_end < T, only the part
    that did not pass through W_hh. `dh_out`, `dc_out`, which may be the same memory: the same of the states before step
    t_begin, complete if t_begin is -1 (if local, 0). If local, clipping by norm needs all of H in one program."""
    LOCAL: tl.constexpr = MODE == "local"
    GROUPED: tl.constexpr = MODE == "grouped"
    RECURRENT: tl.constexpr = w_ptr is not None
    BESIDE: tl.constexpr = Q + N
    UNITS: tl.constexpr = H // HEADS
    H_TILES: tl.constexpr = HEADS * ((UNITS + BLOCK_H - 1) // BLOCK_H)
    TILES: tl.constexpr = H_TILES // HEADS if LOCAL and RECURRENT else 1  # of this program
    PROGRAMS: tl.constexpr = H_TILES // HEADS // TILES  # of a head
    batch, direction = B.to(tl.int64), tl.program_id(2).to(tl.int64)
    walks_back = direction % 2 != reverse
    next_step = tl.where(walks_back, -batch, batch)  # rows from a step to the one that follows it
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B  # of the tile, in the batch
    origin = direction * batch + first_row
    rows = tl.arange(0, BLOCK_B)
    row_inside = first_row + rows < batch
    start = BatchTile(origin, origin, rows, row_inside)
    first = tl.program_id(1) * TILES  # the program's first tile of the hidden units
    w_ptr = offset(w_ptr, direction * G * H * UNITS)
    head, of_head = 0, first  # the program's first tile, in its head
    if HEADS > 1:
        head, of_head = tl.program_id(1) // PROGRAMS, tl.program_id(1) % PROGRAMS * TILES
        w_ptr = offset(w_ptr, head * G * UNITS * UNITS)
    GROUPS: tl.constexpr = HEADS if clip_norm_ptr is None else 1  # of a tile of the batch
    arrived = offset(arrived_ptr, counter_of(direction, head, GROUPS))
    members = tl.num_programs(1) // GROUPS
    parameters_ptr = offset(parameters_ptr, direction * Q * H)
    dstates_in, doutputs, zone_ptrs = (dh_in_ptr, dc_in_ptr), (dy_ptr, dc_ptr), (zone_h_ptr, zone_c_ptr)
    slot = tl.num_programs(2) * batch
    gate_grads = GateGradients(
        dgx_ptr, dgh_ptr, dcell_ptr, unscaled_x_ptr, unscaled_h_ptr, unscaled_cell_ptr, partial_norms_ptr, slot
    )

    weights = w_ptr
    if MODE != "stepwise" and RECURRENT:
        weights = load_weights(w_ptr, of_head, G, TILES, UNITS, BLOCK_H, BLOCK_K, True)
    carries = ()
    for n in tl.static_range(TILES):
        final = hidden_tile(start, first + n, BLOCK_H, H, HEADS)
        carries = carries + (load_states(dstates_in, origin, final, S, H),)

    for j in tl.range(0, t_end - t_begin, num_stages=1):
        i = t_end - 1 - j
        t = step_at(i, T, walks_back)
        row = (direction * T + t) * batch + first_row
        live = row_inside if LOCAL else row_inside & (each_row(i, rows) >= 0)
        now = BatchTile(row, origin, rows, live)
        flags = load_flags(flags_ptr, now)
        gates_x, gates_h, dcells, pasts = (), (), (), ()
        partial_norms = tl.zeros((BLOCK_B, WIDTH), tl.float32)
        for n in tl.static_range(TILES):
            tile = hidden_tile(now, first + n, BLOCK_H, H, HEADS)
            saved = load_planes(saved_ptr, row, tile, K, H)
            before = previous_states((y_ptr, c_ptr), (h0_ptr, c0_ptr), i, row - next_step, flags, tile, S, H)
            direct = load_states(doutputs, row, tile, S, H)
            beside = load_beside(parameters_ptr, step_inputs_ptr, row, tile, Q, N, H)
            carry = carries[n]
            if GROUPED and BLOCK_H >= WIDE:
                saved, before = match_layout(saved, carry[0], i, K), match_layout(before, carry[0], i, S)
                direct = match_layout(direct, carry[0], i, S)
                beside = match_layout(beside, carry[0], i, BESIDE)
            beside = beside + partly_inside(tile, UNITS)
            if not LOCAL:
                alive = wait(arrived, j * members, timeout_flag_ptr)
                following = BatchTile(row + next_step, origin, rows, row_inside & (each_row(i, rows) + 1 < T))
                gathered = gather_gate_grads(
                    carry, alive, i + 1, gate_grads, weights, clip_norm_ptr, flags_ptr, recurrent_mask_ptr,
                    hidden_tile(following, first, BLOCK_H, H, HEADS),
                    G, S, BESIDE, H, HEADS, H_TILES, BLOCK_K, WIDTH, GROUPED, PRECISION,
                )  # fmt: skip
                carry = where_all(i + 1 < T, gathered, carry, S)
            dstate = ()
            for s in tl.static_range(S):
                dstate = dstate + (carry[s] + direct[s],)
            norms_row = (2 * S * T * direction + t) * batch * H_TILES + (first + n) * batch + first_row
            _, past_cell, total, dtotal = state_gradient(
                dstate, carry, None, saved, before, beside, None, zone_ptrs, clip_value, norms_ptr, norms_row,
                T * batch * H_TILES, flags, tile, CELL_TOTAL, S, H,
            )  # fmt: skip
            if clip_norm_ptr is not None:
                for s in tl.static_range(S):
                    partial_norms += into_column(tile_norm(dtotal[s], flags), s * H_TILES + first + n, WIDTH)
            dgx, dgh, through_cell, dcell = CELL_BACKWARD(saved, before, total, beside)
            gates_x, gates_h = gates_x + (drop_padded(dgx, flags, G),), gates_h + (drop_padded(dgh, flags, G),)
            dcells = dcells + (drop_padded(dcell, flags, BESIDE),)
            past_weights = gradient_past_weights(past_cell, through_cell, carry, flags, S)
            pasts = pasts + (past_weights if LOCAL else where_all(i >= 0, past_weights, carry, S),)

        scale = None
        if LOCAL:
            operands = ()
            if clip_norm_ptr is not None:
                scale = clip_scales(partial_norms, clip_norm_ptr)
            for n in tl.static_range(TILES):
                tile = hidden_tile(now, first + n, BLOCK_H, H, HEADS)
                store_planes(dgx_ptr, row, tile, scaled(gates_x[n], scale, G), G, H)
                store_planes(dcell_ptr, row, tile, scaled(dcells[n], scale, BESIDE), BESIDE, H)
                operand = scaled(gates_h[n], scale, G)
                if dgh_ptr is not None:
                    store_planes(dgh_ptr, row, tile, operand, G, H)
                operands = operands + (operand,)
            carries = ()
            for n in tl.static_range(TILES):
                tile = hidden_tile(now, first + n, BLOCK_H, H, HEADS)
                product = None
                if RECURRENT:
                    product = local_product_back(operands, weights, tile, n, G, TILES, PRECISION)
                carries = carries + (carried_gradient(product, pasts[n], scale, flags, recurrent_mask_ptr, tile, S, H),)
        else:
            tile = hidden_tile(now, first, BLOCK_H, H, HEADS)
            publish_gate_grads(
                gates_x[0], gates_h[0], dcells[0], partial_norms, i, gate_grads, tile, first, G, S, BESIDE, H,
                H_TILES, WIDTH, GROUPED,
            )  # fmt: skip
            arrive(arrived)
            carries = pasts

    for n in tl.static_range(TILES):
        last = hidden_tile(start, first + n, BLOCK_H, H, HEADS)
        store_tile(dh_out_ptr, origin, last, carries[n][0], H)
        store_planes(dc_out_ptr, origin, last, carries[n][1:], S - 1, H)
