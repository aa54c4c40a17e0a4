"""The products with W_hh, out of weights on the chip (local, grouped) or with both operands streamed (step by step).

All add the same tiles in the same order, so they give the same bits. What the programs of a group leave for each other
is loaded with `.cg`, past the L1 cache, which knows nothing of their writes.
"""

import triton
import triton.language as tl

from .memory import RESET, choose, hidden_tile, load_stored, load_tile

# Triton's interpreter multiplies the bits of bfloat16 tiles as integers (3.5 to 3.9), so there they become float32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b; products and sums in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def zeros(rows, G: tl.constexpr, BLOCK_H: tl.constexpr):
    """A float32 tile of zeros for every gate."""
    tiles = ()
    for _ in tl.static_range(G):
        tiles = tiles + (tl.zeros((rows.shape[0], BLOCK_H), tl.float32),)
    return tiles


@triton.jit
def load_biases(b_ptr, rows, cols, G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """b_hh as a tile for every gate, for W_hh h to be added to; zeros without one."""
    tiles = zeros(rows, G, BLOCK_H)
    if b_ptr is not None:
        biases = ()
        for g in tl.static_range(G):
            bias = tl.load(b_ptr + g * H + cols, mask=cols < H, other=0.0).to(tl.float32)
            biases = biases + (tiles[g] + bias[None, :],)
        tiles = biases
    return tiles


@triton.jit
def load_weight(w_ptr, gate, unit, source, H: tl.constexpr):
    """W_hh[gate * H + unit, source]; zero outside. `unit` and `source` are index tiles that broadcast."""
    return tl.load(w_ptr + (gate * H + unit) * H + source, mask=(unit < H) & (source < H), other=0.0)


@triton.jit
def load_weights(
    w_ptr, first, G: tl.constexpr, OWN: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """The part of W_hh that a program with OWN tiles of the hidden units multiplies by, to be kept on the chip.

    In tiles `[BLOCK_K, BLOCK_H]`, counted by (gate, own tile, summed tile): a product sums over their rows. They are
    `[source, unit]`, or BACK, `[unit, source]`.
    """
    SUMS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    weights = ()
    for index in tl.static_range(G * OWN * SUMS):
        own = (first + index // SUMS % OWN) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
        summed = (index % SUMS) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        if BACK:
            tile = load_weight(w_ptr, index // (OWN * SUMS), summed, own, H)
        else:
            tile = load_weight(w_ptr, index // (OWN * SUMS), own, summed, H)
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
def column(weights, n, k, G: tl.constexpr, OWN: tl.constexpr, SUMS: tl.constexpr):
    """Of every gate the weights for own tile n and summed tile k."""
    tiles = ()
    for g in tl.static_range(G):
        tiles = tiles + (weights[(g * OWN + n) * SUMS + k],)
    return tiles


@triton.jit
def add(operand, weights, products, G: tl.constexpr, PRECISION: tl.constexpr):
    """products + W_hh h for one tile of h."""
    sums = ()
    for g in tl.static_range(G):
        sums = sums + (dot(operand, weights[g], products[g], PRECISION),)
    return sums


@triton.jit
def local_product(start, operands, weights, n, G: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr):
    """start + W_hh h for the n-th tile of every gate, out of weights on the chip; h in tiles `operands`."""
    products = start
    for k in tl.static_range(TILES):
        products = add(operands[k], column(weights, n, k, G, TILES, TILES), products, G, PRECISION)
    return products


@triton.jit
def load_operand(sent_ptr, k, origin, rows, row_inside, H: tl.constexpr, BLOCK_K: tl.constexpr):
    """The k-th tile of the operands that the programs of the group left at `sent_ptr [B, H]`."""
    source, inside = hidden_tile(k, row_inside, BLOCK_K, H)
    offsets = rows[:, None] * H + source[None, :]
    return tl.load(sent_ptr + origin * H + offsets, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def grouped_product(
    start, sent_ptr, weights, origin, rows, row_inside,
    G: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """start + W_hh h for the program's tile of every gate, out of weights on the chip; its operand streamed, a tile
    ahead of the products."""
    SUMS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    products = start
    operand = load_operand(sent_ptr, 0, origin, rows, row_inside, H, BLOCK_K)
    for k in tl.static_range(SUMS):
        now = operand
        if k + 1 < SUMS:
            operand = load_operand(sent_ptr, k + 1, origin, rows, row_inside, H, BLOCK_K)
        products = add(now, column(weights, 0, k, G, 1, SUMS), products, G, PRECISION)
    return products


@triton.jit
def streamed_product(
    start, sent_ptr, w_ptr, origin, rows, row_inside, cols,
    G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """start + W_hh h for the columns `cols` of every gate, its operand and W_hh streamed in tiles."""
    products = start
    for k in tl.range(0, (H + BLOCK_K - 1) // BLOCK_K):
        operand = load_operand(sent_ptr, k, origin, rows, row_inside, H, BLOCK_K)
        source = k * BLOCK_K + tl.arange(0, BLOCK_K)
        weights = ()
        for g in tl.static_range(G):
            weights = weights + (load_weight(w_ptr, g, cols[None, :], source[:, None], H),)
        products = add(operand, weights, products, G, PRECISION)
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
def add_back(sent, weights, products, G: tl.constexpr, PRECISION: tl.constexpr):
    """products + dgh W_hh for one tile of each gate. Each gate sums apart, so that G sums are under way at once."""
    sums = ()
    for g in tl.static_range(G):
        sums = sums + (dot(sent[g].to(weights[g].dtype), weights[g], products[g], PRECISION),)
    return sums


@triton.jit
def over_gates(products, G: tl.constexpr):
    total = products[0]
    for g in tl.static_range(1, G):
        total += products[g]
    return total


@triton.jit
def local_product_back(
    operands, weights, n, rows, G: tl.constexpr, TILES: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr
):
    """dgh W_hh for the n-th tile of h, out of weights on the chip. `operands[k][g]`."""
    products = zeros(rows, G, BLOCK_H)
    for k in tl.static_range(TILES):
        products = add_back(operands[k], column(weights, n, k, G, TILES, TILES), products, G, PRECISION)
    return over_gates(products, G)


@triton.jit
def load_sent(sent_ptr, sent_row, k, scale, rows, row_inside, G: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr):
    """The k-th tiles of the gate gradients that the programs of the group left at `sent_ptr [.., B, G*H]`."""
    unit, inside = hidden_tile(k, row_inside, BLOCK_K, H)
    return scaled(load_stored(sent_ptr, sent_row, rows, unit, inside, G, H, ".cg"), scale, G)


@triton.jit
def grouped_product_back(
    sent_ptr, sent_row, weights, scale, rows, row_inside,
    G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dgh W_hh for the program's tile of h, out of weights on the chip; dgh streamed.

    A tile ahead of the products, unless it has to be scaled: then it takes registers, and two of it spill.
    """
    SUMS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    products = zeros(rows, G, BLOCK_H)
    sent = load_sent(sent_ptr, sent_row, 0, scale, rows, row_inside, G, H, BLOCK_K)
    for k in tl.static_range(SUMS):
        now = sent
        if scale is None:
            if k + 1 < SUMS:
                sent = load_sent(sent_ptr, sent_row, k + 1, scale, rows, row_inside, G, H, BLOCK_K)
        products = add_back(now, column(weights, 0, k, G, 1, SUMS), products, G, PRECISION)
        if scale is not None:
            if k + 1 < SUMS:
                sent = load_sent(sent_ptr, sent_row, k + 1, scale, rows, row_inside, G, H, BLOCK_K)
    return over_gates(products, G)


@triton.jit
def streamed_product_back(
    sent_ptr, sent_row, w_ptr, scale, rows, row_inside, cols,
    G: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dgh W_hh for the columns `cols` of h, dgh and W_hh streamed in tiles."""
    products = zeros(rows, G, BLOCK_H)
    for k in tl.range(0, (H + BLOCK_K - 1) // BLOCK_K):
        sent = load_sent(sent_ptr, sent_row, k, scale, rows, row_inside, G, H, BLOCK_K)
        unit = k * BLOCK_K + tl.arange(0, BLOCK_K)
        weights = ()
        for g in tl.static_range(G):
            weights = weights + (load_weight(w_ptr, g, unit[:, None], cols[None, :], H),)
        products = add_back(sent, weights, products, G, PRECISION)
    return over_gates(products, G)
