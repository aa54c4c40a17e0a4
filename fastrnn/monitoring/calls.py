"""Facts about a call of a `fastrnn.LSTM`, `GRU` or `RNN`, which the monitor's hooks read off its arguments."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ..cells import CELLS
from ..modules import _Recurrent


def data(args, kwargs):
    """The input tensor of a call; None if there is none."""
    x = args[0] if args else kwargs.get("input")
    return x.data if isinstance(x, PackedSequence) else x


def tap_shape(module: _Recurrent) -> tuple[int, int, int]:
    """The leading dimensions of a tap: `L*D, 2, S`."""
    return module.num_layers * (2 if module.bidirectional else 1), 2, len(CELLS[module._cell].states)


def steps_and_batch(module: _Recurrent, args, kwargs) -> tuple[int, int] | None:
    """T and B of a call; None for an empty batch, and for input that the module will refuse."""
    x = args[0] if args else kwargs.get("input")
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes), int(x.batch_sizes[0])
    if not isinstance(x, Tensor) or x.dim() not in (2, 3) or not x.is_floating_point():
        return None
    if x.dim() == 2:
        return x.shape[0], 1
    T, B = (x.shape[1], x.shape[0]) if module.batch_first else (x.shape[0], x.shape[1])
    return (T, B) if B else None


def needs_gradient(module: _Recurrent, args, kwargs) -> bool:
    """Whether a backward may follow the call; False under torch.func, whose gradients a tap does not see."""
    if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    hx = args[1] if len(args) > 1 else kwargs.get("hx")
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    tensors = (data(args, kwargs), *states, *module.parameters())
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def resets(module: _Recurrent, args, kwargs) -> Tensor | None:
    """The call's reset mask as `[T, B]`."""
    mask, x = kwargs.get("reset_mask"), args[0] if args else kwargs.get("input")
    if mask is None:
        return None
    mask = torch.as_tensor(mask)
    if mask.dim() == 1:
        return mask.unsqueeze(1)
    return mask.transpose(0, 1) if module.batch_first and isinstance(x, Tensor) and x.dim() == 3 else mask


def lengths(args, kwargs) -> Tensor | None:
    """int `[B]`, if the sequences of a call have lengths."""
    x, given = args[0] if args else kwargs.get("input"), kwargs.get("lengths")
    if not isinstance(x, PackedSequence):
        return None if given is None else torch.as_tensor(given)
    batch = torch.arange(int(x.batch_sizes[0])) if x.unsorted_indices is None else x.unsorted_indices.cpu()
    return (x.batch_sizes.unsqueeze(1) > batch).sum(0)


def bad_outputs(module: _Recurrent, output) -> Tensor:
    """bool `[T]`, on the device: True at the steps whose output is not finite."""
    y = output[0]
    if isinstance(y, PackedSequence):
        y, _ = pad_packed_sequence(y)
    elif module.batch_first and y.dim() == 3:
        y = y.transpose(0, 1)
    return ~y.detach().isfinite().flatten(1).all(-1)
