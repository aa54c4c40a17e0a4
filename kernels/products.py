"""The products with W_hh: from weights on the chip (local, grouped), or with both operands streamed (stepwise).

All modes add the same tiles in the same order, so they give the same bits. Data that the programs of a group exchange
is loaded with `.cg`, past the L1 cache, which does not see the writes of other programs.
"""

import triton
import triton.language as tl

from .memory import RESET, choose, head_tile, load_stored, load_tile, zero_tile

# Triton's interpreter multiplies the bits of bfloat16 tiles as integers (3.5 to 3.9), so there they become float32.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b; products and sums in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def zero_gates(tile, G: tl.constexpr):
    """A float32 tile of zeros for every gate."""
    gates = ()
    for _ in tl.static_range(G):
        gates = gates + (zero_tile(tile),)
    return gates


@triton.jit
def load_biases(b_ptr, tile, G: tl.constexpr, H: tl.constexpr):
    """b_hh as a tile for every gate, to which W_hh h is added; zeros without b_hh."""
    gates = zero_gates(tile, G)
    if b_ptr is not None:
        biases = ()
        for g in tl.static_range(G):
            bias = tl.load(b_ptr + g * H + tile.cols, mask=tile.col_inside, other=0.0).to(tl.float32)
            biases = biases + (gates[g] + bias[None, :],)
        gates = biases
    return gates


@triton.jit
def load_weight(w_ptr, gate, unit, source, H: tl.constexpr):
    """W_hh[gate * H + unit, source]; zero outside. `unit` and `source` are index tiles that broadcast."""
    return tl.load(w_ptr + (gate * H + unit) * H + source, mask=(unit < H) & (source < H), other=0.0)


