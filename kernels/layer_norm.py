"""Layer norm of complete rows, over all planes of a row jointly (Ba et al. 2016).

The variance is biased; the caller applies weight and bias. The rows are COUNT tiles `[R, N]`, one per
plane, with H elements in each row, those `inside`. The results are zero outside.
"""

import triton
import triton.language as tl


@triton.jit
def row_mean(planes, inside, COUNT: tl.constexpr, H: tl.constexpr):
    """The mean `[R, 1]` over all planes of a row."""
    total = tl.sum(tl.where(inside, planes[0], 0.0), 1)
    for k in tl.static_range(1, COUNT):
        total += tl.sum(tl.where(inside, planes[k], 0.0), 1)
    return (total / (COUNT * H))[:, None]


@triton.jit
def normalize(planes, inside, COUNT: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr):
    """(x - mean) / std, and 1 / std `[R, 1]`."""
    mean = row_mean(planes, inside, COUNT, H)
    centred, squares = (), ()
    for k in tl.static_range(COUNT):
        x = planes[k] - mean
        centred, squares = centred + (x,), squares + (x * x,)
    rstd = 1 / tl.sqrt(row_mean(squares, inside, COUNT, H) + EPS)
    xhat = ()
    for k in tl.static_range(COUNT):
        xhat = xhat + (tl.where(inside, centred[k] * rstd, 0.0),)
    return xhat, rstd


@triton.jit
def normalize_backward(dxhat, xhat, rstd, inside, COUNT: tl.constexpr, H: tl.constexpr):
    """The gradient of `normalize`'s input, given that of its output."""
    products = ()
    for k in tl.static_range(COUNT):
        products = products + (dxhat[k] * xhat[k],)
    mean, mean_product = row_mean(dxhat, inside, COUNT, H), row_mean(products, inside, COUNT, H)
    dx = ()
    for k in tl.static_range(COUNT):
        dx = dx + (tl.where(inside, rstd * (dxhat[k] - mean - xhat[k] * mean_product), 0.0),)
    return dx


@triton.jit
def normalize_gates(gates, inside, G: tl.constexpr, H: tl.constexpr, EPS: tl.constexpr, EACH: tl.constexpr):
    """`normalize` over all gates, or with EACH of each gate by itself. The second result is a tuple of its parts."""
    xhat, rstd = (), ()
    if EACH:
        for g in tl.static_range(G):
            part, part_rstd = normalize((gates[g],), inside, 1, H, EPS)
            xhat, rstd = xhat + part, rstd + (part_rstd,)
    else:
        xhat, whole_rstd = normalize(gates, inside, G, H, EPS)
        rstd = (whole_rstd,)
    return xhat, rstd


@triton.jit
def normalize_gates_backward(dxhat, xhat, rstd, inside, G: tl.constexpr, H: tl.constexpr, EACH: tl.constexpr):
    """The gradient of `normalize_gates`' input, given that of its output."""
    dx = ()
    if EACH:
        for g in tl.static_range(G):
            dx = dx + normalize_backward((dxhat[g],), (xhat[g],), rstd[g], inside, 1, H)
    else:
        dx = normalize_backward(dxhat, xhat, rstd[0], inside, G, H)
    return dx
