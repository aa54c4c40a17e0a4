"""A module's call on backend `cpu` as one operation: all layers, directions, products and scans, forward and backward.

`directly` takes plain calls, and those with clipping, resets, a tap or a monitor, without the general check of a call;
`network_call.py` takes checked ones, with masks and layer norms too.

The operation is for short calls, whose products are small, and for all calls on processors where it was measured to be
faster than the general path, which multiplies by oneDNN or MKL (`takes_long_calls`).
"""

from collections.abc import Callable
from functools import cache
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _top_saved_tensors_default_hooks as _top_hooks
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence, invert_permutation

from . import aten
from .aten import KNOWN_CELLS
from .backends import cpu
from .cell_table import network_shapes, spec_of
from .linear import MOST_ROWS_IN_PLACE, ONEDNN
from .network_extras import PLAIN, Checked, Extras, Sizes, check, watched
from .network_function import Inputs, Shape, run

LARGEST_PRODUCT = 1 << 23
"""The most multiplications in one product over all steps that the operation takes where oneDNN and MKL multiply faster
than the C++ library."""


_STEPS = {}
"""The operation of one step, by cell: each has its own, since one more argument takes a fiftieth of a small step."""
if cpu.MISSING is None:
    _library = torch.library.Library("fastrnn_c", "IMPL")
    for _cell in KNOWN_CELLS:
        # It has no gradient, and its callers want none: autograd need not look at its arguments.
        _library.impl(f"{_cell}_step", torch.library.fallthrough_kernel, "AutogradCPU")
        _STEPS[_cell] = getattr(torch.ops.fastrnn_c, f"{_cell}_step").default._op  # what its __call__ calls

FULL_DTYPES = (torch.float32, torch.float64)


@cache
def takes_long_calls() -> bool:
    """Whether the operation is the fastest in long calls, too: on AMD's processors with AVX2, and with AVX-512."""
    return ONEDNN and cpu.MISSING is None and torch.ops.fastrnn_c.prefers_network()


def takes(cell: str, dtype: torch.dtype, rows: int, input_size: int, hidden_size: int, outputs: int) -> bool:
    """Whether the operation is there and has no product that the general path would do faster.

    `rows`: of all steps, T*B, or those of a packed batch. `outputs`: of all directions, D*P.
    """
    widest = max(input_size, outputs)
    work = rows * len(spec_of(cell).gates) * hidden_size * widest
    return cpu.MISSING is None and (work <= LARGEST_PRODUCT or (dtype != torch.float64 and takes_long_calls()))


WITH_LENGTHS = frozenset({"lengths"})

# One look into a module's dictionary: to get an attribute of a module takes several times as long.
_settings_of = itemgetter(
    "_parameters", "backend", "input_size", "hidden_size", "proj_size", "num_layers", "bidirectional", "bias",
    "batch_first", "dropout", "training",
)  # fmt: skip


def directly(module: nn.Module, input, hx, chosen: Callable[..., str | None], extras: Extras | None = None):
    """Runs a valid call at once if backend `cpu` is to run it and `takes` it; None for any other.

    Also a call that `takes` but that is torch's: `functional` takes as long before it as a short one itself.

    Args:
        module: a fastrnn LSTM, GRU or RNN whose options beyond torch.nn's, but for `backend` and, with extras, those
            that clip, are off.
        input, hx: as of its forward, unchecked.
        chosen: `dispatch.chosen_for_plain`.
        extras: None for a plain call.
    """
    try:
        stored, backend, input_size, H, proj_size, layers, both, bias, turned, dropout, training = _settings_of(
            module.__dict__
        )
    except KeyError:  # a subclass has one of them as a property
        return None
    x, batch_sizes, order, _ = input if type(input) is PackedSequence else (input, None, None, None)
    if type(x) is not Tensor or not x.is_cpu or _seen_by_others() or (dropout and training):
        return None
    cell, dtype, P, directions = module._cell, x.dtype, proj_size or H, 2 if both else 1
    sizes = _sizes_of(x, batch_sizes, input_size, layers * directions, turned)
    if sizes is None or cell not in KNOWN_CELLS or not takes(cell, dtype, sizes.rows, input_size, H, directions * P):
        return None
    weights = _weights_of(stored, network_shapes(cell, input_size, H, proj_size, bias, False, layers, both), dtype)
    states = _states_of(cell, hx, sizes, P, H, dtype)
    if weights is None or states is None:
        return None
    differentiated = torch.is_grad_enabled() and any([t.requires_grad for t in (x, *weights, *states)])
    checked = PLAIN if extras is None else check(module, extras, sizes, dtype, order, differentiated)
    if checked is None:
        return None
    if checked.tap is not None:
        differentiated = torch.is_grad_enabled()
    of_sizes = (H, proj_size, sizes.steps, sizes.batch, sizes.full)
    name = chosen(backend, cell, differentiated, dtype, *of_sizes, checked.features)
    if name != "cpu" and not (name == "aten" and extras is None):
        return None
    if name == "aten" and batch_sizes is None:
        if aten.refused_by_onednn(cell, x, proj_size, False):
            return None
        if sizes.unbatched:
            x, states = x.unsqueeze(0 if turned else 1), [state.unsqueeze(1) for state in states]
        return aten.padded(module, x, states, weights, not sizes.unbatched)
    # As in torch.nn, a batch-first input is copied, and may be changed before the backward; the output is no view.
    if sizes.turned:
        x = x.transpose(0, 1).contiguous()
    if order is not None:
        states = [state.index_select(1, order) for state in states]
    if name == "aten":
        results = aten.packed(module, x, batch_sizes, states, weights)
    else:
        shape = Shape(cell, layers, both, bias, proj_size > 0, False)
        inputs = Inputs(x, batch_sizes, checked.reset_mask, checked.tap, *states)
        results = _by_operation(shape, inputs, weights, checked, sizes, input, differentiated)
    if sizes.turned:
        results[0].transpose_(0, 1)
    y, h_n, c_n = results if batch_sizes is None else _packed_as(input, *results)
    return y, (h_n, c_n) if cell == "lstm" else h_n


