// The products around the scans of a network, over the rows of many steps, and sums over these rows.
#pragma once

#include <vector>

#include "../cells/lstm.cuh"
#include "arguments.h"
#include "long_product.h"

namespace fastrnn {

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

// Products with one matrix [K, N], whose threads share the rows: the short ones pack it as they read it, the
// long ones beforehand.
template <class Storage>
class MatrixProduct {
 public:
  using A = typename Matrix<Storage>::A;

  // `rows`: of all products with this matrix. `bias` [N] or null. `exact`: as of Packed.
  MatrixProduct(const Matrix<Storage>& matrix, const A* bias, int64_t rows, bool exact = false)
      : long_(std::is_same_v<Storage, A> && rows * matrix.K * matrix.N > longest_short),
        packed_(matrix, !long_, bias, exact) {}

  // out [rows, padded(N)] = in [rows, K] times the matrix, plus the bias, or plus what `out` holds if `adds`.
  // The elements of a row of `in` are in_stride apart.
  void operator()(RowView<const A> in, int64_t in_stride, int64_t rows, RowView<A> out,
                  bool adds = false) const {
    const Matrix<Storage>& matrix = packed_.matrix;
    if constexpr (std::is_same_v<Storage, A>)
      if (long_) return multiply_rows({in.data, rows, matrix.K, in.stride, in_stride}, packed_, out, adds);
    constexpr int64_t grain = 1 << 20;  // multiplications that are worth waking a thread
    share(rows, grain / std::max<int64_t>(matrix.K * matrix.N, 1) + 1, [&](int64_t begin, int64_t end) {
      multiply_rows_of(packed_, in, in_stride, out, adds, begin, end);
    });
  }

 private:
  static constexpr int64_t longest_short = 1 << 23;  // multiplications
  bool long_;
  Packed<Storage> packed_;
};

// Contiguous rows in the type of the arithmetic: the memory itself, or a copy of a half type.
template <class Storage>
class Widened {
 public:
  using A = typename Arithmetic<Storage>::type;

  Widened(const Storage* data, int64_t rows, int64_t columns)
      : columns_(columns), copy_(std::is_same_v<Storage, A> ? 0 : rows * columns) {
    if constexpr (std::is_same_v<Storage, A>)
      data_ = data;
    else
      walk_rows(Read<Storage, A>{columns, {data, columns}, 1, {copy_.data(), columns}}, 0, rows);
    if constexpr (!std::is_same_v<Storage, A>) data_ = copy_.data();
  }
  RowView<const A> rows() const { return {data_, columns_}; }
  const A* data() const { return data_; }

 private:
  int64_t columns_;
  Aligned<A> copy_;
  const A* data_;
};

// out [rows, N] contiguous = in [rows, K] times the matrix of the product, plus what `out` holds if `adds`.
template <class Storage, class Out>
void product_into(const MatrixProduct<Storage>& product, RowView<const typename Matrix<Storage>::A> in,
                  int64_t in_stride, int64_t rows, int64_t N, Out* out, bool adds) {
  using A = typename Matrix<Storage>::A;
  if constexpr (std::is_same_v<Out, A>)
    if (N % panel_width<A> == 0) return product(in, in_stride, rows, {out, N}, adds);
  Buffer<A> found(rows, N);
  product(in, in_stride, rows, found);
  for (int64_t r = 0; adds && r < rows; ++r)
    for (int64_t j = 0; j < N; ++j) found[r][j] += widen(out[r * N + j]);
  walk_rows(Write<Out, A>{N, found, {out, N}}, 0, rows);
}

// Adds rows of a matrix to `sums`, each column in one chain of doubles.
template <class A>
struct AddRows {
  RowView<const A> in;
  int64_t rows;
  double* sums;

  // Columns from begin to end.
  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    for (int64_t r = 0; r < rows; ++r) {
      const A* row = in[r];
      FASTRNN_SIMD
      for (int64_t j = begin; j < end; ++j) sums[j] += double(row[j]);
    }
  }
};

template <class A>
void add_rows(RowView<const A> in, int64_t rows, std::vector<double>& sums) {
  constexpr int64_t grain = 1 << 17;  // additions that are worth waking a thread
  share(sums.size(), grain / std::max<int64_t>(rows, 1) + 1,
        [&](int64_t begin, int64_t end) { walk_widest(AddRows<A>{in, rows, sums.data()}, begin, end); });
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
