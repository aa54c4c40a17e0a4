"""The scan in PyTorch: the order of a step, readable. Every kernel is tested against it, and it runs everywhere.

Within a step: decay, reset, recurrent-dropout mask, W_hh, layer norm, the cell, projection, zoneout, carry where the
sequence has ended. `arguments.py` gives the shapes, `equations.py` the cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import IncomingGradients, Kept, ScanGradients, ScanInputs, ScanOutputs, Walk
from .cell_table import PAD, RESET, START, spec_of
from .equations import (
    Beside,
    LayerNorm,
    accumulate_dtype,
    equations_of,
    lstm_cell_state,
    lstm_output_backward,
    normalize,
    normalize_backward,
    row_norm,
)
from .heads import times_w, times_w_transposed


def _bit(flags: Tensor | None, bit: int) -> Tensor | None:
    """`[..., 1]` bool of one bit of the flags."""
    return None if flags is None else (flags & bit).bool().unsqueeze(-1)


def _by_step(flags: Tensor | None, bit: int, T: int, look: bool = True) -> list[Tensor | None]:
    """Per step the rows `[B, 1]` that have the bit; None where none has it, if `look` and the flags are on a CPU."""
    if flags is None:
        return [None for _ in range(T)]
    rows = _bit(flags, bit)
    if not look or flags.device.type != "cpu" or torch.compiler.is_compiling():
        return list(rows.unbind())
    return [row if some else None for row, some in zip(rows.unbind(), rows.flatten(1).any(1).tolist(), strict=True)]


def previous_state(states: Tensor, initial: Tensor, flags: Tensor | None, reverse: bool) -> Tensor:
    """The state before every step, `[T, B, H]`, from the states after it and the initial one `[B, H]`.

    It is zero at padding: there the gradient that it is multiplied with is zero, but 0 * NaN is NaN.
    """
    before = torch.cat((states[1:], initial[None]) if reverse else (initial[None], states[:-1]))
    if flags is not None:
        before = torch.where(_bit(flags, START), initial, before)
        before = torch.where(_bit(flags, RESET | PAD), torch.zeros_like(before), before)
    return before


def by_state(cell: str, of_h: Tensor | None, of_others: Tensor | None) -> tuple[Tensor | None, ...]:
    """A tensor for each state of the cell: h's, then the planes of the others; None where there is none."""
    others = len(spec_of(cell).states) - 1
    if others == 0:
        return (of_h,)
    return of_h, *([None for _ in range(others)] if of_others is None else of_others.chunk(others, -1))


