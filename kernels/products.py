"""The products with W_hh: out of weights on the chip (local), or with both operands streamed (step by step).

Both add the same tiles in the same order, so they give the same bits.
"""

import triton
import triton.language as tl

from .memory import RESET, choose, hidden_tile, load_planes, load_tile

# Triton's interpreter multiplies the bits of bfloat16 tiles as integers (3.5 to 3.9), so there they become float32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b; products and sums in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_weight(w_ptr, gate, unit, source, H: tl.constexpr):
    """W_hh[gate * H + unit, source]; zero outside. `unit` and `source` are index tiles that broadcast."""
    return tl.load(w_ptr + (gate * H + unit) * H + source, mask=(unit < H) & (source < H), other=0.0)


@triton.jit
def load_weights(w_ptr, G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    """W_hh in tiles `[unit, source]`, or TRANSPOSED `[source, unit]`, counted by (gate, unit tile, source tile)."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    span = tl.arange(0, BLOCK_H)
    weights = ()
    for index in tl.static_range(G * TILES * TILES):
        unit = (index // TILES % TILES) * BLOCK_H + span
        source = (index % TILES) * BLOCK_H + span
        if TRANSPOSED:
            tile = load_weight(w_ptr, index // (TILES * TILES), unit[None, :], source[:, None], H)
        else:
            tile = load_weight(w_ptr, index // (TILES * TILES), unit[:, None], source[None, :], H)
        weights = weights + (tile,)
    return weights


@triton.jit
def recurrent_operand(h, flags, recurrent_ptr, origin, rows, cols, inside, H: tl.constexpr):
    """What W_hh multiplies: h, zero behind a reset, times the mask of recurrent dropout; in h's own dtype."""
    operand = choose(flags, RESET, 0.0, h.to(tl.float32))
    if recurrent_ptr is not None:
        operand = operand * load_tile(recurrent_ptr, origin, rows, cols, inside, H)
    return operand.to(h.dtype)


@triton.jit
def local_product(operands, weights, n, G: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr):
    """W_hh h for the n-th tile of every gate, out of weights on the chip."""
    products = ()
    for g in tl.static_range(G):
        product = tl.zeros((operands[0].shape[0], operands[0].shape[1]), tl.float32)
        for k in tl.static_range(TILES):
            product = dot(operands[k], weights[(g * TILES + n) * TILES + k], product, PRECISION)
        products = products + (product,)
    return products


@triton.jit
def streamed_product(
    h_ptr, w_ptr, flags, recurrent_ptr, origin, rows, row_inside, cols,
    G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_hh h for the columns `cols` of every gate, h and W_hh streamed in tiles."""
    products = ()
    for _ in tl.static_range(G):
        products = products + (tl.zeros((rows.shape[0], BLOCK_H), tl.float32),)
    for k in tl.range(0, (H + BLOCK_K - 1) // BLOCK_K):
        source, inside = hidden_tile(k, row_inside, BLOCK_K, H)
        h = tl.load(h_ptr + origin * H + rows[:, None] * H + source[None, :], mask=inside, other=0.0)
        operand = recurrent_operand(h, flags, recurrent_ptr, origin, rows, source, inside, H)
        sums = ()
        for g in tl.static_range(G):
            w = load_weight(w_ptr, g, cols[None, :], source[:, None], H)
            sums = sums + (dot(operand, w, products[g], PRECISION),)
        products = sums
    return products


@triton.jit
def scaled(planes, scale, COUNT: tl.constexpr):
    result = planes
    if scale is not None:
        result = ()
        for k in tl.static_range(COUNT):
            result = result + (planes[k] * scale[:, None],)
    return result


@triton.jit
def local_product_back(operands, weights, n, G: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr):
    """dgh W_hh for the n-th tile of h, out of weights on the chip. `operands[k][g]`."""
    product = tl.zeros((operands[0][0].shape[0], operands[0][0].shape[1]), tl.float32)
    for k in tl.static_range(TILES):
        for g in tl.static_range(G):
            w = weights[(g * TILES + k) * TILES + n]
            product = dot(operands[k][g].to(w.dtype), w, product, PRECISION)
    return product


@triton.jit
def streamed_product_back(
    sent_ptr, sent_row, w_ptr, scale, rows, row_inside, cols,
    G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dgh W_hh for the columns `cols` of h, dgh and W_hh streamed in tiles."""
    product = tl.zeros((rows.shape[0], BLOCK_H), tl.float32)
    for k in tl.range(0, (H + BLOCK_K - 1) // BLOCK_K):
        unit, inside = hidden_tile(k, row_inside, BLOCK_K, H)
        sent = scaled(load_planes(sent_ptr, sent_row, rows, unit, inside, G, H), scale, G)
        for g in tl.static_range(G):
            w = load_weight(w_ptr, g, unit[:, None], cols[None, :], H)
            product = dot(sent[g].to(w.dtype), w, product, PRECISION)
    return product
