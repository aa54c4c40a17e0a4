"""The kernels of a step whose products are GEMMs of a library. A program takes a few rows of the batch and all of H.

A GEMM computes `W_hh h` for the whole batch, and one kernel does the rest of the step: reset, layer norm, cell,
zoneout, padding, and in the backward also norms and clipping. A reduction over H stays inside a program. A projection
is a second GEMM in the middle of a step; it splits the kernel in two.

    forward:  h W_hhᵀ -> forward_kernel [-> out W_hrᵀ -> forward_projected_kernel]
    backward: [backward_projected_kernel -> dh_new W_hr ->] backward_kernel -> dgh W_hh; at last initial_kernel

Steps are counted in scan order: t is T - 1 - i where the scan walks back. BLOCK_H is H rounded up to a power of two.

A cell without W_hh needs no GEMM; `gh_ptr`, or `product_ptr`, is None. With a recurrent mask for each gate (MASKS is G,
else 1), the operand of W_hh has a part for each gate, and so has what comes back from it.

LN_OF names the layer norm of the gates: "separate", of W_hh h; "sum", of W_ih x + W_hh h over all gates; "gates", of
the same, each gate by itself. The sum takes the place of gh, and gx is zero. With LN_CARRIED the layer norm of c is of
the state that is carried on, not inside the tanh.

Shapes: T steps, B batch, H hidden, P projection (else H), G gates, S states, K saved planes, Q parameters and N inputs
of the cell. `[B, ...]` tensors hold one step. Row indices are 64 bits wide.
"""

import triton
import triton.language as tl

from .cells import lstm_cell_state, lstm_gates_backward, lstm_output, lstm_pre_activations
from .functions import tanh
from .gradients import (
    carried_gradient,
    clamp,
    clip_scales,
    drop_padded,
    gradient_past_weights,
    planes_or_zeros,
    previous_states,
    state_gradient,
    store_norm,
    through_decay,
    through_zoneout,
    tile_norm,
)  # fmt: skip
from .layer_norm import normalize, normalize_backward, normalize_gates, normalize_gates_backward
from .memory import (
    PAD,
    RESET,
    BatchTile,
    choose,
    decayed,
    hidden_tile,
    load_beside,
    load_flags,
    load_plane,
    load_planes,
    load_state,
    load_tile,
    load_vectors,
    offset,
    partly_inside,
    store_planes,
    store_tile,
    zero_tile,
)  # fmt: skip
from .norms import into_column
from .products import scaled
from .scan import next_state


@triton.jit
def program_tile(B, t, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, H: tl.constexpr):
    """The rows of the batch that this program takes at step t, by all of H."""
    batch, rows = B.to(tl.int64), tl.arange(0, BLOCK_B)
    origin = tl.program_id(0).to(tl.int64) * BLOCK_B
    return hidden_tile(BatchTile(t * batch + origin, origin, rows, origin + rows < batch), 0, BLOCK_H, H)


@triton.jit
def layer_norm_c(c, weight_ptr, bias_ptr, tile, H: tl.constexpr, EPS: tl.constexpr):
    """The layer norm on c of an LSTM: its weight, the normalised c, 1 / std, and its output."""
    weight, bias = load_vectors(weight_ptr, tile, 1, H)[0], load_vectors(bias_ptr, tile, 1, H)[0]
    c_hat, rstd = normalize((c,), tile.inside, 1, H, EPS)
    return weight, c_hat[0], rstd, c_hat[0] * weight + bias


# -------------------------------------------------------------------------------------------------------- forward


