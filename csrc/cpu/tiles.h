// Products of bfloat16 numbers by tiles, as processors with AMX compute them: an instruction multiplies 16
// rows of 32 terms with 32 rows of 16 columns, and adds to 16 x 16 float32 sums.
//
// A left operand of float32 numbers goes in two parts, each a bfloat16 number, which keep 16 of its 24 bits.
// An element of the result is always summed in the same order, whatever the other rows are.
#pragma once

#include <cstring>
#include <type_traits>

#include "panels.h"
#include "row_ops.h"

namespace fastrnn {

// The sums of up to two tiles of rows, of two tiles of columns each: a panel.
//
// load_sums<row>(from, stride): sets the sums of a tile of rows to numbers in memory. store_sums: the
// opposite. add<rows>(left, stride, panel): adds the products of `rows` tiles of rows, whose words are
// `stride` apart from one row to the next, with 16 words of a panel.

// For tests. It has the bits of the instruction (Intel's manual, TDPBF16PS), except that this takes denormal
// numbers for zero: the first terms of all pairs are summed, and the second ones, from the first pair to the
// last; then both sums are added to each other and to the sum before.
struct PortableTiles {
  float sums[2][rows_of_tile][2 * rows_of_tile];

  template <int row>
  void load_sums(const float* from, int64_t stride) {
    for (int64_t r = 0; r < rows_of_tile; ++r)
      std::memcpy(sums[row][r], from + r * stride, sizeof sums[row][r]);
  }

  template <int row>
  void store_sums(float* to, int64_t stride) const {
    for (int64_t r = 0; r < rows_of_tile; ++r)
      std::memcpy(to + r * stride, sums[row][r], sizeof sums[row][r]);
  }

  template <int rows>
  void add(const Pair* left, int64_t stride, const Pair* panel) {
    for (int64_t r = 0; r < rows * rows_of_tile; ++r)
      for (int64_t n = 0; n < 2 * rows_of_tile; ++n) {
        float first = 0, second = 0;
        for (int64_t k = 0; k < rows_of_tile; ++k) {
          const Pair x = left[r * stride + k], weight = panel[k * panel_width<Pair> + n];
          first += float_of(x << 16) * float_of(weight << 16);
          second += float_of(x & 0xFFFF0000u) * float_of(weight & 0xFFFF0000u);
        }
        sums[r / rows_of_tile][r % rows_of_tile][n] += first + second;
      }
  }
};

#ifdef FASTRNN_AMX
#define FASTRNN_AMX_ISA FASTRNN_TARGET("amx-tile,amx-bf16," FASTRNN_AVX512)

// Registers 0 to 3 hold the sums, 4 and 5 the left operand, 6 and 7 the panel. The functions are no
// FASTRNN_INLINE: their callers have this target only once they are inlined into `walk_amx`.
struct AmxTiles {
  template <int row>
  FASTRNN_AMX_ISA inline void load_sums(const float* from, int64_t stride) {
    stride *= sizeof(float);
    if constexpr (row == 0) {
      _tile_loadd(0, from, stride);
      _tile_loadd(1, from + rows_of_tile, stride);
    } else {
      _tile_loadd(2, from, stride);
      _tile_loadd(3, from + rows_of_tile, stride);
    }
  }

  template <int row>
  FASTRNN_AMX_ISA inline void store_sums(float* to, int64_t stride) const {
    stride *= sizeof(float);
    if constexpr (row == 0) {
      _tile_stored(0, to, stride);
      _tile_stored(1, to + rows_of_tile, stride);
    } else {
      _tile_stored(2, to, stride);
      _tile_stored(3, to + rows_of_tile, stride);
    }
  }

