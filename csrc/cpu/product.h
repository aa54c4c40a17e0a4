// Rows of the batch times a matrix that stays the same for all steps and is therefore packed (panels.h).
//
// An element of the result is always summed in the same order, whatever the other rows are, on any number of
// threads.
#pragma once

#include <cstring>

#include "instances.h"
#include "panels.h"
#include "row_ops.h"

namespace fastrnn {

// out [rows, padded(N)] = in [rows, K] times the matrix. The elements of a row of `in` are in_stride apart.
template <class Storage>
struct Multiply {
  using A = typename Arithmetic<Storage>::type;

  const Packed<Storage>& packed;
  RowView<const A> in;
  int64_t in_stride;
  RowView<A> out;
  bool adds = false;  // to what `out` holds

  // How many rows of a panel stay in the nearest cache while all rows of the batch are multiplied with them.
  static constexpr int64_t depth = 128;

  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    int64_t K = packed.matrix.K;
    for (int64_t k = 0; k < K || k == 0; k += depth)
      over_terms<bytes>({in.data + k * in_stride, in.stride}, begin, end, k, std::min(k + depth, K));
  }

  struct Nothing {
    FASTRNN_INLINE void operator()(int64_t) const {}
  };

  // The part of the terms from k to k_end, at most `depth`. `terms`: the rows of `in` from term k on.
  // before_panel(n) is called before the panel whose first column is n.
  template <int bytes, class BeforePanel = Nothing>
  FASTRNN_INLINE void over_terms(const RowView<const A>& terms, int64_t begin, int64_t end, int64_t k,
                                 int64_t k_end, const BeforePanel& before_panel = {}) const {
    constexpr int rows = bytes == 64 ? 8 : bytes == 32 ? 3 : 1;  // as many sums as fit into registers
    alignas(64) A scratch[depth * panel_width<A>];
    for (int64_t n = 0; n < packed.matrix.N; n += panel_width<A>) {
      before_panel(n);
      const A* panel = packed.template panel<bytes>(n, k, k_end, scratch);
      int64_t b = begin;
      for (; b + rows <= end; b += rows) tile<bytes, rows>(panel, terms, b, n, k, k_end);
      if constexpr (rows > 4)
        for (; b + 4 <= end; b += 4) tile<bytes, 4>(panel, terms, b, n, k, k_end);
      if constexpr (rows > 2)
        for (; b + 2 <= end; b += 2) tile<bytes, 2>(panel, terms, b, n, k, k_end);
      for (; b < end; ++b) tile<bytes, 1>(panel, terms, b, n, k, k_end);
    }
  }

  // `rows` rows from b on times one panel, over the terms from k to k_end. These are summed by themselves,
  // then added to the earlier terms, since a long chain of additions would round more.
  template <int bytes, int rows>
  FASTRNN_INLINE void tile(const A* panel, const RowView<const A>& terms, int64_t b, int64_t n, int64_t k,
                           int64_t k_end) const {
    typedef A Vector __attribute__((vector_size(bytes)));
    constexpr int vectors = panel_bytes / bytes, lanes = bytes / sizeof(A);
    const A* row[rows];
    Vector sum[rows][vectors];
    FASTRNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      row[r] = terms[b + r];
      FASTRNN_UNROLL
      for (int v = 0; v < vectors; ++v) sum[r][v] = Vector{};
    }
    for (int64_t j = 0; j < k_end - k; ++j, panel += panel_width<A>) {
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
      const A* from = k == 0 && !adds ? packed.start.data() + n : to;
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

#define FASTRNN_INSTANCE(S)                                                          \
  extern template void walk_widest(const Pack<S>& body, int64_t begin, int64_t end); \
  extern template void walk_widest(const Multiply<S>& body, int64_t begin, int64_t end);
FASTRNN_EACH_STORAGE(FASTRNN_INSTANCE)
#undef FASTRNN_INSTANCE

}  // namespace fastrnn