@triton.jit
def gates_of_products(
    gx, gh_ptr, b_ptr, ln_hh_ptr, flags, tile, G: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr, LN_OF: tl.constexpr
):
    """gx, and LN(W_hh h) + b_hh. After a reset W_hh h is zero."""
    raw, gh = load_planes(gh_ptr, tile.origin, tile, G, H), ()
    for g in tl.static_range(G):
        gh = gh + (choose(flags, RESET, 0.0, raw[g]),)
    if LN_OF != "separate":
        products, zeros, gh = gh, (), ()
        for g in tl.static_range(G):
            zeros, gh = zeros + (tl.zeros_like(gx[g]),), gh + (gx[g] + products[g],)
        gx = zeros
    if ln_hh_ptr is not None:
        weight = load_vectors(ln_hh_ptr, tile, G, H)
        xhat, gh = normalize_gates(gh, tile.inside, G, H, EPS, LN_OF == "gates")[0], ()
        for g in tl.static_range(G):
            gh = gh + (xhat[g] * weight[g],)
    if b_ptr is not None:
        bias, product, gh = load_vectors(b_ptr, tile, G, H), gh, ()
        for g in tl.static_range(G):
            gh = gh + (product[g] + bias[g],)
    return gx, gh


@triton.jit
def store_h(
    h, flags, recurrent_mask_ptr, zone_h_ptr, decay_h_ptr, decay_next_ptr, h_in_ptr, h_out_ptr, operand_ptr, y_ptr,
    tile, P: tl.constexpr, MASKS: tl.constexpr,
):  # fmt: skip
    """Zoneout and padding turn the cell's h into the state after the step. Stores it, the output, and the operand of
    the next product."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    carried = load_tile(h_in_ptr, tile.origin, tile, P)
    before = decayed((choose(flags, RESET, 0.0, carried),), (decay_h_ptr,), tile.row, tile, 1, P)[0]
    state = next_state(h, before, carried.to(dtype), flags, zone_h_ptr, tile, dtype, 0, 1, P)
    store_tile(h_out_ptr, tile.origin, tile, state, P)
    store_tile(y_ptr, tile.row, tile, choose(flags, PAD, 0.0, state), P)
    if operand_ptr is not None:
        next_h = decayed((state,), (decay_next_ptr,), tile.row, tile, 1, P)[0]
        operands = ()
        for k in tl.static_range(MASKS):
            operand = next_h
            if recurrent_mask_ptr is not None:
                operand = next_h.to(tl.float32) * load_plane(recurrent_mask_ptr, tile.origin, tile, k, MASKS, P)
            operands = operands + (operand,)
        store_planes(operand_ptr, tile.origin, tile, operands, MASKS, P)


@triton.jit(do_not_specialize=["B", "t"])
def forward_kernel(
    gx_ptr,  # [T, B, G*H]
    gh_ptr,  # [B, G*H] float32: W_hh h, not yet zero after a reset; None for a cell without W_hh
    b_ptr,  # [G*H] or None
    ln_hh_ptr,  # [G*H] or None
    ln_c_weight_ptr,  # [H] or None
    ln_c_bias_ptr,  # [H] or None
    parameters_ptr,  # [Q*H] or None
    step_inputs_ptr,  # [T, B, N*H] or None
    flags_ptr,  # [T, B] uint8 or None
    recurrent_mask_ptr,  # [B, MASKS*H] or None
    zone_h_ptr,  # [T, B, H] or None
    zone_c_ptr,  # [T, B, (S-1)*H] or None
    decay_h_ptr,  # [T, B, H] or None: multiplies h before the step; with projection [T, B, P], for the other kernel
    decay_next_ptr,  # the same before the step that follows
    decay_c_ptr,  # [T, B, (S-1)*H] or None
    h_in_ptr,  # [B, H]: the h before the step; with projection, h is left to forward_projected_kernel
    c_in_ptr,  # [B, (S-1)*H] float32, or None for a cell whose only state is h
    h_out_ptr,  # [B, H]: the h after the step, other memory
    c_out_ptr,  # [B, (S-1)*H] float32 or None
    operand_ptr,  # [B, MASKS*H]: h_out times the next decay and the mask of recurrent dropout; None without either
    out_ptr,  # [B, H]: with projection, the h to project; else None
    y_ptr,  # [T, B, H]
    c_ptr,  # [T, B, (S-1)*H] float32 or None
    saved_ptr,  # [T, B, K*H] or None
    B,
    t,
    CELL_FORWARD: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    MASKS: tl.constexpr,
    LN_EPS: tl.constexpr,
    LN_OF: tl.constexpr,
    LN_CARRIED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tile = program_tile(B, t, BLOCK_B, BLOCK_H, H)
    flags = load_flags(flags_ptr, tile)

    gx = load_planes(gx_ptr, tile.row, tile, G, H)
    gh = ()
    if gh_ptr is not None:
        gx, gh = gates_of_products(gx, gh_ptr, b_ptr, ln_hh_ptr, flags, tile, G, H, LN_EPS, LN_OF)
    beside = load_beside(parameters_ptr, step_inputs_ptr, tile.row, tile, Q, N, H) + partly_inside(tile, H)
    # With projection h has fewer columns. The LSTM does not read it, so c is loaded in its place.
    in_ptrs = (h_in_ptr if out_ptr is None else c_in_ptr, c_in_ptr)
    decay_ptrs = (decay_h_ptr if out_ptr is None else decay_c_ptr, decay_c_ptr)
    before = ()
    for s in tl.static_range(S):
        before = before + (choose(flags, RESET, 0.0, load_state(in_ptrs, tile.origin, tile, s, S, H)),)
    before = decayed(before, decay_ptrs, tile.row, tile, S, H)
    if ln_c_weight_ptr is None:
        cell_states, saved = CELL_FORWARD(gx, gh, before, beside)
    else:
        saved = lstm_pre_activations(gx, gh)
        c = lstm_cell_state(saved, before[1])
        normal = layer_norm_c(c, ln_c_weight_ptr, ln_c_bias_ptr, tile, H, LN_EPS)[3]
        cell_states = (lstm_output(saved, tanh(normal)), normal if LN_CARRIED else c)
    if saved_ptr is not None:
        store_planes(saved_ptr, tile.row, tile, drop_padded(saved, flags, K), K, H)
    if S > 1:
        carried, others = load_planes(c_in_ptr, tile.origin, tile, S - 1, H), ()
        for s in tl.static_range(1, S):
            other = next_state(
                cell_states[s], before[s], carried[s - 1], flags, zone_c_ptr, tile, tl.float32, s - 1, S - 1, H
            )
            others = others + (other,)
        store_planes(c_out_ptr, tile.origin, tile, others, S - 1, H)
        if c_ptr is not None:
            store_planes(c_ptr, tile.row, tile, drop_padded(others, flags, S - 1), S - 1, H)
    if out_ptr is None:
        store_h(
            cell_states[0], flags, recurrent_mask_ptr, zone_h_ptr, decay_h_ptr, decay_next_ptr, h_in_ptr, h_out_ptr,
            operand_ptr, y_ptr, tile, H, MASKS,
        )  # fmt: skip
    else:
        store_tile(out_ptr, tile.origin, tile, cell_states[0], H)


@triton.jit(do_not_specialize=["B", "t"])
def forward_projected_kernel(
    projected_ptr,  # [B, P] float32: W_hr times the cell's h
    flags_ptr,  # [T, B] uint8 or None
    recurrent_mask_ptr,  # [B, MASKS*P] or None
    zone_h_ptr,  # [T, B, P] or None
    decay_h_ptr,  # [T, B, P] or None
    decay_next_ptr,  # [T, B, P] or None
    h_in_ptr,  # [B, P]
    h_out_ptr,  # [B, P], other memory
    operand_ptr,  # [B, MASKS*P] or None
    y_ptr,  # [T, B, P]
    B,
    t,
    P: tl.constexpr,
    MASKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The second part of a forward step with projection."""
    tile = program_tile(B, t, BLOCK_B, BLOCK_P, P)
    flags = load_flags(flags_ptr, tile)
    h = load_tile(projected_ptr, tile.origin, tile, P)
    store_h(
        h, flags, recurrent_mask_ptr, zone_h_ptr, decay_h_ptr, decay_next_ptr, h_in_ptr, h_out_ptr, operand_ptr, y_ptr,
        tile, P, MASKS,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- backward


@triton.jit
def carried_dh(
    past_weights_ptr, product_ptr, scales_ptr, flags_ptr, recurrent_mask_ptr, decay_h_ptr, decayed_h_grad_ptr, tile,
    next_step, P: tl.constexpr, MASKS: tl.constexpr,
):  # fmt: skip
    """dL/dh after the step of `tile`, carried back from the next step, `next_step` rows further on.

    The next step left the part that passed through W_hh in `product`, the rest in `past_weights`, and with a projection
    the factors of its clipping in `scales`.
    """
    carry = planes_or_zeros(past_weights_ptr, tile.origin, tile, 1, P)
    row = tile.row + next_step
    if product_ptr is not None:
        flags = load_flags(offset(flags_ptr, next_step), tile)
        scale = None
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + row + tile.rows, mask=tile.row_inside, other=1.0)
        product = zero_tile(tile)
        for k in tl.static_range(MASKS):
            part = load_plane(product_ptr, tile.origin, tile, k, MASKS, P)
            if recurrent_mask_ptr is not None:
                part = part * load_plane(recurrent_mask_ptr, tile.origin, tile, k, MASKS, P)
            product += part
        carry = carried_gradient(product, carry, scale, flags, None, tile, 1, P)
    if decayed_h_grad_ptr is not None:
        next_flags = load_flags(offset(flags_ptr, next_step), tile)
        carry = through_decay(carry, decay_h_ptr, decayed_h_grad_ptr, row, next_flags, tile, 1, P)
    return carry[0]