  template <int rows>
  FASTRNN_AMX_ISA inline void add(const Pair* left, int64_t stride, const Pair* panel) {
    const int64_t bytes = stride * sizeof(Pair);
    _tile_loadd(6, panel, panel_bytes);
    _tile_loadd(7, panel + rows_of_tile, panel_bytes);
    _tile_loadd(4, left, bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (rows == 2) {
      _tile_loadd(5, left + rows_of_tile * stride, bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};

// Sets up the registers, all of 16 rows of 64 bytes, for this call: torch's products change them, too.
template <class Body>
FASTRNN_AMX_ISA void walk_amx(const Body& body, int64_t begin, int64_t end) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } registers;
  std::fill_n(registers.bytes, 8, 64), std::fill_n(registers.rows, 8, rows_of_tile);
  _tile_loadconfig(&registers);
  body.template walk<64>(begin, end);
  _tile_release();
}
#endif

// The compiler does not know that the instructions read memory.
FASTRNN_INLINE void memory_is_read() {
#ifdef __GNUC__
  __asm__ volatile("" ::: "memory");
#endif
}

// Multiply (product.h) of bfloat16 by tiles. In: float or BFloat16.
template <class Tiles, class In>
struct MultiplyTiles {
  // Words of the left operand at a time, and of one of its rows: they stay in the second cache, and a panel
  // of as many words in the first, while all these rows are multiplied with it.
  static constexpr int64_t room = 1 << 17, most_depth = 256;
  static constexpr int64_t group = 2 * rows_of_tile;  // rows that are multiplied at once
  static constexpr bool may_split = std::is_same_v<In, float>;

  const Packed<BFloat16>& packed;
  RowView<const In> in;
  int64_t in_stride;
  RowView<float> out;
  bool adds;

  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    static thread_local const Aligned<Pair> memory(room);
    Pair* const left = memory.data();
    alignas(64) Pair scratch[most_depth * panel_width<Pair>];
    const int64_t words = packed.words, depth = std::clamp(words, rows_of_tile, most_depth);
    const int64_t stride =
        depth + rows_of_tile;  // no power of two, whose rows would share few places of a cache
    const int64_t block = room / (splits() ? 2 : 1) / stride / group * group;
    Tiles tiles;
    for (int64_t b = begin; b < end; b += block) {
      const int64_t rows = std::min(block, end - b);
      for (int64_t k = 0; k < words || k == 0; k += depth) {
        const int64_t k_end = std::min(k + depth, words);
        const Left terms{left, stride, splits() ? rows_in_tiles(rows) * stride : 0};
        copy<bytes>(b, rows, k, k_end, terms);
        for (int64_t n = 0; n < packed.matrix.N; n += panel_width<Pair>) {
          const Pair* panel = packed.template panel<bytes>(n, k, k_end, scratch);
          memory_is_read();
          for (int64_t r = 0; r < rows; r += group) {
            const int64_t some = std::min(group, rows - r);
            const float* start = k == 0 && !adds ? packed.start.data() + n : nullptr;
            RowView<float> sums{out[b + r] + n, out.stride};
            if (some > rows_of_tile)
              tile<2>(tiles, terms.from(r), panel, k_end - k, start, sums, some);
            else
              tile<1>(tiles, terms.from(r), panel, k_end - k, start, sums, some);
          }
        }
      }
    }
  }

 private:
  // Rows of the left operand, and so many words further on what is left of them without their higher halves;
  // 0 where that is nothing.
  struct Left {
    Pair* data;
    int64_t stride, rest;

    FASTRNN_INLINE Pair* operator[](int64_t r) const { return data + r * stride; }
    FASTRNN_INLINE Left from(int64_t r) const { return {data + r * stride, stride, rest}; }
  };

  FASTRNN_INLINE bool splits() const { return may_split && !packed.exact; }
  static FASTRNN_INLINE int64_t rows_in_tiles(int64_t rows) {
    return (rows + rows_of_tile - 1) / rows_of_tile * rows_of_tile;
  }

  // `some` rows of a panel, in as many tiles as `rows`: the sums, which begin as the row `start` unless that
  // is null, plus the products of `words` words.
  template <int rows>
  FASTRNN_INLINE void tile(Tiles& tiles, const Left& left, const Pair* panel, int64_t words,
                           const float* start, RowView<float> sums, int64_t some) const {
    constexpr int64_t width = panel_width<Pair>;
    alignas(64) float spare[group * width];  // where the last tile has fewer rows
    const bool whole = some == rows * rows_of_tile;
    const RowView<float> memory = whole ? sums : RowView<float>{spare, width};
    if (start == nullptr && !whole) {
      for (int64_t r = 0; r < some; ++r) std::memcpy(memory[r], sums[r], width * sizeof(float));
      memory_is_read();
    }
    const RowView<const float> first =
        start ? RowView<const float>{start, 0} : RowView<const float>{memory.data, memory.stride};
    tiles.template load_sums<0>(first[0], first.stride);
    if constexpr (rows == 2) tiles.template load_sums<1>(first[rows_of_tile], first.stride);
    for (int64_t k = 0; k < words; k += rows_of_tile) {
      const Pair *terms = left.data + k, *weights = panel + k * width;
      tiles.template add<rows>(terms, left.stride, weights);
      if (left.rest) tiles.template add<rows>(terms + left.rest, left.stride, weights);
    }
    tiles.template store_sums<0>(memory[0], memory.stride);
    if constexpr (rows == 2) tiles.template store_sums<1>(memory[rows_of_tile], memory.stride);
    if (!whole)
      for (int64_t r = 0; r < some; ++r) std::memcpy(sums[r], memory[r], width * sizeof(float));
  }

  // Words k to k_end of `rows` rows from b on; zeros after the last term and the last row, up to a whole
  // tile.
  template <int bytes>
  FASTRNN_INLINE void copy(int64_t b, int64_t rows, int64_t k, int64_t k_end, const Left& left) const {
    const int64_t terms = packed.matrix.K, whole = std::max(std::min(k_end, terms / 2), k);
    if constexpr (!may_split) {
      if (in_stride != 1 && in.stride == 1)
        transpose<bytes>(b, rows, k, whole, left);
      else
        for (int64_t r = 0; r < rows; ++r) copy_row(in[b + r], k, whole, left[r], left.rest);
    } else {
      for (int64_t r = 0; r < rows; ++r) copy_row(in[b + r], k, whole, left[r], left.rest);
    }
    for (int64_t r = 0; r < rows_in_tiles(rows); ++r) {
      int64_t filled = r < rows ? whole : k;
      if (r < rows && filled < k_end && 2 * filled < terms) {  // a last, odd term
        put(in[b + r][2 * filled * in_stride], left[r] + filled - k, left.rest);
        ++filled;
      }
      std::fill_n(left[r] + filled - k, k_end - filled, 0);
      if (left.rest) std::fill_n(left[r] + left.rest + filled - k, k_end - filled, 0);
    }
  }

  static FASTRNN_INLINE Pair high(BFloat16 x) { return static_cast<Pair>(x); }
  static FASTRNN_INLINE Pair high(float x) {
    const Pair bits = bits_of(x) >> 16;
    return x != x ? bits | 0x40u : bits;  // a NaN, whose lower bits may be all that makes it one
  }
  // What is left of x without its higher half, rounded; zero where x is not finite.
  static FASTRNN_INLINE Pair low(float x) {
    const float rest = x - float_of(bits_of(x) & 0xFFFF0000u);
    const Pair bits = bits_of(rest);
    return rest == rest ? (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16 : 0;
  }

  // A term without a second one.
  static FASTRNN_INLINE void put(In x, Pair* to, int64_t rest) {
    *to = high(x);
    if constexpr (may_split)
      if (rest) to[rest] = low(x);
  }

  FASTRNN_INLINE void copy_row(const In* row, int64_t k, int64_t k_end, Pair* to, int64_t rest) const {
    if (in_stride == 1)
      copy_terms<1>(row, k, k_end, to, rest);
    else
      copy_terms<0>(row, k, k_end, to, rest);
  }

  // constant: the distance of the terms, or 0 where it is in_stride.
  template <int64_t constant>
  FASTRNN_INLINE void copy_terms(const In* row, int64_t k, int64_t k_end, Pair* to, int64_t rest) const {
    const int64_t stride = constant ? constant : in_stride;
    if constexpr (constant == 1 && !may_split) {
      std::memcpy(to, row + 2 * k, (k_end - k) * sizeof(Pair));
    } else {
      FASTRNN_SIMD
      for (int64_t i = k; i < k_end; ++i)
        to[i - k] = high(row[2 * i * stride]) | high(row[(2 * i + 1) * stride]) << 16;
    }
    if constexpr (may_split) {
      if (!rest) return;
      Pair* remainder = to + rest;
      FASTRNN_SIMD
      for (int64_t i = k; i < k_end; ++i)
        remainder[i - k] = low(row[2 * i * stride]) | low(row[(2 * i + 1) * stride]) << 16;
    }
  }

  // Words k to k_end of rows whose first terms lie side by side, square by square.
  template <int bytes>
  FASTRNN_INLINE void transpose(int64_t b, int64_t rows, int64_t k, int64_t k_end, const Left& left) const {
    constexpr int64_t lanes = Square<Pair, bytes>::lanes;
    const Matrix<BFloat16> terms{in[b], packed.matrix.K, rows, in_stride, 1};
    for (int64_t i = k; i < k_end; i += lanes)
      for (int64_t r = 0; r < rows; r += lanes) {
        const int64_t words = std::min(lanes, k_end - i), columns = std::min(lanes, rows - r);
        Square<Pair, bytes> square;
        alignas(64) Pair row[lanes] = {};
        FASTRNN_UNROLL
        for (int64_t j = 0; j < lanes; ++j) {
          if (columns == lanes && words == lanes)  // a constant number, which the compiler writes out
            terms.pairs_of(i + j, r, lanes, row);
          else if (j < words)
            terms.pairs_of(i + j, r, columns, row);
          std::memcpy(&square.row[j], row, bytes);
        }
        square.transpose();
        FASTRNN_UNROLL
        for (int64_t j = 0; j < lanes; ++j) {
          Pair* to = left[r + j] + i - k;
          if (columns == lanes && words == lanes)
            std::memcpy(to, &square.row[j], bytes);
          else if (j < columns)
            std::memcpy(to, &square.row[j], words * sizeof(Pair));
        }
      }
  }
};

extern template void walk_baseline(const MultiplyTiles<PortableTiles, float>&, int64_t, int64_t);
extern template void walk_baseline(const MultiplyTiles<PortableTiles, BFloat16>&, int64_t, int64_t);
#ifdef FASTRNN_AMX
extern template void walk_amx(const MultiplyTiles<AmxTiles, float>&, int64_t, int64_t);
extern template void walk_amx(const MultiplyTiles<AmxTiles, BFloat16>&, int64_t, int64_t);
#endif

}  // namespace fastrnn
