"""What a call of the whole-network operation has beyond a plain one: bounds, resets, a tap, a monitor."""

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from .backend_table import Request
from .cell_table import spec_of
from .checks import Call
from .equations import accumulate_dtype
from .network_function import NO_BOUNDS, Bounds, Inputs, Shape, run
from .stack import Options


class Sizes(NamedTuple):
    """The sizes of a call's input, and its form."""

    steps: int
    batch: int
    rows: int  # of all steps
    walks: int  # layers times directions
    unbatched: bool
    turned: bool  # [B, T, I]
    full: float | None  # of packed rows 1 if all sequences have one length, else 0; None of other input

    @property
    def packed(self) -> bool:
        return self.full is not None


class Extras(NamedTuple):
    """What a call may have beyond a plain one: arguments of a forward, unchecked, and its module's `Watches`."""

    reset_mask: Tensor | None = None
    tap: Tensor | None = None
    watch: Any = None  # None also where it is idle


class Checked(NamedTuple):
    """The extras of a call, each as the operation takes it, and their names among `dispatch.FEATURES`."""

    features: frozenset[str]
    bounds: Bounds
    reset_mask: Tensor | None
    tap: Tensor | None
    watch: Any


PLAIN = Checked(frozenset(), NO_BOUNDS, None, None, None)


def check(
    module: nn.Module, extras: Extras, sizes: Sizes, dtype: torch.dtype, order: Tensor | None, differentiated: bool
) -> Checked | None:
    """None where an extra is not as the operation needs it. `differentiated`: the call without its tap."""
    reset_mask, tap, watch = extras
    bounds = Bounds(_bound_of(module.clip_state_grad_norm), _bound_of(module.clip_state_grad_value))
    if not all(bound is None or 0 < bound < math.inf for bound in bounds):
        return None
    features = ["clip"] if bounds != NO_BOUNDS else []
    if reset_mask is not None:
        reset_mask = _checked_mask(reset_mask, sizes)
        if reset_mask is None:
            return None
        features.append("resets")
    if tap is not None:
        shape = (sizes.walks, 2, len(spec_of(module._cell).states), sizes.steps, sizes.batch)
        kind = type(tap) in (Tensor, Parameter) and tap.is_cpu and tap.dtype == accumulate_dtype(dtype)
        if not kind or tap.shape != shape or not tap.requires_grad:
            return None
        tap = tap if order is None else tap.index_select(-1, order)
    if tap is not None or (watch is not None and differentiated):
        features.append("tap")
    return Checked(frozenset(features), bounds, reset_mask, tap, watch)


def _checked_mask(mask, sizes: Sizes) -> Tensor | None:
    """A copy of a reset mask, [T, B], which the user may change before the backward; None where it does not fit."""
    if type(mask) is not Tensor or mask.dtype != torch.bool or not mask.is_cpu or sizes.packed:
        return None
    if sizes.unbatched and mask.dim() == 1:
        mask = mask.unsqueeze(1)
    if sizes.turned and mask.dim() == 2:
        mask = mask.t()
    return mask.clone() if mask.shape == (sizes.steps, sizes.batch) else None


def _bound_of(value) -> float | None:
    """A bound of a module as a number; NaN where it is not one."""
    if type(value) in (Tensor, Parameter) and value.dim() == 0 and value.is_floating_point() and value.is_cpu:
        return value.item()
    if value is None:
        return None
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def watched(
    shape: Shape, inputs: Inputs, weights: list[Tensor], checked: Checked, sizes: Sizes, input, differentiated: bool
):
    """`run` for a call with a monitor, which is told of it. `input`: of the module's forward."""
    states = [state for state in (inputs.h0, inputs.c0) if state is not None]
    count = len(spec_of(shape.cell).states)
    request = _request(shape, weights[1], inputs.x.dtype, checked, sizes, differentiated)
    call = _call(shape, inputs.x, states, checked, input if sizes.packed else None, sizes, request)
    call, notes = checked.watch.begin(call)
    if states:  # a monitor may have put others in their place
        states = [state.squeeze(1) if sizes.unbatched else state for state in call.states]
    inputs = Inputs(inputs.x, inputs.batch_sizes, inputs.reset_mask, call.tap, *states)
    y, *found = run(shape, inputs, weights, checked.bounds, differentiated)
    checked.watch.end(notes, call, y, tuple(found[:count]))
    return y, *found


def _request(
    shape: Shape, w_hh: Tensor, dtype: torch.dtype, checked: Checked, sizes: Sizes, gradients: bool
) -> Request:
    """As of `checks.check`: without the tap that only a monitor asks for."""
    units, P = w_hh.shape[0] // len(spec_of(shape.cell).gates), w_hh.shape[1] if shape.projects else 0
    features = checked.features - {"tap"} if checked.tap is None else checked.features
    features |= {"projection"} if shape.projects else set()
    filled = sizes.rows / (sizes.steps * sizes.batch) if sizes.packed else None
    return Request(shape.cell, "cpu", dtype, units, P, features, sizes.steps, sizes.batch, filled, gradients)


def _call(
    shape: Shape, x: Tensor, states, checked: Checked, packed: PackedSequence | None, sizes: Sizes, request: Request
) -> Call:
    """What a monitor is told of a call."""
    if not states:  # the monitor asks for the sizes
        states = [x.new_empty(sizes.walks, sizes.batch, 0)] * len(spec_of(shape.cell).states)
    elif sizes.unbatched:
        states = [state.unsqueeze(1) for state in states]
    bounds = checked.bounds
    options = Options(*shape[:3], clip_norm=bounds.norm, clip_value=bounds.value)
    return Call(x, tuple(states), options, request, None, checked.reset_mask, checked.tap, packed)
