"""The checks of every call and constructor: user input is refused here.

Exceptions are of the type that torch.nn raises for the same mistake. They name the argument, what came and what was
expected. Values on a GPU are never read back just to be checked.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .activations import cell_of
from .aten import refused_by_cudnn, refused_by_onednn
from .call_tensors import (
    check_decay,
    check_input,
    check_lengths,
    check_parameters,
    check_reset_mask,
    check_states,
    check_step_inputs,
    check_tap,
    tuple_of_states,
)
from .cell_table import CELLS, NONLINEARITIES, spec_of
from .dispatch import Request
from .equations import LN_EPS
from .linear import in_forward_mode, recorded, tracing
from .stack import Options

# ---------------------------------------------------------------------------------------------------- constructors


def check_sizes(**sizes) -> None:
    """Each a positive int."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero, got {size}")


def check_layers(num_layers) -> int:
    """Any positive integer, as torch.nn takes it: a NumPy one, too."""
    if isinstance(num_layers, Integral) and not isinstance(num_layers, bool):
        num_layers = int(num_layers)
    check_sizes(num_layers=num_layers)
    return num_layers


def check_cell_sizes(**sizes) -> list[int]:
    """Each any integer but a negative one: torch.nn's cells take 0, and NumPy's integers."""
    found = []
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size < 0:
            raise RuntimeError(f"{name} should not be negative, got {size}")
        found.append(int(size))
    return found


def check_flags(**flags) -> None:
    """Each a bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")


def check_projection(proj_size: int, hidden_size: int) -> None:
    """0, or less than the hidden size."""
    if proj_size < 0:
        raise ValueError("proj_size should be a positive integer or zero to disable projections")
    if proj_size >= hidden_size:
        raise ValueError(f"proj_size has to be smaller than hidden_size, got {proj_size} and {hidden_size}")


def check_heads(num_heads, hidden_size: int, proj_size: int = 0, mask_per_gate: bool = False) -> None:
    """A divisor of the hidden size; more than one head only without a projection and a recurrent mask for each gate."""
    check_sizes(num_heads=num_heads)
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size has to be divisible by num_heads, got {hidden_size} and {num_heads}")
    if num_heads > 1 and proj_size:
        raise ValueError(f"num_heads is for a network without proj_size, got {num_heads} and {proj_size}")
    if num_heads > 1 and mask_per_gate:
        raise ValueError("num_heads is for a network without recurrent_dropout_per_gate")


def without_projection(args: tuple, kwargs: dict, only_for: str = "LSTM, not RNN or GRU") -> tuple:
    """The positional arguments of a GRU or RNN constructor, with a proj_size of 0 in its place.

    torch.nn documents none for them, but its constructors take a 0 there.
    """
    projected = "proj_size" in kwargs
    if len(args) > 7 and isinstance(args[7], int):
        projected = projected or args[7] != 0
    elif len(args) > 7:
        args = (*args[:7], 0, *args[7:])
    if projected:
        raise ValueError(f"proj_size argument is only supported for {only_for}")
    return args


def rnn_cell(nonlinearity: str | Callable) -> str:
    """The name in the cell table of an RNN with this nonlinearity, or the text of the cell of a function."""
    if nonlinearity not in NONLINEARITIES:
        if callable(nonlinearity):
            return cell_of("rnn", nonlinearity=nonlinearity).text
        raise ValueError(
            f"Unknown nonlinearity {nonlinearity!r}. Select from {', '.join(map(repr, NONLINEARITIES))}, "
            "or pass a pointwise function."
        )
    return f"rnn_{nonlinearity}"


def check_leak(leak, learn_leak) -> None:
    """None, or a number above 0 and up to 1, which `learn_leak` needs."""
    check_flags(learn_leak=learn_leak)
    if leak is None:
        if learn_leak:
            raise ValueError("learn_leak needs a first value: leak should be a number in range (0, 1], got None")
    elif isinstance(leak, bool) or not isinstance(leak, Real) or not 0 < leak <= 1:
        raise ValueError(f"leak should be a number in range (0, 1], got {leak!r}")


def check_probability(name: str, p) -> float:
    """Within [0, 1]."""
    if type(p) is float and 0 <= p <= 1:
        return p
    if isinstance(p, bool) or not isinstance(p, Real) or not 0 <= p <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1], a probability, but got {p!r}")
    return float(p)


def check_zoneout(cell: str, zoneout) -> tuple[float, ...]:
    """The probability for each state of the cell, h first. The LSTM's pair is given as (p_c, p_h)."""
    spec = spec_of(cell)
    states = len(spec.states)
    if not isinstance(zoneout, (tuple, list)):
        return (check_probability("zoneout", zoneout),) * states
    if spec.program is not None and len(zoneout) == states:
        return tuple(check_probability("zoneout", p) for p in zoneout)
    if cell != "lstm" or len(zoneout) != 2:
        form = "(p_c, p_h) for the LSTM" if spec.program is None else f"one for each of {', '.join(spec.states)}"
        raise ValueError(f"zoneout takes one probability, or {form}, but got {zoneout!r} for {spec.name}")
    p_c, p_h = zoneout
    return check_probability("zoneout", p_h), check_probability("zoneout", p_c)


