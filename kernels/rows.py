"""Kernels of a step whose products are a library's: a program takes a few rows of the batch and all hidden units.

The third way to run a scan. A GEMM of its own computes `W_hh h` for the whole batch, and one kernel does the rest of
the step: reset, layer norm, cell, zoneout, padding, and backward also norms and clipping. What is reduced over H never
leaves a program. A projection is a second GEMM in the middle of a step, which parts the kernel in two.

    forward:  h W_hhᵀ -> forward_kernel [-> out W_hrᵀ -> settle_kernel]
    backward: [settle_backward_kernel -> dh_new W_hr ->] backward_kernel -> draw W_hh; at last initial_kernel

Steps are counted in scan order: t is T - 1 - i where the scan walks back. A row is one padded block, BLOCK_H wide.

Shapes: T steps, B batch, H hidden, P projection (else H), G gates, S states, K saved planes. `[B, ...]` tensors hold
one step. Row indices are 64 bits wide.
"""

import triton
import triton.language as tl

from .cells import (
    lstm_cell_state,
    lstm_gates_backward,
    lstm_output,
    lstm_output_backward,
    lstm_pre_activations,
    tanh,
)  # fmt: skip
from .gradients import (
    arriving,
    clamp,
    clip_scales,
    drop_padded,
    past_weights,
    previous_states,
    store_norms,
    through_zoneout,
    tile_norm,
)  # fmt: skip
from .layer_norm import normalize, normalize_backward
from .memory import PAD, RESET, choose, hidden_tile, load_flags, load_planes, load_tile, store_planes, store_tile
from .norms import place
from .products import recurrent_operand, scaled
from .scan import carry_over


@triton.jit
def own_rows(B, BLOCK_B: tl.constexpr):
    """The size of the batch, 64 bits wide, and the rows of it that this program takes: origin, offsets, which exist."""
    batch, rows = B.to(tl.int64), tl.arange(0, BLOCK_B)
    origin = tl.program_id(0).to(tl.int64) * BLOCK_B
    return batch, origin, rows, origin + rows < batch


@triton.jit
def load_vectors(ptr, cols, COUNT: tl.constexpr, H: tl.constexpr):
    """A parameter `[COUNT * H]` as COUNT tiles `[1, BLOCK_H]`, float32."""
    vectors = ()
    for k in tl.static_range(COUNT):
        vector = tl.load(ptr + k * H + cols, mask=cols < H, other=0.0).to(tl.float32)
        vectors = vectors + (vector[None, :],)
    return vectors


# -------------------------------------------------------------------------------------------------------- forward


@triton.jit
def recurrent_part(
    gh_ptr, b_ptr, ln_hh_ptr, flags, origin, rows, cols, inside, G: tl.constexpr, H: tl.constexpr
):  # fmt: skip
    """LN(W_hh h) + b_hh. Behind a reset W_hh h is zero."""
    raw, gh = load_planes(gh_ptr, origin, rows, cols, inside, G, H), ()
    for g in tl.static_range(G):
        gh = gh + (choose(flags, RESET, 0.0, raw[g]),)
    if ln_hh_ptr is not None:
        weight, xhat, gh = load_vectors(ln_hh_ptr, cols, G, H), normalize(gh, inside, G, H)[0], ()
        for g in tl.static_range(G):
            gh = gh + (xhat[g] * weight[g],)
    if b_ptr is not None:
        bias, product, gh = load_vectors(b_ptr, cols, G, H), gh, ()
        for g in tl.static_range(G):
            gh = gh + (product[g] + bias[g],)
    return gh