@triton.jit
def load_weights(
    w_ptr, first, G: tl.constexpr, TILES: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """The part of W_hh that a program keeps on the chip: for its TILES tiles of the result, from tile `first` on.

    The weights are tiles `[BLOCK_K, BLOCK_H]`, whose rows a product sums over, in the order (gate, tile of the result,
    tile of the sum). They are `[source, unit]`, or with BACK `[unit, source]`.
    """
    SUMS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    weights = ()
    for index in tl.static_range(G * TILES * SUMS):
        result = (first + index // SUMS % TILES) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
        summed = (index % SUMS) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        if BACK:
            weight = load_weight(w_ptr, index // (TILES * SUMS), summed, result, H)
        else:
            weight = load_weight(w_ptr, index // (TILES * SUMS), result, summed, H)
        weights = weights + (weight,)
    return weights


@triton.jit
def recurrent_operand(h, flags, recurrent_mask_ptr, tile, H: tl.constexpr):
    """The operand of W_hh: h, zero after a reset, times the mask of recurrent dropout; in h's own dtype."""
    operand = choose(flags, RESET, 0.0, h.to(tl.float32))
    if recurrent_mask_ptr is not None:
        operand = operand * load_tile(recurrent_mask_ptr, tile.origin, tile, H)
    return operand.to(h.dtype)


@triton.jit
def weights_of(weights, n, k, G: tl.constexpr, TILES: tl.constexpr, SUMS: tl.constexpr):
    """The weights of every gate for tile n of the program's result and tile k of the sum."""
    gates = ()
    for g in tl.static_range(G):
        gates = gates + (weights[(g * TILES + n) * SUMS + k],)
    return gates


@triton.jit
def add(operand, weights, products, G: tl.constexpr, PRECISION: tl.constexpr):
    """products + W_hh h for one tile of h."""
    sums = ()
    for g in tl.static_range(G):
        sums = sums + (dot(operand, weights[g], products[g], PRECISION),)
    return sums


@triton.jit
def local_product(start, operands, weights, n, G: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr):
    """start + W_hh h for the n-th tile of every gate, from weights on the chip; h in tiles `operands`."""
    products = start
    for k in tl.static_range(TILES):
        products = add(operands[k], weights_of(weights, n, k, G, TILES, TILES), products, G, PRECISION)
    return products


@triton.jit
def load_operand(operand_ptr, tile, k, H: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The k-th tile of the operand that the programs of the group published at `operand_ptr [D, B, H]`; in heads, of
    the units of the tile's own head."""
    return load_stored(operand_ptr, tile.origin, head_tile(tile, tile.head, k, BLOCK_K, H, HEADS), 1, H, ".cg")[0]


@triton.jit
def grouped_product(
    start, operand_ptr, weights, tile,
    G: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """start + W_hh h for the program's tile of every gate, from weights on the chip.

    The operand is streamed, one tile ahead of the products.
    """
    SUMS: tl.constexpr = (H // HEADS + BLOCK_K - 1) // BLOCK_K
    products = start
    operand = load_operand(operand_ptr, tile, 0, H, HEADS, BLOCK_K)
    for k in tl.static_range(SUMS):
        now = operand
        if k + 1 < SUMS:
            operand = load_operand(operand_ptr, tile, k + 1, H, HEADS, BLOCK_K)
        products = add(now, weights_of(weights, 0, k, G, 1, SUMS), products, G, PRECISION)
    return products


@triton.jit
def streamed_product(
    start, operand_ptr, w_ptr, tile,
    G: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """start + W_hh h for the columns of `tile` of every gate; the operand and W_hh are streamed in tiles.

    W_hh: of the tile's head, `[G*UNITS, UNITS]`.
    """
    UNITS: tl.constexpr = H // HEADS
    products = start
    for k in tl.range(0, (UNITS + BLOCK_K - 1) // BLOCK_K):
        operand = load_operand(operand_ptr, tile, k, H, HEADS, BLOCK_K)
        source = k * BLOCK_K + tl.arange(0, BLOCK_K)
        weights = ()
        for g in tl.static_range(G):
            weights = weights + (load_weight(w_ptr, g, tile.units[None, :], source[:, None], UNITS),)
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
def add_back(dgh, weights, products, G: tl.constexpr, PRECISION: tl.constexpr):
    """products + dgh W_hh for one tile of each gate. Each gate has its own sum, so G sums run at once."""
    sums = ()
    for g in tl.static_range(G):
        sums = sums + (dot(dgh[g].to(weights[g].dtype), weights[g], products[g], PRECISION),)
    return sums


@triton.jit
def over_gates(products, G: tl.constexpr):
    total = products[0]
    for g in tl.static_range(1, G):
        total += products[g]
    return total


@triton.jit
def local_product_back(operands, weights, tile, n, G: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr):
    """dgh W_hh for `tile`, the n-th of h, from weights on the chip. dgh is `operands[k][g]`."""
    products = zero_gates(tile, G)
    for k in tl.static_range(TILES):
        products = add_back(operands[k], weights_of(weights, n, k, G, TILES, TILES), products, G, PRECISION)
    return over_gates(products, G)


@triton.jit
def load_dgh(
    dgh_ptr, row, tile, k, scale, G: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The k-th tiles of the gate gradients that the programs of the group published at `dgh_ptr [.., B, G*H]`; in
    heads, of the units of the tile's own head."""
    return scaled(load_stored(dgh_ptr, row, head_tile(tile, tile.head, k, BLOCK_K, H, HEADS), G, H, ".cg"), scale, G)


@triton.jit
def grouped_product_back(
    dgh_ptr, row, weights, scale, tile,
    G: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dgh W_hh for the program's tile of h, from weights on the chip; dgh is streamed.

    It is loaded one tile ahead of the products, unless it has to be scaled: it is in registers then, and two tiles
    spill.
    """
    SUMS: tl.constexpr = (H // HEADS + BLOCK_K - 1) // BLOCK_K
    products = zero_gates(tile, G)
    dgh = load_dgh(dgh_ptr, row, tile, 0, scale, G, H, HEADS, BLOCK_K)
    for k in tl.static_range(SUMS):
        now = dgh
        if scale is None:
            if k + 1 < SUMS:
                dgh = load_dgh(dgh_ptr, row, tile, k + 1, scale, G, H, HEADS, BLOCK_K)
        products = add_back(now, weights_of(weights, 0, k, G, 1, SUMS), products, G, PRECISION)
        if scale is not None:
            if k + 1 < SUMS:
                dgh = load_dgh(dgh_ptr, row, tile, k + 1, scale, G, H, HEADS, BLOCK_K)
    return over_gates(products, G)


@triton.jit
def streamed_product_back(
    dgh_ptr, row, w_ptr, scale, tile,
    G: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dgh W_hh for the columns of `tile` of h; dgh and W_hh, `streamed_product`'s, are streamed in tiles."""
    UNITS: tl.constexpr = H // HEADS
    products = zero_gates(tile, G)
    for k in tl.range(0, (UNITS + BLOCK_K - 1) // BLOCK_K):
        dgh = load_dgh(dgh_ptr, row, tile, k, scale, G, H, HEADS, BLOCK_K)
        unit = k * BLOCK_K + tl.arange(0, BLOCK_K)
        weights = ()
        for g in tl.static_range(G):
            weights = weights + (load_weight(w_ptr, g, unit[:, None], tile.units[None, :], UNITS),)
        products = add_back(dgh, weights, products, G, PRECISION)
    return over_gates(products, G)
