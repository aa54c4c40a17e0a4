"""Whether a contestant computes the right thing, which is decided before it is timed.

The 2x rule of `fastrnn/evidence/agreement.py`: a contestant's error in each tensor is at most twice torch.nn's error
in the same dtype, plus a rounding floor.
"""

import math

from fastrnn.evidence.agreement import EPS, FLOOR, MEASURES, TF32_EPS, Tensors, error


def errors(values: Tensors, truth: Tensors) -> dict[str, tuple[float, float]]:
    """The error of every tensor that is in both. It is infinite where the truth is zero: such a case shows nothing."""
    found = {}
    for name, value in values.items():
        if name in truth:
            found[name] = error(value, truth[name]) if truth[name].any() else (math.inf, math.inf)
    return found


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