def check_bound(name: str, bound, tensor: bool = False):
    """A positive and finite number, None, or with `tensor` a 0-d tensor, whose value is read on a CPU only."""
    if bound is None:
        return None
    if tensor and isinstance(bound, Tensor):
        if bound.dim() != 0 or not bound.is_floating_point():
            raise ValueError(f"{name} should be a float or a 0-d float tensor, got {bound.dtype} {list(bound.shape)}")
        if bound.device.type == "cpu" and not tracing() and not bool(bound > 0):
            raise ValueError(f"{name} should be positive, but got {bound!r}; None clips nothing")
        return bound
    if isinstance(bound, bool) or not isinstance(bound, Real) or not 0 < bound < math.inf:
        hint = "pass its .threshold" if isinstance(getattr(bound, "threshold", None), Tensor) else "None clips nothing"
        raise ValueError(f"{name} should be a positive number, and finite, but got {bound!r}; {hint}")
    return bound if type(bound) in (int, float) else float(bound)


def check_eps(eps) -> float:
    """What a layer norm adds to the variance."""
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 < eps < math.inf:
        raise ValueError(f"layer_norm_eps should be a positive number, and finite, but got {eps!r}")
    return float(eps)


def check_layer_norm(cell: str, kind: bool | str) -> str:
    """What is normalised in the gates, where anything is."""
    if isinstance(kind, bool) or kind == "separate":
        return "separate"
    if kind not in ("sum", "gates"):
        if not isinstance(kind, str):
            check_flags(layer_norm=kind)
        raise ValueError(f'layer_norm should be a bool, "separate", "sum" or "gates", got {kind!r}')
    if not spec_of(cell).recurrent:
        raise ValueError(f"layer_norm={kind!r} is of W_ih x + W_hh h, and {spec_of(cell).name} has no W_hh")
    return kind


def check_layer_norm_cell(cell: str, kind: str | None) -> str | None:
    """Where the layer norm of c is; only an LSTM has a choice."""
    if kind == "inside":
        return kind
    if kind not in ("carried", None):
        raise ValueError(f'layer_norm_cell should be "inside", "carried" or None, got {kind!r}')
    if cell != "lstm":
        raise ValueError(
            f"layer_norm_cell is for the LSTM, whose c it says how to normalise, and not {spec_of(cell).name}"
        )
    return kind


