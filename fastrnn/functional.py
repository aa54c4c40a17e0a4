"""`lstm`, `gru`, `rnn`: a recurrent network as a function of its input and its parameters, by name.

The only place where user input is refused. Exceptions are of the type that torch.nn raises for the same mistake.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, stack
from .cells import CELLS, NONLINEARITIES, network_shapes, suffixes
from .dispatch import Request
from .equations import accumulate_dtype
from .linear import in_forward_mode, tracing
from .scan import AUTOCAST, without_autocast
from .stack import Options


def lstm(input, hx, params: Mapping[str, Tensor], *, backend=None, **options):
    """A (stacked, bidirectional) LSTM.

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  g = tanh(..),  c' = f c + i g,  h' = o tanh(c')

    Args:
        input: `[T, B, I]`, `[B, T, I]` with `batch_first`, `[T, I]` unbatched, or a PackedSequence.
        hx: `(h0 [L*D, B, P], c0 [L*D, B, H])` (without B when unbatched), or None for zeros.
        params: the parameters under torch.nn.LSTM's names (`weight_ih_l0`, ...); the names present decide on bias,
            projection and layer norm (`ln_ih_l0 [G*H]`, `ln_hh_l0 [G*H]`, `ln_c_l0 [H]`, `ln_c_bias_l0 [H]`).
        backend: a name out of `fastrnn.dispatch.BACKENDS`; None chooses.
        options: num_layers, bidirectional, batch_first, training, dropout, residual, locked_dropout, recurrent_dropout,
            zoneout, weight_dropout, clip_state_grad_norm, clip_state_grad_value, as in `fastrnn.LSTM`; lengths,
            reset_mask, tap, return_cells, as in `fastrnn.LSTM.forward`.

    Returns:
        `(output, (h_n, c_n))` as torch.nn.LSTM does; with `return_cells` also c of every step of the last layer.

    Raises:
        ValueError or RuntimeError for what does not fit, naming the argument, what came and what was expected.
    """
    return _recurrent("lstm", input, hx, params, backend, **options)


def gru(input, hx, params: Mapping[str, Tensor], *, backend=None, **options):
    """A (stacked, bidirectional) GRU; arguments as for `lstm`, `hx` and `h_n` one tensor `[L*D, B, H]`.

    r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  n = tanh(W_in x + b_in + r (W_hn h + b_hn)),  h' = n + z (h - n)
    """
    return _recurrent("gru", input, hx, params, backend, **options)


def rnn(input, hx, params: Mapping[str, Tensor], *, nonlinearity="tanh", backend=None, **options):
    """A (stacked, bidirectional) Elman RNN, h' = nonlinearity(W_ih x + b_ih + W_hh h + b_hh); arguments as for `gru`.

    `nonlinearity`: "tanh", "relu", "leaky_relu" (slope 0.01) or "elu" (alpha 1).
    """
    return _recurrent(rnn_cell(nonlinearity), input, hx, params, backend, **options)


def rnn_cell(nonlinearity: str) -> str:
    """The name in the cell table of an RNN with this nonlinearity."""
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"Unknown nonlinearity {nonlinearity!r}. Select from {', '.join(map(repr, NONLINEARITIES))}.")
    return f"rnn_{nonlinearity}"


class Call(NamedTuple):
    """A checked call, time first and batched, in the order of the packed batch where there is one."""

    x: Tensor  # [T, B, I]; or [sum of lengths, I] while packed
    states: tuple[Tensor, ...]
    options: Options
    request: Request
    lengths: Tensor | None
    reset_mask: Tensor | None
    tap: Tensor | None
    packed: PackedSequence | None


def _recurrent(cell: str, input, hx, params, backend, *, batch_first: bool = False, return_cells: bool = False, **rest):
    call = check(cell, input, hx, params, batch_first=batch_first, return_cells=return_cells, **rest)
    name = dispatch.choose(call.request, backend)
    params = stack.drop_weights(params, call.options)
    if name == "aten":
        y, states, c = *_aten(call, params), None
    else:
        y, states, c = _scanned(call, params, return_cells, name)
    return _present(call, input, y, states, c, batch_first)


def _step(cell: str, x: Tensor, states: tuple[Tensor, ...], params, backend) -> tuple[Tensor, ...]:
    """The states `[B, H]` after one step on `x [B, I]`, as torch.nn's cells take it; no `states` are zeros."""
    if cell in dispatch.ATEN_CELLS and "ln_hh_l0" not in params and dispatch.forced(backend) in (None, "aten"):
        # A few operations, which can be traced and transformed. A whole call would prepare the weights for many steps.
        if not states:
            states = (x.new_zeros(x.shape[0], params["weight_hh_l0"].shape[1]),) * len(CELLS[cell].states)
        new = getattr(torch._VF, f"{cell}_cell")(x, states if cell == "lstm" else states[0], *params.values())
        return new if cell == "lstm" else (new,)
    call = check_step(cell, x, states, params)
    _, states, _ = _scanned(call, params, False, dispatch.choose(call.request, backend), step=True)
    return tuple(s[0] for s in states)


def check_step(cell: str, x: Tensor, states: tuple[Tensor, ...], params) -> Call:
    """The call that a step of a cell is; arguments as of `_step`."""
    hx = tuple(s.unsqueeze(0) for s in states)
    return check(cell, x.unsqueeze(0), (hx if cell == "lstm" else hx[0]) if hx else None, params)


def explain(cell: str, input, hx, params, *, backend=None, **options) -> dispatch.Explanation:
    """The backend table for a call: each backend, whether it can run it or why not, and what its rank rests on."""
    return dispatch.explanation(check(cell, input, hx, params, **options).request, backend)


# --------------------------------------------------------------------------------------------------------- running


def _aten(call: Call, params):
    """The whole call on torch's own kernels."""
    options = call.options
    names = [name for row in suffixes(options.num_layers, options.bidirectional) for name in row]
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    weights = [params[f"{kind}_{name}"] for name in names for kind in kinds if f"{kind}_{name}" in params]
    bias = "bias_ih_l0" in params
    hx = call.states if options.cell == "lstm" else call.states[0]
    head = (call.x, hx) if call.packed is None else (call.x, call.packed.batch_sizes, hx)
    tail = (options.num_layers, options.dropout, options.training, options.bidirectional)
    batch_first = () if call.packed is not None else (False,)
    y, *states = getattr(torch._VF, options.cell)(*head, weights, bias, *tail, *batch_first)
    return y, tuple(states)


def _scanned(call: Call, params, return_cells: bool, backend: str, step: bool = False):
    x, (h0, *cells), lengths = call.x, call.states, call.lengths
    h_dtype = c_dtype = x.dtype
    device = x.device.type
    if call.packed is not None:
        sizes = call.packed.batch_sizes  # torch.compile of 2.12 fails to read them off a PackedSequence that it traced
        x = PackedSequence(x, sizes)
        where = stack.places(sizes)
        sequences = torch.arange(h0.shape[1], device=sizes.device)
        lengths = (sizes.unsqueeze(1) > sequences).sum(0).to(h0.device)
        if backend != "cpu":
            x = stack.padded(x, where)
    if device in AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        h_dtype, c_dtype = _autocast_dtypes(call, dtype, step)
        x, h0 = x.to(dtype), h0.to(dtype)
        params = {name: p.to(dtype) for name, p in params.items()}
    with without_autocast(device):
        y, states, c = stack.run(
            x, (h0, *cells), params, call.options, lengths=lengths, reset_mask=call.reset_mask, tap=call.tap,
            keep_c=return_cells, backend=backend,
        )  # fmt: skip
    y, states = y.to(h_dtype), (states[0].to(h_dtype), *(c_n.to(c_dtype) for c_n in states[1:]))
    c = None if c is None else c.to(c_dtype)
    if call.packed is not None:
        y, c = (v if v is None else stack.packed(v, sizes, where).data for v in (y, c))
    return y, states, c


def _autocast_dtypes(call: Call, dtype: torch.dtype, step: bool) -> tuple[torch.dtype, torch.dtype]:
    """What torch.nn returns under autocast to `dtype`: the dtypes of output and h, and of c.

    On a GPU `dtype` throughout. On a CPU autocast knows only some of the kernels behind (seen on torch 2.13). Of a cell
    (`step`) it casts the products alone, and where the state before enters a sum, the wider dtype wins.
    """
    plain, projected = call.states[0].dtype, "projection" in call.request.features
    if call.x.device.type != "cpu":
        return dtype, dtype
    if step:
        wider = torch.promote_types(dtype, call.states[-1].dtype)
        return dtype if call.options.cell.startswith("rnn") else wider, wider
    if call.options.cell == "gru" or (call.options.cell == "lstm" and call.packed is not None and not projected):
        return plain, plain
    return dtype, call.states[1].dtype if projected else dtype


def _present(call: Call, input, y, states, c, batch_first: bool):
    """The outputs in the user's own layout."""
    if call.packed is not None:
        _, batch_sizes, sorted_indices, unsorted_indices = call.packed
        y, c = (v if v is None else PackedSequence(v, batch_sizes, sorted_indices, unsorted_indices) for v in (y, c))
        if unsorted_indices is not None:
            states = tuple(s.index_select(1, unsorted_indices) for s in states)
    elif input.dim() == 2:
        y, c = (v if v is None else v.squeeze(1) for v in (y, c))
        states = tuple(s.squeeze(1) for s in states)
    elif batch_first:
        y, c = (v if v is None else v.transpose(0, 1) for v in (y, c))
    hidden = states[0] if len(states) == 1 else states
    return (y, hidden) if c is None else (y, hidden, c)


# -------------------------------------------------------------------------------------------------------- checking


def check(
    cell: str,
    input,
    hx,
    params: Mapping[str, Tensor],
    *,
    batch_first: bool = False,
    lengths=None,
    reset_mask=None,
    tap=None,
    return_cells: bool = False,
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
) -> Call:
    """Checks a call and brings it into one form."""
    options = _check_options(
        cell, num_layers, bidirectional, dropout, training, residual, locked_dropout, recurrent_dropout, zoneout,
        weight_dropout, clip_state_grad_norm, clip_state_grad_value,
    )  # fmt: skip
    if return_cells and cell != "lstm":
        raise ValueError(f"return_cells needs a cell with a cell state; {cell} has none")
    weight_ih, weight_hh = params["weight_ih_l0"], params["weight_hh_l0"]
    spec = CELLS[cell]
    rows, size = weight_hh.shape
    hidden_size = rows // len(spec.gates)
    packed = input if isinstance(input, PackedSequence) else None
    x, batch = _check_input(cell, input, packed, weight_ih, batch_first)
    projection, layer_norm = size if "weight_hr_l0" in params else 0, "ln_hh_l0" in params
    parameters = _check_parameters(
        params, x.device, cell, weight_ih.shape[1], hidden_size, projection, "bias_ih_l0" in params, layer_norm,
        num_layers, bidirectional,
    )  # fmt: skip
    batched = packed is not None or input.dim() == 3
    stacked = num_layers * (2 if bidirectional else 1)
    expected = [(stacked, batch, size), (stacked, batch, hidden_size)][: len(spec.states)]
    states = _check_states(x, hx, expected, batched)
    T = len(packed.batch_sizes) if packed is not None else x.shape[0]
    if lengths is not None:
        lengths = _check_lengths(lengths, T, batch, x, packed)
    if reset_mask is not None:
        reset_mask = _check_reset_mask(reset_mask, T, batch, x, batched, batch_first)
    if tap is not None:
        _check_tap(tap, (stacked, 2, len(spec.states), T, batch), x)
    if packed is not None and packed.sorted_indices is not None:
        order = packed.sorted_indices
        states = tuple(s.index_select(1, order) for s in states)
        tap = None if tap is None else tap.index_select(-1, order)
        reset_mask = None if reset_mask is None else reset_mask.index_select(1, order)
    features = [name for name, on in options.features() if on]
    if tap is not None:
        features.append("tap")
    if lengths is not None:
        features.append("lengths")
    if reset_mask is not None:
        features.append("resets")
    if return_cells:
        features.append("return_cells")
    if layer_norm:
        features.append("layer_norm")
    if projection:
        features.append("projection")
    if refused_by_cudnn(x, training):
        features.append("eval_gradient")
    # The scan has no forward mode, which torch's own kernels have.
    forward_mode = in_forward_mode()
    if tracing() and not forward_mode:
        features.append("tracing")
    # A compiled graph shall not be tied to its sizes.
    sizes = (0, 0) if tracing() or forward_mode else (T, batch)
    filled = len(x) / (T * batch) if packed is not None and all(sizes) else None
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *states, *parameters))
    request = Request(
        cell, x.device.type, x.dtype, hidden_size, projection, frozenset(features), *sizes, filled, gradients
    )
    return Call(x, states, options, request, lengths, reset_mask, tap, packed)


