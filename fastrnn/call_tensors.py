"""The tensors of a call: each is checked, and brought into one form, time first and batched.

Exceptions are of the type that torch.nn raises for the same mistake. Values on a GPU are never read back just to be
checked.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .cell_table import network_shapes, spec_of
from .equations import accumulate_dtype
from .linear import tracing
from .packing import packed_positions, pad


def check_input(cell: str, input, packed, weight_ih: Tensor, batch_first: bool):
    """The input tensor, time first and batched (or packed), and the batch size."""
    x = input if packed is None else packed.data
    if packed is None and x.dim() not in (2, 3):
        raise ValueError(f"{spec_of(cell).name}: Expected input to be 2D or 3D, got {x.dim()}D instead")
    if not (x.is_floating_point() or x.is_complex()):
        raise ValueError(f"input should be a floating or complex tensor, got {x.dtype}")
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


def check_parameters(params: Mapping[str, Tensor], device: torch.device, *network) -> list[Tensor]:
    """The parameters of a network, each present, of its shape and on the device; `network`: of `network_shapes`."""
    # torch.compile would warn of the cache.
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


def check_states(cell: str, x: Tensor, hx, expected, batched: bool) -> tuple[Tensor, ...]:
    """The initial states, batched: `hx` checked, or zeros."""
    if hx is None:
        return tuple(x.new_zeros(shape) for shape in expected)
    if len(expected) == 1:
        states = (hx,)
    elif isinstance(hx, (tuple, list)) and len(hx) == len(expected):
        states = tuple(hx)
    else:
        name = "an LSTM" if cell == "lstm" else spec_of(cell).name
        length = f" of {len(hx)}" if isinstance(hx, (tuple, list)) else ""
        raise RuntimeError(f"hx of {name} should be {tuple_of_states(cell, '0')}, got {type(hx).__name__}{length}")
    for k, (state, shape) in enumerate(zip(states, expected, strict=True)):
        if not isinstance(state, Tensor):
            raise TypeError(f"hx[{k}] should be a tensor, got {type(state).__name__}")
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


def check_step_inputs(spec, given: Mapping, sizes, x: Tensor, packed, batched: bool, batch_first: bool):
    """The inputs of a user's cell, by its order of their names: `[L*D, T, B, H]` each, in the order of the batch."""
    unknown = [name for name in given if name not in spec.inputs]
    if unknown:
        known = f"; the inputs of {spec.name} are {', '.join(spec.inputs)}" if spec.inputs else ""
        raise TypeError(f"{spec.name} got an unexpected keyword argument {unknown[0]!r}{known}")
    found = []
    for name in spec.inputs:
        one = given.get(name)
        if isinstance(one, PackedSequence):
            if packed is None or not _same_order(one, packed):
                raise ValueError(f"{name} is a PackedSequence, but input is none of the same lengths")
            one = pad(one, packed_positions(one.batch_sizes))
        elif isinstance(one, Tensor):
            one = _time_first(one, batched, packed is None and batch_first)
            if packed is not None and packed.sorted_indices is not None and one.dim() > 1:
                one = one.index_select(-2, packed.sorted_indices)
        else:
            raise TypeError(f"{name}: {spec.name} needs it at every call, as a tensor, got {one!r}")
        L, T, B, H = sizes
        if tuple(one.shape) not in ((B, H), (T, B, H), sizes):
            order = "[B, T, H]" if batch_first and packed is None else "[T, B, H]"
            raise ValueError(
                f"{name} should be {order}, or [B, H], constant in time, or with a leading dimension of {L}, layers "
                f"times directions; T, B, H = {T}, {B}, {H}; got {list(given[name].shape)}"
            )
        if one.device != x.device:
            raise RuntimeError(f"{name} is on {one.device}, but input on {x.device}")
        if one.dtype != x.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"{name} has dtype {one.dtype}, but input has {x.dtype}")
        found.append(one.expand(sizes))
    return tuple(found)