def decayed(states: tuple[Tensor | None, ...], factors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The states before a step, or before every step, times their factors, in the arithmetic's dtype."""
    return tuple(
        s if factor is None else s.to(accumulate_dtype(s.dtype)) * factor
        for s, factor in zip(states, factors, strict=True)
    )


def as_planes(states) -> Tensor | None:
    """The states beyond h side by side; None where there are none."""
    return None if not states else states[0] if len(states) == 1 else torch.cat(states, -1)


def _order(T: int, reverse: bool):
    return range(T - 1, -1, -1) if reverse else range(T)


def _to(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def _layer_norm_of_c(inputs: ScanInputs, walk: Walk, acc: torch.dtype) -> LayerNorm | None:
    if inputs.ln_c_weight is None:
        return None
    weight, bias = (x.to(acc).contiguous() for x in (inputs.ln_c_weight, inputs.ln_c_bias))
    return LayerNorm(weight, bias, walk.ln_eps, walk.ln_c_carried)


def _beside(walk: Walk, inputs: ScanInputs, T: int, acc: torch.dtype) -> list[LayerNorm | Beside | None]:
    """What the equations get at each step beside gates and states (`equations.py`)."""
    spec = spec_of(walk.cell)
    if spec.program is None:
        ln_c = _layer_norm_of_c(inputs, walk, acc)
        return [ln_c for _ in range(T)]
    Q, N = len(spec.parameters), len(spec.inputs)
    parameters = inputs.parameters.to(acc).chunk(Q, -1) if Q else ()
    steps = inputs.step_inputs.to(acc).unbind() if N else [None for _ in range(T)]
    return [Beside(parameters, step.chunk(N, -1) if N else ()) for step in steps]


def _groups(walk: Walk) -> int:
    """How many parts of the gates have a layer norm of their own."""
    return len(spec_of(walk.cell).gates) if walk.ln_of == "gates" else 1


class _Steps:
    """A `[T, ...]` tensor written step by step: in place, or as a list that is stacked where autograd has to follow."""

    def __init__(self, T: int, dtype: torch.dtype, differentiable: bool = False):
        listed = differentiable or torch.compiler.is_compiling()  # a program that is exported writes nothing in place
        self.kept = [None for _ in range(T)] if listed else None
        self.T, self.dtype, self.written = T, dtype, None

    def __setitem__(self, t: int, row: Tensor):
        if self.kept is not None:
            self.kept[t] = row
            return
        if self.written is None:
            self.written = row.new_empty((self.T, *row.shape), dtype=self.dtype)
        self.written[t] = row

    def tensor(self) -> Tensor:
        return self.written if self.kept is None else torch.stack(self.kept).to(self.dtype)


def forward(inputs: ScanInputs, walk: Walk, save: bool, followed: bool = False) -> ScanOutputs:
    """One layer in one direction.

    save: whether to keep the planes that the backward reads. followed: whether autograd follows, in forward mode.
    """
    gx, h0, flags = inputs.gx, inputs.h0, inputs.flags
    T, acc, cell_forward = gx.shape[0], accumulate_dtype(gx.dtype), equations_of(walk.cell).forward
    w_hh, w_hr, b_hh, ln_hh = _to(acc, inputs.w_hh, inputs.w_hr, inputs.b_hh, inputs.ln_hh)
    beside = _beside(walk, inputs, T, acc)
    state, zones = by_state(walk.cell, h0, inputs.c0), by_state(walk.cell, inputs.zone_h, inputs.zone_c)
    factors = by_state(walk.cell, inputs.decay_h, inputs.decay_c)
    y, c, saved = _Steps(T, gx.dtype, followed), _Steps(T, acc, followed), _Steps(T, gx.dtype, followed)
    pad, reset = _by_step(flags, PAD, T), _by_step(flags, RESET, T)
    per_gate = inputs.recurrent_mask is not None and inputs.recurrent_mask.shape[-1] != h0.shape[-1]
    groups, no_gx = _groups(walk), None if walk.ln_of == "separate" else torch.zeros_like(gx[0])
    for t in _order(T, walk.reverse):
        carried = state
        if inputs.decay_h is not None:
            state = decayed(state, tuple(factor[t] for factor in factors))
        if reset[t] is not None:
            state = tuple(s.masked_fill(reset[t], 0) for s in state)
        operand, gx_t = state[0].to(acc), gx[t]
        if inputs.recurrent_mask is not None and not per_gate:
            operand = operand * inputs.recurrent_mask
        if w_hh is None:
            gh = None
        elif per_gate or walk.ln_of != "separate":
            gh = times_w_hh(operand, w_hh, inputs.recurrent_mask if per_gate else None)
            if walk.ln_of != "separate":  # the cell gets the sum, normalised, as gh
                gh, gx_t = normalize_gates(gh + gx_t, groups, walk.ln_eps)[0] * ln_hh, no_gx
            elif ln_hh is not None:
                gh = normalize_gates(gh, groups, walk.ln_eps)[0] * ln_hh
            gh = gh if b_hh is None else gh + b_hh
        elif ln_hh is not None:
            gh = F.layer_norm(times_w(operand, w_hh), ln_hh.shape, ln_hh, b_hh, walk.ln_eps)
        elif b_hh is not None and w_hh.dim() == 2:
            gh = torch.addmm(b_hh, operand, w_hh.t())
        else:
            gh = times_w(operand, w_hh) if b_hh is None else times_w(operand, w_hh) + b_hh
        new, saved_t = cell_forward(gx_t, gh, (state[0].to(acc), *state[1:]), beside[t])
        if w_hr is not None:
            new = (new[0] @ w_hr.t(), *new[1:])
        new = [
            after if zone is None else torch.lerp(after, before.to(acc), zone[t].to(acc))
            for after, before, zone in zip(new, state, zones, strict=True)
        ]
        state = (new[0].to(gx.dtype), *new[1:])
        if pad[t] is not None:
            state = tuple(torch.where(pad[t], old, after) for old, after in zip(carried, state, strict=True))
        output = state if pad[t] is None else tuple(s.masked_fill(pad[t], 0) for s in state)
        y[t] = output[0]
        if save:
            saved[t] = saved_t if pad[t] is None else saved_t.masked_fill(pad[t], 0)
        if save and len(state) > 1:
            c[t] = as_planes(output[1:])
    c_n = as_planes(state[1:])
    return ScanOutputs(
        y=y.tensor(),
        c=c.tensor() if save and len(state) > 1 else None,
        h_n=state[0].clone(),
        c_n=None if c_n is None else c_n.clone(),
        saved=saved.tensor() if save else None,
    )


def clip_scale(norms, threshold: Tensor) -> Tensor:
    """`[B, 1]`: min(1, threshold / joint norm). A NaN norm gives NaN, which must stay visible."""
    joint = row_norm(torch.stack(norms, -1))
    return (threshold / torch.maximum(joint, threshold)).unsqueeze(-1)


def layer_norm_gradients(dgh: Tensor, gh_hat: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of b_hh and ln_hh, `[B, G*H]` acc each: of every sequence, summed over its steps."""
    return dgh.sum(0, dtype=gh_hat.dtype), (dgh * gh_hat).sum(0)


def layer_norm_c_gradients(dh_new, saved, c_prev, w_hr, ln_c: LayerNorm) -> tuple[Tensor, Tensor]:
    """The gradients of ln_c's weight and bias, `[B, H]` each: of every sequence, summed over its steps."""
    acc = c_prev.dtype
    saved, dh = saved.to(acc), dh_new.to(acc)
    c = lstm_cell_state(saved, c_prev)
    du = lstm_output_backward(saved, c, dh if w_hr is None else dh @ w_hr.to(acc), ln_c)
    return (du * normalize(c, ln_c.eps)[0]).sum(0), du.sum(0)


def carried_norm_gradients(dc: Tensor, saved, c_prev, ln_c: LayerNorm) -> tuple[Tensor, Tensor]:
    """As `layer_norm_c_gradients` where the normalised c is carried on; `dc [T, B, H]`: its whole gradient."""
    c = lstm_cell_state(saved.to(c_prev.dtype), c_prev)
    return (dc * normalize(c, ln_c.eps)[0]).sum(0), dc.sum(0)


def normalize_gates(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """`normalize` of `[.., G*H]` over all gates or in `groups` of them; 1 / std is `[.., groups, 1]`."""
    xhat, rstd = normalize(x.unflatten(-1, (groups, -1)), eps)
    return xhat.flatten(-2), rstd


def normalize_gates_backward(dxhat: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    groups = rstd.shape[-2]
    return normalize_backward(*(x.unflatten(-1, (groups, -1)) for x in (dxhat, xhat)), rstd).flatten(-2)


def times_w_hh(h: Tensor, w_hh: Tensor, mask: Tensor | None) -> Tensor:
    """W_hh (h * mask) `[.., G*H]`, for one mask `[B, P]` or a mask for each gate `[B, G*P]`."""
    if mask is None or mask.shape[-1] == h.shape[-1]:
        return times_w(h if mask is None else h * mask, w_hh)
    gates = mask.shape[-1] // h.shape[-1]
    each = zip(mask.chunk(gates, -1), w_hh.chunk(gates), strict=True)
    return torch.cat([(h * one) @ w.t() for one, w in each], -1)


def back_through_w_hh(dgh: Tensor, w_hh: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of h from that of `times_w_hh`."""
    P = w_hh.shape[-1] * (1 if w_hh.dim() == 2 else len(w_hh))
    if mask is None or mask.shape[-1] == P:
        product = times_w_transposed(dgh, w_hh)
        return product if mask is None else product * mask
    gates = mask.shape[-1] // P
    each = zip(dgh.chunk(gates, -1), w_hh.chunk(gates), mask.chunk(gates, -1), strict=True)
    return sum((d @ w) * one for d, w, one in each)


def backward(
    incoming: IncomingGradients,
    kept: Kept,
    inputs: ScanInputs,
    walk: Walk,
    norms: bool,
    differentiable: bool = False,
) -> ScanGradients:
    """The reverse scan of one layer in one direction.

    `differentiable`: autograd can follow into every float tensor, but not into the norms.
    """
    saved, flags, mask = kept.saved, inputs.flags, inputs.recurrent_mask
    T, acc, spec = saved.shape[0], accumulate_dtype(saved.dtype), spec_of(walk.cell)
    _, cell_total, cell_backward = equations_of(walk.cell)
    w_hh, w_hr, ln_hh, clip_norm = _to(acc, inputs.w_hh, inputs.w_hr, inputs.ln_hh, inputs.clip_norm)
    beside = _beside(walk, inputs, T, acc)
    ln_c = None if inputs.ln_c_weight is None else beside[0]
    carries = ln_c is not None and ln_c.carried
    before = by_state(
        walk.cell,
        previous_state(kept.y, inputs.h0, flags, walk.reverse),
        None if kept.c is None else previous_state(kept.c, inputs.c0, flags, walk.reverse),
    )
    undecayed, factors = before, by_state(walk.cell, inputs.decay_h, inputs.decay_c)
    if inputs.decay_h is not None:
        before = decayed(before, factors)
    zones, arriving = by_state(walk.cell, inputs.zone_h, inputs.zone_c), by_state(walk.cell, incoming.dy, incoming.dc)
    if flags is not None:  # what arrives at padding may be infinite, which a second derivative would multiply by zero
        arriving = tuple(None if d is None else d.masked_fill(_bit(flags, PAD), 0) for d in arriving)
    carried = tuple(
        torch.zeros_like(start, dtype=acc) if d is None else d.to(acc)
        for start, d in zip(
            by_state(walk.cell, inputs.h0, inputs.c0), by_state(walk.cell, incoming.dh_n, incoming.dc_n), strict=True
        )
    )
    pad, reset = (_by_step(flags, bit, T, look=not differentiable) for bit in (PAD, RESET))
    if ln_hh is not None:
        # One step at a time, as in the forward: the bits of a product may depend on the number of its rows.
        normalised = torch.stack([times_w_hh(h, w_hh, mask) for h in before[0].to(acc)])
        if walk.ln_of != "separate":
            normalised = normalised + inputs.gx
        gh_hat, gh_rstd = normalize_gates(normalised, _groups(walk), walk.ln_eps)
    dgx, dgh, dh_new, dgh_raw, dcell = (_Steps(T, saved.dtype, differentiable) for _ in range(5))
    dc_new = _Steps(T, acc, differentiable)
    ddecay = [_Steps(T, saved.dtype, differentiable) for _ in spec.states]
    tap = saved.new_empty(2, len(spec.states), T, saved.shape[1], dtype=acc) if norms else None

    for t in _order(T, not walk.reverse):
        zone, (saved_t, *state_prev) = (
            _to(acc, *(z if z is None else z[t] for z in zones)),
            _to(acc, saved[t], *(s[t] for s in before)),
        )
        dstate = tuple(carry if d is None else carry + d[t].to(acc) for carry, d in zip(carried, arriving, strict=True))

        def through_cell(dstate, t=t, zone=zone, saved_t=saved_t, state_prev=state_prev):
            """dL/dh after zoneout, before the projection; the gradients of the cell's own outputs, `total` added."""
            to_cell = [d if z is None else d * (1 - z) for d, z in zip(dstate, zone, strict=True)]
            cell_h = to_cell[0] if w_hr is None else to_cell[0] @ w_hr
            return to_cell[0], cell_total(saved_t, state_prev, (cell_h, *to_cell[1:]), beside[t])

        to_cell, total = through_cell(dstate)
        if norms:
            for k, (whole, carry) in enumerate(zip((dstate[0], *total[1:]), carried, strict=True)):
                tap[0, k, t], tap[1, k, t] = row_norm(whole), row_norm(carry)
        if walk.clip_value is not None:
            dstate = tuple(d.clamp(-walk.clip_value, walk.clip_value) for d in dstate)
            to_cell, total = through_cell(dstate)
        if clip_norm is not None:
            scale = clip_scale([row_norm(g) for g in (dstate[0], *total[1:])], clip_norm)
            to_cell, dstate, total = to_cell * scale, tuple(d * scale for d in dstate), tuple(g * scale for g in total)

        extra = () if incoming.dsaved is None else (incoming.dsaved[t].to(acc),)
        dgx_t, dgh_t, dprev, *rest = cell_backward(saved_t, state_prev, total, beside[t], *extra)
        dcell_t = rest[0] if rest else None
        raw_t, back = dgh_t, list(dprev)
        if w_hh is not None:
            raw_t = dgh_t if ln_hh is None else normalize_gates_backward(dgh_t * ln_hh, gh_hat[t], gh_rstd[t])
            product = back_through_w_hh(raw_t, w_hh, mask)
            back[0] = product if dprev[0] is None else product + dprev[0]
        back = [b if z is None else b + d * z for b, d, z in zip(back, dstate, zone, strict=True)]
        if reset[t] is not None:
            back = [b.masked_fill(reset[t], 0) for b in back]
        if inputs.decay_h is not None:
            for written, b, s in zip(ddecay, back, undecayed, strict=True):
                written[t] = b * s[t] if pad[t] is None else (b * s[t]).masked_fill(pad[t], 0)
            back = [b * factor[t] for b, factor in zip(back, factors, strict=True)]
        if pad[t] is not None:
            back = [torch.where(pad[t], carry, b) for carry, b in zip(carried, back, strict=True)]
            dgx_t, dgh_t, raw_t, to_cell, dcell_t = (
                None if g is None else g.masked_fill(pad[t], 0) for g in (dgx_t, dgh_t, raw_t, to_cell, dcell_t)
            )
            total = tuple(g.masked_fill(pad[t], 0) for g in total) if carries else total
        carried = tuple(back)
        dgx[t] = dgx_t if walk.ln_of == "separate" else raw_t
        if spec.distinct_dgh or walk.ln_of != "separate":
            dgh[t] = dgh_t
        if ln_hh is not None:
            dgh_raw[t] = raw_t
        if w_hr is not None or ln_c is not None:
            dh_new[t] = to_cell
        if dcell_t is not None:
            dcell[t] = dcell_t
        if carries:
            dc_new[t] = total[1]

    found = ScanGradients(
        dgx=dgx.tensor(),
        dgh=dgh.tensor() if spec.distinct_dgh else None,
        dh0=carried[0].to(inputs.h0.dtype),
        dc0=as_planes(carried[1:]),
        dh_new=None if w_hr is None else dh_new.tensor(),
        dcell=None if dcell_t is None else dcell.tensor(),
        ddecay_h=None if inputs.decay_h is None else ddecay[0].tensor(),
        ddecay_c=None if inputs.decay_c is None else as_planes([of_state.tensor() for of_state in ddecay[1:]]),
        norms=tap.masked_fill(_bit(flags, PAD).squeeze(-1), 0) if norms and flags is not None else tap,
    )
    if ln_hh is not None:
        db_hh, dln_hh = layer_norm_gradients(
            dgh.tensor() if spec.distinct_dgh or walk.ln_of != "separate" else found.dgx, gh_hat
        )
        found = found._replace(dgh=dgh_raw.tensor(), db_hh=db_hh, dln_hh=dln_hh)
    if ln_c is not None:
        if carries:
            of_c = carried_norm_gradients(dc_new.tensor(), saved, before[1], ln_c)
        else:
            of_c = layer_norm_c_gradients(dh_new.tensor(), saved, before[1], inputs.w_hr, ln_c)
        found = found._replace(dln_c_weight=of_c[0], dln_c_bias=of_c[1])
    return found
