"""PyTorch's pointwise operations as instructions of a program: the table that tracing looks them up in.

Each function takes a builder and values, numbers among them, and gives the value of the result. Composite operations
become their formulas, written so that the derived gradient is torch's: the same subgradient at the kinks, and finite
where a branch that is not taken would overflow (a `where` inside keeps its argument harmless).
"""

import math
from collections.abc import Callable

from . import arcs
from .building import Builder

Value = int | float  # a float is a constant
LOWERINGS: dict[str, Callable] = {}
"""By the name of the operation in `torch.ops.aten`."""


def lowering(*names: str):
    def register(function):
        LOWERINGS.update(dict.fromkeys(names, function))
        return function

    return register


def _same(op: str):
    return lambda b, *values: b.emit(op, *values)


for _name in (
    "mul", "div", "maximum", "minimum", "neg", "abs", "sign", "exp", "expm1", "log", "log1p", "sqrt", "sigmoid",
    "tanh", "erf", "sin", "cos", "lt", "le", "gt", "ge", "eq", "ne", "pow",
):  # fmt: skip
    LOWERINGS[_name] = _same(_name)
LOWERINGS |= {"sgn": _same("sign"), "logical_and": _same("and"), "logical_or": _same("or"), "logical_not": _same("not")}
LOWERINGS |= {name: getattr(arcs, name) for name in ("atan", "asin", "acos", "atan2")}
LOWERINGS |= {"bitwise_and": _same("and"), "bitwise_or": _same("or"), "bitwise_not": _same("not")}

