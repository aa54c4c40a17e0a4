"""The whole-network operation of the C++ library as a differentiable function: `run`."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import PackedSequence

from .cell_table import layer_shapes, spec_of, suffixes
from .equations import LN_EPS, accumulate_dtype
from .linear import transformed
from .packing import pack, packed_lengths, packed_positions
from .scan import without_autocast
from .stack import NO_MASKS, Masks, Options
from .stack import run as run_stack


class Shape(NamedTuple):
    """What describes a network beside its tensors: arguments of both ops."""

    cell: str
    num_layers: int
    bidirectional: bool
    bias: bool
    projects: bool
    batch_first: bool


class NormsAndMasks(NamedTuple):
    """The last arguments of both ops, which a plain call leaves out."""

    masks: tuple[Masks, ...] = ()  # of each layer and direction, or none
    ln_eps: float = LN_EPS
    ln_of: str = ""  # the layer norm of the gates, as in Walk of arguments.py, if there is one
    ln_c: str = ""  # that of c: "inside" the tanh or "carried"

    def arguments(self, like: Tensor) -> tuple:
        """As the ops take them: an empty tensor for a mask that does not exist."""
        if self is NO_NORMS_OR_MASKS:
            return ()
        masks = [like.new_empty(0) if one is None else one for each in self.masks for one in each]
        return masks or None, *self[1:]


NO_NORMS_OR_MASKS = NormsAndMasks()


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


def run(
    shape: Shape, inputs: Inputs, weights: list[Tensor], bounds: Bounds, differentiated: bool,
    beyond: NormsAndMasks = NO_NORMS_OR_MASKS,
):  # fmt: skip
    """`(y, h_n, c_n)`; c_n is empty where the cell has no c.

    weights: those of each layer and direction in the order of `cell_table.layer_shapes`. `differentiated`: whether a
    backward may follow.
    """
    if differentiated:
        # Without Function.apply's look at transforms: a transformed call takes the general path.
        return super(Function, Network).apply(shape, bounds, beyond, *inputs, *weights)
    x, batch_sizes, reset_mask, _, h0, c0 = inputs
    y, h_n, c_n, _ = torch.ops.fastrnn_c.network_forward(
        x, batch_sizes, reset_mask, h0, c0, weights, *shape, False, *beyond.arguments(x)
    )
    return y, h_n, c_n


class Roles(NamedTuple):
    """Places among a network's weights: those that a first derivative reads, and the others, which the user may change
    before it: the biases and, without dx, the first W_ih."""

    read: tuple[int, ...]
    unread: tuple[int, ...]


@cache
def _roles(shape: Shape, count: int, needs_dx: bool) -> Roles:
    each = count // (shape.num_layers * (1 + shape.bidirectional))
    first = 0 if needs_dx else each * (1 + shape.bidirectional)
    biases = (2, 3) if shape.bias else ()
    unread = tuple(k for k in range(count) if k % each in biases or (k % each == 0 and k < first))
    return Roles(tuple(k for k in range(count) if k not in unread), unread)


FIRST, COUNT = 3, len(Inputs._fields)
"""Where the inputs are among the arguments of `Network`, and how many there are."""
NO_GRADIENTS = (None,) * FIRST
"""Of the arguments before the inputs."""


class Network(Function):
    """Arguments: a Shape, Bounds, NormsAndMasks, Inputs, the weights. Outputs: y, h_n, c_n."""

    @staticmethod
    def forward(ctx, shape, bounds, beyond, *tensors):
        x, batch_sizes, reset_mask, _, h0, c0 = tensors[:COUNT]
        weights = tensors[COUNT:]
        y, h_n, c_n, kept = torch.ops.fastrnn_c.network_forward(
            x, batch_sizes, reset_mask, h0, c0, weights, *shape, True, *beyond.arguments(x)
        )
        ctx.shape, ctx.bounds = shape, bounds
        ctx.set_materialize_grads(False)
        read, unread = _roles(shape, len(weights), ctx.needs_input_grad[FIRST])
        ctx.unread = [weights[k] for k in unread]
        ctx.versions = _versions(ctx.unread)
        masks = [one for each in beyond.masks for one in each]
        ctx.beyond = beyond._replace(masks=()) if masks else beyond
        ctx.masks = len(masks)
        ctx.save_for_backward(x, batch_sizes, reset_mask, h0, c0, kept, *masks, *[weights[k] for k in read])
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        shape, bounds = ctx.shape, ctx.bounds
        x, batch_sizes, reset_mask, h0, c0, kept, *others = ctx.saved_tensors
        beyond, masks, matrices = ctx.beyond, others[: ctx.masks], others[ctx.masks :]
        if masks:
            each = len(Masks._fields)
            beyond = beyond._replace(masks=tuple(Masks(*masks[k : k + each]) for k in range(0, len(masks), each)))
        needs = Inputs(*ctx.needs_input_grad[FIRST : FIRST + COUNT])
        count = len(matrices) + len(ctx.unread)
        roles = _roles(shape, count, needs.x)
        placed = dict(zip((*roles.read, *roles.unread), (*matrices, *ctx.unread), strict=True))
        weights = [placed[k] for k in range(count)]
        given = (dy, dh_n, dc_n)
        if dy is None and dh_n is None and dc_n is None:
            return (*(None for _ in ctx.needs_input_grad),)
        if torch.is_grad_enabled() or transformed() or any(map(_is_batched, given)):
            if _versions(ctx.unread) != ctx.versions:
                raise RuntimeError("a weight of this call has been modified by an inplace operation")
            inputs = Inputs(x, batch_sizes, reset_mask, None, h0, c0)
            needed = ctx.needs_input_grad[FIRST:]
            return *NO_GRADIENTS, *_differentiable(shape, bounds, beyond, inputs, weights, given, needed)
        dx, dh0, dc0, norms, *of_weights = torch.ops.fastrnn_c.network_backward(
            *given, x, batch_sizes, reset_mask, h0, c0, weights, kept, *shape, *bounds, needs.tap, needs.x,
            *beyond.arguments(x),
        )  # fmt: skip
        gradients = Inputs(
            dx if needs.x else None, None, None, norms if needs.tap else None,
            dh0 if needs.h0 else None, dc0 if needs.c0 else None,
        )  # fmt: skip
        return *NO_GRADIENTS, *gradients, *of_weights


def _versions(tensors: list[Tensor]) -> list[int | None]:
    return [None if one.is_inference() else one._version for one in tensors]


def _is_batched(gradient: Tensor | None) -> bool:
    """By torch.autograd.grad(..., is_grads_batched=True)."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def _differentiable(shape, bounds, beyond, inputs: Inputs, weights, incoming, needed) -> list[Tensor | None]:
    """The gradients of the inputs and the weights by the general path, run again: differentiable, and known to vmap.

    A second backward clips what comes by way of `incoming` apart from the rest.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast("cpu"):
        return _by_general_path(shape, bounds, beyond, inputs, weights, incoming, needed, again)


def _new_tap(shape: Shape, inputs: Inputs) -> Tensor:
    x, sizes = inputs.x, inputs.batch_sizes
    batched = x.dim() == 3
    steps, batch = (len(sizes), int(sizes[0])) if sizes is not None else (x.shape[0], x.shape[1] if batched else 1)
    if batched and shape.batch_first:
        steps, batch = batch, steps
    walks, states = shape.num_layers * (1 + shape.bidirectional), len(spec_of(shape.cell).states)
    return torch.zeros(walks, 2, states, steps, batch, dtype=accumulate_dtype(x.dtype), requires_grad=True)


def _by_general_path(shape, bounds, beyond, inputs, weights, incoming, needed, again: bool) -> list[Tensor | None]:
    if needed[Inputs._fields.index("tap")]:
        inputs = inputs._replace(tap=_new_tap(shape, inputs))
    # Each by itself, although one tensor may be two of the inputs.
    own = [t.view_as(t) if need else t for t, need in zip((*inputs, *weights), needed, strict=True)]
    outputs = _on_stack(shape, bounds, beyond, Inputs(*own[:COUNT]), own[COUNT:])
    pairs = [(out, grad) for out, grad in zip(outputs, incoming, strict=False) if grad is not None]
    wanted = [t for t, need in zip(own, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=again, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needed]


def _on_stack(shape: Shape, bounds: Bounds, beyond: NormsAndMasks, inputs: Inputs, weights) -> list[Tensor]:
    """The outputs of `run` by `stack.run`: one scan for each layer and direction."""
    x, sizes, reset_mask, tap, *states = inputs
    kinds = layer_shapes(shape.cell, 1, 1, int(shape.projects), shape.bias, beyond.ln_of, bool(beyond.ln_c))
    walks = [name for layer in suffixes(shape.num_layers, shape.bidirectional) for name in layer]
    params = dict(zip([f"{kind}_{name}" for name in walks for kind in kinds], weights, strict=True))
    unbatched, turned = x.dim() == 2 and sizes is None, shape.batch_first and x.dim() == 3
    x = x.unsqueeze(1) if unbatched else x.transpose(0, 1) if turned else x
    batch = x.shape[1] if sizes is None else int(sizes[0])
    w_hh = params["weight_hh_l0"]
    widths = (w_hh.shape[1], w_hh.shape[0] // len(spec_of(shape.cell).gates))  # of h and of c
    states = [
        x.new_zeros(len(walks), batch, width) if state is None else state.unsqueeze(1) if unbatched else state
        for state, width in zip(states, widths, strict=True)
    ][: len(spec_of(shape.cell).states)]
    options = Options(
        shape.cell, shape.num_layers, shape.bidirectional, clip_norm=bounds.norm, clip_value=bounds.value,
        layer_norm_eps=beyond.ln_eps, layer_norm=beyond.ln_of or "separate", layer_norm_cell=beyond.ln_c or None,
    )  # fmt: skip
    y, found, _, _ = run_stack(
        x if sizes is None else PackedSequence(x, sizes), tuple(states), params, options,
        lengths=None if sizes is None else packed_lengths(sizes, batch), reset_mask=reset_mask, tap=tap,
        masks=beyond.masks or (NO_MASKS,) * len(walks), keep_c=False, keep_layers=False, backend="cpu",
    )  # fmt: skip
    found = [state.to(x.dtype) for state in found]
    if sizes is not None:
        y = pack(y, sizes, packed_positions(sizes)).data
    elif unbatched:
        y, found = y.squeeze(1), [state.squeeze(1) for state in found]
    return [y.transpose(0, 1) if turned else y, *found]
