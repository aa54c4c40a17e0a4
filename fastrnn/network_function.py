"""The whole-network operation of the C++ library as a differentiable function: `run`."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from .cell_table import spec_of
from .equations import accumulate_dtype
from .linear import transformed
from .scan import without_autocast


class Shape(NamedTuple):
    """What describes a network beside its tensors: arguments of both ops."""

    cell: str
    num_layers: int
    bidirectional: bool
    bias: bool
    projects: bool
    batch_first: bool


class Bounds(NamedTuple):
    """What the gradients of the states are clipped to: arguments of `network_backward`."""

    norm: float | None = None
    value: float | None = None


NO_BOUNDS = Bounds()


class Inputs(NamedTuple):
    """The tensors of a call beside the weights."""

    x: Tensor  # [T, B, I], [B, T, I] with batch_first, [T, I], or with batch_sizes packed rows [rows, I]
    batch_sizes: Tensor | None = None  # int64 [T]
    reset_mask: Tensor | None = None  # bool [T, B], not of packed rows; not to be changed before the backward
    tap: Tensor | None = None  # [L*D, 2, S, T, B]
    h0: Tensor | None = None  # [L*D, B, P], [L*D, P] beside [T, I], or None for zeros
    c0: Tensor | None = None  # the same with H in place of P


def run(shape: Shape, inputs: Inputs, weights: list[Tensor], bounds: Bounds, differentiated: bool):
    """`(y, h_n, c_n)`; c_n is empty where the cell has no c.

    weights: those of each layer and direction in torch.nn's order. `differentiated`: whether a backward may follow.
    """
    if differentiated:
        # Without Function.apply's look at transforms: a transformed call takes the general path.
        return super(Function, Network).apply(shape, bounds, *inputs, *weights)
    x, batch_sizes, reset_mask, _, h0, c0 = inputs
    y, h_n, c_n, _ = torch.ops.fastrnn_c.network_forward(x, batch_sizes, reset_mask, h0, c0, weights, *shape, False)
    return y, h_n, c_n


class Roles(NamedTuple):
    """Places among a network's weights: those that a first derivative reads, and the others, which the user may change
    before it: the biases and, without dx, the first W_ih."""

    read: tuple[int, ...]
    unread: tuple[int, ...]


@cache
def _roles(count: int, bidirectional: bool, bias: bool, projects: bool, needs_dx: bool) -> Roles:
    each = 2 + 2 * bias + projects
    first = 0 if needs_dx else each * (1 + bidirectional)
    biases = (2, 3) if bias else ()
    unread = tuple(k for k in range(count) if k % each in biases or (k % each == 0 and k < first))
    return Roles(tuple(k for k in range(count) if k not in unread), unread)


FIRST, COUNT = 2, len(Inputs._fields)
"""Where the inputs are among the arguments of `Network`, and how many there are."""


class Network(Function):
    """Arguments: a Shape, Bounds, Inputs, the weights. Outputs: y, h_n, c_n."""

    @staticmethod
    def forward(ctx, shape, bounds, *tensors):
        x, batch_sizes, reset_mask, _, h0, c0 = tensors[:COUNT]
        weights = tensors[COUNT:]
        y, h_n, c_n, kept = torch.ops.fastrnn_c.network_forward(
            x, batch_sizes, reset_mask, h0, c0, weights, *shape, True
        )
        ctx.shape, ctx.bounds = shape, bounds
        ctx.set_materialize_grads(False)
        read, unread = _roles(len(weights), *shape[2:5], ctx.needs_input_grad[FIRST])
        ctx.unread = [weights[k] for k in unread]
        ctx.versions = [one._version for one in ctx.unread]
        ctx.save_for_backward(x, batch_sizes, reset_mask, h0, c0, kept, *[weights[k] for k in read])
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        shape, bounds = ctx.shape, ctx.bounds
        x, batch_sizes, reset_mask, h0, c0, kept, *matrices = ctx.saved_tensors
        needs = Inputs(*ctx.needs_input_grad[FIRST : FIRST + COUNT])
        count = len(matrices) + len(ctx.unread)
        roles = _roles(count, *shape[2:5], needs.x)
        placed = dict(zip((*roles.read, *roles.unread), (*matrices, *ctx.unread), strict=True))
        weights = [placed[k] for k in range(count)]
        given = (dy, dh_n, dc_n)
        if dy is None and dh_n is None and dc_n is None:
            return (*(None for _ in ctx.needs_input_grad),)
        if torch.is_grad_enabled() or transformed() or any(map(_is_batched, given)):
            if [one._version for one in ctx.unread] != ctx.versions:
                raise RuntimeError("a weight of this call has been modified by an inplace operation")
            inputs = Inputs(x, batch_sizes, reset_mask, None, h0, c0)
            return None, None, *_differentiable(shape, bounds, inputs, weights, given, ctx.needs_input_grad[FIRST:])
        dx, dh0, dc0, norms, *of_weights = torch.ops.fastrnn_c.network_backward(
            *given, x, batch_sizes, reset_mask, h0, c0, weights, kept, *shape, *bounds, needs.tap, needs.x
        )
        gradients = Inputs(
            dx if needs.x else None, None, None, norms if needs.tap else None,
            dh0 if needs.h0 else None, dc0 if needs.c0 else None,
        )  # fmt: skip
        return None, None, *gradients, *of_weights


def _is_batched(gradient: Tensor | None) -> bool:
    """By torch.autograd.grad(..., is_grads_batched=True)."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def _differentiable(shape: Shape, bounds: Bounds, inputs: Inputs, weights, incoming, needed) -> list[Tensor | None]:
    """The gradients of the inputs and the weights by the general path, run again: differentiable, and known to vmap."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast("cpu"):
        return _by_general_path(shape, bounds, inputs, weights, incoming, needed, again)


def _new_tap(shape: Shape, inputs: Inputs) -> Tensor:
    x, sizes = inputs.x, inputs.batch_sizes
    batched = x.dim() == 3
    steps, batch = (len(sizes), int(sizes[0])) if sizes is not None else (x.shape[0], x.shape[1] if batched else 1)
    if batched and shape.batch_first:
        steps, batch = batch, steps
    walks, states = shape.num_layers * (1 + shape.bidirectional), len(spec_of(shape.cell).states)
    return torch.zeros(walks, 2, states, steps, batch, dtype=accumulate_dtype(x.dtype), requires_grad=True)


def _by_general_path(shape, bounds, inputs, weights, incoming, needed, again: bool) -> list[Tensor | None]:
    from . import functional  # which comes to this module by way of `modules`

    if needed[Inputs._fields.index("tap")]:
        inputs = inputs._replace(tap=_new_tap(shape, inputs))
    # Each by itself, although one tensor may be two of the inputs.
    own = [t.view_as(t) if need else t for t, need in zip((*inputs, *weights), needed, strict=True)]
    x, batch_sizes, reset_mask, tap, h0, c0 = own[:COUNT]
    biases = ("bias_ih", "bias_hh") if shape.bias else ()
    kinds = ("weight_ih", "weight_hh", *biases, *(("weight_hr",) if shape.projects else ()))
    names = (
        f"{kind}_l{layer}{direction}"
        for layer in range(shape.num_layers)
        for direction in (("", "_reverse") if shape.bidirectional else ("",))
        for kind in kinds
    )
    hx = h0 if c0 is None or h0 is None else (h0, c0)
    x = x if batch_sizes is None else PackedSequence(x, batch_sizes)
    y, hidden = functional.recurrent(
        shape.cell, x, hx, dict(zip(names, own[COUNT:], strict=True)), "cpu", num_layers=shape.num_layers,
        bidirectional=shape.bidirectional, batch_first=shape.batch_first, reset_mask=reset_mask, tap=tap,
        clip_state_grad_norm=bounds.norm, clip_state_grad_value=bounds.value,
    )  # fmt: skip
    outputs = (y if batch_sizes is None else y.data, *(hidden if isinstance(hidden, tuple) else (hidden,)))
    pairs = [(out, grad) for out, grad in zip(outputs, incoming, strict=False) if grad is not None]
    wanted = [t for t, need in zip(own, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=again, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needed]
