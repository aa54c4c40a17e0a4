"""A checked call on backend `cpu` by the operation for whole networks: what `network.directly` leaves, such as calls
with masks and layer norms."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from . import network
from .cell_table import CELLS, layer_shapes, suffixes
from .checks import Call
from .equations import accumulate_dtype
from .linear import tracing
from .network_function import NO_NORMS_OR_MASKS, Bounds, Inputs, NormsAndMasks, Shape
from .network_function import run as run_operation
from .stack import Masks, Options, draw_masks, to_next_layer

KINDS = tuple(layer_shapes("lstm", 1, 1, 1, True, True))
"""The kinds of a network's parameters, in the order of the operation."""


def run(call: Call, params: Mapping[str, Tensor], keep_layers: bool):
    """The output, `[T, B, D*P]` or packed rows, the final states, and the outputs of the layers below the last one, or
    None; None alone where the general path is to run the call."""
    if tracing() or not _is_for_the_operation(call, params) or network.operations_are_seen():
        return None
    options, shape, given, rows = call.options, call.x.shape, call, None
    if call.lengths is not None:
        rows = network.Rows.of(call.lengths, shape[0], False)
        if rows is None:
            return None
        call = _of_rows(call, rows)
    elif call.packed is None:
        # As in torch.nn, a batch-first input may change before the backward.
        call = call._replace(x=call.x.contiguous())
    # Whether something is between the layers.
    between = keep_layers or options.residual or (options.dropout > 0 and options.training)
    apart = options.num_layers > 1 and between
    y, states, below = call.x, [], []  # of the layer before, of all layers, of those below the last one
    for first in range(options.num_layers) if apart else (0,):
        before = None  # what `residual` adds
        if first > 0:
            below.append(y.clone() if keep_layers else None)
            y, before = to_next_layer(y, None, None, options)
        y, *found = _layers(call, params, y, first, 1 if apart else options.num_layers, given, rows)
        if options.residual and before is not None:
            y = y + before
        states.append(found)
    final = tuple(each[0] if len(each) == 1 else torch.cat(each) for each in zip(*states, strict=True))
    if rows is not None:
        y, final = rows.put_into(y, shape), tuple(state.index_select(1, rows.back) for state in final)
        below = [rows.put_into(one, shape) for one in below] if keep_layers else below
    return y, final, tuple(below) if keep_layers else None


def _of_rows(call: Call, rows: network.Rows) -> Call:
    """A call with lengths as one of packed rows."""
    x, states = rows.taken_from(call.x), tuple(state.index_select(1, rows.order) for state in call.states)
    tap = call.tap
    if tap is not None:
        tap = tap[..., : len(rows.batch_sizes), :].index_select(-1, rows.order)
    return call._replace(x=x, states=states, lengths=None, tap=tap, packed=PackedSequence(x, rows.batch_sizes))


def _is_for_the_operation(call: Call, params: Mapping[str, Tensor]) -> bool:
    """Whether the operation has all that the call needs, and is to be preferred."""
    options, x, sizes = call.options, call.x, None if call.packed is None else call.packed.batch_sizes
    by_rows = sizes is not None or call.lengths is not None
    if options.cell not in CELLS or call.decay is not None:
        return False
    drops = options.num_layers > 1 and options.dropout > 0 and options.training
    if by_rows and (call.reset_mask is not None or (options.locked_dropout and drops)):
        return False
    # Masks between the layers are drawn for the padded batch. A half type: see `network.with_lengths`.
    if call.lengths is not None and (drops or x.dtype not in network.FULL_DTYPES):
        return False
    if options.recurrent_dropout_per_gate and options.recurrent_dropout and options.training:
        return False
    w_hh = params["weight_hh_l0"]
    if w_hh.dim() != 2 or ("weight_hr_l0" in params and (_draws_masks(options) or "ln_hh_l0" in params)):
        return False
    tensors = (x, *call.states, *params.values(), call.reset_mask, call.tap)
    if not all(type(t) in (Tensor, Parameter) and t.is_cpu and t.numel() > 0 for t in tensors if t is not None):
        return False
    rows, outputs = x.shape[:-1].numel(), w_hh.shape[1] * (1 + options.bidirectional)
    return network.takes(options.cell, x.dtype, rows, x.shape[-1], call.states[-1].shape[-1], outputs)


def _draws_masks(options: Options) -> bool:
    """Whether a call has masks: also in evaluation, where zoneout's are expectations."""
    return any(options.zoneout) or (options.recurrent_dropout > 0 and options.training)


def _layers(
    call: Call, params: Mapping[str, Tensor], x: Tensor, first: int, count: int, given: Call, rows: network.Rows | None
) -> list[Tensor]:
    """`count` layers from the first one on in one operation: the output and the final states.

    x: the input of the first one. given: the call before `_of_rows`, for which the masks are drawn.
    """
    options, sizes = call.options, None if call.packed is None else call.packed.batch_sizes
    names = [name for layer in suffixes(options.num_layers, options.bidirectional) for name in layer]
    walks = slice(first * (1 + options.bidirectional), (first + count) * (1 + options.bidirectional))
    names, states = names[walks], [state[walks] for state in call.states]
    tap = None if call.tap is None else call.tap[walks]
    kinds = [kind for kind in KINDS if f"{kind}_l0" in params]
    weights = [params[f"{kind}_{name}"] for name in names for kind in kinds]
    beyond, masks = NO_NORMS_OR_MASKS, ()
    if _draws_masks(options):
        h0, *others = (state[walks] for state in given.states)
        steps = (given.x if given.packed is None else given.packed.batch_sizes).shape[0]
        acc = accumulate_dtype(x.dtype)
        of_walks = zip(h0, *[c.to(acc) for c in others], strict=True)
        masks = tuple(draw_masks(options, steps, *states_of_walk) for states_of_walk in of_walks)
        if rows is not None:
            masks = tuple(_in_order(one, rows) for one in masks)
    if masks or "ln_hh" in kinds:
        norm_of = options.layer_norm if "ln_hh" in kinds else ""
        norm_of_c = options.layer_norm_cell if "ln_c" in kinds else ""
        beyond = NormsAndMasks(masks, options.layer_norm_eps, norm_of, norm_of_c)
    shape = Shape(options.cell, count, options.bidirectional, "bias_ih" in kinds, "weight_hr" in kinds, False)
    bounds = Bounds(_number(options.clip_norm), _number(options.clip_value))
    # The user may change the mask before the backward.
    inputs = Inputs(x, sizes, None if call.reset_mask is None else call.reset_mask.clone(), tap, *states)
    tensors = (x, tap, *states, *weights)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    found = run_operation(shape, inputs, weights, bounds, differentiated, beyond)
    return found[: 1 + len(states)]


def _in_order(masks: Masks, rows: network.Rows) -> Masks:
    """Masks of a padded batch for its packed rows."""
    recurrent, *zones = masks
    zones = [None if one is None else one[: len(rows.batch_sizes)].index_select(1, rows.order) for one in zones]
    return Masks(None if recurrent is None else recurrent.index_select(0, rows.order), *zones)


def _number(bound: float | Tensor | None) -> float | None:
    return bound.item() if isinstance(bound, Tensor) else bound