def _same_order(one: PackedSequence, other: PackedSequence) -> bool:
    """Whether two packed batches have the same lengths, in the same order."""
    pairs = ((one.batch_sizes, other.batch_sizes), (one.sorted_indices, other.sorted_indices))
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _time_first(x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """`[.., T, B, H]` or `[B, H]`; unbatched, x lacks B."""
    if not batched:
        x = x.unsqueeze(-2)
    return x.transpose(-3, -2) if batched and batch_first and x.dim() > 2 else x


def _as_tensor(values, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is no tensor, as one; of `dtype` where it is empty, since an empty list says no type."""
    found = torch.as_tensor(values, device=device)
    return found if found.numel() else found.to(dtype)


def check_lengths(lengths, T: int, batch: int, x: Tensor, packed) -> Tensor:
    """`lengths [B]` on x's device and within [0, T]."""
    if packed is not None:
        raise ValueError("lengths: a PackedSequence already has its own; pass one or the other")
    if not isinstance(lengths, Tensor):
        lengths = _as_tensor(lengths, torch.int64, torch.device("cpu"))
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths should be of an integer dtype, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths should have shape ({batch},), one per sequence, got {tuple(lengths.shape)}")
    lengths = lengths.to(torch.int64)  # a uint8 one would be compared with T modulo 256
    if lengths.device.type == "cpu" and not tracing() and bool(((lengths < 0) | (lengths > T)).any()):
        raise ValueError(f"lengths should lie within [0, {T}], the number of steps, got {lengths.tolist()}")
    return lengths.to(x.device, non_blocking=True).clamp(0, T)


def check_reset_mask(reset_mask: Tensor, T: int, batch: int, x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """`reset_mask`, bool `[T, B]`."""
    transposed = batched and batch_first
    shape = (batch, T) if transposed else (T, batch)
    if not isinstance(reset_mask, Tensor):
        reset_mask = _as_tensor(reset_mask, torch.bool, x.device)
    if not batched and reset_mask.dim() == 1:
        reset_mask = reset_mask.unsqueeze(1)
    if reset_mask.dtype != torch.bool:
        raise ValueError(f"reset_mask should be of dtype torch.bool, got {reset_mask.dtype}")
    if tuple(reset_mask.shape) != shape:
        raise ValueError(f"reset_mask should have shape {shape}, got {tuple(reset_mask.shape)}")
    if reset_mask.device != x.device:
        raise RuntimeError(f"reset_mask is on {reset_mask.device}, but input on {x.device}")
    return reset_mask.transpose(0, 1) if transposed else reset_mask


def check_decay(decay, sizes, projection: int, x: Tensor, packed, batched: bool, batch_first: bool) -> Tensor:
    """`decay [T, B, 1 or H]` in x's dtype, in the order of the batch; `sizes`: T, B, H."""
    if isinstance(decay, PackedSequence):
        if packed is None or not _same_order(decay, packed):
            raise ValueError("decay is a PackedSequence, but input is none of the same lengths")
        rows = decay.data if decay.data.dim() == 2 else decay.data.unsqueeze(-1)
        found = pad(PackedSequence(rows, decay.batch_sizes), packed_positions(decay.batch_sizes))
        given, order = [len(rows), *decay.data.shape[1:]], None
    else:
        found = decay if isinstance(decay, Tensor) else torch.as_tensor(decay, dtype=x.dtype, device=x.device)
        given, order = list(found.shape), None if packed is None else packed.sorted_indices
        if not batched and found.dim() in (1, 2):
            found = found.unsqueeze(1)
        elif batched and batch_first and packed is None and found.dim() in (2, 3):
            found = found.transpose(0, 1)
        if found.dim() == 2:
            found = found.unsqueeze(-1)
    T, B, H = sizes
    # Size by size: for symbolic ones the compiler does not follow the comparison of whole tuples.
    fits = found.dim() == 3 and found.shape[0] == T and found.shape[1] == B
    if not (fits and (found.shape[2] == 1 or (found.shape[2] == H and not projection))):
        first = f"[{'B, T' if batch_first and packed is None else 'T, B'}" if batched else "[T"
        forms = f"{first}]" if projection else f"{first}] or {first}, H]"
        why = " (with a projection h and c have different sizes)" if projection else ""
        raise ValueError(f"decay should be {forms}{why}; T, B, H = {T}, {B}, {H}; got {given}")
    if found.is_complex():
        raise ValueError(f"decay should be of a real dtype, got {found.dtype}")
    if found.device != x.device:
        raise RuntimeError(f"decay is on {found.device}, but input on {x.device}")
    return (found if order is None else found.index_select(1, order)).to(x.dtype)


def check_tap(tap: Tensor, shape, x: Tensor) -> None:
    """A leaf of zeros of this shape, in the arithmetic's dtype."""
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


def tuple_of_states(cell: str, suffix: str = "") -> str:
    """`a pair (h0, c0)`."""
    states = spec_of(cell).states
    return f"a {'pair' if len(states) == 2 else 'tuple'} ({', '.join(state + suffix for state in states)})"