def refused_by_cudnn(x: Tensor, training: bool) -> bool:
    """Whether a gradient will be asked for in eval mode, which cuDNN does not compute."""
    return x.is_cuda and not training and x.requires_grad and torch.is_grad_enabled()


def _check_options(
    cell, num_layers, bidirectional, dropout, training, residual, locked_dropout, recurrent_dropout, zoneout,
    weight_dropout, clip_norm, clip_value,
) -> Options:  # fmt: skip
    return Options(
        cell, num_layers, bidirectional, check_probability("dropout", dropout), training, residual, locked_dropout,
        check_probability("recurrent_dropout", recurrent_dropout), check_zoneout(cell, zoneout),
        check_probability("weight_dropout", weight_dropout),
        check_bound("clip_state_grad_norm", clip_norm, tensor=True), check_bound("clip_state_grad_value", clip_value),
    )  # fmt: skip


def check_probability(name: str, p) -> float:
    if type(p) is float and 0 <= p <= 1:
        return p
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1], a probability, but got {p!r}")
    return float(p)


def check_zoneout(cell: str, zoneout) -> tuple[float, ...]:
    """The probabilities for h and, for the LSTM, for c. A pair is given as (p_c, p_h)."""
    states = len(CELLS[cell].states)
    if not isinstance(zoneout, (tuple, list)):
        return (check_probability("zoneout", zoneout),) * states
    if states != 2 or len(zoneout) != 2:
        raise ValueError(f"zoneout takes one probability, or (p_c, p_h) for the LSTM, but got {zoneout!r} for {cell}")
    p_c, p_h = zoneout
    return check_probability("zoneout", p_h), check_probability("zoneout", p_c)


