"""Products of bfloat16 by pairs of terms, as AVX512-BF16 and AMX compute them: the sums' order, every path of csrc.

The processor's instruction is replaced by the same arithmetic in plain C++; packing, tiles and all else are the same.
"""

import pytest
import torch
from cell_texts import hand_written
from cpp_programs import ROOT, compiled, printed, with_torch
from setups import random_inputs
from test_csrc_scan import FEATURES, problem, run, same

import fastrnn
from fastrnn.arguments import IncomingGradients, Kept, ScanInputs, Walk
from fastrnn.backends import cpu, reference

if cpu.MISSING is not None:
    pytest.skip(f"csrc: {cpu.MISSING}", allow_module_level=True)

choose = torch.ops.fastrnn_c.choose_pair_products
NONE, PAIRS, AVX512, TILES, AMX = range(5)  # PairProducts of csrc/cpu/pairs.h
AT_ONCE = 256  # terms that are summed by themselves by AVX512-BF16
OF_TILE = 32  # and by AMX
every_order = pytest.mark.parametrize("kind", [PAIRS, TILES], ids=["pairs", "tiles"])


def has_instruction(kind):
    before = choose(NONE)
    try:
        choose(kind)
    except RuntimeError:
        return False
    finally:
        choose(before)
    return True


@pytest.fixture
def by(poisoned):
    """by(kind) chooses the kind of products, until the test ends."""
    before = choose(NONE)
    yield choose
    choose(before)


def of_both_kinds(by, f, kind):
    """What f() gives with products of single numbers, and with those of this kind."""
    found = []
    for one in (NONE, kind):
        by(one)
        found.append(f())
    return found


# A cell whose second state, which is float32, is W_hh h.
SHOWS_PRODUCT = hand_written(
    "product", "z", "h c",
    forward=lambda x, u, state, p, n: [x[0] + u[0], u[0], x[0]],
    total=lambda saved, state, d, p, n: d,
    backward=lambda saved, state, d, p, n: [d[0], d[0] + d[1], 0.0, 0.0],
    saved=1, step=None,
).text  # fmt: skip


def product(h, w_hh, steps=1):
    """W_hh h [B, H] in float32, of the first of these steps. h [B, H], w_hh [H, H] or [heads, H / heads, H / heads]."""
    zeros = torch.zeros(steps, *h.shape, dtype=torch.bfloat16)
    inputs = random_inputs(SHOWS_PRODUCT, sizes=(1, *h.shape), dtype=torch.bfloat16, bias=False)
    inputs = inputs._replace(gx=zeros, w_hh=w_hh, h0=h, c0=torch.zeros(h.shape))
    return cpu.forward(inputs, Walk(SHOWS_PRODUCT, False, "cpu", None), True).c[0]


def operands(B, H, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator).bfloat16() for shape in ((B, H), (H, H)))


def in_order(kind, h, w_hh):
    """The product as the instruction sums it. A product of two terms is exact."""
    terms = h.float()[:, None, :] * w_hh.float()
    total = torch.zeros(terms.shape[:2])
    if kind == PAIRS:  # of each pair the second term first
        for some in terms.split(AT_ONCE, dim=2):
            part = torch.zeros_like(total)
            for pair in some.split(2, dim=2):
                for term in reversed(pair.unbind(2)):
                    part += term
            total += part
        return total
    for some in terms.split(OF_TILE, dim=2):  # the first terms of all pairs, and the second ones
        sums = [torch.zeros_like(total), torch.zeros_like(total)]
        for k, term in enumerate(some.unbind(2)):
            sums[k % 2] += term
        total += sums[0] + sums[1]
    return total


# Odd numbers of terms; columns beyond whole panels of 32; rows beyond tiles of 3 and 16, groups of 32 and blocks of 64;
# more terms than are read at once.
SHAPES = [(1, 1), (2, 5), (3, 32), (20, 33), (70, 65), (4, 257), (5, 514)]


