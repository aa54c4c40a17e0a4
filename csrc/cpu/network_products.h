// The products around the scans of a network, over the rows of many steps, and sums over these rows.
#pragma once

#include <vector>

#include "../cells/lstm.cuh"
#include "arguments.h"
#include "long_product.h"

namespace fastrnn {

constexpr int64_t grain_of_copies = 1 << 16;  // numbers that are worth waking a thread

// [rows, columns] of memory as the right operand of products, or its transpose.
template <class Storage>
Matrix<Storage> matrix_of(const Storage* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns, 1};
}

template <class Storage>
Matrix<Storage> matrix_of(const Tensor& t) {
  return {data_of<Storage>(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

template <class Storage>
Matrix<Storage> transposed(const Matrix<Storage>& m) {
  return {m.data, m.N, m.K, m.n_stride, m.k_stride};
}

// Whether products read their left operand in the type of the storage.
template <class Storage>
bool reads_storage() {
  if constexpr (std::is_same_v<Storage, BFloat16>) return by_tiles(pair_products());
  return std::is_same_v<Storage, typename Arithmetic<Storage>::type>;
}

// Products with one matrix [K, N], whose threads share the rows: the short ones pack it as they read it, the
// long ones beforehand.
template <class Storage>
class MatrixProduct {
 public:
  using A = typename Matrix<Storage>::A;

  // `rows`: of all products with this matrix. `bias` [N] or null. `exact`: as of Packed.
  MatrixProduct(const Matrix<Storage>& matrix, const A* bias, int64_t rows, bool exact = false)
      : long_(std::is_same_v<Storage, A> && rows * matrix.K * matrix.N > longest_short),
        packed_(matrix, !long_ && (!half || rows <= rows_read_once), bias, exact) {}

  // out [rows, padded(N)] = in [rows, K] times the matrix, plus the bias, or plus what `out` holds if `adds`.
  // The elements of a row of `in` are in_stride apart. In: A, or Storage if `reads_storage`.
  template <class In>
  void operator()(RowView<const In> in, int64_t in_stride, int64_t rows, RowView<A> out,
                  bool adds = false) const {
    const Matrix<Storage>& matrix = packed_.matrix;
    if constexpr (std::is_same_v<Storage, A> && std::is_same_v<In, A>)
      if (long_) return multiply_rows({in.data, rows, matrix.K, in.stride, in_stride}, packed_, out, adds);
    const bool tiled = half && reads_storage<Storage>();
    const int64_t grain = tiled ? 1 << 23 : 1 << 20;  // multiplications that are worth waking a thread
    const int64_t unit = tiled ? 2 * rows_of_tile : 1;
    share((rows + unit - 1) / unit, grain / std::max<int64_t>(unit * matrix.K * matrix.N, 1) + 1,
          [&](int64_t begin, int64_t end) {
            multiply_rows_of(packed_, in, in_stride, out, adds, begin * unit, std::min(end * unit, rows));
          });
  }

 private:
  static constexpr bool half = !std::is_same_v<Storage, A>;
  static constexpr int64_t longest_short = 1 << 23;  // multiplications
  static constexpr int64_t rows_read_once = 64;      // in a half type, whose calls go in chunks

  bool long_;
  Packed<Storage> packed_;
};

// f(begin, end) for parts of `rows` rows of `columns` numbers each, which a pass over the memory takes.
template <class F>
void share_rows(int64_t rows, int64_t columns, const F& f) {
  share(rows, grain_of_copies / std::max<int64_t>(columns, 1) + 1, f);
}

// Contiguous rows as the left operand of products: as they are where products read them so, or a copy in the
// type of the arithmetic.
template <class Storage>
class Operand {
 public:
  using A = typename Arithmetic<Storage>::type;

  Operand(const Storage* data, int64_t rows, int64_t columns)
      : stored_{data, columns}, copied_(!reads_storage<Storage>()), copy_(copied_ ? rows * columns : 0) {
    if (!copied_) return;
    const Read<Storage, A> row{columns, stored_, 1, {copy_.data(), columns}};
    share_rows(rows, columns, [&](int64_t begin, int64_t end) { walk_rows(row, begin, end); });
  }

  // f(rows) with the rows from `first` on, of type Storage or A.
  template <class F>
  void with_rows(int64_t first, const F& f) const {
    if (!copied_) return f(RowView<const Storage>{stored_[first], stored_.stride});
    if constexpr (!std::is_same_v<Storage, A>)
      f(RowView<const A>{copy_.data() + first * stored_.stride, stored_.stride});
  }

 private:
  RowView<const Storage> stored_;
  bool copied_;
  Aligned<A> copy_;
};

// out [rows, N] contiguous = in [rows, K] times the matrix of the product, plus what `out` holds if `adds`.
template <class Storage, class In, class Out>
void product_into(const MatrixProduct<Storage>& product, RowView<const In> in, int64_t in_stride,
                  int64_t rows, int64_t N, Out* out, bool adds) {
  using A = typename Matrix<Storage>::A;
  if constexpr (std::is_same_v<Out, A>)
    if (N % panel_width<A> == 0) return product(in, in_stride, rows, {out, N}, adds);
  Buffer<A> found(rows, N);
  product(in, in_stride, rows, found);
  share_rows(rows, N, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; adds && r < end; ++r)
      for (int64_t j = 0; j < N; ++j) found[r][j] += widen(out[r * N + j]);
    walk_rows(Write<Out, A>{N, found, {out, N}}, begin, end);
  });
}

// Adds rows of a matrix to `sums`, each column in one chain of doubles.
template <class In>
struct AddRows {
  RowView<const In> in;
  int64_t rows;
  double* sums;

  // Columns from begin to end.
  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    for (int64_t r = 0; r < rows; ++r) {
      const In* row = in[r];
      FASTRNN_SIMD
      for (int64_t j = begin; j < end; ++j) sums[j] += double(widen(row[j]));
    }
  }
};

template <class In>
void add_rows(RowView<const In> in, int64_t rows, std::vector<double>& sums) {
  constexpr int64_t grain = 1 << 17;  // additions that are worth waking a thread
  share(sums.size(), grain / std::max<int64_t>(rows, 1) + 1,
        [&](int64_t begin, int64_t end) { walk_widest(AddRows<In>{in, rows, sums.data()}, begin, end); });
}

template <class Storage>
void store_sums(const std::vector<double>& sums, const Tensor& to) {
  Storage* out = static_cast<Storage*>(to.mutable_data_ptr());
  for (size_t j = 0; j < sums.size(); ++j)
    narrow(static_cast<typename Arithmetic<Storage>::type>(sums[j]), out[j]);
}

// h before the projection, from what the LSTM saved, [rows, 4 * H], and c.
template <class Storage, class A>
struct UnprojectedRow {
  int64_t H;
  RowView<const Storage> saved;
  RowView<const A> c;
  RowView<A> h;

  FASTRNN_INLINE void operator()(int64_t b) const {
    const Storage* saved_row = saved[b];
    const A* c_row = c[b];
    A* h_row = h[b];
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A saved_j[LSTM::saved];
      load(saved_row, H, j, saved_j);
      h_row[j] = LSTM::output(saved_j, tanh_of(c_row[j]));
    }
  }
};

}  // namespace fastrnn
