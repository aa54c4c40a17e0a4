"""The product of csrc's scan at every width of vectors, compiled here by itself."""

import pytest
from cpp_programs import ROOT, compiled, printed, with_torch

from fastrnn.backends import cpu

needs_csrc = pytest.mark.skipif(cpu.MISSING is not None, reason=f"csrc: {cpu.MISSING}")

EVERY_WIDTH = """
#include "cpu/product.h"
#include <cmath>
#include <cstdio>
#include <vector>
using namespace fastrnn;

#define FASTRNN_INSTANCE(S) template void fastrnn::walk_widest(const Pack<S>&, int64_t, int64_t);
FASTRNN_EACH_STORAGE(FASTRNN_INSTANCE)
template void fastrnn::walk_widest(const Pack<BFloat16, Pair>&, int64_t, int64_t);

// Rows [0, R) at once, one by one, of a matrix packed before or where it is, stored by rows or by columns, by the given
// walk: the same bits, and right within the rounding of some 200 terms of order one.
template <class S, class Walk>
int wrong(const Walk& walk, double rounding) {
  using A = typename Arithmetic<S>::type;
  constexpr int64_t R = 13, K = 200, N = 70, width = N + 64;
  std::vector<A> x(R * K), got[2][2][2];
  std::vector<S> by_rows(K * N), by_columns(K * N);
  for (size_t j = 0; j < x.size(); ++j) x[j] = std::sin(j + 1.0);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t n = 0; n < N; ++n) {
      narrow(A(std::cos(3.0 * (k * N + n))), by_rows[k * N + n]);
      by_columns[n * K + k] = by_rows[k * N + n];
    }
  int count = padded<A>(N) > width;
  for (int columns : {0, 1})
    for (int once : {0, 1})
      for (int apart : {0, 1}) {
        Matrix<S> matrix = columns ? Matrix<S>{by_columns.data(), K, N, 1, K} : Matrix<S>{by_rows.data(), K, N, N, 1};
        Packed<S> packed(matrix, once, nullptr);
        auto& out = got[columns][once][apart];
        out.resize(R * width);
        Multiply<S> multiply{packed, {x.data(), K}, 1, {out.data(), width}};
        for (int64_t r = 0; r < R; r += apart ? 1 : R) walk(multiply, r, apart ? r + 1 : R);
        for (int64_t r = 0; r < R; ++r)
          for (int64_t n = 0; n < N; ++n) {
            double sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += double(x[r * K + k]) * widen(by_rows[k * N + n]);
            A y = out[r * width + n];
            count += y != got[0][0][0][r * width + n] || !(std::abs(y - sum) < rounding);
          }
      }
  return count;
}

template <class Walk>
int wrong(const Walk& walk) {
  return wrong<float>(walk, 1e-4) + wrong<BFloat16>(walk, 1e-4) + wrong<Float16>(walk, 1e-4) +
         wrong<double>(walk, 1e-12);
}

int main() {
  pair_products() = PairProducts::none;
  Vectors widest = widest_vectors();
  int count = wrong([](const auto& body, int64_t begin, int64_t end) { walk_baseline(body, begin, end); });
  if (widest >= Vectors::avx2)
    count += wrong([](const auto& body, int64_t begin, int64_t end) { walk_avx2(body, begin, end); });
  if (widest >= Vectors::avx512)
    count += wrong([](const auto& body, int64_t begin, int64_t end) { walk_avx512(body, begin, end); });
  std::printf("%d", count);
}
"""


@needs_csrc
def test_every_width_of_vectors_is_right_and_rows_keep_their_bits(tmp_path):
    """Also the narrower vectors, which the library would not choose on this machine."""
    flags = ["-O2", "-ffp-contract=fast", "-fopenmp-simd", ROOT / "csrc/cpu/threads.cpp", *with_torch()]
    assert printed(compiled(tmp_path, EVERY_WIDTH, *flags)) == "0"
