"""One layer, in one direction or both, as a differentiable function: `scan`, an `autograd.Function` pair over raw ops.

Why a pair, and not `torch.library.register_autograd`: ops with registered autograd fail under `torch.func`. `Scan`
backpropagates through `ScanBackward`, whose own backward, reached only by `create_graph=True`, differentiates the
reference. `Scan` returns its saved pre-activations as an output, so second derivatives reach gx through them
(d saved / d gx is the identity) and gx itself need not be kept.

Autograd wants flat arguments and one gradient for each: the named tuples of `arguments.py`, one after the other.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch._C._functorch import TransformType, unwrap_if_dead
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import Function

from . import export, ops, reference
from .arguments import (
    BATCH_OF_GRADIENTS,
    BATCH_OF_INCOMING,
    BATCH_OF_INPUTS,
    BATCH_OF_KEPT,
    BATCH_OF_OUTPUTS,
    BATCH_OF_WALK,
    MASKS,
    NO_GRADIENT,
    NO_GRADIENT_OF_WALK,
    IncomingGradients,
    Kept,
    ScanGradients,
    ScanInputs,
    ScanOutputs,
    Walk,
    as_tensors,
    has_directions,
    schema,
    split,
)
from .cell_table import PAD, spec_of
from .directions import each_direction
from .equations import LayerNorm, lstm_carried, lstm_cell_state, lstm_output
from .heads import of_each_head
from .linear import in_forward_mode, linear, recorded, tracing, transformed
from .reference import previous_state
from .vmapping import vmap


def scan(inputs: ScanInputs, walk: Walk, *, tap: Tensor | None = None, keep_c: bool = False) -> ScanOutputs:
    """Runs one layer in one direction over all T steps; or, without a projection, in both (`arguments.py`).

    `tap [2, S, T, B]` receives, as its gradient, the norms of dL/ds_t: total and carried. `keep_c` returns every step's
    c also where no gradient is needed. The outputs have no `saved`; an empty tensor stands for one that does not exist.
    """
    if has_directions(inputs.gx) and inputs.w_hr is not None:
        raise NotImplementedError("a scan with a projection takes one direction at a time")
    if torch.compiler.is_compiling() and _gradients_of_gradients():
        # Runs uncompiled, or raises under fullgraph=True: a compiler would take the backward op for a constant.
        raise NotImplementedError("a second derivative cannot be compiled; call it without torch.compile")
    if export.exporting():
        return export.scan(inputs, walk, keep_c)
    if recorded() and tap is None:  # what is written down asks for gradients when it runs, not now
        return ScanOutputs(*torch.ops.fastrnn.scan_recorded(*inputs, *walk, keep_c)[:4])
    return ScanOutputs(*_run(inputs, walk, tap, keep_c)[:4])


def _run(inputs: ScanInputs, walk: Walk, tap: Tensor | None, keep_c: bool) -> tuple[Tensor, ...]:
    """The function, where a derivative may be taken, or the raw op."""
    if not torch.compiler.is_compiling() and in_forward_mode():
        return _run_in_forward_mode(inputs, walk, tap, keep_c)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, tap))
    # Under vmap a tensor does not show that a tensor around it requires grad, and vmap's rule belongs to the function.
    if differentiated or (not torch.compiler.is_compiling() and transformed()):
        return _apply(Scan, *inputs, *walk, tap, keep_c)
    return ops.call_forward(*inputs, *walk, keep_c)


def _run_in_forward_mode(inputs: ScanInputs, walk: Walk, tap: Tensor | None, keep_c: bool) -> tuple[Tensor, ...]:
    """torch itself differentiates the loop of the reference, in forward mode and any other, where the gradient is that
    of the outputs: a tap and clipping are of the function's own backward, which has no such mode."""
    clips = inputs.clip_norm is not None or walk.clip_value is not None
    if walk.backend == "reference" and tap is None and not clips:

        def one(inputs, reverse):
            return reference.forward(inputs, walk._replace(reverse=reverse), True, followed=True)

        both = has_directions(inputs.gx)
        found = each_direction(one, len(inputs.gx), walk.reverse, inputs) if both else one(inputs, walk.reverse)
        return as_tensors(found, inputs.gx)
    try:
        return _apply(Scan, *inputs, *walk, tap, keep_c)
    except NotImplementedError:  # an input has a tangent
        what = "clipping and norms of the gradient have" if walk.backend == "reference" else f"{walk.backend!r} has"
        raise NotImplementedError(
            f"{what} no derivative in forward mode; backend 'reference', without them, has"
        ) from None