def _sizes_of(x: Tensor, batch_sizes: Tensor | None, input_size: int, walks: int, batch_first: bool) -> Sizes | None:
    """None where the input has no rows or is not as a plain call needs it."""
    shape = x.shape
    if batch_sizes is not None:
        return _sizes_of_packed(shape, batch_sizes, input_size, walks)
    if len(shape) not in (2, 3) or shape[-1] != input_size:
        return None
    unbatched = len(shape) == 2
    turned = batch_first and not unbatched
    steps, batch = (shape[0], 1) if unbatched else (shape[1], shape[0]) if turned else shape[:2]
    rows = steps * batch
    return Sizes(steps, batch, rows, walks, unbatched, turned, None) if rows else None


def _sizes_of_packed(shape: torch.Size, batch_sizes, input_size: int, walks: int) -> Sizes | None:
    if len(shape) != 2 or shape[1] != input_size or not shape[0]:
        return None
    if type(batch_sizes) is not Tensor or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
        return None
    steps, batch, rows = len(batch_sizes), int(batch_sizes[0]), shape[0]
    return Sizes(steps, batch, rows, walks, False, False, float(rows == steps * batch))


def _by_operation(
    shape: Shape, inputs: Inputs, weights: list[Tensor], checked: Checked, sizes: Sizes, input, differentiated: bool
):
    """The results in the order of the rows, [T, B, D*P] and final states; c_n is empty where the cell has no c."""
    if checked.watch is not None:
        return watched(shape, inputs, weights, checked, sizes, input, differentiated)
    if sizes.steps == 1 and not differentiated and checked is PLAIN and _reads_in_place(shape, sizes, weights):
        return _one_step(shape, inputs, weights)
    return run(shape, inputs, weights, checked.bounds, differentiated)


def _packed_as(input: PackedSequence, y: Tensor, h_n: Tensor, c_n: Tensor | None):
    """The results of packed rows as torch.nn returns them: the sequences in the user's order."""
    back = input.unsorted_indices
    if back is not None:
        h_n = h_n.index_select(1, back)
        c_n = c_n.index_select(1, back) if c_n is not None and c_n.dim() == 3 else c_n
    return PackedSequence(y, *input[1:]), h_n, c_n


FEW_ROWS = 4
LEAST_WEIGHTS = 1 << 16
"""More sequences than FEW_ROWS read the weights in place only where W_hh has at least LEAST_WEIGHTS elements. The
product of many rows is faster with a packed matrix, and a small matrix is packed fast."""


def _reads_in_place(shape: Shape, sizes: Sizes, weights: list[Tensor]) -> bool:
    """Whether the operation of `step` can run a call of one step without gradients, and is faster than `run`."""
    w_hh = weights[1]
    if sizes.full is not None or shape.bidirectional or w_hh.dtype not in FULL_DTYPES:
        return False
    return sizes.batch <= FEW_ROWS or (sizes.batch <= MOST_ROWS_IN_PLACE and w_hh.numel() >= LEAST_WEIGHTS)


def _one_step(shape: Shape, inputs: Inputs, weights: list[Tensor]):
    """`run` for a call that `_reads_in_place`."""
    x, states = inputs.x, [inputs.h0, inputs.c0]
    if x.dim() == 2:
        states = [None if state is None else state.unsqueeze(1) for state in states]
    states = states if shape.cell == "lstm" else states[:1]
    y, *found = _STEPS[shape.cell](x.reshape(-1, x.shape[-1]), *states, weights)
    reshaped = torch.ops.aten._unsafe_view
    if x.dim() == 2:
        found = [reshaped(state, (shape.num_layers, -1)) for state in found]
    return reshaped(y, (*x.shape[:-1], -1)), *found, *([] if len(found) == 2 else [y.new_empty(0)])


