// Products of few rows with a matrix that is read once, in place: row-major, as torch.nn keeps its weights.
//
// Such a product takes as long as reading the matrix. Nothing is packed, so nothing can be out of date.
#pragma once

#include <algorithm>
#include <cstring>

#include "panels.h"
#include "row_ops.h"

namespace fastrnn {

// As many dot products as a vector has lanes: x with consecutive rows of matrices.
template <class A, int bytes>
struct Dots {
  static constexpr int lanes = bytes / sizeof(A);
  // Rows; with two sums for each, they hide the latency of an addition.
  static constexpr int at_once = lanes < 4 ? lanes : 4;
  using Sums = Square<A, bytes>;
  using Vector = typename Sums::Vector;

  Sums sums;  // of each row, a vector of parts

  FASTRNN_INLINE Dots() {
    FASTRNN_UNROLL
    for (int r = 0; r < lanes; ++r) sums.row[r] = Vector{};
  }

  // Adds the products of x [K] with rows n to n + lanes of `matrix`, of which there are `rows`; beyond the
  // last one, it is taken again. The rows that are likely to follow are fetched meanwhile.
  FASTRNN_INLINE void add(const RowView<const A>& matrix, int64_t n, int64_t rows, const A* x, int64_t K) {
    FASTRNN_UNROLL
    for (int first = 0; first < lanes; first += at_once) {
      const A* row[at_once];
      Vector even[at_once], odd[at_once];
      FASTRNN_UNROLL
      for (int r = 0; r < at_once; ++r) {
        row[r] = matrix[std::min(n + first + r, rows - 1)];
        even[r] = sums.row[first + r], odd[r] = Vector{};
      }
      const int64_t following = at_once * matrix.stride;
      int64_t k = 0;
      for (; k + 2 * lanes <= K; k += 2 * lanes) {
        add_products(row, k, x, even);
        add_products(row, k + lanes, x, odd);
        FASTRNN_UNROLL
        for (int r = 0; r < at_once; ++r)
          for (int j = 0; j < 2 * lanes; j += line) __builtin_prefetch(row[r] + following + k + j);
      }
      if (k + lanes <= K) add_products(row, k, x, even), k += lanes;
      if (k < K) {
        Vector factor, weight;
        read_some(x + k, K - k, factor);
        FASTRNN_UNROLL
        for (int r = 0; r < at_once; ++r) {
          read_some(row[r] + k, K - k, weight);
          odd[r] += factor * weight;
        }
      }
      FASTRNN_UNROLL
      for (int r = 0; r < at_once; ++r) sums.row[first + r] = even[r] + odd[r];
    }
  }

  // The dot products, into `out` [lanes].
  FASTRNN_INLINE void store(A* out) {
    sums.transpose();
    FASTRNN_UNROLL
    for (int width = lanes / 2; width > 0; width /= 2) {
      FASTRNN_UNROLL
      for (int r = 0; r < width; ++r) sums.row[r] += sums.row[r + width];
    }
    std::memcpy(out, &sums.row[0], bytes);
  }

 private:
  static constexpr int line = 64 / sizeof(A);  // numbers of a cache line

  // Adds the products of the numbers from k on, as many as a vector has lanes.
  static FASTRNN_INLINE void add_products(const A* const (&row)[at_once], int64_t k, const A* x,
                                          Vector (&sum)[at_once]) {
    Vector factor, weight;
    std::memcpy(&factor, x + k, bytes);
    FASTRNN_UNROLL
    for (int r = 0; r < at_once; ++r) {
      std::memcpy(&weight, row[r] + k, bytes);
      sum[r] += factor * weight;
    }
  }

  // The first `count` numbers; the rest are zeros.
  static FASTRNN_INLINE void read_some(const A* from, int64_t count, Vector& to) {
    to = Vector{};
    for (int64_t j = 0; j < count; ++j) to[j] = from[j];
  }
};

// out [B, N], rows n from begin to end of `matrix` [N, K] times x [B, K].
template <class A>
struct TimesRows {
  int64_t B, K, N;
  RowView<const A> x, matrix;
  RowView<A> out;

  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    constexpr int64_t lanes = Dots<A, bytes>::lanes;
    alignas(64) A found[lanes];
    for (int64_t n = begin; n < end; n += lanes) {
      for (int64_t b = 0; b < B; ++b) {
        Dots<A, bytes> dots;
        dots.add(matrix, n, N, x[b], K);
        dots.store(found);
        std::copy_n(found, std::min(lanes, end - n), out[b] + n);
      }
    }
  }
};

}  // namespace fastrnn
