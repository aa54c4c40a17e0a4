"""A plain call on backend `cpu` as one operation: all layers, directions, products and scans, forward and backward.

It is for short calls, whose products are small, and for all calls where the C++ library's product is the fastest at
hand; for others, the general path multiplies by oneDNN or MKL.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence, invert_permutation

from . import aten
from .aten import KNOWN_CELLS
from .backends import cpu
from .cell_table import spec_of
from .linear import has_own, transformed
from .scan import without_autocast

LARGEST_PRODUCT = 1 << 23
"""The most multiplications in one product over all steps that the operation takes where oneDNN and MKL multiply faster
than the C++ library."""


FULL_DTYPES = (torch.float32, torch.float64)


class Shape(NamedTuple):
    """What describes a network beside its tensors: the last arguments of both ops."""

    cell: str
    num_layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool


def takes(cell: str, dtype: torch.dtype, rows: int, input_size: int, hidden_size: int, directions: int) -> bool:
    """Whether the operation is there and has no product that the general path would do faster.

    `rows`: of all steps, T*B, or those of a packed batch.
    """
    widest = max(input_size, directions * hidden_size)
    work = rows * len(spec_of(cell).gates) * hidden_size * widest
    return cpu.MISSING is None and (work <= LARGEST_PRODUCT or (dtype != torch.float64 and has_own()))


def run(shape: Shape, x: Tensor, batch_sizes: Tensor | None, h0, c0, weights: list[Tensor], differentiated: bool):
    """`(y, h_n, c_n)`; c_n is empty where the cell has no c.

    x: `[T, B, I]`, `[B, T, I]` with batch_first, `[T, I]`, or with `batch_sizes [T]` packed rows `[rows, I]`. h0, c0:
    `[L*D, B, H]`, `[L*D, H]` beside `[T, I]`, or None for zeros. weights: those of each layer and direction in
    torch.nn's order. `differentiated`: whether a backward may follow.
    """
    if differentiated:
        # Without Function.apply's look at transforms: a transformed call takes the general path.
        return super(Function, Network).apply(shape, x, batch_sizes, h0, c0, *weights)
    y, h_n, c_n, _ = torch.ops.fastrnn_c.network_forward(x, batch_sizes, h0, c0, weights, *shape, False)
    return y, h_n, c_n


def directly(module: nn.Module, input, hx, chosen: Callable[..., str | None]):
    """Runs a valid plain call at once if backend `cpu` is to run it and `takes` it; None for any other.

    Also a packed call that `takes` but that is torch's: `functional` takes as long before it as a short one itself.

    Args:
        module: a fastrnn LSTM, GRU or RNN whose extras, but for `backend`, are off.
        input, hx: as of its forward, unchecked.
        chosen: `dispatch.chosen_for_plain`.
    """
    x, batch_sizes, order, back = input if type(input) is PackedSequence else (input, None, None, None)
    if type(x) is not Tensor or not x.is_cpu or _seen_by_others() or (module.dropout and module.training):
        return None
    packed, cell, sizes = batch_sizes is not None, module._cell, x.shape
    pair, batched, full = cell == "lstm", len(sizes) == 3 or packed, None
    if len(sizes) not in ((2,) if packed else (2, 3)) or module.proj_size or cell not in KNOWN_CELLS:
        return None
    turned, hidden_size, dtype = module.batch_first and len(sizes) == 3, module.hidden_size, x.dtype
    if packed:
        if type(batch_sizes) is not Tensor or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
            return None
        steps, rows = len(batch_sizes), sizes[0]
        batch = int(batch_sizes[0]) if rows else 0
        full = float(rows == steps * batch)
    else:
        steps, batch = (sizes[0], 1) if not batched else (sizes[1], sizes[0]) if turned else sizes[:2]
        rows = steps * batch
    shapes = module._shapes()
    if not rows or sizes[-1] != module.input_size:
        return None
    if not takes(cell, dtype, rows, module.input_size, hidden_size, len(shapes) // module.num_layers):
        return None
    weights = _weights_of(module, shapes, dtype)
    states = _states_of(hx, pair, (len(shapes), batch, hidden_size) if batched else (len(shapes), hidden_size), dtype)
    if weights is None or states is None:
        return None
    differentiated = torch.is_grad_enabled() and any([t.requires_grad for t in (x, *weights, *states)])
    name = chosen(module.backend, cell, differentiated, dtype, hidden_size, steps, batch, full)
    if name != "cpu" and not (name == "aten" and packed):
        return None
    # As in torch.nn, a batch-first input is copied, and may be changed before the backward; the output is no view.
    shape = Shape(cell, module.num_layers, module.bidirectional, module.bias, False)
    if turned:
        x = x.transpose(0, 1).contiguous()
    if order is not None:
        states = [state.index_select(1, order) for state in states]
    if name == "aten":
        y, h_n, c_n = aten.packed(module, x, batch_sizes, states, weights)
    else:
        h0, c0 = states if len(states) == 2 else (*states, None) if states else (None, None)
        y, h_n, c_n = run(shape, x, batch_sizes, h0, c0, weights, differentiated)
    if turned:
        y.transpose_(0, 1)
    if packed:
        y = PackedSequence(y, batch_sizes, order, back)
    if back is not None:
        h_n, c_n = h_n.index_select(1, back), c_n.index_select(1, back) if pair else c_n
    return y, (h_n, c_n) if pair else h_n


def with_lengths(module: nn.Module, input, hx, lengths, chosen: Callable[..., str | None]):
    """`directly` for a padded batch with `lengths`: it packs the rows of the input and pads those of the output.

    None for other calls: also where a sequence is empty, where `lengths` are not to be believed, and in a half type:
    autocast, which takes the general path, gives the bits of the half module.
    """
    if type(input) is not Tensor or not input.is_cpu or input.dim() != 3 or input.dtype not in FULL_DTYPES:
        return None
    if _seen_by_others():
        return None
    if type(lengths) is not Tensor or not lengths.is_cpu or lengths.dtype not in (torch.int64, torch.int32):
        return None
    batch, steps = input.shape[:2] if module.batch_first else (input.shape[1], input.shape[0])
    if lengths.shape != (batch,) or not batch or module._cell not in KNOWN_CELLS:
        return None
    gradients, hidden_size = torch.is_grad_enabled(), module.hidden_size
    if chosen(module.backend, module._cell, gradients, input.dtype, hidden_size, steps, batch, None, True) != "cpu":
        return None
    ordered, order = lengths.long().sort(descending=True, stable=True)
    longest, shortest = int(ordered[0]), int(ordered[-1])
    if shortest < 1 or longest > steps:
        return None
    step = torch.arange(longest).unsqueeze(1)
    runs = step < ordered  # [T, B]
    places = (order * steps + step if module.batch_first else step * batch + order)[runs]
    rows = input.reshape(batch * steps, input.shape[2]).index_select(0, places)
    packed = PackedSequence(rows, runs.sum(1), order, invert_permutation(order))
    result = directly(module, packed, hx, lambda *call: "cpu")
    if result is None:
        return None
    y, state = result
    padded = y.data.new_zeros(batch * steps, y.data.shape[1]).index_copy_(0, places, y.data)
    # No view, as nowhere else.
    return torch.ops.aten._unsafe_view(padded, (*input.shape[:2], -1)), state


def _weights_of(module: nn.Module, shapes, dtype: torch.dtype) -> list[Parameter] | None:
    """A network's parameters; None where one is not as a plain call needs it."""
    weights, stored = [], module._parameters
    for layer in shapes:
        for name, shape in layer:
            weight = stored.get(name)  # a weight that is computed at every call is no parameter
            if type(weight) is not Parameter or weight.shape != shape or weight.dtype != dtype or not weight.is_cpu:
                return None
            weights.append(weight)
    return weights