def _apply(function: type[Function], *flat):
    """`function.apply`; where no transform is active, without its binding of arguments to names, which takes a tenth
    of a short call."""
    if torch.compiler.is_compiling() or transformed():
        return function.apply(*flat)
    flat = [x if x is None or not isinstance(x, Tensor) else unwrap_if_dead(x) for x in flat]
    return super(Function, function).apply(*flat)


def _gradients_of_gradients() -> bool:
    """Whether torch.func takes a derivative of a derivative."""
    levels = retrieve_all_functorch_interpreters()
    return sum(level.key() in (TransformType.Grad, TransformType.Jvp) for level in levels) > 1


# As torch.compiler.assume_constant_result does, which would import the compiler, and that takes a second.
_gradients_of_gradients._dynamo_marked_constant = True


# Asked once, because torch.compile cannot follow the question (seen with torch 2.11).
AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")))
"""Device types that autocast knows."""


def without_autocast(device: str):
    """A block in which autocast does not change dtypes that have been chosen already."""
    on = device in AUTOCAST and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


DIFFERENTIABLE = ScanOutputs(y=True, c=True, h_n=True, c_n=True, saved=True)


class Scan(Function):
    """Arguments: ScanInputs, Walk, tap, keep_c. Outputs: ScanOutputs.

    Under torch.compile nothing is differentiated twice: `saved`, and c unless `keep_c`, are not differentiable there.
    """

    @staticmethod
    def forward(*flat):  # with names, autograd would bind each of them in every call
        *inputs_and_walk, _, _ = flat
        return ops.call_forward(*inputs_and_walk, True)

    @staticmethod
    def setup_context(ctx, flat, output):
        inputs, walk, tap, keep_c = split(flat, ScanInputs, Walk)
        outputs, has_c = ScanOutputs(*output), inputs.c0 is not None
        ctx.set_materialize_grads(False)
        ctx.differentiable = DIFFERENTIABLE
        if torch.compiler.is_compiling():
            ctx.differentiable = ScanOutputs(y=True, c=has_c and keep_c, h_n=True, c_n=has_c, saved=False)
            ctx.mark_non_differentiable(*(v for v, d in zip(output, ctx.differentiable, strict=True) if not d))
        # No backward reads the bias, which the user may change in between.
        gx, biased = None if walk.ln_of == "separate" else inputs.gx, inputs.b_hh is not None
        inputs = inputs._replace(gx=gx, b_hh=None)
        ctx.save_for_backward(*inputs, outputs.y, outputs.c if has_c else None, outputs.saved)
        ctx.walk, ctx.device, ctx.tapped, ctx.biased = walk, outputs.saved.device.type, tap is not None, biased

    @staticmethod
    def backward(ctx, *grads):
        # A compiler gives zeros where no gradient arrives, also for outputs that are not differentiable.
        found = [g if d else None for g, d in zip(grads, ctx.differentiable, strict=True)]
        incoming, (inputs, kept) = IncomingGradients(*found), split(ctx.saved_tensors, ScanInputs, Kept)
        norms = None
        if any([g is not None for g in incoming]):
            # The forward chose its dtypes; a backward called inside an autocast block must not choose again.
            with without_autocast(ctx.device):
                inputs, norms = _gradients(incoming, kept, inputs, ctx.walk, ctx.tapped, ctx.biased)
        else:
            inputs = NO_GRADIENT
        return *inputs, *NO_GRADIENT_OF_WALK, norms, None

    @staticmethod
    def vmap(info, in_dims, *args):
        batch_dims = (*BATCH_OF_INPUTS, *BATCH_OF_WALK, -1, None)
        return vmap(Scan, batch_dims, BATCH_OF_OUTPUTS, info, in_dims, args)


