"""A call on backend `cpu` as one operation: all layers, directions, products and scans, forward and backward.

It is for short calls, whose products are small, and for all calls where the C++ library's product is the fastest at
hand; for others, the general path multiplies by oneDNN or MKL.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence, invert_permutation

from . import aten
from .aten import KNOWN_CELLS
from .backend_table import Request
from .backends import cpu
from .cell_table import spec_of
from .checks import Call
from .equations import accumulate_dtype
from .linear import MOST_ROWS_IN_PLACE, has_own
from .network_function import NO_BOUNDS, Bounds, Inputs, Shape, run
from .stack import Options

LARGEST_PRODUCT = 1 << 23
"""The most multiplications in one product over all steps that the operation takes where oneDNN and MKL multiply faster
than the C++ library."""


FULL_DTYPES = (torch.float32, torch.float64)


def takes(cell: str, dtype: torch.dtype, rows: int, input_size: int, hidden_size: int, outputs: int) -> bool:
    """Whether the operation is there and has no product that the general path would do faster.

    `rows`: of all steps, T*B, or those of a packed batch. `outputs`: of all directions, D*P.
    """
    widest = max(input_size, outputs)
    work = rows * len(spec_of(cell).gates) * hidden_size * widest
    return cpu.MISSING is None and (work <= LARGEST_PRODUCT or (dtype != torch.float64 and has_own()))


class Extras(NamedTuple):
    """What a call may have beyond a plain one: arguments of a forward, unchecked, and its module's `Watches`."""

    reset_mask: Tensor | None = None
    tap: Tensor | None = None
    watch: Any = None  # None also where it is idle


WITH_LENGTHS = frozenset({"lengths"})


class _Sizes(NamedTuple):
    """Of a call."""

    steps: int
    batch: int
    rows: int  # of all steps
    walks: int  # layers times directions
    unbatched: bool
    turned: bool  # [B, T, I]
    packed: bool