def check_bound(name: str, bound, tensor: bool = False):
    if bound is None:
        return None
    if tensor and isinstance(bound, Tensor):
        if bound.dim() != 0 or not bound.is_floating_point():
            raise ValueError(f"{name} should be a float or a 0-d float tensor, got {bound.dtype} {list(bound.shape)}")
        if bound.device.type == "cpu" and not tracing() and not bool(bound > 0):
            raise ValueError(f"{name} should be positive, but got {bound!r}; None clips nothing")
        return bound  # never read back from a GPU
    if isinstance(bound, bool) or not isinstance(bound, Real) or not 0 < bound < math.inf:
        hint = "pass its .threshold" if isinstance(getattr(bound, "threshold", None), Tensor) else "None clips nothing"
        raise ValueError(f"{name} should be a positive number, and finite, but got {bound!r}; {hint}")
    return bound if type(bound) in (int, float) else float(bound)


def _check_input(cell: str, input, packed, weight_ih: Tensor, batch_first: bool):
    """The input tensor, time first and batched (or packed), and the batch size."""
    x = input if packed is None else packed.data
    if packed is None and x.dim() not in (2, 3):
        raise ValueError(f"{cell}: Expected input to be 2D or 3D, got {x.dim()}D instead")
    if not x.is_floating_point():
        raise ValueError(f"input should be a real floating tensor, got {x.dtype}")
    if x.dtype != weight_ih.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight_ih.dtype}). "
            f"Convert input: input.to({weight_ih.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.shape[-1] != weight_ih.shape[1]:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {weight_ih.shape[1]}, got {x.shape[-1]}"
        )
    if x.device != weight_ih.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, "
            f"found input tensor at {x.device} and parameter tensor at {weight_ih.device}"
        )
    if packed is not None:
        return x, int(packed.batch_sizes[0])
    if x.dim() == 2:
        x = x.unsqueeze(1)
    elif batch_first:
        x = x.transpose(0, 1)
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    return x, x.shape[1]


