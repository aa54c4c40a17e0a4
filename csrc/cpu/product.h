// Rows of the batch times a matrix that stays the same for all steps and is therefore packed (panels.h).
//
// An element of the result is always summed in the same order, whatever the other rows are, on any number of
// threads.
#pragma once

#include <cstring>
#include <stdexcept>

#include "instances.h"
#include "panels.h"
#include "row_ops.h"
#include "tiles.h"

namespace fastrnn {

// out [rows, padded(N)] = in [rows, K] times the matrix. The elements of a row of `in` are in_stride apart.
// Terms: as in pairs.h. Where they are pairs, so are the elements of `in` [rows, words].
template <class Storage, class Terms = SingleTerms<typename Arithmetic<Storage>::type>>
struct Multiply {
  using A = typename Arithmetic<Storage>::type;
  using Word = typename Terms::Word;

  const Packed<Storage>& packed;
  RowView<const Word> in;
  int64_t in_stride;
  RowView<A> out;
  bool adds = false;  // to what `out` holds

  // How many rows of a panel stay in the nearest cache while all rows of the batch are multiplied with them.
  static constexpr int64_t depth = 128;
  static constexpr int64_t half = panel_width<Word> / 2;  // of a row of a panel: a cache line

  // One panel after the other, so that its part of the result stays in the cache.
  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    const int64_t K = packed.words;
    alignas(64) Word scratch[depth * panel_width<Word>];
    for (int64_t n = 0; n < packed.matrix.N; n += panel_width<A>)
      for (int64_t k = 0; k < K || k == 0; k += depth) {
        const int64_t k_end = std::min(k + depth, K), after = n + panel_width<A>;
        const Word* panel = packed.template panel<bytes>(n, k, k_end, scratch);
        const Word* next = packed.following(panel, k_end < K ? n : after, k_end < K ? k_end : 0);
        over_rows<bytes>({in.data + k * in_stride, in.stride}, begin, end, n, k, k_end, panel, next);
      }
  }

  struct Nothing {
    FASTRNN_INLINE void operator()(int64_t) const {}
  };

  // The part of the terms from k to k_end, at most `depth`. `terms`: the rows of `in` from term k on.
  // before_panel(n) is called before the panel whose first column is n.
  template <int bytes, class BeforePanel = Nothing>
  FASTRNN_INLINE void over_terms(const RowView<const Word>& terms, int64_t begin, int64_t end, int64_t k,
                                 int64_t k_end, const BeforePanel& before_panel = {}) const {
    const int64_t K = packed.words;
    alignas(64) Word scratch[depth * panel_width<Word>];
    for (int64_t n = 0; n < packed.matrix.N; n += panel_width<A>) {
      before_panel(n);
      const Word* panel = packed.template panel<bytes>(n, k, k_end, scratch);
      const int64_t after = n + panel_width<A>;
      const bool last = after >= packed.matrix.N;
      const Word* next = packed.following(panel, last ? 0 : after, !last ? k : k_end < K ? k_end : 0);
      over_rows<bytes>(terms, begin, end, n, k, k_end, panel, next);
    }
  }

  // The part of one panel. `next`: what will be read after it.
  template <int bytes>
  FASTRNN_INLINE void over_rows(const RowView<const Word>& terms, int64_t begin, int64_t end, int64_t n,
                                int64_t k, int64_t k_end, const Word* panel, const Word* next) const {
    constexpr int rows = bytes == 64 ? 8 : bytes == 32 ? 3 : 1;  // as many sums as fit into registers
    int64_t b = begin;
    for (; b + 3 * rows <= end; b += rows) tile<bytes, rows>(panel, terms, b, n, k, k_end);
    // The last tiles ask for half of the next panel each, which then replaces this one in the cache.
    for (; b + rows <= end; b += rows, next += (k_end - k) * half)
      tile<bytes, rows, true>(panel, terms, b, n, k, k_end, next);
    if constexpr (rows > 4)
      for (; b + 4 <= end; b += 4) tile<bytes, 4>(panel, terms, b, n, k, k_end);
    if constexpr (rows > 2)
      for (; b + 2 <= end; b += 2) tile<bytes, 2>(panel, terms, b, n, k, k_end);
    for (; b < end; ++b) tile<bytes, 1>(panel, terms, b, n, k, k_end);
  }