def check_options(
    cell, num_layers, bidirectional, dropout, training, residual, locked_dropout, recurrent_dropout, zoneout,
    weight_dropout, clip_norm, clip_value, layer_norm_eps=LN_EPS, layer_norm_cell="inside",
    layer_norm=True, recurrent_dropout_per_gate=False,
) -> Options:  # fmt: skip
    """The options of a network, checked but for the sizes and flags."""
    return Options(
        cell, num_layers, bidirectional, check_probability("dropout", dropout), training, residual, locked_dropout,
        check_probability("recurrent_dropout", recurrent_dropout), check_zoneout(cell, zoneout),
        check_probability("weight_dropout", weight_dropout),
        check_bound("clip_state_grad_norm", clip_norm, tensor=True), check_bound("clip_state_grad_value", clip_value),
        check_eps(layer_norm_eps), check_layer_norm_cell(cell, layer_norm_cell), check_layer_norm(cell, layer_norm),
        recurrent_dropout_per_gate and len(spec_of(cell).gates) > 1,
    )  # fmt: skip


def _options_and_features(*settings) -> tuple[Options, tuple[str, ...]]:
    options = check_options(*settings)
    return options, options.features()


_cached_options = lru_cache(typed=True)(_options_and_features)


def _options_known(*settings) -> tuple[Options, tuple[str, ...]]:
    """`_options_and_features`, checked once."""
    try:
        return _cached_options(*settings)
    except TypeError:  # a list, which cannot be looked up, or a setting of the wrong type
        return _options_and_features(*settings)


# -------------------------------------------------------------------------------------------------------- exporters


def refuse_script(module: torch.nn.Module) -> None:
    """torch.jit.script compiles source, and fastrnn's is beyond it."""
    name = type(module).__name__
    raise TypeError(f"torch.jit.script cannot compile fastrnn.{name}: {_instead(module._cell, 'script')}")


def refuse_proxy(cell: str) -> None:
    """torch.fx runs a forward on proxies, which have no shape to check."""
    raise TypeError(f"torch.fx cannot trace fastrnn's {spec_of(cell).name}: {_instead(cell, 'trace')}")


def _instead(cell: str, action: str) -> str:
    converted = f"{action} fastrnn.convert(model, to='torch', copy=True), or use " if cell in CELLS else "use "
    return f"{converted}torch.export (docs/deployment.md)"


