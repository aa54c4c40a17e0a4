"""Launches the kernels of `kernels/gemm_step.py`: a GEMM of PyTorch's and a kernel per step, with projection two each.
In heads, the GEMM is one of each head, and a copy brings the gates of all heads to their places.

Mode "gemm" of `tiles.py`. Layer norm and projection need it: they reduce over all of H in the middle of a step. Decay,
and recurrent masks for each gate, have kernels only here. Nothing is allocated within the time loop and nothing is
waited for, so a CUDA graph can hold it.
float32 is multiplied as PyTorch's setting for matmul says, as on the reference path, and not as cuDNN's setting says:
the setting for matmul belongs to the whole process, and no launch changes it.
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
from ..cell_table import spec_of
from ..equations import LayerNorm
from ..reference import (
    carried_norm_gradients,
    layer_norm_c_gradients,
    layer_norm_gradients,
    normalize_gates,
    previous_state,
)
from .launch import Launch, next_power_of_two, scratch
from .programs import equations

States = tuple[Tensor, Tensor | None]  # h and c, or their gradients


def _product(b: Tensor, out: Tensor) -> Callable[[Tensor], Tensor]:
    """The function out = a b of a, with sums and result in float32; of matrices, or of as many matrices each."""
    multiply = torch.mm if b.dim() == 2 else torch.bmm
    if b.dtype == out.dtype:
        return partial(multiply, mat2=b, out=out)
    if b.is_cuda:
        return partial(multiply, mat2=b, out_dtype=out.dtype, out=out)
    b = b.to(out.dtype)
    return lambda a: multiply(a.to(out.dtype), b, out=out)


def _times_w(w_hh: Tensor, out: Tensor) -> Callable[[Tensor], Tensor]:
    """The function out = W_hh h of h, `[B, P] -> [B, G*H]`; W_hh `[G*H, P]`, or in heads `[N, G*K, K]`."""
    if w_hh.dim() == 2:
        return _product(w_hh.t(), out)
    (N, GK, K), B = w_hh.shape, len(out)
    of_heads, G = scratch(N, B, GK, like=out), GK // K  # not -1: an empty batch would not tell the gates
    multiply = _product(w_hh.transpose(1, 2), of_heads)
    to, results = out.view(B, G, N, K), of_heads.view(N, B, G, K).permute(1, 2, 0, 3)

    def times(h: Tensor) -> Tensor:
        multiply(h.view(B, N, K).transpose(0, 1))
        to.copy_(results)
        return out

    return times


def _times_w_transposed(w_hh: Tensor, out: Tensor) -> Callable[[Tensor], Tensor]:
    """The function out = W_hh^T dgh of dgh, `[B, G*H] -> [B, P]`."""
    if w_hh.dim() == 2:
        return _product(w_hh, out)
    (N, GK, K), B = w_hh.shape, len(out)
    of_heads, G = w_hh.new_empty(N, B, GK), GK // K
    multiply = _product(w_hh, out.view(B, N, K).transpose(0, 1))
    gates = of_heads.view(N, B, G, K).permute(1, 2, 0, 3)

    def times(dgh: Tensor) -> Tensor:
        gates.copy_(dgh.view(B, G, N, K))
        multiply(of_heads)
        return out

    return times


def _product_by_gate(b: Tensor, out: Tensor) -> Callable[[Tensor], Tensor]:
    """The function out = a b of a for each gate: of b `[G, N, M]` and a `[B, G*N]`, it writes `[B, G*M]`."""
    G, N, M = b.shape
    multiply = _product(b, out.view(-1, G, M).transpose(0, 1))
    return lambda a: multiply(a.view(-1, G, N).transpose(0, 1))


def count_masks(inputs: ScanInputs) -> int:
    """How many recurrent masks a call has: one, unless each gate has its own."""
    mask = inputs.recurrent_mask
    return 1 if mask is None else mask.shape[-1] // inputs.h0.shape[-1]


class _Steps:
    """The steps of a call, `steps(i)` in scan order. Each reads the states of one memory and writes another.

    initial, final: the memories before step 0 and after step T - 1, or their gradients. The other states alternate
    between two buffers. So a call has at most four kinds of launches: both ends, and one for each buffer between.
    """

    def __init__(self, walk: Walk, T: int, B: int, tile: tiles.GemmTile, initial: States, final: States, buffers):
        self.reverse, self.T, self.B, self.tile = walk.reverse, T, B, tile
        self.walk, self.spec = walk, spec_of(walk.cell)
        self.gates = len(self.spec.gates)
        self.ends, self.buffers, self.prepared = {-1: initial, T - 1: final}, buffers, {}

    def constants(self) -> dict[str, int | float | str]:
        """What the kernels of the cell, forward and backward, are compiled for."""
        spec, walk = self.spec, self.walk
        return dict(
            G=self.gates, K=len(spec.saved), Q=len(spec.parameters), N=len(spec.inputs), LN_EPS=walk.ln_eps,
            LN_OF=walk.ln_of, LN_CARRIED=walk.ln_c_carried,
        )  # fmt: skip

    def after(self, i: int) -> States:
        """The memory of the states after step i."""
        return self.ends.get(i, self.buffers[i % 2])

    def launch(self, kernel, **arguments) -> Launch:
        # As in the other modes, multiplications and additions are not fused.
        return Launch(
            kernel, (-(-self.B // self.tile.block_b),), **arguments, B=self.B, BLOCK_B=self.tile.block_b,
            num_warps=self.tile.warps, enable_fp_fusion=False,
        )  # fmt: skip

    def __call__(self, i: int):
        kind = (i % 2, i == 0, i == self.T - 1)
        if kind not in self.prepared:
            self.prepared[kind] = self.prepare(i)
        self.run(i, self.T - 1 - i if self.reverse else i, *self.prepared[kind])


class _ForwardSteps(_Steps):
    def __init__(self, inputs: ScanInputs, outputs: ScanOutputs, walk: Walk, tile: tiles.GemmTile):
        T, B, GH = inputs.gx.shape
        h0, c0, mask = inputs.h0, inputs.c0, inputs.recurrent_mask
        buffers = [(torch.empty_like(h0), None if c0 is None else torch.empty_like(c0)) for _ in range(2)]
        super().__init__(walk, T, B, tile, (h0, c0), (outputs.h_n, outputs.c_n), buffers)
        self.inputs, self.outputs = inputs, outputs
        self.H, self.P, self.masks = GH // self.gates, h0.shape[1], count_masks(inputs)
        decay, self.decay_next = inputs.decay_h, None
        self.operand = None
        if decay is not None:
            self.decay_next = decay.roll(1 if walk.reverse else -1, 0)
        if decay is not None or mask is not None:
            decayed_h0 = h0 if decay is None else h0.float() * decay[-1 if walk.reverse else 0]
            self.operand = (decayed_h0 if mask is None else decayed_h0.repeat(1, self.masks) * mask).to(h0.dtype)
        self.gh = self.multiply_w_hh = self.multiply_w_hr = None
        if inputs.w_hh is not None:
            self.gh = scratch(B, GH, like=h0)
            if self.masks == 1:
                self.multiply_w_hh = _times_w(inputs.w_hh, self.gh)
            else:
                self.multiply_w_hh = _product_by_gate(inputs.w_hh.unflatten(0, (self.gates, -1)).mT, self.gh)
        self.cell_h = self.projected = None
        if inputs.w_hr is not None:
            self.cell_h, self.projected = h0.new_empty(B, self.H), scratch(B, self.P, like=h0)
            self.multiply_w_hr = _product(inputs.w_hr.t(), self.projected)

    def prepare(self, i: int) -> tuple[Tensor, Launch, Launch]:
        """The operand of W_hh, and the launches of the step."""
        from ..kernels import gemm_step as kernels

        x, (h, c), (h_after, c_after) = self.inputs, self.after(i - 1), self.after(i)
        of_h = dict(
            flags_ptr=x.flags, recurrent_mask_ptr=x.recurrent_mask, zone_h_ptr=x.zone_h, decay_h_ptr=x.decay_h,
            decay_next_ptr=self.decay_next, h_in_ptr=h, h_out_ptr=h_after, operand_ptr=self.operand,
            y_ptr=self.outputs.y, MASKS=self.masks,
        )  # fmt: skip
        cell = self.launch(
            kernels.forward_kernel, **of_h, gx_ptr=x.gx, gh_ptr=self.gh, b_ptr=x.b_hh, ln_hh_ptr=x.ln_hh,
            ln_c_weight_ptr=x.ln_c_weight, ln_c_bias_ptr=x.ln_c_bias, parameters_ptr=x.parameters,
            step_inputs_ptr=x.step_inputs, zone_c_ptr=x.zone_c, decay_c_ptr=x.decay_c, c_in_ptr=c,
            c_out_ptr=c_after, out_ptr=self.cell_h,
            c_ptr=self.outputs.c, saved_ptr=self.outputs.saved, CELL_FORWARD=equations(self.walk.cell)[0],
            **self.constants(), S=len(self.spec.states), H=self.H, BLOCK_H=next_power_of_two(self.H),
        )  # fmt: skip
        projection = self.launch(
            kernels.forward_projected_kernel, **of_h, projected_ptr=self.projected, P=self.P,
            BLOCK_P=next_power_of_two(self.P),
        )  # fmt: skip
        return h if self.operand is None else self.operand, cell, projection

    def run(self, i: int, t: int, operand: Tensor, cell: Launch, projection: Launch):
        if self.multiply_w_hh is not None:
            self.multiply_w_hh(operand)
        cell(t=t)
        if self.multiply_w_hr is not None:
            self.multiply_w_hr(self.cell_h)
            projection(t=t)


def forward(inputs: ScanInputs, walk: Walk, save: bool, tile: tiles.GemmTile) -> ScanOutputs:
    """All tensors are contiguous."""
    T, B, _ = inputs.gx.shape
    outputs = empty_outputs(inputs, walk, save)
    step = _ForwardSteps(inputs, outputs, walk, tile)
    for i in range(T if B else 0):
        step(i)
    return outputs


class _BackwardSteps(_Steps):
    """With projection, a step's norms are taken before clipping by value, which W_hr would mix. So if both are wanted,
    W_hr multiplies twice."""

    def __init__(
        self, incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, gradients: ScanGradients,
        tile: tiles.GemmTile,
    ):  # fmt: skip
        self.incoming, self.kept, self.inputs, self.gradients = incoming, kept, inputs, gradients
        T, B, self.P = kept.y.shape
        self.H, self.clip_value = self.P if inputs.w_hr is None else inputs.w_hr.shape[1], walk.clip_value
        like, projects, self.masks = kept.y, inputs.w_hr is not None, count_masks(inputs)
        c0 = inputs.c0
        buffers = [(scratch(B, self.P, like=like), None if c0 is None else torch.empty_like(c0)) for _ in range(2)]
        # The gradient of h0 needs one kernel more, so of its part past W_hh only.
        initial = (buffers[1][0], gradients.dc0)
        super().__init__(walk, T, B, tile, initial, (incoming.dh_n, incoming.dc_n), buffers)

        self.decayed_h_grad, self.decayed_c_grad = (
            None if decay is None else torch.empty_like(decay, dtype=torch.float32)
            for decay in (inputs.decay_h, inputs.decay_c)
        )
        self.dgh, self.dgh_raw, self.gh_hat, self.gh_rstd = gradients.dgh, None, None, None
        if inputs.ln_hh is not None:
            self.dgh_raw = gradients.dgh
            distinct = self.spec.distinct_dgh or walk.ln_of != "separate"
            self.dgh = torch.empty_like(gradients.dgx) if distinct else None
            self.gh_hat, self.gh_rstd = self.normalized_gh()
        self.dgh_before_norm = gradients.dgx if self.dgh is None else self.dgh
        self.operands = self.dgh_before_norm if self.dgh_raw is None else self.dgh_raw

        self.dh_new = gradients.dh_new
        if inputs.ln_c_weight is not None and not projects and not walk.ln_c_carried:
            self.dh_new = like.new_empty(T, B, self.P)
        self.dc_new = scratch(T, B, self.H, like=like, when=walk.ln_c_carried and inputs.ln_c_weight is not None)
        clips = projects and inputs.clip_norm is not None
        twice = projects and gradients.norms is not None and walk.clip_value is not None
        self.dh_cell = scratch(B, self.H, like=like, when=projects)
        self.dh_cell_unclamped = scratch(B, self.H, like=like, when=twice)
        self.dh_new_unclamped = like.new_empty(B, self.P) if twice else None
        self.norm_h, self.scales = scratch(B, like=like, when=clips), scratch(T, B, like=like, when=clips)
        self.product = self.multiply_w_hh = None
        if inputs.w_hh is not None:
            self.product = scratch(B, self.masks * self.P, like=like)
            if self.masks == 1:
                self.multiply_w_hh = _times_w_transposed(inputs.w_hh, self.product)
            else:
                self.multiply_w_hh = _product_by_gate(inputs.w_hh.unflatten(0, (self.gates, -1)), self.product)
        self.multiply_w_hr = _product(inputs.w_hr, self.dh_cell) if projects else None
        self.multiply_w_hr_unclamped = _product(inputs.w_hr, self.dh_cell_unclamped) if twice else None

    def normalized_gh(self) -> tuple[Tensor, Tensor]:
        """What the layer norm of the gates makes of all steps, without weight: `[T, B, G*H]`; and 1 / std."""
        x = self.inputs
        h_prev = previous_state(self.kept.y, x.h0, x.flags, self.reverse)
        operand = h_prev if x.decay_h is None else h_prev.float() * x.decay_h
        gh = scratch(*self.gradients.dgx.shape, like=h_prev)
        if self.masks == 1:
            operand = (operand if x.recurrent_mask is None else operand * x.recurrent_mask).to(h_prev.dtype)
            _times_w(x.w_hh, gh.flatten(0, 1))(operand.flatten(0, 1))
        else:
            operand = (operand.repeat(1, 1, self.gates) * x.recurrent_mask).to(h_prev.dtype)
            by_gate = x.w_hh.unflatten(0, (self.gates, -1))
            _product_by_gate(by_gate.mT, gh.flatten(0, 1))(operand.flatten(0, 1))
        if self.walk.ln_of != "separate":
            gh += x.gx
        xhat, rstd = normalize_gates(gh, self.gates if self.walk.ln_of == "gates" else 1, self.walk.ln_eps)
        return xhat, rstd.contiguous()

    def prepare(self, i: int) -> tuple[Launch, Launch]:
        from ..kernels import gemm_step as kernels

        x, (y, c, saved), (dh, dc), (dh_before, dc_before) = self.inputs, self.kept, self.after(i), self.after(i - 1)
        _, total, cell_backward = equations(self.walk.cell)
        projects = x.w_hr is not None
        of_h = dict(
            dy_ptr=self.incoming.dy, flags_ptr=x.flags, recurrent_mask_ptr=x.recurrent_mask, decay_h_ptr=x.decay_h,
            decayed_h_grad_ptr=None if i == self.T - 1 else self.decayed_h_grad, clip_value=self.clip_value,
            product_ptr=None if i == self.T - 1 else self.product, scales_ptr=self.scales, dh_in_ptr=dh,
            dh_out_ptr=dh_before, norm_h_ptr=self.norm_h, norms_ptr=self.gradients.norms, T=self.T,
            S=len(self.spec.states), MASKS=self.masks, REVERSE=self.reverse,
        )  # fmt: skip
        projection = self.launch(
            kernels.backward_projected_kernel, **of_h, zone_h_ptr=x.zone_h, dh_new_ptr=self.dh_new,
            dh_new_unclamped_ptr=self.dh_new_unclamped, P=self.P, BLOCK_P=next_power_of_two(self.P),
        )  # fmt: skip
        cell = self.launch(
            kernels.backward_kernel, **of_h, dc_ptr=self.incoming.dc, saved_ptr=saved, y_ptr=y, c_ptr=c, h0_ptr=x.h0,
            c0_ptr=x.c0, ln_hh_ptr=x.ln_hh, gh_hat_ptr=self.gh_hat, gh_rstd_ptr=self.gh_rstd,
            ln_c_weight_ptr=x.ln_c_weight, ln_c_bias_ptr=x.ln_c_bias, parameters_ptr=x.parameters,
            step_inputs_ptr=x.step_inputs, zone_h_ptr=None if projects else x.zone_h, zone_c_ptr=x.zone_c,
            decay_c_ptr=x.decay_c, decayed_c_grad_ptr=self.decayed_c_grad, clip_norm_ptr=x.clip_norm,
            dc_in_ptr=dc, dc_out_ptr=dc_before, dh_cell_ptr=self.dh_cell,
            dh_cell_unclamped_ptr=self.dh_cell_unclamped, dgx_ptr=self.gradients.dgx, dgh_ptr=self.dgh,
            dcell_ptr=self.gradients.dcell, dgh_raw_ptr=self.dgh_raw, dh_new_ptr=None if projects else self.dh_new,
            dc_new_ptr=self.dc_new, CELL_TOTAL=total, CELL_BACKWARD=cell_backward, **self.constants(), H=self.H,
            BLOCK_H=next_power_of_two(self.H),
        )  # fmt: skip
        return projection, cell

    def run(self, i: int, t: int, projection: Launch, cell: Launch):
        if self.multiply_w_hr is not None:
            projection(i=i)
            self.multiply_w_hr(self.dh_new[t])
        if self.multiply_w_hr_unclamped is not None:
            self.multiply_w_hr_unclamped(self.dh_new_unclamped)
        cell(i=i)
        if self.multiply_w_hh is not None:
            self.multiply_w_hh(self.operands[t])

    def finish(self):
        """The gradient of h0, after all steps."""
        from ..kernels.gemm_step import initial_kernel

        self.launch(
            initial_kernel, flags_ptr=self.inputs.flags, recurrent_mask_ptr=self.inputs.recurrent_mask,
            decay_h_ptr=self.inputs.decay_h, decayed_h_grad_ptr=self.decayed_h_grad,
            product_ptr=self.product, scales_ptr=self.scales, past_weights_ptr=self.after(-1)[0],
            dh0_ptr=self.gradients.dh0, T=self.T, P=self.P, MASKS=self.masks, BLOCK_P=next_power_of_two(self.P),
            REVERSE=self.reverse,
        )()  # fmt: skip


def backward(
    incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, norms: bool, tile: tiles.GemmTile
) -> ScanGradients:
    """Without `dsaved`. All tensors are contiguous."""
    T, B, _ = kept.y.shape
    gradients = empty_gradients(kept, inputs, walk, norms)
    step = _BackwardSteps(incoming, kept, inputs, walk, gradients, tile)
    if B:
        for i in reversed(range(T)):
            step(i)
        step.finish()
    if inputs.decay_h is not None:
        h_prev = previous_state(kept.y, inputs.h0, inputs.flags, walk.reverse)
        gradients.ddecay_h.copy_(step.decayed_h_grad.mul_(h_prev))
    c_prev = None
    if inputs.decay_c is not None or inputs.ln_c_weight is not None:
        c_prev = previous_state(kept.c, inputs.c0, inputs.flags, walk.reverse)
    if inputs.decay_c is not None:
        gradients.ddecay_c.copy_(step.decayed_c_grad.mul_(c_prev))
        c_prev = c_prev * inputs.decay_c
    if step.scales is not None:
        step.dh_new.mul_(step.scales[..., None])
    if inputs.ln_hh is not None:
        db_hh, dln_hh = layer_norm_gradients(step.dgh_before_norm, step.gh_hat)
        gradients = gradients._replace(db_hh=db_hh, dln_hh=dln_hh)
    if inputs.ln_c_weight is not None:
        ln_c = LayerNorm(inputs.ln_c_weight.float(), inputs.ln_c_bias.float(), walk.ln_eps)
        if walk.ln_c_carried:
            weight, bias = carried_norm_gradients(step.dc_new, kept.saved, c_prev, ln_c)
        else:
            weight, bias = layer_norm_c_gradients(step.dh_new, kept.saved, c_prev, inputs.w_hr, ln_c)
        gradients = gradients._replace(dln_c_weight=weight, dln_c_bias=bias)
    return gradients