UNCHANGED = ("clone", "alias", "positive", "contiguous", "lift_fresh", "lift")
FILLED = {"zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0, "empty_like": math.nan}


@lowering("add")
def _add(b: Builder, x, y, alpha: float = 1.0):
    return b.emit("add", x, b.emit("mul", y, float(alpha)))


@lowering("sub")
def _sub(b: Builder, x, y, alpha: float = 1.0):
    return b.emit("sub", x, b.emit("mul", y, float(alpha)))


@lowering("rsub")
def _rsub(b: Builder, x, y, alpha: float = 1.0):
    return _sub(b, y, x, alpha)


@lowering("square")
def _square(b: Builder, x):
    return b.emit("mul", x, x)


@lowering("reciprocal")
def _reciprocal(b: Builder, x):
    return b.emit("div", 1.0, x)


@lowering("rsqrt")
def _rsqrt(b: Builder, x):
    return b.emit("div", 1.0, b.emit("sqrt", x))


@lowering("exp2")
def _exp2(b: Builder, x):
    return b.emit("exp", b.emit("mul", x, math.log(2)))


@lowering("log2")
def _log2(b: Builder, x):
    return b.emit("mul", b.emit("log", x), 1 / math.log(2))


@lowering("log10")
def _log10(b: Builder, x):
    return b.emit("mul", b.emit("log", x), 1 / math.log(10))


@lowering("erfc")
def _erfc(b: Builder, x):
    return b.emit("sub", 1.0, b.emit("erf", x))


@lowering("tan")
def _tan(b: Builder, x):
    return b.emit("div", b.emit("sin", x), b.emit("cos", x))


@lowering("sinh")
def _sinh(b: Builder, x):
    above, below = b.emit("expm1", x), b.emit("expm1", b.emit("neg", x))  # e^x - 1 keeps small x; the 1s cancel
    return b.emit("mul", b.emit("sub", above, below), 0.5)


@lowering("cosh")
def _cosh(b: Builder, x):
    return b.emit("mul", b.emit("add", b.emit("exp", x), b.emit("exp", b.emit("neg", x))), 0.5)


@lowering("atanh")
def _atanh(b: Builder, x):
    return b.emit("mul", b.emit("sub", b.emit("log1p", x), b.emit("log1p", b.emit("neg", x))), 0.5)


@lowering("acosh")
def _acosh(b: Builder, x):
    above = b.emit("sub", x, 1.0)
    return b.emit("log1p", b.emit("add", above, b.emit("sqrt", b.emit("mul", above, b.emit("add", x, 1.0)))))


@lowering("asinh")
def _asinh(b: Builder, x):
    """log(x + sqrt(x^2 + 1)) for x > 0, as log1p of x + x^2 / (1 + sqrt(x^2 + 1)), and odd; its slope at 0 is 1."""

    def of(x):
        square = b.emit("mul", x, x)
        root = b.emit("sqrt", b.emit("add", square, 1.0))
        return b.emit("log1p", b.emit("add", x, b.emit("div", square, b.emit("add", root, 1.0))))

    negative = b.emit("lt", x, 0.0)
    size = b.emit("where", negative, b.emit("neg", x), x)
    return b.emit("where", negative, b.emit("neg", of(size)), of(size))


@lowering("logit", "special_logit")
def _logit(b: Builder, x, eps=None):
    x = x if eps is None else _clamp(b, x, float(eps), 1.0 - float(eps))
    return b.emit("sub", b.emit("log", x), b.emit("log1p", b.emit("neg", x)))


@lowering("deg2rad")
def _deg2rad(b: Builder, x):
    return b.emit("mul", x, math.pi / 180)


@lowering("rad2deg")
def _rad2deg(b: Builder, x):
    return b.emit("mul", x, 180 / math.pi)


@lowering("ldexp")
def _ldexp(b: Builder, x, y):
    return b.emit("mul", x, b.emit("pow", 2.0, y))


@lowering("sinc", "special_sinc")
def _sinc(b: Builder, x):
    at_zero = b.emit("eq", x, 0.0)
    angle = b.emit("mul", b.emit("where", at_zero, 1.0, x), math.pi)
    return b.emit("where", at_zero, 1.0, b.emit("div", b.emit("sin", angle), angle))


@lowering("xlogy", "special_xlogy")
def _xlogy(b: Builder, x, y):
    nothing = b.emit("and", b.emit("eq", x, 0.0), b.emit("le", y, 0.0))
    return b.emit("mul", x, b.emit("log", b.emit("where", nothing, 1.0, y)))


@lowering("special_xlog1py")
def _xlog1py(b: Builder, x, y):
    nothing = b.emit("and", b.emit("eq", x, 0.0), b.emit("le", y, -1.0))
    return b.emit("mul", x, b.emit("log1p", b.emit("where", nothing, 0.0, y)))


@lowering("heaviside")
def _heaviside(b: Builder, x, at_zero):
    return b.emit("where", b.emit("eq", x, 0.0), at_zero, b.emit("where", b.emit("gt", x, 0.0), 1.0, 0.0))


@lowering("signbit")
def _signbit(b: Builder, x):
    at_zero = b.emit("eq", x, 0.0)  # 1 / x tells -0 from 0
    of_zero = b.emit("lt", b.emit("div", 1.0, b.emit("where", at_zero, x, 1.0)), 0.0)
    return b.emit("or", b.emit("lt", x, 0.0), b.emit("and", at_zero, of_zero))


@lowering("copysign")
def _copysign(b: Builder, x, y):
    size = b.emit("abs", x)
    return b.emit("where", _signbit(b, y), b.emit("neg", size), size)


@lowering("_prelu_kernel")
def _prelu(b: Builder, x, slope):
    return b.emit("where", b.emit("gt", x, 0.0), x, b.emit("mul", x, slope))


@lowering("fmax")
def _fmax(b: Builder, x, y):
    return b.emit("where", b.emit("or", b.emit("ge", x, y), b.emit("ne", y, y)), x, y)


@lowering("fmin")
def _fmin(b: Builder, x, y):
    return b.emit("where", b.emit("or", b.emit("le", x, y), b.emit("ne", y, y)), x, y)


@lowering("where")
def _where(b: Builder, condition, x, y):
    return b.emit("where", condition, x, y)


@lowering("masked_fill")
def _masked_fill(b: Builder, x, mask, value):
    return b.emit("where", mask, value, x)


@lowering("logical_xor", "bitwise_xor")
def _xor(b: Builder, x, y):
    return b.emit("and", b.emit("or", x, y), b.emit("not", b.emit("and", x, y)))


@lowering("isnan")
def _isnan(b: Builder, x):
    return b.emit("ne", x, x)


@lowering("isinf")
def _isinf(b: Builder, x):
    return b.emit("eq", b.emit("abs", x), math.inf)


@lowering("isposinf")
def _isposinf(b: Builder, x):
    return b.emit("eq", x, math.inf)


@lowering("isneginf")
def _isneginf(b: Builder, x):
    return b.emit("eq", x, -math.inf)


@lowering("isfinite")
def _isfinite(b: Builder, x):
    return b.emit("lt", b.emit("abs", x), math.inf)


@lowering("lerp")
def _lerp(b: Builder, begin, end, weight):
    return b.emit("add", begin, b.emit("mul", weight, b.emit("sub", end, begin)))


@lowering("addcmul")
def _addcmul(b: Builder, x, y, z, value: float = 1.0):
    return b.emit("add", x, b.emit("mul", b.emit("mul", y, z), float(value)))


@lowering("addcdiv")
def _addcdiv(b: Builder, x, y, z, value: float = 1.0):
    return b.emit("add", x, b.emit("mul", b.emit("div", y, z), float(value)))


@lowering("hypot")
def _hypot(b: Builder, x, y):
    return b.emit("sqrt", b.emit("add", b.emit("mul", x, x), b.emit("mul", y, y)))


@lowering("logaddexp")
def _logaddexp(b: Builder, x, y):
    apart = b.emit("neg", b.emit("abs", b.emit("sub", x, y)))
    return b.emit("add", b.emit("maximum", x, y), b.emit("log1p", b.emit("exp", apart)))


@lowering("logaddexp2")
def _logaddexp2(b: Builder, x, y):
    x, y = b.emit("mul", x, math.log(2)), b.emit("mul", y, math.log(2))
    return b.emit("mul", _logaddexp(b, x, y), 1 / math.log(2))


# ----------------------------------------------------------------------------------------------- limits and activations


@lowering("clamp_min")
def _clamp_min(b: Builder, x, low):
    return b.emit("where", b.emit("lt", x, low), low, x)


@lowering("clamp_max")
def _clamp_max(b: Builder, x, high):
    return b.emit("where", b.emit("gt", x, high), high, x)


@lowering("clamp", "clip")
def _clamp(b: Builder, x, min=None, max=None):
    x = x if min is None else _clamp_min(b, x, min)
    return x if max is None else _clamp_max(b, x, max)


@lowering("threshold")
def _threshold(b: Builder, x, threshold, value):
    return b.emit("where", b.emit("le", x, threshold), value, x)


@lowering("relu")
def _relu(b: Builder, x):
    return _threshold(b, x, 0.0, 0.0)


@lowering("hardtanh")
def _hardtanh(b: Builder, x, min_val: float = -1.0, max_val: float = 1.0):
    low, high = float(min_val), float(max_val)
    return b.emit("where", b.emit("le", x, low), low, b.emit("where", b.emit("ge", x, high), high, x))


@lowering("relu6")
def _relu6(b: Builder, x):
    return _hardtanh(b, x, 0.0, 6.0)


@lowering("hardsigmoid")
def _hardsigmoid(b: Builder, x):
    inner = b.emit("div", b.emit("add", x, 3.0), 6.0)
    return b.emit("where", b.emit("le", x, -3.0), 0.0, b.emit("where", b.emit("ge", x, 3.0), 1.0, inner))


@lowering("hardswish")
def _hardswish(b: Builder, x):
    inner = b.emit("div", b.emit("mul", x, b.emit("add", x, 3.0)), 6.0)
    return b.emit("where", b.emit("le", x, -3.0), 0.0, b.emit("where", b.emit("ge", x, 3.0), x, inner))


@lowering("leaky_relu")
def _leaky_relu(b: Builder, x, negative_slope: float = 0.01):
    return b.emit("where", b.emit("gt", x, 0.0), x, b.emit("mul", x, float(negative_slope)))


@lowering("elu")
def _elu(b: Builder, x, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0):
    positive = b.emit("gt", x, 0.0)
    below = b.emit("where", positive, 0.0, b.emit("mul", x, float(input_scale)))
    return b.emit(
        "where", positive, b.emit("mul", x, float(scale)), b.emit("mul", b.emit("expm1", below), float(alpha * scale))
    )


@lowering("celu")
def _celu(b: Builder, x, alpha: float = 1.0):
    return _elu(b, x, alpha, 1.0, 1 / alpha)


@lowering("selu")
def _selu(b: Builder, x):
    return _elu(b, x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@lowering("silu")
def _silu(b: Builder, x):
    return b.emit("mul", x, b.emit("sigmoid", x))


@lowering("softplus")
def _softplus(b: Builder, x, beta: float = 1.0, threshold: float = 20.0):
    scaled = b.emit("mul", x, float(beta))
    large = b.emit("gt", scaled, float(threshold))
    curved = b.emit("log1p", b.emit("exp", b.emit("where", large, 0.0, scaled)))
    return b.emit("where", large, x, b.emit("div", curved, float(beta)))


@lowering("mish")
def _mish(b: Builder, x):
    return b.emit("mul", x, b.emit("tanh", _softplus(b, x)))


@lowering("log_sigmoid", "log_sigmoid_forward")
def _log_sigmoid(b: Builder, x):
    curved = b.emit("log1p", b.emit("exp", b.emit("neg", b.emit("abs", x))))
    return b.emit("sub", b.emit("minimum", x, 0.0), curved)


@lowering("gelu")
def _gelu(b: Builder, x, approximate: str = "none"):
    if approximate == "none":
        inner = b.emit("erf", b.emit("mul", x, math.sqrt(0.5)))
    else:
        cube = b.emit("mul", b.emit("mul", x, x), x)
        polynomial = b.emit("add", x, b.emit("mul", cube, 0.044715))
        inner = b.emit("tanh", b.emit("mul", polynomial, math.sqrt(2 / math.pi)))
    return b.emit("mul", b.emit("mul", x, 0.5), b.emit("add", inner, 1.0))


@lowering("hardshrink")
def _hardshrink(b: Builder, x, lambd: float = 0.5):
    inside = b.emit("and", b.emit("ge", x, -float(lambd)), b.emit("le", x, float(lambd)))
    return b.emit("where", inside, 0.0, x)


@lowering("softshrink")
def _softshrink(b: Builder, x, lambd: float = 0.5):
    below = b.emit("where", b.emit("lt", x, -float(lambd)), b.emit("add", x, float(lambd)), b.emit("mul", x, 0.0))
    return b.emit("where", b.emit("gt", x, float(lambd)), b.emit("sub", x, float(lambd)), below)
