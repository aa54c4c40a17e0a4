// A matrix packed into panels of a fixed number of columns, so that a product reads it sequentially.
#pragma once

#include <algorithm>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "../common/storage.cuh"
#include "pairs.h"
#include "threads.h"

namespace fastrnn {

constexpr int64_t panel_bytes = 128;  // of one row of a panel: two AVX-512 vectors, four AVX2 vectors

template <class A>
constexpr int64_t panel_width = panel_bytes / sizeof(A);

// The columns, rounded up to whole panels.
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

// A square of numbers, a vector for each row.
template <class A, int bytes>
struct Square {
  static constexpr int lanes = bytes / sizeof(A);
  typedef A Vector __attribute__((vector_size(bytes)));
  Vector row[lanes];

  // Transposes: exchanges the off-diagonal corners of 2 x 2 blocks, first of single numbers, then of blocks
  // of twice the size each time.
  FASTRNN_INLINE void transpose() { exchange<1>(std::make_integer_sequence<int, lanes>{}); }

 private:
  template <int size, int... lane>
  FASTRNN_INLINE void exchange(std::integer_sequence<int, lane...> each) {
    FASTRNN_UNROLL
    for (int i = 0; i < lanes; ++i) {
      if (i & size) continue;
      Vector upper = row[i], lower = row[i + size];
      choose<(lane & size ? lane - size + lanes : lane)...>(upper, lower, row[i]);
      choose<(lane & size ? lane + lanes : lane + size)...>(upper, lower, row[i + size]);
    }
    if constexpr (2 * size < lanes) exchange<2 * size>(each);
  }

  // Selects from the numbers of a, followed by those of b.
  template <int... from>
  static FASTRNN_INLINE void choose(const Vector& a, const Vector& b, Vector& out) {
#ifdef __clang__
    out = __builtin_shufflevector(a, b, from...);
#else
    using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    typedef Index Indices __attribute__((vector_size(bytes)));
    out = __builtin_shuffle(a, b, Indices{from...});
#endif
  }
};

// [K, N] in memory: row k, column n at data[k * k_stride + n * n_stride].
template <class Storage>
struct Matrix {
  using A = typename Arithmetic<Storage>::type;

  const Storage* data;
  int64_t K, N, k_stride, n_stride;

  // A word is what a product reads at once of a column: a number of type A, or a Pair, with zero after an odd
  // last number.
  template <class Word>
  static constexpr int64_t terms = std::is_same_v<Word, A> ? 1 : 2;

  template <class Word>
  int64_t words() const {
    return (K + terms<Word> - 1) / terms<Word>;
  }

  // Packs the rows of words k to k_end of the panel whose first column is n into `to` [k_end - k,
  // panel_width]; zeros after the last column and the last word.
  template <int bytes, class Word>
  FASTRNN_INLINE void panel(int64_t n, int64_t k, int64_t k_end, Word* to) const {
    constexpr int64_t lanes = Square<Word, bytes>::lanes, width = panel_width<Word>;
    const int64_t last = std::max(std::min(k_end, words<Word>()), k);
    std::fill_n(to + (last - k) * width, (k_end - last) * width, Word(0));
    if (k_stride == 1) {  // each column is contiguous
      for (int64_t j = 0; j < width; j += lanes)
        for (int64_t i = k; i < last; i += lanes)
          square<bytes>(i, std::min(lanes, last - i), n + j, to + (i - k) * width + j);
      return;
    }
    int64_t columns = std::min(width, N - n);
    for (int64_t i = k; i < last; ++i, to += width) {
      const Storage* from = data + i * terms<Word> * k_stride + n * n_stride;
      const Storage* next = from + columns * n_stride;  // of the next panel
      __builtin_prefetch(next), __builtin_prefetch(next + 64 / sizeof(Storage));
      if (n_stride == 1 && columns == width && (i + 1) * terms<Word> <= K) {
        if constexpr (std::is_same_v<Word, A>)
          whole_row(from, to);
        else
          pairs_of(i, n, width, to);
      } else {
        for (int64_t j = 0; j < columns; ++j) to[j] = word<Word>(from + j * n_stride, i);
        std::fill_n(to + columns, width - columns, Word(0));
      }
    }
  }

  // The k-th words of some contiguous columns, from the n-th on.
  FASTRNN_INLINE void pairs_of(int64_t k, int64_t n, int64_t columns, Pair* to) const {
    const Storage *first = data + 2 * k * k_stride + n, *second = first + k_stride;
    FASTRNN_SIMD
    for (int64_t j = 0; j < columns; ++j)
      to[j] = static_cast<Pair>(first[j]) | static_cast<Pair>(second[j]) << 16;
  }

 private:
  // A row of a panel, of contiguous columns.
  static FASTRNN_INLINE void whole_row(const Storage* from, A* to) {
    FASTRNN_SIMD
    for (int64_t j = 0; j < panel_width<A>; ++j) to[j] = widen(from[j]);
  }

  // The k-th word of a column, whose first number is at `from`.
  template <class Word>
  FASTRNN_INLINE Word word(const Storage* from, int64_t k) const {
    if constexpr (std::is_same_v<Word, A>) {
      return widen(*from);
    } else {
      Pair second = 2 * k + 1 < K ? static_cast<Pair>(from[k_stride]) : 0;
      return static_cast<Pair>(*from) | second << 16;
    }
  }