def _check_parameters(params: Mapping[str, Tensor], device: torch.device, *network) -> list[Tensor]:
    """The parameters of a network (the arguments of `network_shapes`): all there, of their shape, on the device."""
    # A compiler would warn of the cache.
    shapes = network_shapes.__wrapped__ if torch.compiler.is_compiling() else network_shapes
    found = []
    for row in shapes(*network):
        for name, shape in row:
            parameter = params.get(name)
            if parameter is None:
                raise TypeError(f"{name} should be a tensor of shape {list(shape)}, got None")
            if parameter.shape != shape:
                raise RuntimeError(f"{name} should have shape {list(shape)}, got {list(parameter.shape)}")
            if parameter.device != device:
                raise RuntimeError(f"{name} is on device {parameter.device}, but input on {device}")
            found.append(parameter)
    return found


def _check_states(x: Tensor, hx, expected, batched: bool):
    """The initial states, batched: `hx` checked, or zeros."""
    if hx is None:
        return tuple(x.new_zeros(shape) for shape in expected)
    if len(expected) == 1:
        states = (hx,)
    elif isinstance(hx, (tuple, list)) and len(hx) == 2:
        states = tuple(hx)
    else:
        raise RuntimeError(f"hx of an LSTM should be a pair (h0, c0), got {type(hx).__name__}")
    for k, (state, shape) in enumerate(zip(states, expected, strict=True)):
        if state.dim() != (3 if batched else 2):
            kind = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(f"For {kind} input, hx should also be {3 if batched else 2}-D but got {state.dim()}-D")
        if not batched:
            state = state.unsqueeze(1)
        if tuple(state.shape) != shape:
            raise RuntimeError(f"Expected hidden[{k}] size {shape}, got {list(state.shape)}")
        if state.device != x.device:
            raise RuntimeError(f"hx[{k}] is on {state.device}, but input on {x.device}")
        if state.dtype != x.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"hx[{k}] has dtype {state.dtype}, but input has {x.dtype}")
    return states if batched else tuple(state.unsqueeze(1) for state in states)