def _states_of(hx, pair: bool, shape: tuple[int, ...], dtype: torch.dtype):
    """The initial states, none for zeros; None where they are not as a plain call needs them."""
    if hx is None:
        return ()
    states = hx if pair else (hx,)
    if type(states) not in (tuple, list) or len(states) != 1 + pair:
        return None
    for state in states:
        if type(state) is not Tensor or state.shape != shape or state.dtype != dtype or not state.is_cpu:
            return None
    return states


def step(module: nn.Module, x: Tensor, state, chosen: Callable[..., str | None]):
    """`(y, state)` of `module.step` by one operation; None where another way is to run it, or to refuse it.

    The operation reads the parameters where they are, and checks all shapes and dtypes: what does not fit, the module's
    call refuses in its own words. Every other error is raised.

    Args:
        module: a fastrnn LSTM, GRU or RNN of one direction whose extras, but for `backend`, are off.
        x: `[B, I]`.
        state: as of the module's call, unchecked.
        chosen: `dispatch.chosen_for_step`.
    """
    cell, dtype = module._cell, x.dtype
    if type(x) is not Tensor or not x.is_cpu or dtype not in FULL_DTYPES or cell not in KNOWN_CELLS:
        return None
    if cpu.MISSING is not None or _seen_by_others() or (module.dropout and module.training):
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    pair, weights, stored = cell == "lstm", [], module._parameters
    for names in module.all_names:
        for name in names:
            weight = stored.get(name)  # a weight that is computed at every call is no parameter
            if type(weight) is not Parameter:
                return None
            weights.append(weight)
    states = () if state is None else state if pair else (state,)
    if type(states) not in (tuple, list) or any(type(one) is not Tensor for one in states):
        return None
    if len(states) not in (0, 1 + pair):
        return None
    if chosen(module.backend, cell, dtype, module.hidden_size, module.proj_size, x.shape[0]) != "cpu":
        return None
    h, c = states if len(states) == 2 else (*states, None) if states else (None, None)
    try:
        y, *states = torch.ops.fastrnn_c.network_step.default(
            x, h, c, weights, cell, module.num_layers, module.bias, module.proj_size > 0
        )
    except RuntimeError:
        if _fits(module, x, (h, c), weights):
            raise
        return None
    return y, tuple(states) if pair else states[0]


