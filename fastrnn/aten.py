"""torch's own kernels (cuDNN, MIOpen, oneDNN): which calls they take, whole calls, single steps, and a fast path."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from .cell_table import spec_of, suffixes

KNOWN_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _halves_without_onednn() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available():
        return frozenset()  # torch then has not even the question; it runs every LSTM step by step
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in known.items() if not supported)


HALVES_WITHOUT_ONEDNN = _halves_without_onednn()
"""The half types in which oneDNN has no LSTM and no product on this processor. torch asks before it hands over half
tensors, but not before it hands over float32 ones that autocast makes half: "could not create a primitive
descriptor"."""


def why_not(request) -> str | None:
    """Why torch's kernels cannot run a call (`dispatch.Request`), or None. They take packed input and projections."""
    extras = request.features - {"projection"}
    if extras:
        return f"torch's own kernels take only plain calls; this one has {', '.join(sorted(extras))}"
    if request.cell not in KNOWN_CELLS:
        return f"torch has no {spec_of(request.cell).name}"
    return None


def refused_by_cudnn(x: Tensor, training: bool) -> bool:
    """Whether a gradient may follow a forward in eval mode, which cuDNN does not compute."""
    return x.is_cuda and not training and x.requires_grad and torch.is_grad_enabled()


def refused_by_onednn(cell: str, x: Tensor, proj_size: int, packed: bool) -> bool:
    """Whether torch hands the call to oneDNN in a half type that it does not have here, by autocast.

    In float16 oneDNN only infers, and torch wants an LSTM that trains wherever gradients are enabled.
    """
    if not torch._C._is_any_autocast_enabled() or not torch.backends.mkldnn.is_available():
        return False
    if cell != "lstm" or proj_size or packed or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    half = torch.get_autocast_dtype("cpu")
    missing = half in HALVES_WITHOUT_ONEDNN or (half == torch.float16 and torch.is_grad_enabled())
    return torch.is_autocast_enabled("cpu") and missing


def network(options, x: Tensor, states: tuple[Tensor, ...], params: Mapping[str, Tensor], batch_sizes: Tensor | None):
    """A whole call.

    Args:
        options: `stack.Options`; those that torch.nn lacks are off.
        x: `[T, B, I]`; `[rows, I]` with `batch_sizes`, those of a PackedSequence.
        states: h `[L*D, B, P]`, and for the LSTM c `[L*D, B, H]`.
        params: by torch.nn's names.

    Returns:
        The output, shaped as x, and the final states, shaped as `states`.
    """
    names = [name for layer in suffixes(options.num_layers, options.bidirectional) for name in layer]
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    weights = [params[f"{kind}_{name}"] for name in names for kind in kinds if f"{kind}_{name}" in params]
    hx = states if len(states) > 1 else states[0]
    head = (x, hx) if batch_sizes is None else (x, batch_sizes, hx)
    tail = (options.num_layers, options.dropout, options.training, options.bidirectional)
    if batch_sizes is None:
        tail = (*tail, False)  # batch_first
    y, *states = getattr(torch, options.cell)(*head, weights, "bias_ih_l0" in params, *tail)
    return y, tuple(states)


def step(cell: str, x: Tensor, states: tuple[Tensor, ...], weights) -> tuple[Tensor, ...]:
    """The states `[B, H]` after one step on `x [B, I]`; no `states` are zeros. `weights`: as in torch.nn's cells.

    A few operations, which can be traced and transformed. A whole call would prepare the weights for many steps.
    """
    count = len(spec_of(cell).states)
    w_ih, w_hh, *biases = weights
    if not states:
        states = (x.new_zeros(x.shape[0], w_hh.shape[1]),) * count
    new = getattr(torch, f"{cell}_cell")(x, states if count > 1 else states[0], w_ih, w_hh, *biases)
    return new if count > 1 else (new,)


