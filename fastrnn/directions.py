"""Both directions of a layer in one call, for a scan that knows only one of them."""

import torch
from torch import Tensor


def walks_back(direction: int, reverse: bool) -> bool:
    """Whether that direction does; `reverse`: whether the first one does. They take turns."""
    return (direction % 2 == 1) != reverse


def each_direction(scan, tensors, cell: str, reverse: bool, *rest) -> tuple[Tensor, ...]:
    """`scan(*tensors, cell, reverse, *rest)` of each direction, one after the other.

    tensors: as in `ops.py`, with the leading dimension D; None, numbers and tensors of no dimension serve them all.
    """

    def has_directions(x):
        return torch.is_tensor(x) and x.dim() > 0

    def one(d):
        return scan(*(x[d] if has_directions(x) else x for x in tensors), cell, walks_back(d, reverse), *rest)

    outputs = zip(*map(one, range(len(next(filter(has_directions, tensors))))), strict=True)
    # An output of one dimension is empty and does not exist.
    return tuple(torch.stack(found) if found[0].dim() > 1 else found[0] for found in outputs)