def check_defaults(module: torch.nn.Module, defaults: tuple) -> None:
    """The positional arguments of a forward after hx: none but the defaults that torch.onnx.export hands over."""
    if isinstance(defaults, torch.fx.Proxy):
        refuse_proxy(module._cell)
    given = [value for value in defaults if value is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # a bool comes as a tensor
        others = not torch.onnx.is_in_onnx_export() or any(x.dim() > 0 or bool(x) for x in map(torch.as_tensor, given))
    if others:
        raise TypeError(
            f"{type(module).__name__}.forward takes input and hx, and its options by name, but got "
            f"{2 + len(defaults)} positional arguments"
        )


# ----------------------------------------------------------------------------------------------- calls of networks


class Call(NamedTuple):
    """A checked call: time first, batched, and in the order of the packed batch where the input is packed."""

    x: Tensor  # [T, B, I]; of packed input its rows, [sum of lengths, I]
    states: tuple[Tensor, ...]  # h [L*D, B, P], every other one [L*D, B, H]
    options: Options
    request: Request
    lengths: Tensor | None  # [B]
    reset_mask: Tensor | None  # bool [T, B]
    tap: Tensor | None  # [L*D, 2, S, T, B]
    packed: PackedSequence | None
    step_inputs: tuple[Tensor, ...] = ()  # the inputs of a user's cell, [L*D, T, B, H] each
    decay: Tensor | None = None  # [T, B, 1 or H]


def check(
    cell: str,
    input,
    hx,
    params: Mapping[str, Tensor],
    *,
    batch_first: bool = False,
    lengths=None,
    reset_mask=None,
    decay=None,
    tap=None,
    return_cells: bool = False,
    return_layers: bool = False,
    num_layers: int = 1,
    bidirectional: bool = False,
    training: bool = False,
    dropout: float = 0.0,
    residual: bool = False,
    locked_dropout: bool = False,
    recurrent_dropout: float = 0.0,
    zoneout=0.0,
    weight_dropout: float = 0.0,
    clip_state_grad_norm=None,
    clip_state_grad_value=None,
    layer_norm_eps=LN_EPS,
    layer_norm_cell="inside",
    layer_norm=True,
    recurrent_dropout_per_gate=False,
    **step_inputs,
) -> Call:
    """Checks a call and brings it into one form; arguments as of `functional.recurrent`.

    Raises:
        ValueError, RuntimeError, TypeError: the type that torch.nn raises for the same mistake.
    """
    # torch.compile would warn of a cache. The value of a bound that is a tensor may have changed since. In a pair, a
    # cache does not tell True from 1.
    known = not (torch.compiler.is_compiling() or isinstance(clip_state_grad_norm, Tensor) or type(zoneout) is tuple)
    options, features = (_options_known if known else _options_and_features)(
        cell, num_layers, bidirectional, dropout, training, residual, locked_dropout, recurrent_dropout, zoneout,
        weight_dropout, clip_state_grad_norm, clip_state_grad_value, layer_norm_eps, layer_norm_cell,
        layer_norm, recurrent_dropout_per_gate,
    )  # fmt: skip
    spec = spec_of(cell)
    if return_cells and len(spec.states) == 1:
        raise ValueError(f"return_cells needs a cell with a cell state; {spec.name} has none")
    weight_ih = params["weight_ih_l0"]
    shape = params["weight_hh_l0" if spec.recurrent else "weight_ih_l0"].shape
    rows, size = shape if len(shape) == 2 else (shape[0] * shape[1], shape[0] * shape[2])
    num_heads = int(shape[0]) if len(shape) == 3 else 1  # under torch.jit.trace a size is a tensor
    hidden_size = rows // len(spec.gates)
    if not spec.recurrent:
        size = hidden_size
    if isinstance(input, torch.fx.Proxy):
        refuse_proxy(cell)
    packed = input if isinstance(input, PackedSequence) else None
    x, batch = check_input(cell, input, packed, weight_ih, batch_first)
    projection, layer_norm = size if "weight_hr_l0" in params else 0, "ln_ih_l0" in params or "ln_hh_l0" in params
    if num_heads > 1:
        check_heads(num_heads, hidden_size, projection, options.recurrent_dropout_per_gate)
    parameters = check_parameters(
        params, x.device, cell, weight_ih.shape[1], hidden_size, projection, "bias_ih_l0" in params,
        layer_norm and options.layer_norm, num_layers, bidirectional, layer_norm_cell is not None, num_heads,
    )  # fmt: skip
    batched = packed is not None or input.dim() == 3
    stacked = num_layers * (2 if bidirectional else 1)
    expected = [(stacked, batch, size), *[(stacked, batch, hidden_size)] * (len(spec.states) - 1)]
    states = check_states(cell, x, hx, expected, batched)
    T = len(packed.batch_sizes) if packed is not None else x.shape[0]
    if lengths is not None:
        lengths = check_lengths(lengths, T, batch, x, packed)
    if reset_mask is not None:
        reset_mask = check_reset_mask(reset_mask, T, batch, x, batched, batch_first)
    if tap is not None:
        check_tap(tap, (stacked, 2, len(spec.states), T, batch), x)
    if packed is not None and packed.sorted_indices is not None:
        order = packed.sorted_indices
        states = tuple(s.index_select(1, order) for s in states)
        tap = None if tap is None else tap.index_select(-1, order)
        reset_mask = None if reset_mask is None else reset_mask.index_select(1, order)
    inputs = ()
    if step_inputs or spec.inputs:
        sizes = (stacked, T, batch, hidden_size)
        inputs = check_step_inputs(spec, step_inputs, sizes, x, packed, batched, batch_first)
    if decay is not None:
        decay = check_decay(decay, (T, batch, hidden_size), projection, x, packed, batched, batch_first)
    traced, forward_mode = tracing(), in_forward_mode()
    found = (
        *features,
        tap is not None and "tap",
        lengths is not None and "lengths",
        reset_mask is not None and "resets",
        decay is not None and "decay",
        return_cells and "return_cells",
        return_layers and "return_layers",
        layer_norm and "layer_norm",
        layer_norm and options.layer_norm == "sum" and "layer_norm_sum",
        layer_norm and options.layer_norm == "gates" and "layer_norm_gates",
        layer_norm and options.layer_norm_cell == "carried" and "layer_norm_carried",
        projection > 0 and "projection",
        num_heads > 1 and "heads",
        refused_by_cudnn(x, training) and "eval_gradient",
        refused_by_onednn(cell, x, projection, packed is not None) and "autocast_lstm",
        # The scan has no forward mode, and what torch.jit.trace writes of it has no gradient; torch's own kernels do.
        traced and not forward_mode and not recorded() and "tracing",
    )
    # A compiled graph must not be tied to its sizes.
    symbolic = isinstance(T, torch.SymInt) or isinstance(batch, torch.SymInt)
    known_T, known_batch = (0, 0) if traced or forward_mode or symbolic else (T, batch)
    filled = len(x) / (T * batch) if packed is not None and known_T and known_batch else None
    tensors = (x, *states, *parameters, *inputs)
    if decay is not None:
        tensors = (*tensors, decay)
    subclass = not traced and _has_subclass(tensors)
    # ExpandedWeight does not say whether it requires grad.
    gradients = torch.is_grad_enabled() and (subclass or any([t.requires_grad for t in tensors]))
    request = Request(
        cell, x.device.type, x.dtype, hidden_size, projection, frozenset([name for name in found if name]),
        known_T, known_batch, filled, gradients, subclass, num_heads,
    )  # fmt: skip
    return Call(x, states, options, request, lengths, reset_mask, tap, packed, inputs, decay)


def _has_subclass(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a tensor's class says what torch's functions do with it, as torch.nn.utils' ExpandedWeight does."""
    kinds = {type(t) for t in tensors} - {Tensor, torch.nn.Parameter}
    return any(kind.__torch_function__ is not torch._C._disabled_torch_function_impl for kind in kinds)


# -------------------------------------------------------------------------------------------------- calls of cells


def check_cell_call(
    name: str, cell: str, hidden_size: int, dtype: torch.dtype, input: Tensor, hx
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Input `[B, I]` and states `[B, H]` of a single-step cell; no states are zeros. `dtype`: of its weights."""
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    states = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
    count = len(spec_of(cell).states)
    if count > 1 and hx is not None and (states is not hx or len(hx) != count):
        found = f"{len(hx)} states" if states is hx else type(hx).__name__
        raise RuntimeError(f"{name}: hx should be {tuple_of_states(cell)}, got {found}")
    if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(f"{name}: input has dtype {input.dtype}, but the weights have {dtype}")
    x = input if input.dim() == 2 else input.unsqueeze(0)  # torch.atleast_2d takes longer, which a small cell feels
    shape, batched = (x.shape[0], hidden_size), []
    for k, state in enumerate(states):
        if state.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead")
        batched.append(state if state.dim() == 2 else state.unsqueeze(0))
        if batched[k].shape != shape:
            expected = [*input.shape[:-1], hidden_size]
            raise RuntimeError(f"{name}: Expected hx[{k}] of shape {expected}, got {list(state.shape)}")
    return x, tuple(batched)


def check_step(cell: str, x: Tensor, states: tuple[Tensor, ...], params: Mapping[str, Tensor], **options) -> Call:
    """A step of a cell as the call of a network; `x [B, I]`, states `[B, H]` or none."""
    hx = tuple(s.unsqueeze(0) for s in states)
    return check(cell, x.unsqueeze(0), (hx if len(hx) > 1 else hx[0]) if hx else None, params, **options)
