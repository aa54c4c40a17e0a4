"""The inverse of the tangent, and what follows from it, as instructions of a program, which has none for them.

They are exact to a few units in the last place of a float64, values and gradients.
"""

import math

from .building import Builder

# atan(r) = r + r z P(z) / Q(z), z = r^2, for |r| < 0.66: S. Moshier, Cephes, atan.c.
NUMERATOR = (
    -8.750608600031904122785e-1, -1.615753718733365076637e1, -7.500855792314704667340e1, -1.228866684490136173410e2,
    -6.485021904942025371773e1,
)  # fmt: skip
DENOMINATOR = (
    1.0, 2.485846490142306297962e1, 1.650270098316988542046e2, 4.328810604912902668951e2, 4.853903996359136964868e2,
    1.945506571482613964425e2,
)  # fmt: skip


def _polynomial(b: Builder, z: int, coefficients: tuple[float, ...]):
    total = coefficients[0]
    for one in coefficients[1:]:
        total = b.emit("add", b.emit("mul", total, z), one)
    return total


def _size(b: Builder, x: int):
    """Whether x < 0, and |x| with the slope 1 at 0."""
    negative = b.emit("lt", x, 0.0)
    return negative, b.emit("where", negative, b.emit("neg", x), x)


def atan(b: Builder, x: int):
    negative, size = _size(b, x)
    large, middle = b.emit("gt", size, math.tan(3 * math.pi / 8)), b.emit("gt", size, 0.66)
    # Of a branch that is not taken the argument is harmless, so that its gradient is no NaN.
    inverse = b.emit("div", -1.0, b.emit("where", large, size, 1.0))
    inner = b.emit("where", large, 1.0, size)
    turned = b.emit("div", b.emit("sub", inner, 1.0), b.emit("add", inner, 1.0))  # atan(size) - pi/4
    r = b.emit("where", large, inverse, b.emit("where", middle, turned, inner))
    start = b.emit("where", large, math.pi / 2, b.emit("where", middle, math.pi / 4, 0.0))
    z = b.emit("mul", r, r)
    fraction = b.emit("div", _polynomial(b, z, NUMERATOR), _polynomial(b, z, DENOMINATOR))
    angle = b.emit("add", start, b.emit("add", r, b.emit("mul", r, b.emit("mul", z, fraction))))
    return b.emit("where", negative, b.emit("neg", angle), angle)


def _twice_atan(b: Builder, x: int):
    return b.emit("mul", atan(b, x), 2.0)


def asin(b: Builder, x: int):
    rest = b.emit("mul", b.emit("sub", 1.0, x), b.emit("add", 1.0, x))
    return _twice_atan(b, b.emit("div", x, b.emit("add", 1.0, b.emit("sqrt", rest))))


def acos(b: Builder, x: int):
    return _twice_atan(b, b.emit("sqrt", b.emit("div", b.emit("sub", 1.0, x), b.emit("add", 1.0, x))))


def atan2(b: Builder, y, x):
    """The angle of the point (x, y), from the half of it that has no pole: 2 atan(y / (r + |x|)); 0 at the origin."""
    squares = b.emit("add", b.emit("mul", x, x), b.emit("mul", y, y))
    nowhere = b.emit("eq", squares, 0.0)
    left, size = _size(b, x)
    below = b.emit("add", b.emit("sqrt", b.emit("where", nowhere, 1.0, squares)), size)
    half = _twice_atan(b, b.emit("div", y, below))
    turn = b.emit("where", b.emit("lt", y, 0.0), -math.pi, math.pi)
    return b.emit("where", nowhere, 0.0, b.emit("where", left, b.emit("sub", turn, half), half))