@every_order
@pytest.mark.parametrize(("B", "H"), SHAPES)
def test_sums_are_in_the_instructions_order(by, kind, B, H):
    h, w_hh = operands(B, H)
    expected, exact = in_order(kind, h, w_hh), h.double() @ w_hh.double().t()
    scale = h.double().abs() @ w_hh.double().abs().t()
    assert ((expected - exact).abs() <= min(H, AT_ONCE + H // AT_ONCE) * 2**-24 * scale).all()
    by(kind)
    by_columns = w_hh.t().contiguous().t()
    spread = torch.stack((w_hh, w_hh), 2)[..., 1]
    for steps in (1, 2):  # packed as it is read, where there is one step; otherwise beforehand
        for weight in (w_hh, by_columns, spread):
            assert torch.equal(product(h, weight, steps), expected)
    assert torch.equal(torch.cat([product(row, w_hh) for row in h.split(1)]), expected)
    by(NONE)
    if H > 32:
        assert not torch.equal(product(h, w_hh), expected)


@pytest.mark.parametrize(("instruction", "kind"), [(AVX512, PAIRS), (AMX, TILES)], ids=["AVX512-BF16", "AMX"])
@pytest.mark.parametrize(("B", "H"), [(1, 5), (11, 65), (70, 257)])
def test_the_instruction_has_these_bits(by, instruction, kind, B, H):
    if not has_instruction(instruction):
        pytest.skip("the processor has no such instruction")
    h, w_hh = operands(B, H)
    by(instruction)
    for steps in (1, 2):
        assert torch.equal(product(h, w_hh, steps), in_order(kind, h, w_hh))


@every_order
def test_infinities_and_nan_stay_in_their_rows_and_columns(by, kind):
    by(kind)
    h, w_hh = operands(7, 33)
    h[3, 5], h[5, 32], w_hh[8, 32] = float("nan"), float("inf"), float("-inf")
    finite = product(h, w_hh).isfinite()
    expected = torch.ones(7, 33, dtype=torch.bool)
    expected[[3, 5]], expected[:, 8] = False, False
    assert torch.equal(finite, expected)


@every_order
def test_heads_are_blocks_of_a_matrix(by, kind):
    by(kind)
    h, _ = operands(5, 24)
    blocks = torch.stack([operands(1, 12, seed)[1] for seed in (1, 2)])
    each = [in_order(kind, part, block) for part, block in zip(h.split(12, 1), blocks, strict=True)]
    assert torch.equal(product(h, blocks), torch.cat(each, 1))


def masked(h, w_hh, mask):
    """W_hh (h mask) in float32; the mask is bfloat16 [B, H]."""
    inputs = random_inputs(SHOWS_PRODUCT, sizes=(1, *h.shape), dtype=torch.bfloat16, bias=False)
    gx, c0 = torch.zeros(1, *h.shape, dtype=torch.bfloat16), torch.zeros(h.shape)
    inputs = inputs._replace(gx=gx, w_hh=w_hh, h0=h, c0=c0, recurrent_mask=mask)
    return cpu.forward(inputs, Walk(SHOWS_PRODUCT, False, "cpu", None), True).c[0]


@pytest.mark.parametrize(("B", "H"), [(2, 5), (20, 65), (5, 514)])
def test_other_numbers_go_by_tiles_in_two_parts(by, B, H):
    """The product of two bfloat16 numbers has 16 bits, which two parts of 8 bits hold."""
    (h, w_hh), (mask, _) = operands(B, H), operands(B, H, 1)
    by(TILES)
    operand = (h.float() * mask.float()).double()
    exact, scale = operand @ w_hh.double().t(), operand.abs() @ w_hh.double().abs().t()
    assert ((masked(h, w_hh, mask) - exact).abs() <= (2 * OF_TILE + H // OF_TILE) * 2**-24 * scale).all()
    mask[:, 1] = 1 + 2**-7  # a second part that counts: h alone has no more than 8 bits
    assert not torch.equal(masked(h, w_hh, mask), in_order(TILES, (h * mask), w_hh))


def test_in_two_parts_what_is_not_finite_stays_so(by):
    h, w_hh = operands(4, 33)
    h[0, 3], h[1, 3], h[2, 32] = float("inf"), float("nan"), 3e38
    w_hh[:, 3], w_hh[:, 32] = 1, 0.125
    by(TILES)
    found = masked(h, w_hh, torch.ones_like(h))
    assert (found[0] == float("inf")).all() and found[1].isnan().all() and found[2:].isfinite().all()


@every_order
@pytest.mark.parametrize("features", ["plain", "flags", "layer_norm"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_scan_is_the_references(by, kind, cell, features):
    by(kind)
    given = problem(cell, 4, 5, 33, torch.bfloat16, FEATURES[features])
    found, expected = run(cpu, cell, given), run(reference, cell, given)
    for name in expected.keys() - {"saved"}:
        want = expected[name]
        # A float32 result on the other side of a tie is one unit of the half type; what follows from it, a few more.
        scale = max(1, want.abs().max().item()) if want.numel() else 1
        torch.testing.assert_close(found[name], want, rtol=0, atol=8 * 2**-8 * scale, msg=name)


@pytest.mark.parametrize("feature", ["recurrent_mask", "decay"])
def test_h_times_another_number_does_not_go_by_pairs(by, feature):
    given = problem("lstm", 3, 5, 65, torch.bfloat16, (feature,))
    same(*of_both_kinds(by, lambda: run(cpu, "lstm", given), PAIRS))


def gradients(given):
    """f() gives the gradients of a scan, whose forward ran with single numbers."""
    walk = Walk("lstm", False, "cpu", None)
    inputs = ScanInputs(*map(given.get, ScanInputs._fields))
    kept = cpu.forward(inputs, walk, True)
    kept, inputs = Kept(kept.y, kept.c, kept.saved), inputs._replace(gx=None)
    incoming = IncomingGradients(*map(given.get, IncomingGradients._fields))
    return lambda: cpu.backward(incoming, kept, inputs, walk, True)


def test_the_gradients_do_not_go_by_pairs(by):
    by(NONE)
    f = gradients(problem("lstm", 3, 5, 65, torch.bfloat16))
    assert all(map(torch.equal, *of_both_kinds(by, f, PAIRS)))


def test_the_gradients_go_by_tiles_in_two_parts(by):
    """The norms, which are float32, show that the gradients of the gates are not rounded to bfloat16."""
    by(NONE)
    f = gradients(problem("lstm", 9, 5, 65, torch.bfloat16))
    single, tiles = (found.norms for found in of_both_kinds(by, f, TILES))
    assert not torch.equal(single, tiles)
    torch.testing.assert_close(tiles, single, rtol=9 * 2**-16, atol=0)


@every_order
def test_bits_do_not_depend_on_rows_threads_or_chunks(by, kind):
    by(kind)
    given = problem("lstm", 5, 70, 33, torch.bfloat16)
    walk = Walk("lstm", False, "cpu", None)

    def outputs(steps=slice(None), rows=slice(None), **states):
        states = {name: given[name][rows] for name in ("h0", "c0")} | states
        inputs = ScanInputs(*map({**given, **states, "gx": given["gx"][steps, rows]}.get, ScanInputs._fields))
        return cpu.forward(inputs, walk, True)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = outputs()
        torch.set_num_threads(3)
        assert torch.equal(outputs().y, whole.y)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs(rows=slice(66, 69)).y, whole.y[:, 66:69])
    first = outputs(slice(0, 1), slice(0, 9))
    rest = outputs(slice(1, 5), slice(0, 9), h0=first.h_n, c0=first.c_n)
    assert torch.equal(torch.cat((first.y, rest.y)), whole.y[:, :9])


@every_order
def test_both_products_of_a_whole_network_go_by_pairs(by, kind):
    """Terms that cancel: in order their sum is 1; by pairs, the 1 is added to 2^30 and lost."""
    model, ones = fastrnn.RNN(4, 4, nonlinearity="relu", bias=False, dtype=torch.bfloat16), torch.ones(1, 1, 4)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.tensor([0, 2.0**30, -(2.0**30), 1]))

    def output():
        with fastrnn.backend("cpu"):
            return model(ones.bfloat16(), ones.bfloat16())[0].unique().item()

    assert of_both_kinds(by, output, kind) == [2, 0]


@every_order
@pytest.mark.parametrize(
    ("steps", "batch", "sizes"), [(4, 3, (35, 33)), (30, 21, (40, 32)), (3, 200, (31, 48))], ids=str
)
def test_a_whole_network_and_its_gradients(by, kind, steps, batch, sizes):
    """Also in chunks of steps, of which the longest of these calls needs two; odd numbers of everything."""
    torch.manual_seed(0)
    model = fastrnn.GRU(*sizes, num_layers=2, bidirectional=True, dtype=torch.bfloat16)
    x = torch.randn(steps, batch, sizes[0]).bfloat16()
    dy = torch.randn(steps, batch, 2 * sizes[1]).bfloat16()

    def results():
        with fastrnn.backend("cpu"):
            y, _ = model(x)
        return y, *torch.autograd.grad(y, list(model.parameters()), dy)

    for want, got in zip(*of_both_kinds(by, results, kind), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=8 * 2**-8 * max(1, want.abs().max().item()))


EVERY_WIDTH = """
#include "cpu/product.h"
#include <cmath>
#include <cstdio>
#include <vector>
using namespace fastrnn;

template void fastrnn::walk_widest(const Pack<BFloat16>&, int64_t, int64_t);
template void fastrnn::walk_widest(const Pack<BFloat16, Pair>&, int64_t, int64_t);

constexpr int64_t R = 79, K = 301, N = 70, width = 96;  // rows: tiles of 8, 4, 2 and 1

template <int bytes>
std::vector<float> product(const std::vector<float>& x, const Matrix<BFloat16>& matrix, bool once) {
  Packed<BFloat16> packed(matrix, once, nullptr, true);
  std::vector<float> out(R * width);
  MultiplyPairs<PortablePairs>{packed, {x.data(), 1}, R, {out.data(), width}, false}.template walk<bytes>(0, R);
  return out;
}

int main() {
  pair_products() = PairProducts::portable;
  std::vector<float> x(R * K), expected(R * width);  // x [K, R]
  std::vector<BFloat16> by_rows(K * N), by_columns(K * N);
  BFloat16 rounded;
  for (size_t j = 0; j < x.size(); ++j) narrow(std::sin(j + 1.0f), rounded), x[j] = widen(rounded);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t n = 0; n < N; ++n) {
      narrow(std::cos(3.0f * (k * N + n)), by_rows[k * N + n]);
      by_columns[n * K + k] = by_rows[k * N + n];
    }
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t begin = 0; begin < K; begin += 256) {
        float part = 0;
        for (int64_t k = begin; k < std::min(begin + 256, K); k += 2)
          for (int64_t j : {k + 1, k})
            if (j < K) part += x[j * R + r] * widen(by_rows[j * N + n]);
        expected[r * width + n] += part;
      }
  int wrong = 0;
  for (auto matrix : {Matrix<BFloat16>{by_rows.data(), K, N, N, 1}, Matrix<BFloat16>{by_columns.data(), K, N, 1, K}})
    for (bool once : {false, true})
      wrong += (product<16>(x, matrix, once) != expected) + (product<32>(x, matrix, once) != expected) +
               (product<64>(x, matrix, once) != expected);
  std::printf("%d", wrong);
}
"""


def test_every_width_of_vectors_has_the_same_bits(tmp_path):
    """Also the tiles around the instruction, which are of 64 bytes."""
    flags = ["-O0", "-ffp-contract=off", "-fopenmp-simd", ROOT / "csrc/cpu/threads.cpp", *with_torch()]
    assert printed(compiled(tmp_path, EVERY_WIDTH, *flags)) == "0"
