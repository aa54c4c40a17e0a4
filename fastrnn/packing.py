"""A PackedSequence as a padded tensor, and back.

torch.nn.utils.rnn has both, but the gradient of its `pad_packed_sequence` takes time in proportion to T*T*B where all
lengths differ: more than the whole network.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def packed_positions(batch_sizes: Tensor) -> Tensor:
    """int64 `[rows]`: the index of every packed row among the T*B rows of the padded tensor."""
    sequences = torch.arange(int(batch_sizes[0]), device=batch_sizes.device)
    return (sequences < batch_sizes.unsqueeze(1)).flatten().nonzero().squeeze(1)


def packed_lengths(batch_sizes: Tensor, batch: int) -> Tensor:
    """int64 `[B]`: the length of every sequence, in packed order."""
    return (batch_sizes.unsqueeze(1) > torch.arange(batch, device=batch_sizes.device)).sum(0)


def pad(packed: PackedSequence, positions: Tensor) -> Tensor:
    """`[T, B, N]`, zeros after each sequence's end; `positions` are the `packed_positions`."""
    data, sizes = packed.data, packed.batch_sizes
    T, B, N = len(sizes), int(sizes[0]), data.shape[-1]
    return data.new_zeros(T * B, N).index_copy_(0, positions.to(data.device), data).view(T, B, N)


def pack(x: Tensor, batch_sizes: Tensor, positions: Tensor) -> PackedSequence:
    """The rows of `x [T, B, N]` that are no padding; `positions` are the `packed_positions`."""
    return PackedSequence(x.flatten(0, 1).index_select(0, positions.to(x.device)), batch_sizes)


# PyTorch before 2.13 cannot trace these. This is what torch.compiler.disable sets, without importing the compiler.
packed_positions._torchdynamo_disable = pad._torchdynamo_disable = pack._torchdynamo_disable = True