def directly(module: nn.Module, input, hx, most_steps_of_torch: Callable[..., int]):
    """Fast path: runs a valid plain call at once, unless it has more steps than torch is to run; None for any other.

    `functional` would choose the same kernels, but its checks alone take as long as a short call.

    Args:
        module: a fastrnn LSTM, GRU or RNN whose extras are off.
        input, hx: as of its forward, unchecked.
        most_steps_of_torch: of `dispatch`.
    """
    if not isinstance(input, Tensor) or input.dim() not in (2, 3):
        return None
    cell = module._cell
    pair, batched, batch_dim = cell == "lstm", input.dim() == 3, 0 if module.batch_first else 1
    states = () if hx is None else hx if pair else (hx,)
    if pair and not isinstance(states, (tuple, list)):
        return None
    if not batched:
        if any(state.dim() != 2 for state in states):
            return None
        input, states = input.unsqueeze(batch_dim), [state.unsqueeze(1) for state in states]
    sizes = input.shape
    steps, batch, dtype = sizes[1 - batch_dim], sizes[batch_dim], input.dtype
    hidden_size, proj_size = module.hidden_size, module.proj_size
    # The type of the device takes as long to ask for as all the rest.
    device_type = "cpu" if input.is_cpu else input.device.type
    grad_mode = torch.is_grad_enabled()
    most_steps = most_steps_of_torch(cell, proj_size, grad_mode, dtype, device_type, hidden_size, batch)
    if not 0 < steps <= most_steps or (input.is_cuda and refused_by_cudnn(input, module.training)):
        return None
    weights, stored, shapes = [], module._parameters, module._shapes()
    for layer in shapes:
        for name, shape in layer:
            weight = stored.get(name)  # a weight that is computed at every call is no parameter
            if weight is None or weight.shape != shape:
                return None
            weights.append(weight)
    # torch's kernels check for themselves that all weights are on one device.
    device = input.device
    if sizes[2] != module.input_size or weights[0].dtype != dtype or weights[0].device != device:
        return None
    if pair and refused_by_onednn(cell, input, proj_size, False):
        return None
    shape_h = (len(shapes), batch, proj_size or hidden_size)
    state_shapes = (shape_h, (len(shapes), batch, hidden_size)) if pair else (shape_h,)
    if hx is not None:
        if len(states) != len(state_shapes):
            return None
        for state, shape in zip(states, state_shapes, strict=True):
            if state.shape != shape or state.dtype != dtype or state.device != device:
                return None
    return padded(module, input, states, weights, batched)


def _zero_states(module: nn.Module, x: Tensor, batch: int) -> list[Tensor]:
    walks, hidden_size = module.num_layers * (1 + module.bidirectional), module.hidden_size
    widths = (module.proj_size or hidden_size, hidden_size) if module._cell == "lstm" else (hidden_size,)
    return [x.new_zeros(walks, batch, width) for width in widths]


def padded(module: nn.Module, x: Tensor, states, weights: list[Parameter], batched: bool):
    """A plain call, all of it valid, as the module returns it.

    x: `[T, B, I]`, or `[B, T, I]` with batch_first. states: h `[L*D, B, P]` and c `[L*D, B, H]`; none for zeros.
    weights: in torch.nn's order. batched: False for results without B, which is 1.
    """
    pair, batch_dim = module._cell == "lstm", 0 if module.batch_first else 1
    states = states or _zero_states(module, x, x.shape[batch_dim])
    y, *states = getattr(torch, module._cell)(
        x, states if pair else states[0], weights, module.bias, module.num_layers, module.dropout,
        module.training, module.bidirectional, module.batch_first,
    )  # fmt: skip
    if not batched:
        y, states = y.squeeze(batch_dim), [state.squeeze(1) for state in states]
    return y, tuple(states) if pair else states[0]


def packed(module: nn.Module, x: Tensor, batch_sizes: Tensor, states, weights: list[Parameter]):
    """A plain call of packed rows `x [rows, I]`, all of it valid: `(y, h_n, c_n)`, c_n None where the cell has no c.

    states: h `[L*D, B, P]` and c `[L*D, B, H]`, in the order of the rows; none for zeros. weights: in torch.nn's order.
    """
    pair = module._cell == "lstm"
    states = states or _zero_states(module, x, int(batch_sizes[0]))
    y, *found = getattr(torch, module._cell)(
        x, batch_sizes, tuple(states) if pair else states[0], weights, module.bias, module.num_layers, module.dropout,
        module.training, module.bidirectional,
    )  # fmt: skip
    return y, found[0], found[1] if pair else None


def flatten_weights(module: nn.Module) -> None:
    """Lays the weights of a fastrnn LSTM, GRU or RNN out in the one chunk that cuDNN wants, where it can run them."""
    # Only stored weights: a computed one may not exist yet, or change when it is read (spectral norm).
    weights = [module._parameters.get(name) for layer in module.all_names for name in layer]
    first = weights[0]
    if module.layer_norm or module.num_heads > 1 or module._cell not in KNOWN_CELLS:
        return
    if not all(type(w) is Parameter and w.is_cuda and w.dtype == first.dtype for w in weights):
        return
    if not torch.backends.cudnn.is_acceptable(first) or len({w.data_ptr() for w in weights}) != len(weights):
        return
    mode = torch.backends.cudnn.rnn.get_cudnn_mode(module.mode)
    with torch.cuda.device_of(first), torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            weights, len(module.all_names[0]), module.input_size, mode, module.hidden_size, module.proj_size,
            module.num_layers, module.batch_first, module.bidirectional,
        )  # fmt: skip