def directly(module: nn.Module, input, hx, chosen: Callable[..., str | None], extras: Extras | None = None):
    """Runs a valid call at once if backend `cpu` is to run it and `takes` it; None for any other.

    Also a packed call that `takes` but that is torch's: `functional` takes as long before it as a short one itself.

    Args:
        module: a fastrnn LSTM, GRU or RNN whose options beyond torch.nn's, but for `backend` and, with extras, those
            that clip, are off.
        input, hx: as of its forward, unchecked.
        chosen: `dispatch.chosen_for_plain`.
        extras: None for a plain call.
    """
    x, batch_sizes, order, back = input if type(input) is PackedSequence else (input, None, None, None)
    if type(x) is not Tensor or not x.is_cpu or _seen_by_others() or (module.dropout and module.training):
        return None
    cell, hidden_size, dtype, shapes = module._cell, module.hidden_size, x.dtype, module._shapes()
    sizes = _sizes_of(module, x, batch_sizes, len(shapes))
    if sizes is None or cell not in KNOWN_CELLS:
        return None
    steps, batch, rows, walks, unbatched, turned, packed = sizes
    proj_size, width_of_h = module.proj_size, module.proj_size or hidden_size
    if not takes(cell, dtype, rows, module.input_size, hidden_size, walks // module.num_layers * width_of_h):
        return None
    weights, pair = _weights_of(module, shapes, dtype), cell == "lstm"
    states = _states_of(hx, pair, (walks,) if unbatched else (walks, batch), width_of_h, hidden_size, dtype)
    if weights is None or states is None:
        return None
    differentiated = torch.is_grad_enabled() and any([t.requires_grad for t in (x, *weights, *states)])
    features, bounds, reset_mask, tap, watch = PLAIN
    if extras is not None:
        checked = _checked(module, extras, sizes, dtype, order, differentiated)
        if checked is None:
            return None
        features, bounds, reset_mask, tap, watch = checked
        differentiated = differentiated or (tap is not None and torch.is_grad_enabled())
    full = float(rows == steps * batch) if packed else None
    name = chosen(module.backend, cell, differentiated, dtype, hidden_size, proj_size, steps, batch, full, features)
    if name != "cpu" and not (name == "aten" and packed and extras is None):
        return None
    # As in torch.nn, a batch-first input is copied, and may be changed before the backward; the output is no view.
    if turned:
        x = x.transpose(0, 1).contiguous()
    if order is not None:
        states = [state.index_select(1, order) for state in states]
    if name == "aten":
        y, h_n, c_n = aten.packed(module, x, batch_sizes, states, weights)
    else:
        shape, call = Shape(cell, module.num_layers, module.bidirectional, module.bias, proj_size > 0, False), None
        if watch is not None:
            call = _call(shape, x, states, checked, input if packed else None, sizes, differentiated)
            call, notes = watch.begin(call)
            tap, states = call.tap, _as_given(states, call.states, unbatched)
        h0, c0 = states if len(states) == 2 else (*states, None) if states else (None, None)
        inputs = Inputs(x, batch_sizes, reset_mask, tap, h0, c0)
        if steps == 1 and not differentiated and extras is None and _reads_in_place(shape, sizes, dtype, weights[1]):
            y, h_n, c_n = _one_step(shape, inputs, weights)
        else:
            y, h_n, c_n = run(shape, inputs, weights, bounds, differentiated)
        if call is not None:
            watch.end(notes, call, y, (h_n, c_n) if pair else (h_n,))
    if turned:
        y.transpose_(0, 1)
    if packed:
        y = PackedSequence(y, batch_sizes, order, back)
    if back is not None:
        h_n, c_n = h_n.index_select(1, back), c_n.index_select(1, back) if pair else c_n
    return y, (h_n, c_n) if pair else h_n


def _sizes_of(module: nn.Module, x: Tensor, batch_sizes: Tensor | None, walks: int) -> _Sizes | None:
    """None where the input has no rows or is not as a plain call needs it."""
    shape, packed = x.shape, batch_sizes is not None
    if len(shape) not in ((2,) if packed else (2, 3)) or shape[-1] != module.input_size:
        return None
    unbatched, turned = len(shape) == 2 and not packed, module.batch_first and len(shape) == 3
    if packed:
        if type(batch_sizes) is not Tensor or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
            return None
        steps, rows = len(batch_sizes), shape[0]
        batch = int(batch_sizes[0]) if rows else 0
    else:
        steps, batch = (shape[0], 1) if unbatched else (shape[1], shape[0]) if turned else shape[:2]
        rows = steps * batch
    return _Sizes(steps, batch, rows, walks, unbatched, turned, packed) if rows else None


LEAST_WEIGHTS = 1 << 16
"""The fewest elements of W_hh for which reading them in place saves more than the Python around it costs."""


def _reads_in_place(shape: Shape, sizes: _Sizes, dtype: torch.dtype, w_hh: Tensor) -> bool:
    """Whether the operation of `step` can run a call of one step without gradients, and is faster than `run`."""
    if sizes.packed or shape.bidirectional or dtype not in FULL_DTYPES:
        return False
    return sizes.batch <= MOST_ROWS_IN_PLACE and w_hh.numel() >= LEAST_WEIGHTS


def _one_step(shape: Shape, inputs: Inputs, weights: list[Tensor]):
    """`run` for a call that `_reads_in_place`."""
    x, states = inputs.x, [inputs.h0, inputs.c0]
    if x.dim() == 2:
        states = [None if state is None else state.unsqueeze(1) for state in states]
    y, *found = torch.ops.fastrnn_c.network_step.default(
        x.reshape(-1, x.shape[-1]), *states, weights, shape.cell, shape.num_layers, shape.bias, shape.projects
    )
    reshaped = torch.ops.aten._unsafe_view
    if x.dim() == 2:
        found = [reshaped(state, (shape.num_layers, -1)) for state in found]
    return reshaped(y, (*x.shape[:-1], -1)), *found, *([] if len(found) == 2 else [y.new_empty(0)])


class _Checked(NamedTuple):
    """The extras of a call, each as the operation takes it, and their names among `dispatch.FEATURES`."""

    features: frozenset[str]
    bounds: Bounds
    reset_mask: Tensor | None
    tap: Tensor | None
    watch: Any


PLAIN = _Checked(frozenset(), NO_BOUNDS, None, None, None)


def _checked(
    module: nn.Module, extras: Extras, sizes: _Sizes, dtype: torch.dtype, order: Tensor | None, differentiated: bool
) -> _Checked | None:
    """None where an extra is not as the operation needs it."""
    reset_mask, tap, watch = extras
    bounds = Bounds(_bound_of(module.clip_state_grad_norm), _bound_of(module.clip_state_grad_value))
    if not all(bound is None or 0 < bound < math.inf for bound in bounds):
        return None
    features = ["clip"] if bounds != NO_BOUNDS else []
    if reset_mask is not None:
        if type(reset_mask) is not Tensor or reset_mask.dtype != torch.bool or not reset_mask.is_cpu or sizes.packed:
            return None
        if sizes.unbatched and reset_mask.dim() == 1:
            reset_mask = reset_mask.unsqueeze(1)
        if sizes.turned and reset_mask.dim() == 2:
            reset_mask = reset_mask.t()
        if reset_mask.shape != (sizes.steps, sizes.batch):
            return None
        reset_mask = reset_mask.clone()  # the user may change it before the backward
        features.append("resets")
    if tap is not None:
        shape = (sizes.walks, 2, len(spec_of(module._cell).states), sizes.steps, sizes.batch)
        kind = type(tap) in (Tensor, Parameter) and tap.is_cpu and tap.dtype == accumulate_dtype(dtype)
        if not kind or tap.shape != shape or not tap.requires_grad:
            return None
        tap = tap if order is None else tap.index_select(-1, order)
    if tap is not None or (watch is not None and differentiated):
        features.append("tap")
    return _Checked(frozenset(features), bounds, reset_mask, tap, watch)


def _bound_of(value) -> float | None:
    """A bound of a module as a number; NaN where it is not one."""
    if type(value) in (Tensor, Parameter) and value.dim() == 0 and value.is_floating_point() and value.is_cpu:
        return value.item()
    if value is None:
        return None
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def _call(
    shape: Shape, x: Tensor, states, checked: _Checked, packed: PackedSequence | None, sizes: _Sizes, gradients: bool
) -> Call:
    """What a monitor is told of a call."""
    if not states:  # the monitor asks for the sizes
        states = [x.new_empty(sizes.walks, sizes.batch, 0)] * len(spec_of(shape.cell).states)
    elif sizes.unbatched:
        states = [state.unsqueeze(1) for state in states]
    bounds, request = checked.bounds, Request(shape.cell, "cpu", x.dtype, 0, gradients=gradients)
    options = Options(*shape[:3], clip_norm=bounds.norm, clip_value=bounds.value)
    return Call(x, tuple(states), options, request, None, checked.reset_mask, checked.tap, packed)


def _as_given(states, watched: tuple[Tensor, ...], unbatched: bool):
    """The states of a call as a monitor gave them back, in the form of `states`."""
    if not states:
        return states
    return [state.squeeze(1) for state in watched] if unbatched else watched


def with_lengths(
    module: nn.Module, input, hx, lengths, chosen: Callable[..., str | None], extras: Extras | None = None
):
    """`directly` for a padded batch with `lengths`: it packs the rows of the input and pads those of the output.

    Of the extras it takes only the bounds. None for other calls: also where a sequence is empty, where `lengths` are
    not to be believed, and in a half type: autocast, which takes the general path, gives the bits of the half module.
    """
    if type(input) is not Tensor or not input.is_cpu or input.dim() != 3 or input.dtype not in FULL_DTYPES:
        return None
    if _seen_by_others() or (extras is not None and any(one is not None for one in extras)):
        return None
    if type(lengths) is not Tensor or not lengths.is_cpu or lengths.dtype not in (torch.int64, torch.int32):
        return None
    batch, steps = input.shape[:2] if module.batch_first else (input.shape[1], input.shape[0])
    if lengths.shape != (batch,) or not batch or module._cell not in KNOWN_CELLS:
        return None
    features = WITH_LENGTHS if extras is None else WITH_LENGTHS | {"clip"}
    sizes = (module.hidden_size, module.proj_size, steps, batch)
    of_call = (torch.is_grad_enabled(), input.dtype, *sizes, None, features)
    if chosen(module.backend, module._cell, *of_call) != "cpu":
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
    result = directly(module, packed, hx, lambda *call: "cpu", extras)
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


def _states_of(hx, pair: bool, stacked: tuple[int, ...], width_of_h: int, hidden_size: int, dtype: torch.dtype):
    """The initial states, none for zeros; None where they are not as a plain call needs them.

    stacked: their first dimensions.
    """
    if hx is None:
        return ()
    states = hx if pair else (hx,)
    if type(states) not in (tuple, list) or len(states) != 1 + pair:
        return None
    for state, width in zip(states, (width_of_h, hidden_size), strict=False):
        if type(state) is not Tensor or state.shape != (*stacked, width) or state.dtype != dtype or not state.is_cpu:
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
