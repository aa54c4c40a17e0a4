"""Pointwise functions on float32 tiles that Triton does not have, or has with fewer digits. NaN stays NaN."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    # exp(-x) may be infinite; then 1 / inf = 0 is the right answer.
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh to about 2 units in the last place: an odd polynomial near zero, where the quotient of exponentials cancels.

    The coefficients are those of Cephes' tanhf (Moshier), for |x| < 0.625.
    """
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    near = p * z * x + x
    size = tl.abs(x)
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def expm1(x):
    """exp(x) - 1; near zero as 2 u / (1 - u) with u = tanh(x / 2), where the difference cancels."""
    u = tanh(0.5 * x)
    return tl.where(tl.abs(x) < 1, 2 * u / (1 - u), tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """log(1 + x). Below 1 it is multiplied by x / ((1 + x) - 1), which undoes the rounding of 1 + x (Kahan)."""
    w = 1 + x
    near = tl.where(w == 1, x, tl.log(w) * (x / (w - 1)))
    return tl.where(x > 1, tl.log(w), near)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as in torch."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def power(a, b):
    """a to the power of b, through float64: exp(b log a) in float32 has few digits where the exponent is large."""
    wide, exponent = a.to(tl.float64), b.to(tl.float64)
    size = tl.exp(exponent * tl.log(tl.abs(wide)))
    whole, half = tl.floor(exponent), 0.5 * exponent
    odd = (whole == exponent) & (tl.floor(half) != half)
    real = (whole == exponent) | (wide == float("-inf"))  # no root of a negative number is
    negative = tl.where(real, tl.where(odd, -size, size), float("nan"))
    result = tl.where(wide < 0, negative, size)
    return tl.where((exponent == 0) | (wide == 1), 1.0, result).to(tl.float32)


@triton.jit
def only(inside, x):
    """x, and zero where H has no such element. There a function of zeros may be anything, and a product or a norm over
    the tile would spread it. `inside` is empty where the tile has no such place."""
    result = x
    if len(inside) > 0:
        result = tl.where(inside[0], x, 0.0)
    return result


@triton.jit
def filled(like, value):
    """A tile of one number, of the shape of another tile."""
    return tl.full(like.shape, value, tl.float32)
