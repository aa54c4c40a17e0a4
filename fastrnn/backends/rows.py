"""Launches the scan of the Triton backend whose products are PyTorch's: per step a GEMM and one kernel over whole rows.

Mode "rows" of `tiles.py`: for layer norm and projection, which reduce over all of H in the middle of a step, and for
what else asks for it. A step is one GEMM and one kernel, with projection two and two. Nothing is allocated within the
time loop and nothing is waited for, so that a CUDA graph can hold it. float32 is multiplied as PyTorch's setting for
matmul says, as on the reference path, not as cuDNN's: that setting is the whole process's, and no launch turns it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import tiles
from ..arguments import (
    IncomingGradients,
    Kept,
    ScanGradients,
    ScanInputs,
    ScanOutputs,
    Walk,
    empty_gradients,
    empty_outputs,
)
from ..cells import CELLS
from ..equations import LayerNorm, normalize
from ..reference import layer_norm_c_gradients, layer_norm_gradients, previous_state
from .launch import Launch


def _product(b: Tensor, out: Tensor) -> Callable[[Tensor], Tensor]:
    """The function out = a b of a, with sums and result in float32."""
    if b.dtype == out.dtype:
        return partial(torch.mm, mat2=b, out=out)
    if b.is_cuda:
        return partial(torch.mm, mat2=b, out_dtype=out.dtype, out=out)
    b = b.to(out.dtype)
    return lambda a: torch.mm(a.to(out.dtype), b, out=out)


def _width(hidden_size: int) -> int:
    return 1 << (hidden_size - 1).bit_length()


def _prepare(kernel, batch_size: int, tile: tiles.RowTile, **arguments) -> Launch:
    # As in the other modes: multiplications and additions stay apart.
    return Launch(
        kernel, (-(-batch_size // tile.block_b),), **arguments, B=batch_size, BLOCK_B=tile.block_b,
        num_warps=tile.warps, enable_fp_fusion=False,
    )  # fmt: skip


def forward(inputs: ScanInputs, walk: Walk, save: bool, tile: tiles.RowTile) -> ScanOutputs:
    """All tensors are contiguous."""
    from ..kernels.cells import EQUATIONS
    from ..kernels.rows import forward_kernel, settle_kernel

    (gx, w_hh, h0, c0, b_hh, w_hr, ln_hh, ln_c_weight, ln_c_bias, flags, recurrent_mask, zone_h, zone_c, _) = inputs
    cell, reverse = walk.cell, walk.reverse
    (T, B, GH), P, spec = gx.shape, w_hh.shape[1], CELLS[cell]
    H, K = GH // len(spec.gates), len(spec.saved)

    def float32(*shape, when=True):
        return torch.empty(shape, dtype=torch.float32, device=gx.device) if when else None

    outputs = empty_outputs(inputs, walk, save)
    gh, projected = float32(B, GH), float32(B, P, when=w_hr is not None)
    out = None if w_hr is None else gx.new_empty(B, H)
    operand = None if recurrent_mask is None else (h0 * recurrent_mask).to(h0.dtype)
    recur = _product(w_hh.t(), gh)
    project = _product(w_hr.t(), projected) if w_hr is not None else None

    def step(before, after):
        """A function of t that takes a step from one memory of the states to another."""
        of_h = dict(
            flags_ptr=flags, recurrent_ptr=recurrent_mask, zone_h_ptr=zone_h, h_in_ptr=before[0], h_out_ptr=after[0],
            operand_ptr=operand, y_ptr=outputs.y,
        )  # fmt: skip
        advance = _prepare(
            forward_kernel, B, tile, **of_h, gx_ptr=gx, gh_ptr=gh, b_ptr=b_hh, ln_hh_ptr=ln_hh,
            ln_c_weight_ptr=ln_c_weight, ln_c_bias_ptr=ln_c_bias, zone_c_ptr=zone_c, c_in_ptr=before[1],
            c_out_ptr=after[1], out_ptr=out, c_ptr=outputs.c, saved_ptr=outputs.saved,
            CELL_FORWARD=EQUATIONS[cell][0], G=len(spec.gates), K=K, S=len(spec.states), H=H, BLOCK_H=_width(H),
        )  # fmt: skip
        settle = _prepare(settle_kernel, B, tile, **of_h, projected_ptr=projected, P=P, BLOCK_P=_width(P))
        h = before[0] if operand is None else operand

        def run(t):
            recur(h)
            advance(t=t)
            if project is not None:
                project(out)
                settle(t=t)

        return run

    pair = [(torch.empty_like(h0), None if c0 is None else torch.empty_like(c0)) for _ in range(2)]
    ends = {-1: (h0, c0), T - 1: (outputs.h_n, outputs.c_n)}

    def after(i):
        """Where the states after step i are."""
        return ends.get(i, pair[i % 2])

    between = [step(pair[1 - k], pair[k]) for k in range(2)]
    for i in range(T if B else 0):
        run = between[i % 2] if 0 < i < T - 1 else step(after(i - 1), after(i))
        run(T - 1 - i if reverse else i)
    return outputs


def backward(
    incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, norms: bool, tile: tiles.RowTile
) -> ScanGradients:
    """Without `dsaved`. All tensors are contiguous."""
    from ..kernels.cells import EQUATIONS
    from ..kernels.rows import backward_kernel, initial_kernel, settle_backward_kernel

    (dy, dc, dh_n, dc_n, _), (y, c, saved), (cell, reverse, _, clip_value) = incoming, kept, walk
    (_, w_hh, h0, c0, _, w_hr, ln_hh, ln_c_weight, ln_c_bias, flags, recurrent_mask, zone_h, zone_c, clip_norm) = inputs
    (T, B, P), spec, GH = y.shape, CELLS[cell], w_hh.shape[0]
    H, S, K = GH // len(spec.gates), len(spec.states), len(spec.saved)
    parted, bounded = w_hr is not None, clip_norm is not None
    twice = parted and norms and clip_value is not None  # norms are of gradients before the clipping, which W_hr mixes
    _, total, backward = EQUATIONS[cell]

    def float32(*shape, when=True):
        return torch.empty(shape, dtype=torch.float32, device=saved.device) if when else None

    found = empty_gradients(kept, inputs, walk, norms)
    dgx, dgh, report = found.dgx, saved.new_empty(T, B, GH) if spec.distinct_dgh else None, found.norms
    dh_new = saved.new_empty(T, B, P) if parted or ln_c_weight is not None else None
    draw = gh_hat = gh_rstd = None
    if ln_hh is not None:
        draw, gh_hat = saved.new_empty(T, B, GH), float32(T, B, GH)
        h_prev = previous_state(y, h0, flags, reverse)
        operand = h_prev if recurrent_mask is None else (h_prev * recurrent_mask).to(h_prev.dtype)
        _product(w_hh.t(), gh_hat.flatten(0, 1))(operand.flatten(0, 1))
        gh_hat, gh_rstd = normalize(gh_hat)
    product, cell_h, reported = float32(B, P), float32(B, H, when=parted), float32(B, H, when=twice)
    unclamped = saved.new_empty(B, P) if twice else None
    norm_h, scales = float32(B, when=parted and bounded), float32(T, B, when=parted and bounded)
    gates = dgh if spec.distinct_dgh else dgx
    of_product = gates if draw is None else draw
    recur = _product(w_hh, product)
    project = _product(w_hr, cell_h) if parted else None
    project_reported = _product(w_hr, reported) if twice else None

    def step(after, before, last=False):
        """A function of i and t that takes the gradients of the states a step back, from one memory to another."""
        of_h = dict(
            dy_ptr=dy, flags_ptr=flags, recurrent_ptr=recurrent_mask, clip_value=clip_value,
            product_ptr=None if last else product, scales_ptr=scales, dh_in_ptr=after[0], dh_out_ptr=before[0],
            norm_h_ptr=norm_h, norms_ptr=report, T=T, S=S, REVERSE=reverse,
        )  # fmt: skip
        settle = _prepare(
            settle_backward_kernel, B, tile, **of_h, zone_h_ptr=zone_h, dh_new_ptr=dh_new, unclamped_ptr=unclamped,
            P=P, BLOCK_P=_width(P),
        )  # fmt: skip
        retreat = _prepare(
            backward_kernel, B, tile, **of_h, dc_ptr=dc, saved_ptr=saved, y_ptr=y, c_ptr=c, h0_ptr=h0, c0_ptr=c0,
            ln_hh_ptr=ln_hh, gh_hat_ptr=gh_hat, gh_rstd_ptr=gh_rstd, ln_c_weight_ptr=ln_c_weight,
            ln_c_bias_ptr=ln_c_bias, zone_h_ptr=None if parted else zone_h, zone_c_ptr=zone_c, bound_ptr=clip_norm,
            dc_in_ptr=after[1], dc_out_ptr=before[1], cell_ptr=cell_h, reported_ptr=reported, dgx_ptr=dgx, dgh_ptr=dgh,
            draw_ptr=draw, dh_new_ptr=None if parted else dh_new, CELL_TOTAL=total, CELL_BACKWARD=backward,
            G=len(spec.gates), K=K, H=H, BLOCK_H=_width(H),
        )  # fmt: skip

        def run(i, t):
            if parted:
                settle(i=i)
                project(dh_new[t])
            if twice:
                project_reported(unclamped)
            retreat(i=i)
            recur(of_product[t])

        return run

    pair = [(float32(B, P), float32(B, H, when=c0 is not None)) for _ in range(2)]
    ends = {-1: (pair[1][0], found.dc0), T - 1: (dh_n, dc_n)}

    def after(i):
        """Where the gradients of the states after step i are, but for the part that passed through W_hh."""
        return ends.get(i, pair[i % 2])

    between = [step(pair[k], pair[1 - k]) for k in range(2)]
    for i in reversed(range(T if B else 0)):
        run = between[i % 2] if 0 < i < T - 1 else step(after(i), after(i - 1), last=i == T - 1)
        run(i, T - 1 - i if reverse else i)
    if B:
        _prepare(
            initial_kernel, B, tile, flags_ptr=flags, recurrent_ptr=recurrent_mask, product_ptr=product,
            scales_ptr=scales, rest_ptr=after(-1)[0], dh0_ptr=found.dh0, T=T, P=P, BLOCK_P=_width(P), REVERSE=reverse,
        )()  # fmt: skip
    if scales is not None:
        dh_new.mul_(scales[..., None])
    found = found._replace(dgh=dgh if ln_hh is None else draw, dh_new=dh_new if parted else None)
    if ln_hh is not None:
        db_hh, dln_hh = layer_norm_gradients(gates, gh_hat)
        found = found._replace(db_hh=db_hh, dln_hh=dln_hh)
    if ln_c_weight is not None:
        c_prev, ln_c = previous_state(c, c0, flags, reverse), LayerNorm(ln_c_weight.float(), ln_c_bias.float())
        dln_c_weight, dln_c_bias = layer_norm_c_gradients(dh_new, saved, c_prev, w_hr, ln_c)
        found = found._replace(dln_c_weight=dln_c_weight, dln_c_bias=dln_c_bias)
    return found