def _check_lengths(lengths, T: int, batch: int, x: Tensor, packed) -> Tensor:
    """`lengths [B]` on x's device and within [0, T]."""
    if packed is not None:
        raise ValueError("lengths: a PackedSequence already has its own; pass one or the other")
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths should be of an integer dtype, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths should have shape ({batch},), one per sequence, got {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and not tracing() and bool(((lengths < 0) | (lengths > T)).any()):
        raise ValueError(f"lengths should lie within [0, {T}], the number of steps, got {lengths.tolist()}")
    return lengths.to(x.device, non_blocking=True).clamp(0, T)


def _check_reset_mask(reset_mask: Tensor, T: int, batch: int, x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """`reset_mask`, bool `[T, B]`."""
    transposed = batched and batch_first
    shape = (batch, T) if transposed else (T, batch)
    if not isinstance(reset_mask, Tensor):
        reset_mask = torch.as_tensor(reset_mask, device=x.device)
    if not batched and reset_mask.dim() == 1:
        reset_mask = reset_mask.unsqueeze(1)
    if reset_mask.dtype != torch.bool:
        raise ValueError(f"reset_mask should be of dtype torch.bool, got {reset_mask.dtype}")
    if tuple(reset_mask.shape) != shape:
        raise ValueError(f"reset_mask should have shape {shape}, got {tuple(reset_mask.shape)}")
    if reset_mask.device != x.device:
        raise RuntimeError(f"reset_mask is on {reset_mask.device}, but input on {x.device}")
    return reset_mask.transpose(0, 1) if transposed else reset_mask


def _check_tap(tap: Tensor, shape, x: Tensor) -> None:
    dtype = accumulate_dtype(x.dtype)
    if not isinstance(tap, Tensor):
        raise TypeError(f"tap should be a tensor of zeros that requires grad, of shape {shape}, got {tap!r}")
    if tuple(tap.shape) != shape:
        raise ValueError(
            f"tap should have shape [layers * directions, 2, states, T, B] = {shape}, got {list(tap.shape)}"
        )
    if tap.dtype != dtype:
        raise ValueError(f"tap should be of dtype {dtype} for {x.dtype} input, got {tap.dtype}")
    if tap.device != x.device:
        raise RuntimeError(f"tap is on {tap.device}, but input on {x.device}")
    if not tap.requires_grad and torch.is_grad_enabled() and not tracing():
        raise ValueError("tap should require grad: its gradient is where the norms are written")
