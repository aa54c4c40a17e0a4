// Rows of the batch times a matrix that stays the same for all steps.
//
// The matrix is packed once per call into panels of a fixed number of columns, so that the product reads it
// in one stream. An element of the result is always summed in the same order, whatever rows are multiplied
// beside it and on however many threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "../step/rows.cuh"
#include "vectors.h"

namespace fastrnn {

constexpr int64_t panel_bytes = 128;  // of one row of a panel: two AVX-512 vectors, four AVX2 vectors

template <class A>
constexpr int64_t panel_width = panel_bytes / sizeof(A);

// columns, up to whole panels
template <class A>
int64_t padded(int64_t columns) {
  return (columns + panel_width<A> - 1) / panel_width<A> * panel_width<A>;
}

// Uninitialised memory that starts at a cache line.
template <class A>
class Aligned {
 public:
  explicit Aligned(int64_t count)
      : data_(static_cast<A*>(::operator new(count * sizeof(A), std::align_val_t{64}))) {}
  ~Aligned() { ::operator delete(data_, std::align_val_t{64}); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  A* data() const { return data_; }

 private:
  A* data_;
};

// A matrix [K, N] in panels: panel p holds the columns from p * panel_width on, row by row, zeros behind the
// last.
template <class A>
struct Packed {
  int64_t K, N;
  Aligned<A> panels;  // [padded(N) / panel_width, K, panel_width]
  Aligned<A> start;   // [padded(N)], what is added to each row of the product

  // The element in row k and column n stands at matrix[k * k_stride + n * n_stride]. `bias` [N] or null.
  // Panels are packed by PyTorch's threads.
  template <class S>
  Packed(const S* matrix, int64_t K, int64_t N, int64_t k_stride, int64_t n_stride, const A* bias)
      : K(K), N(N), panels(padded<A>(N) * K), start(padded<A>(N)) {
    constexpr int64_t grain = 1 << 15;  // elements that are worth waking a thread
    torch::stable::parallel_for(
        0, padded<A>(N) / panel_width<A>, grain / (panel_width<A> * std::max<int64_t>(K, 1)) + 1,
        [&](int64_t begin, int64_t end) { pack(matrix, begin, end, k_stride, n_stride); });
    for (int64_t n = 0; n < padded<A>(N); ++n) start.data()[n] = n < N && bias != nullptr ? bias[n] : A(0);
  }

 private:
  // The panels from begin to end, in the order in which the source lies in memory: row by row, or column by
  // column in pieces that stay in the nearest cache.
  template <class S>
  void pack(const S* matrix, int64_t begin, int64_t end, int64_t k_stride, int64_t n_stride) const {
    constexpr int64_t piece = 64;
    if (n_stride == 1) {
      for (int64_t k = 0; k < K; ++k)
        for (int64_t p = begin; p < end; ++p) pack(matrix, p, k, k + 1, k_stride, n_stride);
    } else {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t k = 0; k < K; k += piece) pack(matrix, p, k, std::min(k + piece, K), k_stride, n_stride);
    }
  }

  // Rows of panel p, from k to k_end.
  template <class S>
  void pack(const S* matrix, int64_t p, int64_t k, int64_t k_end, int64_t k_stride, int64_t n_stride) const {
    constexpr int64_t width = panel_width<A>;
    int64_t first = p * width, columns = std::min(width, N - first);
    A* panel = panels.data() + first * K;
    const S* source = matrix + first * n_stride;
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t j = k; j < k_end; ++j) panel[j * width + n] = widen(source[j * k_stride + n * n_stride]);
    for (int64_t j = k; columns < width && j < k_end; ++j)
      std::fill_n(panel + j * width + columns, width - columns, A(0));
  }
};

// in [rows, K] times the matrix, into out [rows, padded(N)]. The elements of a row of `in` lie in_stride
// apart.
template <class A>
struct Multiply {
  const Packed<A>& matrix;
  Rows<const A> in;
  int64_t in_stride;
  Rows<A> out;

  // Rows of a panel that stay in the nearest cache while it is multiplied with all rows of the batch.
  static constexpr int64_t depth = 128;

  template <int bytes>
  FASTRNN_HD void walk(int64_t begin, int64_t end) const {
    constexpr int rows = bytes == 64 ? 8 : bytes == 32 ? 3 : 1;  // as many sums as there are registers for
    for (int64_t k = 0; k < matrix.K || k == 0; k += depth) {
      int64_t k_end = k + depth < matrix.K ? k + depth : matrix.K;
      for (int64_t n = 0; n < matrix.N; n += panel_width<A>) {
        int64_t b = begin;
        for (; b + rows <= end; b += rows) tile<bytes, rows>(b, n, k, k_end);
        if constexpr (rows > 4)
          for (; b + 4 <= end; b += 4) tile<bytes, 4>(b, n, k, k_end);
        if constexpr (rows > 2)
          for (; b + 2 <= end; b += 2) tile<bytes, 2>(b, n, k, k_end);
        for (; b < end; ++b) tile<bytes, 1>(b, n, k, k_end);
      }
    }
  }

  // `rows` rows from b on times one panel, the terms from k to k_end: a sum of its own, which is then added
  // to those before it, since a long chain of additions would round more.
  template <int bytes, int rows>
  FASTRNN_HD void tile(int64_t b, int64_t n, int64_t k, int64_t k_end) const {
    typedef A Vector __attribute__((vector_size(bytes)));
    constexpr int vectors = panel_bytes / bytes, lanes = bytes / sizeof(A);
    const A* row[rows];
    Vector sum[rows][vectors];
    FASTRNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      row[r] = in[b + r];
      FASTRNN_UNROLL
      for (int v = 0; v < vectors; ++v) sum[r][v] = Vector{};
    }
    const A* panel = matrix.panels.data() + n * matrix.K + k * panel_width<A>;
    for (int64_t j = k; j < k_end; ++j, panel += panel_width<A>) {
      Vector weight[vectors];
      FASTRNN_UNROLL
      for (int v = 0; v < vectors; ++v) std::memcpy(&weight[v], panel + v * lanes, bytes);
      FASTRNN_UNROLL
      for (int r = 0; r < rows; ++r) {
        A x = row[r][j * in_stride];
        FASTRNN_UNROLL
        for (int v = 0; v < vectors; ++v) sum[r][v] += x * weight[v];
      }
    }
    FASTRNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      A* to = out[b + r] + n;
      const A* from = k == 0 ? matrix.start.data() + n : to;
      FASTRNN_UNROLL
      for (int v = 0; v < vectors; ++v) {
        Vector before;
        std::memcpy(&before, from + v * lanes, bytes);
        before += sum[r][v];
        std::memcpy(to + v * lanes, &before, bytes);
      }
    }
  }
};

}  // namespace fastrnn
