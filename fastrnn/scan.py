"""One layer, in one direction or both, as a differentiable function: `scan`, an `autograd.Function` pair over raw ops.

Why a pair, and not `torch.library.register_autograd`: ops with registered autograd fail under `torch.func`. `Scan`
backpropagates through `ScanBackward`, whose own backward, reached only by `create_graph=True`, differentiates the
reference. `Scan` returns its saved pre-activations as an output, so second derivatives reach gx through them
(d saved / d gx is the identity) and gx itself need not be kept.
"""

import inspect
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import Function

from . import ops, reference
from .cells import CELLS, PAD
from .directions import each_direction, walks_back
from .linear import linear, tracing, transformed
from .reference import LayerNorm, Masks, lstm_cell_state, lstm_output, previous_state


class Weights(NamedTuple):
    """The parameters inside the recursion; H hidden, P projection (else H), G gates."""

    w_hh: Tensor  # [G*H, P]
    b_hh: Tensor | None = None  # [G*H]
    w_hr: Tensor | None = None  # [P, H]
    ln_hh: Tensor | None = None  # [G*H]
    ln_c_weight: Tensor | None = None  # [H]
    ln_c_bias: Tensor | None = None  # [H]


class ScanOutput(NamedTuple):
    y: Tensor  # [T, B, P], zero at padding
    c: Tensor  # [T, B, H] acc, zero at padding; empty without a c or without gradients
    h_n: Tensor  # [B, P]
    c_n: Tensor  # [B, H] acc; empty without a c


def scan(
    cell: str,
    gx: Tensor,
    weights: Weights,
    h0: Tensor,
    c0: Tensor | None = None,
    masks: Masks = Masks(),  # noqa: B008 (immutable)
    *,
    reverse: bool = False,
    tap: Tensor | None = None,
    clip_norm: Tensor | None = None,
    clip_value: float | None = None,
    keep_c: bool = False,
    backend: str = "reference",
) -> ScanOutput:
    """Runs one layer in one direction over all T steps. `ops.scan_forward` gives the shapes.

    Or, without a projection, in both: then every tensor but clip_norm has a leading dimension D.

    `tap [2, S, T, B]` receives, as its gradient, the norms of dL/ds_t: total and carried. `keep_c` returns every step's
    c also where no gradient is needed.
    """
    if gx.dim() == 4 and weights.w_hr is not None:
        raise NotImplementedError("a scan with a projection takes one direction at a time")
    if torch.compiler.is_compiling() and _gradients_of_gradients():
        # Left uncompiled, unless fullgraph=True insists: a compiler takes the backward op for a constant.
        raise NotImplementedError("a second derivative cannot be compiled; call it without torch.compile")
    tensors = (gx, weights.w_hh, weights.b_hh, h0, c0, *weights[2:])
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, tap))
    # Under vmap a tensor does not say that what it is a part of requires grad; and vmap knows the function, not the op.
    # Nor does a dual number, of which the op would drop the tangent; the function refuses it.
    in_eager = not torch.compiler.is_compiling()
    if differentiated or (in_eager and (transformed() or torch.autograd.forward_ad._current_level >= 0)):
        outputs = Scan.apply(*tensors, *masks, tap, clip_norm, clip_value, cell, reverse, backend, keep_c)
    else:
        outputs = ops.scan_forward(*tensors, *masks, cell, reverse, keep_c, backend)
    return ScanOutput(*outputs[:4])


def _gradients_of_gradients() -> bool:
    """Whether torch.func is differentiating what it differentiates."""
    levels = retrieve_all_functorch_interpreters()
    return sum(level.key() in (TransformType.Grad, TransformType.Jvp) for level in levels) > 1


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes a second.
_gradients_of_gradients._dynamo_marked_constant = True


def _fold(tensor, in_dim, batch_dim, size):
    """Moves a vmapped dimension into the batch: `[.., V, .., B, ..]` -> `[.., V*B, ..]`."""
    if tensor is None or batch_dim is None:
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if in_dim is None else tensor.movedim(in_dim, 0)
    return tensor.movedim(0, batch_dim - 1).flatten(batch_dim - 1, batch_dim)