@triton.jit
def through_layer_norm(
    dgh, ln_hh_ptr, gh_hat_ptr, gh_rstd_ptr, flags, tile, G: tl.constexpr, H: tl.constexpr, EACH: tl.constexpr
):
    """The gradient of W_hh h, or of the sum, before its layer norm, given that of gh."""
    PARTS: tl.constexpr = G if EACH else 1
    weight, gh_hat = load_vectors(ln_hh_ptr, tile, G, H), load_planes(gh_hat_ptr, tile.row, tile, G, H)
    dxhat, rstd = (), ()
    for k in tl.static_range(PARTS):
        places = gh_rstd_ptr + (tile.row + tile.rows) * PARTS + k
        rstd = rstd + (tl.load(places, mask=tile.row_inside, other=0.0)[:, None],)
    for g in tl.static_range(G):
        dxhat = dxhat + (dgh[g] * weight[g],)
    return drop_padded(normalize_gates_backward(dxhat, gh_hat, rstd, tile.inside, G, H, EACH), flags, G)


@triton.jit(do_not_specialize=["T", "B", "i"])
def backward_kernel(
    dy_ptr,  # [T, B, H] or None
    dc_ptr,  # [T, B, (S-1)*H] float32 or None
    saved_ptr,  # [T, B, K*H]
    y_ptr,  # [T, B, H]
    c_ptr,  # [T, B, (S-1)*H] float32, or None for a cell whose only state is h
    h0_ptr,  # [B, H]
    c0_ptr,  # [B, (S-1)*H] float32 or None
    ln_hh_ptr,  # [G*H] or None
    gh_hat_ptr,  # [T, B, G*H] float32, with ln_hh: the normalised W_hh h, or sum
    gh_rstd_ptr,  # [T, B, parts] float32, with ln_hh
    ln_c_weight_ptr,  # [H] or None
    ln_c_bias_ptr,  # [H] or None
    parameters_ptr,  # [Q*H] or None
    step_inputs_ptr,  # [T, B, N*H] or None
    flags_ptr,  # [T, B] uint8 or None
    recurrent_mask_ptr,  # [B, MASKS*H] or None
    zone_h_ptr,  # [T, B, H] or None
    zone_c_ptr,  # [T, B, (S-1)*H] or None
    decay_h_ptr,  # [T, B, H] or None
    decay_c_ptr,  # [T, B, (S-1)*H] or None
    decayed_h_grad_ptr,  # [T, B, H] float32: the gradient of the decayed h of the next step; None at the last step
    decayed_c_grad_ptr,  # [T, B, (S-1)*H] float32: of the other decayed states of this step; None without decay
    clip_norm_ptr,  # [] or None
    clip_value,  # float or None
    product_ptr,  # [B, MASKS*H] float32: what passed through W_hh of the next step; None at the last step
    dh_in_ptr,  # [B, H] or None: the rest of the gradients of the states after the step
    dc_in_ptr,  # [B, (S-1)*H] float32 or None
    dh_out_ptr,  # [B, H] float32: the same of the states before the step, other memory
    dc_out_ptr,  # [B, (S-1)*H] float32 or None
    dh_cell_ptr,  # [B, H] float32: with projection, the gradient of the cell's own h; else None
    dh_cell_unclamped_ptr,  # [B, H] float32: the same before clipping by value, if its norm is wanted; else None
    norm_h_ptr,  # [B] float32: with projection and clipping by norm, the norm of dL/dh; else None
    scales_ptr,  # [T, B] float32: the factors of clipping, written where norm_h is given; else None
    dgx_ptr,  # [T, B, G*H]
    dgh_ptr,  # [T, B, G*H]: the gradient of gh, or None where it equals dgx
    dcell_ptr,  # [T, B, (Q+N)*H]: of the parameters, at each step, and of the inputs; None where there are neither
    dgh_raw_ptr,  # [T, B, G*H]: with ln_hh, the gradient of W_hh h before its layer norm; else None
    dh_new_ptr,  # [T, B, H] or None
    dc_new_ptr,  # [T, B, H] float32: with LN_CARRIED the whole gradient of c; else None
    norms_ptr,  # [2, S, T, B] float32 or None: total and carried
    T,
    B,
    i,
    CELL_TOTAL: tl.constexpr,
    CELL_BACKWARD: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    MASKS: tl.constexpr,
    LN_EPS: tl.constexpr,
    LN_OF: tl.constexpr,
    LN_CARRIED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """A backward step; with projection its second part, after `backward_projected_kernel` and the GEMM with W_hr."""
    tile = program_tile(B, T - 1 - i if REVERSE else i, BLOCK_B, BLOCK_H, H)
    flags = load_flags(flags_ptr, tile)
    zone_ptrs = (zone_h_ptr, zone_c_ptr)
    batch = B.to(tl.int64)
    next_step = -batch if REVERSE else batch

    saved = load_planes(saved_ptr, tile.row, tile, K, H)
    beside = load_beside(parameters_ptr, step_inputs_ptr, tile.row, tile, Q, N, H) + partly_inside(tile, H)
    if dh_cell_ptr is None:
        ptrs, initial_ptrs = (y_ptr, c_ptr), (h0_ptr, c0_ptr)
        decay_ptrs = (decay_h_ptr, decay_c_ptr)
        carry_h = carried_dh(
            dh_in_ptr, product_ptr, None, flags_ptr, recurrent_mask_ptr, decay_h_ptr, decayed_h_grad_ptr, tile,
            next_step, H, MASKS,
        )  # fmt: skip
        dh = carry_h + planes_or_zeros(dy_ptr, tile.row, tile, 1, H)[0]
    else:  # an LSTM, which does not read h: c is loaded in its place
        ptrs, initial_ptrs = (c_ptr, c_ptr), (c0_ptr, c0_ptr)
        decay_ptrs = (decay_c_ptr, decay_c_ptr)
        carry_h = zero_tile(tile)
        unclamped_ptr = dh_cell_ptr if dh_cell_unclamped_ptr is None else dh_cell_unclamped_ptr
        dh = load_tile(unclamped_ptr, tile.origin, tile, H)
    before = previous_states(ptrs, initial_ptrs, i, tile.row - next_step, flags, tile, S, H)
    before = decayed(before, decay_ptrs, tile.row, tile, S, H)
    carry = (carry_h,) + planes_or_zeros(dc_in_ptr, tile.origin, tile, S - 1, H)
    dc, dstate = planes_or_zeros(dc_ptr, tile.row, tile, S - 1, H), (dh,)
    for s in tl.static_range(1, S):
        dstate = dstate + (carry[s] + dc[s - 1],)
    ln_c = None
    if ln_c_weight_ptr is not None:
        weight, c_hat, rstd, normal = layer_norm_c(
            lstm_cell_state(saved, before[1]), ln_c_weight_ptr, ln_c_bias_ptr, tile, H, LN_EPS
        )
        ln_c = (weight, c_hat, rstd, tanh(normal))

    to_cell, past_cell, total, dtotal = state_gradient(
        dstate, carry, dh_cell_ptr, saved, before, beside, ln_c, zone_ptrs, clip_value, norms_ptr, tile.row, T * batch,
        flags, tile, CELL_TOTAL, S, H, LN_CARRIED,
    )  # fmt: skip
    if clip_norm_ptr is not None:
        if norm_h_ptr is None:
            norm_h = tile_norm(dtotal[0], flags)
        else:
            norm_h = tl.load(norm_h_ptr + tile.origin + tile.rows, mask=tile.row_inside, other=0.0)
        state_norms = into_column(norm_h, 0, S)
        for s in tl.static_range(1, S):
            state_norms += into_column(tile_norm(dtotal[s], flags), s, S)
        scale = clip_scales(state_norms, clip_norm_ptr)
        to_cell, past_cell, total = scaled(to_cell, scale, S), scaled(past_cell, scale, S), scaled(total, scale, S)
        if scales_ptr is not None:
            tl.store(scales_ptr + tile.row + tile.rows, scale, mask=tile.row_inside)
    if dh_new_ptr is not None:
        store_tile(dh_new_ptr, tile.row, tile, choose(flags, PAD, 0.0, to_cell[0]), H)

    if ln_c is None:
        dgx, dgh, through_cell, dcell = CELL_BACKWARD(saved, before, total, beside)
        store_planes(dcell_ptr, tile.row, tile, drop_padded(dcell, flags, Q + N), Q + N, H)
    else:
        dc_cell = total[1]
        if LN_CARRIED:
            store_tile(dc_new_ptr, tile.row, tile, choose(flags, PAD, 0.0, total[1]), H)
            dc_cell = normalize_backward((total[1] * ln_c[0],), (ln_c[1],), ln_c[2], tile.inside, 1, H)[0]
        dgx, dgh, through_cell, _ = lstm_gates_backward(saved, before[1], ln_c[3], (total[0], dc_cell))
    dgx, dgh = drop_padded(dgx, flags, G), drop_padded(dgh, flags, G)
    past_weights = gradient_past_weights(past_cell, through_cell, carry, flags, S)
    if LN_OF == "separate":
        store_planes(dgx_ptr, tile.row, tile, dgx, G, H)
    if dgh_ptr is not None:
        store_planes(dgh_ptr, tile.row, tile, dgh, G, H)
    if dh_cell_ptr is None:
        store_tile(dh_out_ptr, tile.origin, tile, past_weights[0], H)
    others = past_weights[1:]
    if decayed_c_grad_ptr is not None:
        others = through_decay(others, decay_c_ptr, decayed_c_grad_ptr, tile.row, flags, tile, S - 1, H)
    store_planes(dc_out_ptr, tile.origin, tile, others, S - 1, H)
    if ln_hh_ptr is not None:
        dgh_raw = through_layer_norm(dgh, ln_hh_ptr, gh_hat_ptr, gh_rstd_ptr, flags, tile, G, H, LN_OF == "gates")
        store_planes(dgh_raw_ptr, tile.row, tile, dgh_raw, G, H)
        if LN_OF != "separate":
            store_planes(dgx_ptr, tile.row, tile, dgh_raw, G, H)


@triton.jit(do_not_specialize=["T", "B", "i"])
def backward_projected_kernel(
    dy_ptr,  # [T, B, P] or None
    flags_ptr,  # [T, B] uint8 or None
    recurrent_mask_ptr,  # [B, MASKS*P] or None
    zone_h_ptr,  # [T, B, P] or None
    decay_h_ptr,  # [T, B, P] or None
    decayed_h_grad_ptr,  # [T, B, P] float32: the gradient of the decayed h of the next step; None at the last step
    clip_value,  # float or None
    product_ptr,  # [B, MASKS*P] float32: what passed through W_hh of the next step; None at the last step
    scales_ptr,  # [T, B] float32 or None: the factors of clipping of the steps that follow
    dh_in_ptr,  # [B, P] or None: the rest of dL/dh after the step
    dh_out_ptr,  # [B, P] float32: the same before it, other memory, not scaled yet
    dh_new_ptr,  # [T, B, P]: the gradient of the projection's output, not scaled yet
    dh_new_unclamped_ptr,  # [B, P]: the same before clipping by value, if its norm is wanted; else None
    norm_h_ptr,  # [B] float32 or None: the norm of dL/dh to clip by
    norms_ptr,  # [2, S, T, B] float32 or None: total and carried; those of h are written
    T,
    B,
    i,
    S: tl.constexpr,
    P: tl.constexpr,
    MASKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The first part of a backward step with projection: dL/dh before it reaches W_hr."""
    tile = program_tile(B, T - 1 - i if REVERSE else i, BLOCK_B, BLOCK_P, P)
    flags = load_flags(flags_ptr, tile)
    batch = B.to(tl.int64)
    next_step = -batch if REVERSE else batch

    carry = carried_dh(
        dh_in_ptr, product_ptr, scales_ptr, flags_ptr, recurrent_mask_ptr, decay_h_ptr, decayed_h_grad_ptr, tile,
        next_step, P, MASKS,
    )  # fmt: skip
    dh = carry + planes_or_zeros(dy_ptr, tile.row, tile, 1, P)[0]
    if norms_ptr is not None:
        store_norm(norms_ptr + tile.row, dh, flags, tile)
        store_norm(norms_ptr + tile.row + S * T * batch, carry, flags, tile)
    if dh_new_unclamped_ptr is not None:
        to_cell = through_zoneout((dh,), (zone_h_ptr,), tile, 1, P)[0]
        store_tile(dh_new_unclamped_ptr, tile.origin, tile, to_cell[0], P)
    if clip_value is not None:
        dh = clamp((dh,), clip_value, 1)[0]
    if norm_h_ptr is not None:
        tl.store(norm_h_ptr + tile.origin + tile.rows, tile_norm(dh, flags), mask=tile.row_inside)
    to_cell, past_cell = through_zoneout((dh,), (zone_h_ptr,), tile, 1, P)
    past_weights = gradient_past_weights(past_cell, (tl.zeros_like(dh),), (carry,), flags, 1)
    store_tile(dh_new_ptr, tile.row, tile, choose(flags, PAD, 0.0, to_cell[0]), P)
    store_tile(dh_out_ptr, tile.origin, tile, past_weights[0], P)


@triton.jit(do_not_specialize=["T", "B"])
def initial_kernel(
    flags_ptr,  # [T, B] uint8 or None
    recurrent_mask_ptr,  # [B, MASKS*P] or None
    decay_h_ptr,  # [T, B, P] or None
    decayed_h_grad_ptr,  # [T, B, P] float32 or None: the gradient of the decayed h of the first step
    product_ptr,  # [B, MASKS*P] float32: what passed through W_hh of the first step
    scales_ptr,  # [T, B] float32 or None
    past_weights_ptr,  # [B, P] float32: the rest of dL/dh before it
    dh0_ptr,  # [B, P]
    T,
    B,
    P: tl.constexpr,
    MASKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The gradient of the initial h, after all steps."""
    tile = program_tile(B, T if REVERSE else -1, BLOCK_B, BLOCK_P, P)
    batch = B.to(tl.int64)
    next_step = -batch if REVERSE else batch
    dh0 = carried_dh(
        past_weights_ptr, product_ptr, scales_ptr, flags_ptr, recurrent_mask_ptr, decay_h_ptr, decayed_h_grad_ptr, tile,
        next_step, P, MASKS,
    )  # fmt: skip
    store_tile(dh0_ptr, tile.origin, tile, dh0, P)