@triton.jit
def settle(
    h, flags, recurrent_ptr, zone_ptr, h_in_ptr, h_out_ptr, operand_ptr, y_ptr, row, origin, rows, cols, inside,
    P: tl.constexpr,
):  # fmt: skip
    """The h that the step leaves: zoneout and padding, the output, and what W_hh multiplies next."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    carried = load_tile(h_in_ptr, origin, rows, cols, inside, P)
    before = choose(flags, RESET, 0.0, carried)
    state = carry_over(
        (h,), (before,), (carried.to(dtype),), flags, (zone_ptr,), row, rows, cols, inside, dtype, 1, P
    )[0]  # fmt: skip
    store_tile(h_out_ptr, origin, rows, cols, inside, state, P)
    store_tile(y_ptr, row, rows, cols, inside, choose(flags, PAD, 0.0, state), P)
    if operand_ptr is not None:
        operand = recurrent_operand(state, None, recurrent_ptr, origin, rows, cols, inside, P)
        store_tile(operand_ptr, origin, rows, cols, inside, operand, P)


@triton.jit(do_not_specialize=["B", "t"])
def forward_kernel(
    gx_ptr,  # [T, B, G*H]
    gh_ptr,  # [B, G*H] float32: W_hh h, without regard to resets
    b_ptr,  # [G*H] or None
    ln_hh_ptr,  # [G*H] or None
    ln_c_weight_ptr,  # [H] or None
    ln_c_bias_ptr,  # [H] or None
    flags_ptr,  # [T, B] uint8 or None
    recurrent_ptr,  # [B, H] or None
    zone_h_ptr,  # [T, B, H] or None
    zone_c_ptr,  # [T, B, H] or None
    h_in_ptr,  # [B, H]: the states before the step; with projection, this and what follows of h is settle_kernel's
    c_in_ptr,  # [B, H] float32, or None for a cell without c
    h_out_ptr,  # [B, H]: the states after it, other memory
    c_out_ptr,  # [B, H] float32 or None
    operand_ptr,  # [B, H]: h_out times `recurrent`, with that; else None
    out_ptr,  # [B, H]: with projection, the h to project; else None
    y_ptr,  # [T, B, H]
    c_ptr,  # [T, B, H] float32 or None
    saved_ptr,  # [T, B, K*H] or None
    B,
    t,
    CELL_FORWARD: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    batch, origin, rows, row_inside = own_rows(B, BLOCK_B)
    cols, inside = hidden_tile(0, row_inside, BLOCK_H, H)
    row = t * batch + origin
    flags = load_flags(flags_ptr, row, rows, row_inside)

    gx = load_planes(gx_ptr, row, rows, cols, inside, G, H)
    gh = recurrent_part(gh_ptr, b_ptr, ln_hh_ptr, flags, origin, rows, cols, inside, G, H)
    # With projection h is narrower, and the LSTM does not read it: c stands in for it.
    in_ptrs = (h_in_ptr if out_ptr is None else c_in_ptr, c_in_ptr)
    before = ()
    for s in tl.static_range(S):
        state = load_tile(in_ptrs[s], origin, rows, cols, inside, H)
        before = before + (choose(flags, RESET, 0.0, state),)
    if ln_c_weight_ptr is None:
        fresh, saved = CELL_FORWARD(gx, gh, before)
    else:
        saved = lstm_pre_activations(gx, gh)
        c = lstm_cell_state(saved, before[1])
        c_hat = normalize((c,), inside, 1, H)[0][0]
        weight, bias = load_vectors(ln_c_weight_ptr, cols, 1, H)[0], load_vectors(ln_c_bias_ptr, cols, 1, H)[0]
        fresh = (lstm_output(saved, tanh(c_hat * weight + bias)), c)
    if saved_ptr is not None:
        store_planes(saved_ptr, row, rows, cols, inside, saved, K, H)
    if S == 2:
        carried = load_tile(c_in_ptr, origin, rows, cols, inside, H)
        c = carry_over(
            fresh[1:], before[1:], (carried,), flags, (zone_c_ptr,), row, rows, cols, inside, tl.float32, 1, H
        )[0]  # fmt: skip
        store_tile(c_out_ptr, origin, rows, cols, inside, c, H)
        if c_ptr is not None:
            store_tile(c_ptr, row, rows, cols, inside, choose(flags, PAD, 0.0, c), H)
    if out_ptr is None:
        settle(
            fresh[0], flags, recurrent_ptr, zone_h_ptr, h_in_ptr, h_out_ptr, operand_ptr, y_ptr,
            row, origin, rows, cols, inside, H,
        )  # fmt: skip
    else:
        store_tile(out_ptr, origin, rows, cols, inside, fresh[0], H)


@triton.jit(do_not_specialize=["B", "t"])
def settle_kernel(
    projected_ptr,  # [B, P] float32: W_hr times the cell's h
    flags_ptr,  # [T, B] uint8 or None
    recurrent_ptr,  # [B, P] or None
    zone_h_ptr,  # [T, B, P] or None
    h_in_ptr,  # [B, P]
    h_out_ptr,  # [B, P], other memory
    operand_ptr,  # [B, P] or None
    y_ptr,  # [T, B, P]
    B,
    t,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    batch, origin, rows, row_inside = own_rows(B, BLOCK_B)
    cols, inside = hidden_tile(0, row_inside, BLOCK_P, P)
    row = t * batch + origin
    flags = load_flags(flags_ptr, row, rows, row_inside)
    h = load_tile(projected_ptr, origin, rows, cols, inside, P)
    settle(
        h, flags, recurrent_ptr, zone_h_ptr, h_in_ptr, h_out_ptr, operand_ptr, y_ptr,
        row, origin, rows, cols, inside, P,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- backward


@triton.jit
def carried_back(
    rest_ptr, product_ptr, scales_ptr, flags_ptr, recurrent_ptr, i, T, batch, origin, rows, row_inside, cols, inside,
    P: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """dL/dh after step `i`, as the step behind it carried it back. That step left the part that passed through W_hh in
    `product`, the rest in `rest`, and with a projection the factor of its clipping in `scales`."""
    if rest_ptr is None:
        carry = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    else:
        carry = load_tile(rest_ptr, origin, rows, cols, inside, P)
    if product_ptr is not None:
        row = (T - 2 - i if REVERSE else i + 1) * batch + origin
        flags = load_flags(flags_ptr, row, rows, row_inside)
        scale = None
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + row + rows, mask=row_inside, other=1.0)
        product = load_tile(product_ptr, origin, rows, cols, inside, P)
        carry = arriving(product, (carry,), scale, flags, recurrent_ptr, origin, rows, cols, inside, 1, P)[0]
    return carry


@triton.jit
def total_of(CELL_TOTAL: tl.constexpr, saved, before, dstate, ln_c, inside, H: tl.constexpr):
    """The cell's `total`. `ln_c`: None, or of the layer norm on c its weight, what it made of c, 1 / std, and u."""
    if ln_c is None:
        total = CELL_TOTAL(saved, before, dstate)
    else:
        weight, c_hat, rstd, u = ln_c
        du = lstm_output_backward(saved, u, dstate[0])
        total = (dstate[0], dstate[1] + normalize_backward((du * weight,), (c_hat,), rstd, inside, 1, H)[0])
    return total