class Rows(NamedTuple):
    """Where the rows of packed sequences are in a padded batch."""

    places: Tensor  # [rows]: the numbers of the rows
    batch_sizes: Tensor  # [longest]
    order: Tensor  # [B]: of the sequences, the longest first
    back: Tensor  # [B]: the inverse of it

    @staticmethod
    def of(lengths: Tensor, steps: int, batch_first: bool) -> "Rows | None":
        """None where a sequence is empty, or longer than there are steps."""
        ordered, order = lengths.long().sort(descending=True, stable=True)
        longest, shortest = int(ordered[0]), int(ordered[-1])
        if shortest < 1 or longest > steps:
            return None
        step = torch.arange(longest).unsqueeze(1)
        runs = step < ordered  # [T, B]
        places = (order * steps + step if batch_first else step * len(lengths) + order)[runs]
        return Rows(places, runs.sum(1), order, invert_permutation(order))

    def taken_from(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[2]).index_select(0, self.places)

    def put_into(self, y: Tensor, shape: torch.Size) -> Tensor:
        """y `[rows, N]` as a padded batch, with the first two sizes of `shape`; no view, as no result is one."""
        padded = y.new_zeros(shape[0] * shape[1], y.shape[1]).index_copy_(0, self.places, y)
        return torch.ops.aten._unsafe_view(padded, (*shape[:2], -1))


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
    rows = Rows.of(lengths, steps, module.batch_first)
    if rows is None:
        return None
    packed = PackedSequence(rows.taken_from(input), *rows[1:4])
    result = directly(module, packed, hx, lambda *call: "cpu", extras)
    if result is None:
        return None
    y, state = result
    return rows.put_into(y.data, input.shape), state


def _weights_of(stored: dict[str, Parameter], shapes, dtype: torch.dtype) -> list[Parameter] | None:
    """A network's parameters; None where one is not as a plain call needs it."""
    weights = []
    for layer in shapes:
        for name, shape in layer:
            weight = stored.get(name)  # a weight that is computed at every call is no parameter
            if type(weight) is not Parameter or weight.shape != shape or weight.dtype != dtype or not weight.is_cpu:
                return None
            weights.append(weight)
    return weights


def _states_of(cell: str, hx, sizes: Sizes, P: int, H: int, dtype: torch.dtype):
    """The initial states, none for zeros; None where they are not as a plain call needs them."""
    if hx is None:
        return ()
    pair = cell == "lstm"
    states = hx if pair else (hx,)
    if type(states) not in (tuple, list) or len(states) != 1 + pair:
        return None
    shape = (sizes.walks, P) if sizes.unbatched else (sizes.walks, sizes.batch, P)
    for state in states:
        if type(state) is not Tensor or state.shape != shape or state.dtype != dtype or not state.is_cpu:
            return None
        if P != H:
            shape = (*shape[:-1], H)  # of c
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
    try:
        settings = _settings_of_step(module.__dict__)
    except KeyError:  # a subclass has one of them as a property
        return None
    stored, all_names, hooks, hooks_before, dropout, training, backend, hidden_size, proj_size = settings
    cell, dtype = module._cell, x.dtype
    operation = _STEPS.get(cell)
    if operation is None or type(x) is not Tensor or not x.is_cpu or dtype not in FULL_DTYPES:
        return None
    if operations_are_seen() or hooks or hooks_before or (dropout and training):
        return None
    weights = [stored.get(name) for names in all_names for name in names]
    for weight in weights:
        if type(weight) is not Parameter:  # a weight that is computed at every call is none
            return None
    pair = cell == "lstm"
    states = state if pair and state is not None else (state,) * (1 + pair)
    if type(states) not in (tuple, list) or len(states) != 1 + pair:
        return None
    for one in states:
        if type(one) is not Tensor and state is not None:
            return None
    if chosen(backend, cell, dtype, hidden_size, proj_size, x.size(0)) != "cpu":
        return None
    try:
        y, h, *c = operation(x, *states, weights)
    except RuntimeError:
        if _fits(module, x, states, weights):
            raise
        return None
    return y, (h, *c) if pair else h


_settings_of_step = itemgetter(
    "_parameters", "all_names", "_forward_hooks", "_forward_pre_hooks", "dropout", "training", "backend", "hidden_size",
    "proj_size",
)  # fmt: skip
"""Of a module's dictionary; its getattr takes several times as long."""


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
    """Whether autocast, forward mode or what sees every operation is on, which the general path knows; or what sees
    every saved tensor: a call within a checkpoint is checked, since a monitor may watch only one of its two runs."""
    return operations_are_seen() or _top_hooks(True) is not None


def operations_are_seen() -> bool:
    return (
        _is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
    )