  // `rows` rows from b on times one panel, over the terms from k to k_end. These are summed by themselves,
  // then added to the earlier terms, since a long chain of additions would round more. With `asks`, half a
  // row from `next` on is brought into the cache for each term.
  template <int bytes, int rows, bool asks = false>
  FASTRNN_INLINE void tile(const Word* panel, const RowView<const Word>& terms, int64_t b, int64_t n,
                           int64_t k, int64_t k_end, const Word* next = nullptr) const {
    typedef A Vector __attribute__((vector_size(bytes)));
    typedef Word Weights __attribute__((vector_size(bytes)));
    constexpr int vectors = panel_bytes / bytes, lanes = bytes / sizeof(A);
    const Word* row[rows];
    Vector sum[rows][vectors];
    FASTRNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      row[r] = terms[b + r];
      FASTRNN_UNROLL
      for (int v = 0; v < vectors; ++v) sum[r][v] = Vector{};
    }
    const int64_t stride = in_stride;
    for (int64_t j = 0, i = 0; j < k_end - k; ++j, i += stride, panel += panel_width<A>) {
      Weights weight[vectors];
      if constexpr (asks) __builtin_prefetch(next + j * half);
      FASTRNN_UNROLL
      for (int v = 0; v < vectors; ++v) std::memcpy(&weight[v], panel + v * lanes, bytes);
      FASTRNN_UNROLL
      for (int r = 0; r < rows; ++r) {
        Word x = row[r][i];
        FASTRNN_UNROLL
        for (int v = 0; v < vectors; ++v) Terms::add(sum[r][v], x, weight[v]);
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

// The same by pairs of numbers of `in`, each of which is a bfloat16 number. `depth` pairs, pair after pair,
// are summed by themselves.
template <class Terms>
struct MultiplyPairs {
  static constexpr int64_t block = 64, depth = Multiply<BFloat16, Terms>::depth;  // rows and pairs at a time

  const Packed<BFloat16>& packed;
  RowView<const float> in;
  int64_t in_stride;
  RowView<float> out;
  bool adds;

  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    const int64_t K = packed.words;
    alignas(64) Pair pairs[block * depth];
    for (int64_t b = begin; b < end; b += block) {
      const int64_t rows = std::min(block, end - b);
      Multiply<BFloat16, Terms> multiply{packed, {}, 1, {out[b], out.stride}, adds};
      for (int64_t k = 0; k < K || k == 0; k += depth) {
        const int64_t k_end = std::min(k + depth, K);
        for (int64_t r = 0; r < rows; ++r) copy(in[b + r], k, k_end, pairs + r * depth);
        multiply.template over_terms<bytes>({pairs, depth}, 0, rows, k, k_end);
      }
    }
  }

 private:
  // Pairs k to k_end of a row.
  FASTRNN_INLINE void copy(const float* row, int64_t k, int64_t k_end, Pair* to) const {
    const int64_t whole = std::min(k_end, packed.matrix.K / 2);
    FASTRNN_SIMD
    for (int64_t i = k; i < whole; ++i)
      to[i - k] =
          bits_of(row[2 * i * in_stride]) >> 16 | (bits_of(row[(2 * i + 1) * in_stride]) & 0xFFFF0000u);
    if (whole < k_end) to[whole - k] = bits_of(row[2 * whole * in_stride]) >> 16;
  }
};

// Rows begin to end of `out` = `in` times the matrix, as in Multiply. The rows of `in` may be of the storage
// type where the product goes by tiles.
template <class Storage, class In>
void multiply_rows_of(const Packed<Storage>& packed, RowView<const In> in, int64_t in_stride,
                      RowView<typename Packed<Storage>::A> out, bool adds, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<Storage, BFloat16>) {
#ifdef FASTRNN_AMX
    if (packed.pairs == PairProducts::amx)
      return walk_amx(MultiplyTiles<AmxTiles, In>{packed, in, in_stride, out, adds}, begin, end);
#endif
    if (by_tiles(packed.pairs))
      return walk_baseline(MultiplyTiles<PortableTiles, In>{packed, in, in_stride, out, adds}, begin, end);
  }
  if constexpr (std::is_same_v<In, typename Packed<Storage>::A>) {
    if constexpr (std::is_same_v<Storage, BFloat16>) {
#ifdef FASTRNN_AVX512_BF16
      if (packed.pairs == PairProducts::avx512)
        return walk_avx512_bf16(MultiplyPairs<Avx512Pairs>{packed, in, in_stride, out, adds}, begin, end);
#endif
      if (packed.pairs != PairProducts::none)
        return walk_widest(MultiplyPairs<PortablePairs>{packed, in, in_stride, out, adds}, begin, end);
    }
    walk_widest(Multiply<Storage>{packed, in, in_stride, out, adds}, begin, end);
  } else {
    throw std::logic_error("only products by tiles read their rows in the type of the storage");
  }
}

#define FASTRNN_INSTANCE(S)                                                          \
  extern template void walk_widest(const Pack<S>& body, int64_t begin, int64_t end); \
  extern template void walk_widest(const Multiply<S>& body, int64_t begin, int64_t end);
FASTRNN_EACH_STORAGE(FASTRNN_INSTANCE)
#undef FASTRNN_INSTANCE

extern template void walk_widest(const Pack<BFloat16, Pair>& body, int64_t begin, int64_t end);
extern template void walk_widest(const MultiplyPairs<PortablePairs>& body, int64_t begin, int64_t end);
#ifdef FASTRNN_AVX512_BF16
extern template void walk_avx512_bf16(const MultiplyPairs<Avx512Pairs>& body, int64_t begin, int64_t end);
#endif

}  // namespace fastrnn