def _fits(module: nn.Module, x: Tensor, states: tuple[Tensor | None, ...], weights: list[Parameter]) -> bool:
    """Whether the tensors of a step have the sizes of the module, and one dtype and device."""
    H, P, given = module.hidden_size, module.proj_size or module.hidden_size, [s for s in states if s is not None]
    stacked = (module.num_layers, x.shape[0])
    shapes = [shape for row in module._shapes() for _, shape in row]
    return (
        x.shape[1] == module.input_size
        and all(s.shape == (*stacked, size) for s, size in zip(given, (P, H), strict=False))
        and all(weight.shape == shape for weight, shape in zip(weights, shapes, strict=True))
        and all(one.dtype == x.dtype and one.device == x.device for one in (*given, *weights))
    )


def _seen_by_others() -> bool:
    """Whether autocast, forward mode or what sees every operation or every saved tensor is on: the general path knows
    these, and saves the same tensors when a checkpoint recomputes a call, with a monitor or without one."""
    return (
        torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


class Roles(NamedTuple):
    """Places among a network's weights: those that a first derivative reads, and the others, which the user may change
    before it: the biases and, without dx, the first W_ih."""

    read: tuple[int, ...]
    unread: tuple[int, ...]


@cache
def _roles(count: int, bidirectional: bool, bias: bool, needs_dx: bool) -> Roles:
    each = 4 if bias else 2
    first = 0 if needs_dx else each * (1 + bidirectional)
    unread = tuple(k for k in range(count) if k % each in (2, 3) or (k % each == 0 and k < first))
    return Roles(tuple(k for k in range(count) if k not in unread), unread)


class Network(Function):
    """Arguments: a Shape, x, batch_sizes, h0, c0, the weights. Outputs: y, h_n, c_n."""

    @staticmethod
    def forward(ctx, shape, x, batch_sizes, h0, c0, *weights):
        y, h_n, c_n, kept = torch.ops.fastrnn_c.network_forward(x, batch_sizes, h0, c0, weights, *shape, True)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        read, unread = _roles(len(weights), shape.bidirectional, shape.bias, ctx.needs_input_grad[1])
        ctx.unread = [weights[k] for k in unread]
        ctx.versions = [one._version for one in ctx.unread]
        ctx.save_for_backward(x, batch_sizes, h0, c0, kept, *[weights[k] for k in read])
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n):
        shape = ctx.shape
        x, batch_sizes, h0, c0, kept, *matrices = ctx.saved_tensors
        count = len(matrices) + len(ctx.unread)
        roles = _roles(count, shape.bidirectional, shape.bias, ctx.needs_input_grad[1])
        placed = dict(zip((*roles.read, *roles.unread), (*matrices, *ctx.unread), strict=True))
        weights = [placed[k] for k in range(count)]
        given = (dy, dh_n, dc_n)
        if dy is None and dh_n is None and dc_n is None:
            return (*(None for _ in range(5 + len(weights))),)
        if torch.is_grad_enabled() or transformed() or any(map(_is_batched, given)):
            if [one._version for one in ctx.unread] != ctx.versions:
                raise RuntimeError("a weight of this call has been modified by an inplace operation")
            _, needs_dx, _, *needs = ctx.needs_input_grad
            inputs = (x, h0, c0, *weights)
            dx, *others = _differentiable(shape, inputs, batch_sizes, given, (needs_dx, *needs))
            return None, dx, None, *others
        _, needs_dx, _, needs_h, needs_c, *_ = ctx.needs_input_grad
        dx, dh0, dc0, *of_weights = torch.ops.fastrnn_c.network_backward(
            *given, x, batch_sizes, h0, c0, weights, kept, *shape, needs_dx
        )
        return None, dx if needs_dx else None, None, dh0 if needs_h else None, dc0 if needs_c else None, *of_weights


def _is_batched(gradient: Tensor | None) -> bool:
    """By torch.autograd.grad(..., is_grads_batched=True)."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def _differentiable(shape: Shape, inputs, batch_sizes, incoming, needed) -> list[Tensor | None]:
    """The gradients of the inputs by the general path, run again: differentiable, and known to vmap."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast("cpu"):
        return _by_general_path(shape, inputs, batch_sizes, incoming, needed, again)


def _by_general_path(shape: Shape, inputs, batch_sizes, incoming, needed, again: bool) -> list[Tensor | None]:
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
    x = x if batch_sizes is None else PackedSequence(x, batch_sizes)
    y, hidden = functional.recurrent(shape.cell, x, hx, dict(zip(names, weights, strict=True)), "cpu", **options)
    outputs = (y if batch_sizes is None else y.data, *(hidden if isinstance(hidden, tuple) else (hidden,)))
    pairs = [(out, grad) for out, grad in zip(outputs, incoming, strict=False) if grad is not None]
    wanted = [t for t, need in zip(own, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=again, allow_unused=True
        )
    )
    return [next(found) if need else None for need in needed]