def _gradients(
    incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, tapped: bool, biased: bool
) -> tuple[ScanInputs, Tensor | None]:
    """The gradients of the inputs, and the norms. `biased`: whether there is a b_hh."""
    # The raw op is enough where it is neither differentiated again, as in a compiled graph, nor mapped by vmap.
    again = (torch.is_grad_enabled() or tracing()) and not torch.compiler.is_compiling()
    # The fused kernels have no input for the gradient of `saved`, which only double backward brings.
    if incoming.dsaved is not None:
        walk = walk._replace(backend="reference")
    flat = (*incoming, *kept, *inputs, *walk, tapped)
    found = ScanGradients._make(_apply(ScanBackward, *flat) if again else ops.call_backward(*flat))
    dgh = found.dgh if spec_of(walk.cell).distinct_dgh or inputs.ln_hh is not None else found.dgx
    dw_hh = db_hh = None
    if inputs.w_hh is not None:
        h_prev, mask = _previous_states(kept.y, inputs.h0, inputs.flags, walk.reverse), inputs.recurrent_mask
        if inputs.decay_h is not None:
            h_prev = h_prev * inputs.decay_h
        per_gate = mask is not None and mask.shape[-1] != h_prev.shape[-1]
        if mask is not None and not per_gate:
            h_prev = h_prev * mask.unsqueeze(-3)
        h_prev = h_prev.to(dgh.dtype)
        if per_gate:
            dw_hh = _over_gates(dgh, h_prev, mask, inputs.flags)
        elif inputs.w_hh.dim() == h_prev.dim():  # in heads: one dimension more than dense
            heads = of_each_head(dgh, h_prev, inputs.w_hh)
            dw_hh = torch.stack([_over_steps(*head, inputs.flags) for head in heads], -3)
        else:
            dw_hh = _over_steps(dgh, h_prev, inputs.flags)
    if biased:
        db_hh = dgh.sum((-3, -2)) if inputs.ln_hh is None else _over_batch(found.db_hh, inputs.ln_hh)
    of_inputs = NO_GRADIENT._replace(
        gx=found.dgx,
        w_hh=dw_hh,
        h0=found.dh0,
        c0=None if inputs.c0 is None else found.dc0,
        b_hh=db_hh,
        w_hr=None if inputs.w_hr is None else _projection_gradient(found.dh_new, kept, inputs, walk),
        ln_hh=_over_batch(found.dln_hh, inputs.ln_hh),
        ln_c_weight=_over_batch(found.dln_c_weight, inputs.ln_c_weight),
        ln_c_bias=_over_batch(found.dln_c_bias, inputs.ln_c_bias),
        decay_h=None if inputs.decay_h is None else found.ddecay_h,
        decay_c=None if inputs.decay_c is None else found.ddecay_c,
    )
    if inputs.parameters is not None:
        of_parameters = found.dcell[..., : inputs.parameters.shape[-1]]
        of_inputs = of_inputs._replace(parameters=of_parameters.sum((-3, -2)))
    if inputs.step_inputs is not None:
        of_inputs = of_inputs._replace(step_inputs=found.dcell[..., -inputs.step_inputs.shape[-1] :])
    return of_inputs, found.norms if tapped else None


def _previous_states(states: Tensor, initial: Tensor, flags: Tensor | None, reverse: bool) -> Tensor:
    """`previous_state`, of one direction or of each."""
    if not has_directions(states):
        return previous_state(states, initial, flags, reverse)
    return each_direction(previous_state, len(states), reverse, states, initial, flags)


def _over_batch(gradients: Tensor, parameter: Tensor | None) -> Tensor | None:
    """The gradient of a parameter from those of the sequences, `[B, N]`."""
    return None if parameter is None else gradients.sum(-2).to(parameter.dtype)


LEAST_PADDED_WORK = 1 << 24
"""Multiplications of a weight's gradient from which on it pays to leave out the padding, which has to be found."""


def _over_steps(dy: Tensor, x: Tensor, flags: Tensor | None = None) -> Tensor:
    """The gradient `[N, K]` of a weight that multiplies `x [T, B, K]` at every step, from `dy [T, B, N]`.

    `flags [T, B]`: dy is zero at the padding. It is left out on a CPU; elsewhere looking for it would wait for the GPU.
    """
    if has_directions(dy):
        return dy.flatten(1, 2).mT @ x.flatten(1, 2)
    steps = dy.shape[0] * dy.shape[1]  # what -1 stands for is not known of a tensor without columns
    rows, terms = dy.reshape(steps, dy.shape[2]), x.reshape(steps, x.shape[2])
    look = type(flags) is Tensor and flags.device.type == "cpu" and not tracing()  # a fake one has no values
    if look and rows.numel() * terms.shape[1] >= LEAST_PADDED_WORK:
        real = (flags.flatten() & PAD == 0).nonzero().squeeze(1)
        if len(real) < len(rows):
            rows, terms = rows.index_select(0, real), terms.index_select(0, real)
    return linear(rows.t(), terms.t())