@triton.jit
def through_layer_norm(
    dgh, ln_hh_ptr, gh_hat_ptr, gh_rstd_ptr, row, rows, row_inside, cols, inside, G: tl.constexpr, H: tl.constexpr
):  # fmt: skip
    """The gradient of W_hh h, given that of gh."""
    weight, gh_hat = load_vectors(ln_hh_ptr, cols, G, H), load_planes(gh_hat_ptr, row, rows, cols, inside, G, H)
    rstd, dxhat = tl.load(gh_rstd_ptr + row + rows, mask=row_inside, other=0.0)[:, None], ()
    for g in tl.static_range(G):
        dxhat = dxhat + (dgh[g] * weight[g],)
    return normalize_backward(dxhat, gh_hat, rstd, inside, G, H)


@triton.jit(do_not_specialize=["T", "B", "i"])
def backward_kernel(
    dy_ptr,  # [T, B, H] or None
    dc_ptr,  # [T, B, H] float32 or None
    saved_ptr,  # [T, B, K*H]
    y_ptr,  # [T, B, H]
    c_ptr,  # [T, B, H] float32, or None for a cell without c
    h0_ptr,  # [B, H]
    c0_ptr,  # [B, H] float32 or None
    ln_hh_ptr,  # [G*H] or None
    gh_hat_ptr,  # [T, B, G*H] float32, with ln_hh
    gh_rstd_ptr,  # [T, B] float32, with ln_hh
    ln_c_weight_ptr,  # [H] or None
    ln_c_bias_ptr,  # [H] or None
    flags_ptr,  # [T, B] uint8 or None
    recurrent_ptr,  # [B, H] or None
    zone_h_ptr,  # [T, B, H] or None
    zone_c_ptr,  # [T, B, H] or None
    bound_ptr,  # [] or None: clipping by norm
    clip_value,  # float or None
    product_ptr,  # [B, H] float32: the gradient that passed through W_hh of the step behind; None at the last
    dh_in_ptr,  # [B, H] or None: the rest of the gradients of the states after the step
    dc_in_ptr,  # [B, H] float32 or None
    dh_out_ptr,  # [B, H] float32: the same of the states before it, other memory
    dc_out_ptr,  # [B, H] float32 or None
    cell_ptr,  # [B, H] float32: with projection, the gradient of the cell's own h; else None
    reported_ptr,  # [B, H] float32: the same before clipping by value, where both are wanted; else None
    norm_h_ptr,  # [B] float32: with projection and clipping by norm, the norm of dL/dh; else None
    scales_ptr,  # [T, B] float32: the factors of clipping, written where norm_h is given; else None
    dgx_ptr,  # [T, B, G*H]
    dgh_ptr,  # [T, B, G*H], or None where it equals dgx
    draw_ptr,  # [T, B, G*H]: with ln_hh, the gradient of W_hh h; else None
    dh_new_ptr,  # [T, B, H] or None
    norms_ptr,  # [2, S, T, B] float32 or None: total and carried
    T,
    B,
    i,
    CELL_TOTAL: tl.constexpr,
    CELL_BACKWARD: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """A backward step; with projection its second part, after what `settle_backward_kernel` has done to dL/dh."""
    OWN: tl.constexpr = 0 if cell_ptr is None else 1  # the first state whose norms are reduced here
    batch, origin, rows, row_inside = own_rows(B, BLOCK_B)
    cols, inside = hidden_tile(0, row_inside, BLOCK_H, H)
    t = T - 1 - i if REVERSE else i
    row, row_before = t * batch + origin, (t + 1 if REVERSE else t - 1) * batch + origin
    flags = load_flags(flags_ptr, row, rows, row_inside)
    zone_ptrs = (zone_h_ptr, zone_c_ptr)

    saved = load_planes(saved_ptr, row, rows, cols, inside, K, H)
    if cell_ptr is None:
        before = previous_states(
            (y_ptr, c_ptr), (h0_ptr, c0_ptr), i, row_before, flags, origin, rows, cols, inside, S, H
        )
        carry = (
            carried_back(
                dh_in_ptr, product_ptr, None, flags_ptr, recurrent_ptr, i, T, batch,
                origin, rows, row_inside, cols, inside, H, REVERSE,
            ),
        )  # fmt: skip
        dstate = carry
        if dy_ptr is not None:
            dstate = (carry[0] + load_tile(dy_ptr, row, rows, cols, inside, H),)
    else:  # an LSTM, which does not read h: c stands in for it
        before = previous_states(
            (c_ptr, c_ptr), (c0_ptr, c0_ptr), i, row_before, flags, origin, rows, cols, inside, S, H
        )
        carry = (tl.zeros((BLOCK_B, BLOCK_H), tl.float32),)
        dstate = (load_tile(cell_ptr if reported_ptr is None else reported_ptr, origin, rows, cols, inside, H),)
    if S == 2:
        carry_c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        if dc_in_ptr is not None:
            carry_c = load_tile(dc_in_ptr, origin, rows, cols, inside, H)
        dc = carry_c
        if dc_ptr is not None:
            dc = carry_c + load_tile(dc_ptr, row, rows, cols, inside, H)
        carry, dstate = carry + (carry_c,), dstate + (dc,)
    ln_c = None
    if ln_c_weight_ptr is not None:
        weight, bias = load_vectors(ln_c_weight_ptr, cols, 1, H)[0], load_vectors(ln_c_bias_ptr, cols, 1, H)[0]
        c_hat, rstd = normalize((lstm_cell_state(saved, before[1]),), inside, 1, H)
        ln_c = (weight, c_hat[0], rstd, tanh(c_hat[0] * weight + bias))

    fresh, past = through_zoneout(dstate, zone_ptrs, row, rows, cols, inside, S, H)
    total = total_of(CELL_TOTAL, saved, before, fresh, ln_c, inside, H)
    if norms_ptr is not None:
        at, whole = (OWN * T + t) * batch + origin, (dstate[0],) + total[1:]
        store_norms(norms_ptr, at, batch, rows, row_inside, whole[OWN:], flags, S - OWN, T)
        at += S * T * batch
        store_norms(norms_ptr, at, batch, rows, row_inside, carry[OWN:], flags, S - OWN, T)
    if clip_value is not None:
        clamped = clamp(dstate, clip_value, S)
        if cell_ptr is not None:  # clamped before the projection
            clamped = (load_tile(cell_ptr, origin, rows, cols, inside, H),) + clamped[1:]
        dstate = clamped
        fresh, past = through_zoneout(dstate, zone_ptrs, row, rows, cols, inside, S, H)
        total = total_of(CELL_TOTAL, saved, before, fresh, ln_c, inside, H)
    if bound_ptr is not None:
        if cell_ptr is None:
            norm_h = tile_norm(dstate[0], flags)
        else:
            norm_h = tl.load(norm_h_ptr + origin + rows, mask=row_inside, other=0.0)
        parts = place(norm_h, 0, S)
        for s in tl.static_range(1, S):
            parts += place(tile_norm(total[s], flags), s, S)
        scale = clip_scales(parts, bound_ptr)
        fresh, past, total = scaled(fresh, scale, S), scaled(past, scale, S), scaled(total, scale, S)
        if scales_ptr is not None:
            tl.store(scales_ptr + row + rows, scale, mask=row_inside)
    if dh_new_ptr is not None:
        store_tile(dh_new_ptr, row, rows, cols, inside, choose(flags, PAD, 0.0, fresh[0]), H)

    if ln_c is None:
        dgx, dgh, through_cell = CELL_BACKWARD(saved, before, total)
    else:
        dgx, dgh, through_cell = lstm_gates_backward(saved, before[1], ln_c[3], total)
    dgx, dgh = drop_padded(dgx, flags, G), drop_padded(dgh, flags, G)
    rest = past_weights(past, through_cell, carry, flags, S)
    store_planes(dgx_ptr, row, rows, cols, inside, dgx, G, H)
    if dgh_ptr is not None:
        store_planes(dgh_ptr, row, rows, cols, inside, dgh, G, H)
    if cell_ptr is None:
        store_tile(dh_out_ptr, origin, rows, cols, inside, rest[0], H)
    if S == 2:
        store_tile(dc_out_ptr, origin, rows, cols, inside, rest[1], H)
    if ln_hh_ptr is not None:
        draw = through_layer_norm(
            dgh, ln_hh_ptr, gh_hat_ptr, gh_rstd_ptr, row, rows, row_inside, cols, inside, G, H
        )  # fmt: skip
        store_planes(draw_ptr, row, rows, cols, inside, draw, G, H)


@triton.jit(do_not_specialize=["T", "B", "i"])
def settle_backward_kernel(
    dy_ptr,  # [T, B, P] or None
    flags_ptr,  # [T, B] uint8 or None
    recurrent_ptr,  # [B, P] or None
    zone_h_ptr,  # [T, B, P] or None
    clip_value,  # float or None
    product_ptr,  # [B, P] float32: the gradient that passed through W_hh of the step behind; None at the last
    scales_ptr,  # [T, B] float32 or None: the factors of clipping of the steps behind
    dh_in_ptr,  # [B, P] or None: the rest of dL/dh after the step
    dh_out_ptr,  # [B, P] float32: the same before it, other memory, not scaled yet
    dh_new_ptr,  # [T, B, P]: the gradient of what the projection gave, not scaled yet
    unclamped_ptr,  # [B, P]: the same before clipping by value, where both are wanted; else None
    norm_h_ptr,  # [B] float32 or None: the norm of dL/dh to clip by
    norms_ptr,  # [2, S, T, B] float32 or None: total and carried; those of h are written
    T,
    B,
    i,
    S: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The first part of a backward step with projection: what becomes of dL/dh before it reaches W_hr."""
    batch, origin, rows, row_inside = own_rows(B, BLOCK_B)
    cols, inside = hidden_tile(0, row_inside, BLOCK_P, P)
    t = T - 1 - i if REVERSE else i
    row = t * batch + origin
    flags = load_flags(flags_ptr, row, rows, row_inside)

    carry = carried_back(
        dh_in_ptr, product_ptr, scales_ptr, flags_ptr, recurrent_ptr, i, T, batch,
        origin, rows, row_inside, cols, inside, P, REVERSE,
    )  # fmt: skip
    dh = carry
    if dy_ptr is not None:
        dh = carry + load_tile(dy_ptr, row, rows, cols, inside, P)
    if norms_ptr is not None:
        store_norms(norms_ptr, row, batch, rows, row_inside, (dh,), flags, 1, T)
        store_norms(norms_ptr, row + S * T * batch, batch, rows, row_inside, (carry,), flags, 1, T)
    if unclamped_ptr is not None:
        fresh, past = through_zoneout((dh,), (zone_h_ptr,), row, rows, cols, inside, 1, P)
        store_tile(unclamped_ptr, origin, rows, cols, inside, fresh[0], P)
    if clip_value is not None:
        dh = clamp((dh,), clip_value, 1)[0]
    if norm_h_ptr is not None:
        tl.store(norm_h_ptr + origin + rows, tile_norm(dh, flags), mask=row_inside)
    fresh, past = through_zoneout((dh,), (zone_h_ptr,), row, rows, cols, inside, 1, P)
    rest = past_weights(past, (tl.zeros_like(dh),), (carry,), flags, 1)
    store_tile(dh_new_ptr, row, rows, cols, inside, choose(flags, PAD, 0.0, fresh[0]), P)
    store_tile(dh_out_ptr, origin, rows, cols, inside, rest[0], P)


@triton.jit(do_not_specialize=["T", "B"])
def initial_kernel(
    flags_ptr,  # [T, B] uint8 or None
    recurrent_ptr,  # [B, P] or None
    product_ptr,  # [B, P] float32: the gradient that passed through W_hh of the first step
    scales_ptr,  # [T, B] float32 or None
    rest_ptr,  # [B, P] float32: the rest of dL/dh before it
    dh0_ptr,  # [B, P]
    T,
    B,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """The gradient of the first h, once all steps are done."""
    batch, origin, rows, row_inside = own_rows(B, BLOCK_B)
    cols, inside = hidden_tile(0, row_inside, BLOCK_P, P)
    dh0 = carried_back(
        rest_ptr, product_ptr, scales_ptr, flags_ptr, recurrent_ptr, -1, T, batch,
        origin, rows, row_inside, cols, inside, P, REVERSE,
    )  # fmt: skip
    store_tile(dh0_ptr, origin, rows, cols, inside, dh0, P)