def _vmap(function, batch_dims, out_batch_dims, info, in_dims, args):
    """One rule for both functions: fold the vmapped dimension into the batch; loop where the weights are vmapped.

    The places of the batch are counted from the end: a dimension for the directions may lead.
    """
    size = info.batch_size
    if any(dim is not None and batch_dims[k] is None for k, dim in enumerate(in_dims)):

        def one(v):
            return function.apply(*(a if d is None else a.select(d, v) for a, d in zip(args, in_dims, strict=True)))

        outputs = zip(*map(one, range(size)), strict=True)
        return tuple(torch.stack(out) for out in outputs), (0,) * len(out_batch_dims)
    folded = map(lambda a, d, b: _fold(a, d, b, size), args, in_dims, batch_dims)
    outputs = function.apply(*folded)
    missing = [out.ndim == 1 and out.numel() == 0 for out in outputs]
    unfolded = tuple(
        out if gone else out.unflatten(dim, (size, out.shape[dim] // size))
        for out, dim, gone in zip(outputs, out_batch_dims, missing, strict=True)
    )
    places = zip(unfolded, out_batch_dims, missing, strict=True)
    return unfolded, tuple(None if gone else out.dim() + dim - 1 for out, dim, gone in places)


# Asked once, because torch.compile cannot follow the question (seen with torch 2.11).
AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")))
"""Device types that autocast knows."""


def without_autocast(device: str):
    """The block in which autocast does not touch dtypes that have been chosen already."""
    on = device in AUTOCAST and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


class Scan(Function):
    """Arguments: those of `ops.scan_forward`, then tap and clipping. Outputs: y, c, h_n, c_n, saved.

    Under torch.compile nothing is differentiated twice: `saved`, and c unless `keep_c`, are not differentiable there.
    """

    @staticmethod
    def forward(*inputs):  # with names, autograd would bind each of them in every call
        *tensors, _, _, _, cell, reverse, backend, _ = inputs
        return ops.scan_forward(*tensors, cell, reverse, True, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, tap, clip_norm, clip_value, cell, reverse, backend, keep_c = inputs
        y, c, _, _, saved = output
        ctx.set_materialize_grads(False)
        ctx.differentiable = (True,) * 5
        if torch.compiler.is_compiling():
            has_c = tensors[4] is not None
            ctx.differentiable = (True, has_c and keep_c, True, has_c, False)
            ctx.mark_non_differentiable(*(v for v, d in zip(output, ctx.differentiable, strict=True) if not d))
        ctx.save_for_backward(*tensors[1:], clip_norm, y, c if tensors[4] is not None else None, saved)
        ctx.options = (clip_value, cell, reverse)
        ctx.backend, ctx.device = backend, saved.device.type
        ctx.tapped = tap is not None

    @staticmethod
    def backward(ctx, *grads):
        # A compiler gives zeros where no gradient arrives, also of what is not differentiable.
        grads = (g if d else None for g, d in zip(grads, ctx.differentiable, strict=True))
        # The forward chose its dtypes; a backward called inside an autocast block must not choose again.
        with without_autocast(ctx.device):
            return Scan._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx, dy, dc, dh_n, dc_n, dsaved):
        (w_hh, b_hh, h0, c0, w_hr, ln_hh, ln_c_weight, ln_c_bias, *masks, clip_norm, y, c, saved) = ctx.saved_tensors
        masks, (clip_value, cell, reverse) = Masks(*masks), ctx.options
        if all(g is None for g in (dy, dc, dh_n, dc_n, dsaved)):
            return (None,) * 20
        # The raw op is enough where nobody differentiates it again, as in a compiled graph, nor vmaps over it.
        again = (torch.is_grad_enabled() or tracing()) and not torch.compiler.is_compiling()
        run = ScanBackward.apply if again else ops.scan_backward
        dgx, dgh, dh0, dc0, dh_new, db_hh, *dln, norms = run(
            dy, dc, dh_n, dc_n, dsaved, saved, y, c, h0, c0, w_hh, w_hr, ln_hh, ln_c_weight, ln_c_bias,
            *masks, clip_norm, clip_value, cell, reverse, ctx.tapped,
            # The fused kernels have no input for the gradient of `saved`, which only double backward brings.
            "reference" if dsaved is not None else ctx.backend,
        )  # fmt: skip
        if not CELLS[cell].split and ln_hh is None:
            dgh = dgx
        h_prev = _previous_states(y, h0, masks.flags, reverse)
        if masks.recurrent is not None:
            h_prev = h_prev * masks.recurrent.unsqueeze(-3)
        dw_hh = _over_steps(dgh, h_prev.to(dgh.dtype), masks.flags)
        if b_hh is None:
            db_hh = None
        else:
            db_hh = dgh.sum((-3, -2)) if ln_hh is None else db_hh.sum(-2).to(b_hh.dtype)
        dw_hr = None
        if w_hr is not None:
            new_c = c  # that of the cell, unless zoneout mixes it with the one before
            if masks.zone_c is not None:
                new_c = lstm_cell_state(saved.to(c.dtype), previous_state(c, c0, masks.flags, reverse))
            out = _unprojected(saved, new_c, ln_c_weight, ln_c_bias)
            dw_hr = _over_steps(dh_new, out.to(dh_new.dtype))
        norm_weights = zip((ln_hh, ln_c_weight, ln_c_bias), dln, strict=True)
        dln = (None if weight is None else d.sum(-2).to(weight.dtype) for weight, d in norm_weights)
        return (
            dgx, dw_hh, db_hh, dh0, None if c0 is None else dc0, dw_hr, *dln,
            None, None, None, None, norms if ctx.tapped else None, *(None,) * 6,
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, *args):
        batch_dims = (-2, None, None, -2, -2, *(None,) * 4, -1, -2, -2, -2, -1, *(None,) * 6)
        return _vmap(Scan, batch_dims, (-2,) * 5, info, in_dims, args)


def _previous_states(y: Tensor, h0: Tensor, flags: Tensor | None, reverse: bool) -> Tensor:
    """`previous_state`, of one direction or of each."""
    if y.dim() == 3:
        return previous_state(y, h0, flags, reverse)
    each = (None,) * len(y) if flags is None else flags
    own = zip(y, h0, each, strict=True)
    return torch.stack([previous_state(*states, walks_back(d, reverse)) for d, states in enumerate(own)])


LEAST_PADDED_WORK = 1 << 24
"""Multiplications of a weight's gradient from which on it pays to leave out the padding, which has to be found."""


def _over_steps(dy: Tensor, x: Tensor, flags: Tensor | None = None) -> Tensor:
    """The gradient `[N, K]` of a weight that multiplies `x [T, B, K]` at every step, from `dy [T, B, N]`.

    `flags [T, B]`: dy is zero at the padding, which is left out where one can look without waiting.
    """
    if dy.dim() == 4:
        return dy.flatten(1, 2).mT @ x.flatten(1, 2)
    rows, terms = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    look = type(flags) is Tensor and flags.device.type == "cpu" and not tracing()  # a fake one has no values
    if look and rows.numel() * terms.shape[1] >= LEAST_PADDED_WORK:
        real = (flags.flatten() & PAD == 0).nonzero().squeeze(1)
        if len(real) < len(rows):
            rows, terms = rows.index_select(0, real), terms.index_select(0, real)
    return linear(rows.t(), terms.t())


def _unprojected(saved, c, ln_c_weight, ln_c_bias):
    """The LSTM's h before the projection, `[T, B, H]` acc."""
    ln_c = None if ln_c_weight is None else LayerNorm(ln_c_weight, ln_c_bias)
    return lstm_output(saved.to(c.dtype), c, ln_c)


def _differentiable_backward(*arguments):
    """`ops.scan_backward` of one direction, such that autograd can follow."""
    *floats, ln_c_weight, ln_c_bias = arguments[:15]
    *masks, clip_norm, clip_value, cell, reverse, norms = arguments[15:]
    ln_c = None if ln_c_weight is None else LayerNorm(ln_c_weight, ln_c_bias)
    return reference.scan_backward(
        *floats, ln_c, Masks(*masks), clip_norm, clip_value, cell, reverse, norms, reference.Step(cell),
        differentiable=True,
    )  # fmt: skip


class ScanBackward(Function):
    """Arguments and outputs: those of `ops.scan_backward`."""

    @staticmethod
    def forward(*args):
        return ops.scan_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, clip_value, cell, reverse, _, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(*tensors)
        ctx.options = (clip_value, cell, reverse)

    @staticmethod
    def backward(ctx, *grads):
        *floats, flags, recurrent, zone_h, zone_c, clip_norm = ctx.saved_tensors
        (clip_value, cell, reverse), saved = ctx.options, floats[5]
        present = [k for k, tensor in enumerate(floats) if tensor is not None]

        def outputs(*values):
            filled = dict(zip(present, values, strict=True))
            tensors = (*map(filled.get, range(len(floats))), flags, recurrent, zone_h, zone_c, clip_norm, clip_value)
            if saved.dim() == 4:
                return each_direction(_differentiable_backward, tensors, cell, reverse, False)[:-1]
            return _differentiable_backward(*tensors, cell, reverse, False)[:-1]

        values, pull_back = torch.func.vjp(outputs, *(floats[k] for k in present))
        cotangents = tuple(torch.zeros_like(v) if g is None else g for v, g in zip(values, grads[:-1], strict=True))
        found = dict(zip(present, pull_back(cotangents), strict=True))
        return (*(found.get(k) for k in range(len(floats))), *(None,) * 10)

    @staticmethod
    def vmap(info, in_dims, *args):
        batch_dims = (*(-2,) * 10, *(None,) * 5, -1, -2, -2, -2, *(None,) * 6)
        return _vmap(ScanBackward, batch_dims, (*(-2,) * 9, -1), info, in_dims, args)


# Autograd asks for it in every call, and Python would find it out anew each time, which a short call feels.
for _forward in (Scan.forward, ScanBackward.forward):
    _forward.__signature__ = inspect.signature(_forward)
del _forward