def _over_gates(dgh: Tensor, h_prev: Tensor, mask: Tensor, flags: Tensor | None) -> Tensor:
    """The gradient of W_hh where each gate's rows multiply h by a mask of their own, `[B, G*P]`."""
    gates = mask.shape[-1] // h_prev.shape[-1]
    each = zip(dgh.chunk(gates, -1), mask.chunk(gates, -1), strict=True)
    return torch.cat([_over_steps(d, (h_prev * one.unsqueeze(-3)).to(d.dtype), flags) for d, one in each], -2)


def _projection_gradient(dh_new: Tensor, kept: Kept, inputs: ScanInputs, walk: Walk) -> Tensor:
    """The gradient of w_hr, which multiplies the LSTM's h `[T, B, H]`; h is computed again from `saved`."""
    c, saved = kept.c, kept.saved.to(kept.c.dtype)
    ln_c = None
    if inputs.ln_c_weight is not None:
        ln_c = LayerNorm(inputs.ln_c_weight, inputs.ln_c_bias, walk.ln_eps, walk.ln_c_carried)
    if inputs.zone_c is not None:  # zoneout mixes the cell's own c with the one before
        c_prev = previous_state(c, inputs.c0, inputs.flags, walk.reverse)
        c = lstm_cell_state(saved, c_prev if inputs.decay_c is None else c_prev * inputs.decay_c)
        c, ln_c = lstm_carried(c, ln_c)
    elif walk.ln_c_carried:  # c is normalised already
        ln_c = None
    return _over_steps(dh_new, lstm_output(saved, c, ln_c).to(dh_new.dtype))


NOT_DIFFERENTIATED = (*MASKS, "clip_norm")


class ScanBackward(Function):
    """Arguments: IncomingGradients, Kept, ScanInputs, Walk, norms. Outputs: ScanGradients."""

    @staticmethod
    def forward(*flat):
        return ops.call_backward(*flat)

    @staticmethod
    def setup_context(ctx, flat, output):
        incoming, kept, inputs, ctx.walk, _ = split(flat, IncomingGradients, Kept, ScanInputs, Walk)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ScanGradients._make(output).norms)
        ctx.save_for_backward(*incoming, *kept, *inputs)

    @staticmethod
    def backward(ctx, *grads):
        parts, walk = split(ctx.saved_tensors, IncomingGradients, Kept, ScanInputs), ctx.walk
        floats = {
            name: tensor
            for part in parts
            for name, tensor in part._asdict().items()
            if tensor is not None and name not in NOT_DIFFERENTIATED
        }

        def one_direction(incoming, kept, inputs, reverse):
            own = walk._replace(reverse=reverse)
            return reference.backward(incoming, kept, inputs, own, norms=False, differentiable=True)

        def outputs(floats):
            given = [part._replace(**{n: x for n, x in floats.items() if n in part._fields}) for part in parts]
            saved = floats["saved"]
            if has_directions(saved):
                found = each_direction(one_direction, len(saved), walk.reverse, *given)
            else:
                found = one_direction(*given, walk.reverse)
            return as_tensors(found[:-1], saved)

        values, pull_back = torch.func.vjp(outputs, floats)
        cotangents = tuple(torch.zeros_like(v) if g is None else g for v, g in zip(values, grads[:-1], strict=True))
        (found,) = pull_back(cotangents)
        return *(found.get(name) for part in parts for name in part._fields), *NO_GRADIENT_OF_WALK, None

    @staticmethod
    def vmap(info, in_dims, *args):
        batch_dims = (*BATCH_OF_INCOMING, *BATCH_OF_KEPT, *BATCH_OF_INPUTS, *BATCH_OF_WALK, None)
        return vmap(ScanBackward, batch_dims, BATCH_OF_GRADIENTS, info, in_dims, args)


def _run_recorded(*flat):
    inputs, walk, keep_c = split(flat, ScanInputs, Walk)
    return tuple(_run(inputs, walk, None, keep_c))


# torch.jit.trace writes this op down, as it is, with gradients and without. A composite op leaves them to its kernel.
ops.LIBRARY.define("scan_recorded" + schema(ScanInputs, Walk, results=ScanOutputs, keep_c=bool))
ops.LIBRARY.impl("scan_recorded", _run_recorded, "CompositeImplicitAutograd")