  // Packs `count` rows of words from k on, of as many columns from n on as a vector has lanes.
  template <int bytes, class Word>
  FASTRNN_INLINE void square(int64_t k, int64_t count, int64_t n, Word* to) const {
    constexpr int lanes = Square<Word, bytes>::lanes;
    constexpr bool as_they_are = sizeof(Word) == terms<Word> * sizeof(Storage);  // in memory
    Square<Word, bytes> numbers;
    const Storage* first = data + n * n_stride + k * terms<Word>;
    if (as_they_are && count == lanes && (k + count) * terms<Word> <= K && n + lanes <= N) {
      FASTRNN_UNROLL
      for (int i = 0; i < lanes; ++i) std::memcpy(&numbers.row[i], first + i * n_stride, bytes);
    } else {
      alignas(64) Word converted[lanes * lanes] = {};
      for (int64_t i = 0; i < std::min<int64_t>(lanes, N - n); ++i)
        for (int64_t j = 0; j < count; ++j)
          converted[i * lanes + j] = word<Word>(first + i * n_stride + j * terms<Word>, k + j);
      FASTRNN_UNROLL
      for (int i = 0; i < lanes; ++i) std::memcpy(&numbers.row[i], converted + i * lanes, bytes);
    }
    numbers.transpose();
    FASTRNN_UNROLL
    for (int i = 0; i < lanes; ++i)
      if (i < count) std::memcpy(to + i * panel_width<Word>, &numbers.row[i], bytes);
  }
};

// Packs the panels from begin to end, in the order of the matrix in memory, into
// `panels` [padded(N) / panel_width, K, panel_width].
template <class Storage, class Word = typename Matrix<Storage>::A>
struct Pack {
  Matrix<Storage> matrix;
  int64_t K;  // words, those after the matrix's last one included
  Word* panels;

  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    constexpr int64_t width = panel_width<Word>;
    const int64_t rows = matrix.k_stride == 1 ? std::max<int64_t>(K, 1) : 1;
    for (int64_t k = 0; k < K; k += rows)
      for (int64_t n = begin * width; n < end * width; n += width)
        matrix.template panel<bytes>(n, k, k + rows, panels + n * K + k * width);
  }
};

// How a matrix is multiplied. `exact`: whether only with numbers that the storage type holds. Products by
// tiles take any left operand: they multiply with what the storage type leaves of it, too.
template <class Storage>
PairProducts pairs_for(bool exact) {
  if (!std::is_same_v<Storage, BFloat16>) return PairProducts::none;
  const PairProducts kind = pair_products();
  return exact || by_tiles(kind) ? kind : PairProducts::none;
}

// A matrix as products read it: packed beforehand, by PyTorch's threads; or, if it is read only once, left in
// place, and packed a few rows of a panel at a time when a product needs them.
template <class Storage>
struct Packed {
  using A = typename Matrix<Storage>::A;

  Matrix<Storage> matrix;
  const bool exact;          // whether it is multiplied only with numbers that the storage type holds
  const PairProducts pairs;  // none where the words are numbers of type A; pairs are as long
  const int64_t words;       // of a column; a multiple of `rows_of_tile` for products by tiles
  Aligned<A> panels;         // see `Pack`; empty if it is read once
  Aligned<A> start;          // [padded(N)], what is added to each row of the product

  // `bias` [N] or null.
  Packed(const Matrix<Storage>& matrix, bool once, const A* bias, bool exact = false)
      : matrix(matrix),
        exact(exact),
        pairs(pairs_for<Storage>(exact)),
        words(words_of(matrix, pairs)),
        panels(once ? 0 : padded<A>(matrix.N) * words),
        start(padded<A>(matrix.N)),
        once(once) {
    if (!once && pairs == PairProducts::none) pack(panels.data());
    if constexpr (std::is_same_v<Storage, BFloat16>)
      if (!once && pairs != PairProducts::none) pack(reinterpret_cast<Pair*>(panels.data()));
    for (int64_t n = 0; n < padded<A>(matrix.N); ++n)
      start.data()[n] = n < matrix.N && bias != nullptr ? bias[n] : A(0);
  }

  // Rows of words k to k_end of the panel whose first column is n; packed into `scratch` if they are not
  // packed yet.
  template <int bytes, class Word>
  FASTRNN_INLINE const Word* panel(int64_t n, int64_t k, int64_t k_end, Word* scratch) const {
    if (!once) return reinterpret_cast<const Word*>(panels.data()) + n * words + k * panel_width<Word>;
    matrix.template panel<bytes>(n, k, k_end, scratch);
    return scratch;
  }

  // The rows from k on of the panel whose first column is n, modulo the number of columns; `panel` itself
  // where they will be packed into its place.
  template <class Word>
  FASTRNN_INLINE const Word* following(const Word* panel, int64_t n, int64_t k) const {
    if (once) return panel;
    return reinterpret_cast<const Word*>(panels.data()) + (n < matrix.N ? n * words : 0) +
           k * panel_width<Word>;
  }

 private:
  static int64_t words_of(const Matrix<Storage>& matrix, PairProducts pairs) {
    if (pairs == PairProducts::none) return matrix.K;
    const int64_t words = matrix.template words<Pair>();
    return by_tiles(pairs) ? (words + rows_of_tile - 1) / rows_of_tile * rows_of_tile : words;
  }

  template <class Word>
  void pack(Word* to) const {
    constexpr int64_t grain = 1 << 15;  // elements that are worth waking a thread
    share(
        padded<A>(matrix.N) / panel_width<A>, grain / (panel_width<A> * std::max<int64_t>(words, 1)) + 1,
        [&](int64_t begin, int64_t end) { walk_widest(Pack<Storage, Word>{matrix, words, to}, begin, end); });
  }

  bool once;
};

}  // namespace fastrnn
