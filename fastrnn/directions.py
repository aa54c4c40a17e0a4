"""Both directions of a layer in one call, for code that runs one at a time."""

import torch
from torch import Tensor


def walks_back(direction: int, reverse: bool) -> bool:
    """Whether a direction walks from the last step to the first. Directions alternate; `reverse`: of the first one."""
    return (direction % 2 == 1) != reverse


def _of_direction(x, d: int):
    """Direction d of tensors with a leading dimension D; None, and a tensor without dimensions, belong to each."""
    if isinstance(x, tuple):
        return type(x)._make(_of_direction(each, d) for each in x)
    return x[d] if isinstance(x, Tensor) and x.dim() > 0 else x


def each_direction(run, D: int, reverse: bool, *arguments):
    """`run(*arguments, reverse)` for each direction in turn; the results, tensors or named tuples, are stacked.

    arguments: tensors with a leading dimension D, None, and named tuples of them.
    """
    found = [run(*(_of_direction(x, d) for x in arguments), walks_back(d, reverse)) for d in range(D)]

    def stacked(results):
        missing = results[0] is None or results[0].shape == (0,)
        return results[0] if missing else torch.stack(results)

    if isinstance(found[0], Tensor):
        return stacked(found)
    return type(found[0])._make(map(stacked, zip(*found, strict=True)))
