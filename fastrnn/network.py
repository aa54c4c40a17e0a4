"""A plain call on backend `cpu` as one operation: all layers, directions, products and scans, forward and backward.

It is for short calls, whose products are small: with larger ones, the general path multiplies by oneDNN or MKL.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .backends import cpu
from .cell_table import spec_of

LARGEST_PRODUCT = 1 << 23
"""The most multiplications in one product over all steps that the operation's own panels take."""


class Shape(NamedTuple):
    """What describes a network beside its tensors: the last arguments of both ops."""

    cell: str
    num_layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool


def takes(cell: str, steps: int, batch: int, input_size: int, hidden_size: int, directions: int) -> bool:
    """Whether the operation is there and has no product that the general path would do faster."""
    widest = max(input_size, directions * hidden_size)
    work = steps * batch * len(spec_of(cell).gates) * hidden_size * widest
    return cpu.MISSING is None and work <= LARGEST_PRODUCT


def run(shape: Shape, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], differentiated: bool):
    """`(y, h_n, c_n)`; c_n is empty where the cell has no c.

    x: `[T, B, I]`, `[B, T, I]` with batch_first, or `[T, I]`. h0, c0: `[L*D, B, H]`, `[L*D, H]` beside `[T, I]`, or
    None for zeros. weights: those of each layer and direction in torch.nn's order. `differentiated`: whether a backward
    may follow.
    """
    if differentiated:
        # Without Function.apply's look at transforms: a transformed call takes the general path.
        return super(Function, Network).apply(shape, x, h0, c0, *weights)
    y, h_n, c_n, _ = torch.ops.fastrnn_c.network_forward(x, h0, c0, weights, *shape, False)
    return y, h_n, c_n


class Network(Function):
    """Arguments: a Shape, x, h0, c0, the weights. Outputs: y, h_n, c_n."""

    @staticmethod
    def forward(ctx, shape, x, h0, c0, *weights):
        y, h_n, c_n, kept = torch.ops.fastrnn_c.network_forward(x, h0, c0, weights, *shape, True)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, kept, *weights)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        x, h0, c0, kept, *weights = ctx.saved_tensors
        shape, given = ctx.shape, (dy, dh_n, dc_n)
        if dy is None and dh_n is None and dc_n is None:
            return (*(None for _ in range(4 + len(weights))),)
        if torch.is_grad_enabled():
            return None, *_differentiable(shape, (x, h0, c0, *weights), given, ctx.needs_input_grad[1:])
        _, needs_dx, needs_h, needs_c, *_ = ctx.needs_input_grad
        dx, dh0, dc0, *of_weights = torch.ops.fastrnn_c.network_backward(
            *given, x, h0, c0, weights, kept, *shape, needs_dx
        )
        return None, dx if needs_dx else None, dh0 if needs_h else None, dc0 if needs_c else None, *of_weights


def _differentiable(shape: Shape, inputs, incoming, needed) -> list[Tensor | None]:
    """The gradients of the inputs as a differentiable function of them: by the general path, run again."""
    from . import functional  # which comes to this module by way of `modules`

    # Each by itself, although one tensor may be two of the inputs.
    own = [t.view_as(t) if need else t for t, need in zip(inputs, needed, strict=True)]
    x, h0, c0, *weights = own
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if shape.bias else ("weight_ih", "weight_hh")
    names = (
        f"{kind}_l{layer}{direction}"
        for layer in range(shape.num_layers)
        for direction in (("", "_reverse") if shape.bidirectional else ("",))
        for kind in kinds
    )
    hx = h0 if c0 is None or h0 is None else (h0, c0)
    options = {"num_layers": shape.num_layers, "bidirectional": shape.bidirectional, "batch_first": shape.batch_first}
    y, hidden = functional.recurrent(shape.cell, x, hx, dict(zip(names, weights, strict=True)), "cpu", **options)
    outputs = (y, *(hidden if isinstance(hidden, tuple) else (hidden,)))
    pairs = [(out, grad) for out, grad in zip(outputs, incoming, strict=False) if grad is not None]
    wanted = [t for t, need in zip(own, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needed]
