"""Whether a contestant computes the right thing, which is decided before it is timed.

The 2x rule: against a float64 reference, a contestant's error in each tensor is at most twice torch.nn's error in the
same dtype, plus a rounding floor. Two measures, relative to the reference: the norm of the error (systematic errors)
and its largest element (a single wrong row).
"""

import math

import torch
from torch import Tensor

# The rounding floor, in units of the dtype's eps: by so much the same sums differ in another order where torch.nn
# happens to be nearly exact. Measured in float32 on the CPU cases: at most 0.4 eps above twice torch.nn's error. The
# rest is room for the sequences on a GPU, which are up to twenty times longer; there the floor has not been measured.
FLOOR = 4.0
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TF32_EPS = 2.0**-10
MEASURES = ("norm", "largest element")

Tensors = dict[str, Tensor]


def error(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """(norm of the error / norm, largest error / largest element). NaN, or a wrong shape, is an infinite error."""
    if value.shape != truth.shape:
        return math.inf, math.inf
    difference = value.double() - truth
    size, largest = truth.norm(), truth.abs().max()
    errors = (difference.norm() / size, difference.abs().max() / largest)
    return tuple(math.inf if math.isnan(e) else e for e in map(float, errors))


def errors(values: Tensors, truth: Tensors) -> dict[str, tuple[float, float]]:
    """The error of every tensor that is in both."""
    return {name: error(value, truth[name]) for name, value in values.items() if name in truth}


def worst(found: dict) -> dict[str, float]:
    """The largest error over all tensors, by either measure."""
    columns = zip(*found.values(), strict=True)
    return {measure: float(f"{max(column):.3g}") for measure, column in zip(MEASURES, columns, strict=True)}


def violations(found: dict, yardstick: dict, case, rounding: float = 1.0) -> list[str]:
    """The tensors that break the 2x rule, in words. `rounding` multiplies the floor."""
    floor = rounding * FLOOR * (TF32_EPS if case.tf32 else EPS[case.dtype])
    broken = []
    for name, pair in found.items():
        # torch.nn has no norms of the state gradient: for them its error in the gradient of the input counts.
        allowed = [2 * e + floor for e in yardstick.get(name) or yardstick["dx"]]
        for measure, e, limit in zip(MEASURES, pair, allowed, strict=True):
            if not e <= limit:
                broken.append(f"{name}: error {e:.2e} by {measure}, allowed {limit:.2e}")
    return broken
