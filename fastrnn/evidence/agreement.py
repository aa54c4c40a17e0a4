"""Whether results are right: the 2x rule.

Against a float64 reference, an error is at most twice that of a yardstick in the same dtype, plus a rounding floor. Two
measures, relative to the reference: the norm of the error (systematic errors) and its largest element (a single wrong
row).
"""

import math

import torch
from torch import Tensor

FLOOR = 4.0
"""In units of the dtype's eps: by so much the same sums differ in another order where the yardstick is nearly exact.
Measured in float32 on CPUs: at most 0.4 eps above twice torch.nn's error. The rest is room for the longer
sequences on a GPU, where the floor has not been measured."""
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TF32_EPS = 2.0**-10
MEASURES = ("norm", "largest element")

Tensors = dict[str, Tensor]


def error(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """(norm of the error / norm, largest error / largest element). NaN, or a wrong shape, is an infinite error."""
    if value.shape != truth.shape:
        return math.inf, math.inf
    if not truth.numel():
        return 0.0, 0.0
    difference = value.double() - truth
    if not truth.any():
        return (math.inf, math.inf) if difference.isnan().any() or difference.any() else (0.0, 0.0)
    size, largest = truth.norm(), truth.abs().max()
    errors = (difference.norm() / size, difference.abs().max() / largest)
    return tuple(math.inf if math.isnan(e) else e for e in map(float, errors))


def disagreement(
    values: Tensors, yardsticks: list[Tensors], truth: Tensors, eps: float, rounding: float = 1.0
) -> str | None:
    """The first tensor that breaks the rule, in words; None where all keep it.

    yardsticks: the largest of their errors counts. rounding: a factor on the floor.
    """
    for name, exact in truth.items():
        found, usual = error(values[name], exact), [error(one[name], exact) for one in yardsticks]
        for k, (measure, e) in enumerate(zip(MEASURES, found, strict=True)):
            allowed = 2 * max(pair[k] for pair in usual) + rounding * FLOOR * eps
            if not e <= allowed:
                return f"{name} is wrong: error {e:.1e} by {measure}, allowed {allowed:.1e}"
    return None
