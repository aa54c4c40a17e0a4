"""Whether results are right: the 2x rule.

Against a float64 reference, an error is at most twice that of a yardstick in the same dtype, plus a rounding floor. Two
measures, relative to the reference: the norm of the error (systematic errors) and its largest element (a single wrong
row).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..cell_table import spec_of

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


# A ReLU's derivative jumps at zero. A sum that is a rounding above zero in one order of its terms, and below it in
# another, gives gradients that differ by far more than a rounding. Both are right. In a comparison the sequences in
# which this may happen send no gradient.

FINE = 2.0**-20
"""The largest eps with which this is done. In half types the yardstick is as often on the other side."""
NEAR, PAIRS = 64.0, 2
"""The distance at which the derivative is looked at, in roundings of x, and in how many directions: a unit a rounding
from its kink is missed in one of 20 directions."""
KINKS = frozenset({"abs", "maximum", "minimum", "sign", "where"})
"""The functions of a user's cell whose derivatives may jump."""


def has_kinks(cell: str) -> bool:
    """Whether the derivative of a cell may jump."""
    programs = spec_of(cell).program
    if programs is None:
        return cell in ("rnn_relu", "rnn_leaky_relu")
    return any(op in KINKS for program in programs for op, *_ in program.instructions)


def near_kinks(gradient: Callable[[Tensor], Tensor], x: Tensor, eps: float) -> Tensor:
    """The sequences that come within some roundings of a jump of the derivative, bool `[B]`; none where all do, since
    something must be compared.

    gradient: dL/dx as a function of `x [T, B, N]`, both in float64. Its second difference is of the order of the
    distance squared where it is smooth, and of the order of the jump across one.
    """
    here, generator = gradient(x), torch.Generator().manual_seed(2016)
    found = torch.zeros(x.shape[-2], dtype=torch.bool, device=x.device)
    for _ in range(PAIRS):
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        step = NEAR * eps * x.abs().mean() * signs
        bend = gradient(x + step) + gradient(x - step) - 2 * here
        found |= bend.abs().amax((0, -1)) > eps / 8 * here.abs().max()
    return torch.zeros_like(found) if found.all() else found
