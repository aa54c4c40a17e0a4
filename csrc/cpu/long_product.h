// The products around the scan, over the rows of all steps at once: W_ih x, and the gradients of x and of the
// weights.
#pragma once

#include "product.h"

namespace fastrnn {

// Rows of x times a packed matrix. Whole panels are written: the rows of `out` need room for them.
template <class A>
struct RowsOfProduct {
  static constexpr int64_t block = 48, depth = Multiply<A>::depth;  // rows whose results stay in the cache

  const Packed<A>& packed;
  Matrix<A> x;     // [rows, K]: x.K rows, x.N terms
  RowView<A> out;  // [rows, N]
  bool adds;       // to what `out` holds

  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    const bool in_place = x.n_stride == 1;  // the terms of a row lie side by side
    alignas(64) A copied[block * depth];    // [depth, block]
    for (int64_t b = begin; b < end; b += block) {
      const int64_t rows = std::min(block, end - b), N = packed.matrix.N;
      Multiply<A> multiply{packed, {}, in_place ? 1 : block, {out[b], out.stride}, adds};
      for (int64_t k = 0; k < x.N || k == 0; k += depth) {
        const bool last = k + depth >= x.N;
        auto fetch_next = [&](int64_t n) { fetch(last ? b + block : b, end, last ? 0 : k + depth, n); };
        const int64_t k_end = std::min(k + depth, x.N);
        RowView<const A> terms{at(b, k), x.k_stride};
        if (!in_place) {
          copy(b, rows, k, k_end, copied);
          terms = {copied, 1};
        }
        multiply.template over_terms<bytes>(terms, 0, rows, k, k_end, fetch_next);
      }
    }
  }

 private:
  const A* at(int64_t b, int64_t k) const { return x.data + b * x.k_stride + k * x.n_stride; }

  // `rows` rows of x from b on, terms k to k_end, into `to` [depth, block].
  FASTRNN_INLINE void copy(int64_t b, int64_t rows, int64_t k, int64_t k_end, A* to) const {
    for (int64_t j = k; j < k_end; ++j, to += block) {
      const A* from = at(b, j);
      if (x.k_stride == 1 && rows == block) {
        std::memcpy(to, from, block * sizeof(A));  // of a constant size, which the compiler writes out
      } else {
        for (int64_t r = 0; r < rows; ++r) to[r] = from[r * x.k_stride];
      }
    }
  }

  // Asks for the n-th share of the rows from b on and the terms from k on, which the next call multiplies:
  // they lie far apart, and no processor foresees that.
  FASTRNN_INLINE void fetch(int64_t b, int64_t b_end, int64_t k, int64_t n) const {
    constexpr int64_t line = 64 / sizeof(A);
    const int64_t N = packed.matrix.N, rows = std::min(block, b_end - b), terms = std::min(depth, x.N - k);
    const bool in_place = x.n_stride == 1;
    const int64_t outer = in_place ? rows : terms, inner = in_place ? terms : rows;
    if (rows <= 0 || (!in_place && x.k_stride != 1)) return;
    for (int64_t i = n * outer / N; i < std::min((n + panel_width<A>)*outer / N, outer); ++i)
      for (int64_t j = 0; j < inner; j += line)
        __builtin_prefetch(in_place ? at(b + i, k + j) : at(b + j, k + i));
  }
};

extern template void walk_widest(const RowsOfProduct<float>& body, int64_t begin, int64_t end);
extern template void walk_widest(const RowsOfProduct<double>& body, int64_t begin, int64_t end);

// out [M, N] = x [M, K] times the packed matrix [K, N], plus what `out` holds if `adds`. Threads share the
// rows; which thread computes a row does not change its bits.
template <class A>
void multiply_rows(const Matrix<A>& x, const Packed<A>& packed, RowView<A> out, bool adds) {
  constexpr int64_t grain = 1 << 21;  // multiplications that are worth waking a thread
  constexpr int64_t unit = 12;        // rows
  RowsOfProduct<A> product{packed, x, out, adds};
  share((x.K + unit - 1) / unit, grain / (unit * std::max<int64_t>(packed.matrix.N * x.N, 1)) + 1,
        [&](int64_t begin, int64_t end) { walk_widest(product, begin * unit, std::min(end * unit, x.K)); });
}

// The same with a matrix that is packed here, plus the bias [N] or null unless it `adds`.
template <class A>
void long_product(const Matrix<A>& x, const Matrix<A>& matrix, const A* bias, RowView<A> out,
                  bool adds = false) {
  constexpr int64_t most_terms = 1024;  // packed at a time, which bounds the memory
  for (int64_t k = 0; k < matrix.K || k == 0; k += most_terms) {
    int64_t terms = std::min(most_terms, matrix.K - k);
    Packed<A> packed({matrix.data + k * matrix.k_stride, terms, matrix.N, matrix.k_stride, matrix.n_stride},
                     false, bias);
    multiply_rows({x.data + k * x.n_stride, x.K, terms, x.k_stride, x.n_stride}, packed, out, adds || k > 0);
  }
}

}  // namespace fastrnn
