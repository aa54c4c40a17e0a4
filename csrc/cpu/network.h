// A whole network in one call: all layers and directions, the products with the inputs as well as the scans.
//
// Rows of all steps are in the order of the input in memory, [T, B], [B, T] or packed, so that nothing is
// transposed or padded.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../cells/lstm.cuh"
#include "arguments.h"
#include "long_product.h"
#include "scan_backward.h"
#include "scan_forward.h"

namespace fastrnn {

// The sizes of a network and of its input. P: the width of h, H without a projection.
struct NetworkSizes {
  int64_t T, B, I, H, P, layers, directions;
  bool batch_first, bias, projects;
  // Of packed rows: the sequences that run at each step, 0 after the last, and the number of the first row of
  // each step. Otherwise empty.
  std::vector<int64_t> batch_sizes, first_rows;

  bool packed() const { return !batch_sizes.empty(); }
  int64_t rows() const { return packed() ? first_rows[T] : T * B; }
  int64_t running(int64_t t) const { return packed() ? batch_sizes[t] : B; }
  int64_t t_step() const { return batch_first ? 1 : B; }
  int64_t b_step() const { return batch_first ? T : 1; }
  // The first row of a step.
  int64_t row(int64_t t) const { return packed() ? first_rows[t] : t * t_step(); }
  int64_t walks() const { return layers * directions; }
  int64_t weights_of_walk() const { return 2 + 2 * bias + projects; }
  int64_t outputs() const { return directions * P; }
  int64_t inputs(int64_t layer) const { return layer == 0 ? I : outputs(); }
  // The most rows of consecutive steps that are computed together, products and scan, while they are in the
  // cache.
  static int64_t rows_of_chunk(int64_t width) {
    constexpr int64_t numbers = 1 << 18, least_rows = 512;
    return std::max(numbers / std::max<int64_t>(width, 1), least_rows);
  }
  // The steps from t on, of rows `stride` apart of which the first is at `data`.
  template <class X>
  Steps<X> steps(X* data, int64_t stride, int64_t t) const {
    return {data, t_step() * stride, b_step() * stride, 1, packed() ? first_rows.data() + t : nullptr};
  }
};

// The parameters of one layer in one direction.
struct NetworkWeights {
  const Tensor &w_ih, &w_hh;  // [gates * H, inputs], [gates * H, P]
  const Tensor *b_ih, *b_hh;  // [gates * H] or null
  const Tensor* w_hr;         // [P, H] or null
};

// Of the k-th walk, a layer in one direction: from tensors in torch.nn's order.
inline NetworkWeights weights_of(const Tensor* all, int64_t k, const NetworkSizes& sizes) {
  const Tensor* first = all + k * sizes.weights_of_walk();
  const Tensor* after_w_hh = first + 2;
  const bool bias = sizes.bias;
  return {first[0], first[1], bias ? after_w_hh : nullptr, bias ? after_w_hh + 1 : nullptr,
          sizes.projects ? after_w_hh + 2 * bias : nullptr};
}

template <class Storage>
const Storage* data_of(const Tensor& t) {
  return static_cast<const Storage*>(t.const_data_ptr());
}

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

// What the backward needs, in one piece of memory: of each layer y [rows, D * P] in the storage type, and of
// each layer and direction `saved` [rows, saved * H], and c [rows, H] in the type of the arithmetic.
template <class Storage>
struct NetworkMemory {
  using A = typename Arithmetic<Storage>::type;

  int64_t of_y, of_saved, of_c, of_walk, of_layer, directions;  // bytes
  char* data = nullptr;

  NetworkMemory(const NetworkSizes& sizes, const CellTraits& cell, bool keeps)
      : of_y(aligned(sizes.rows() * sizes.outputs() * sizeof(Storage))),
        of_saved(keeps ? aligned(sizes.rows() * cell.saved * sizes.H * sizeof(Storage)) : 0),
        of_c(keeps && cell.states > 1 ? aligned(sizes.rows() * sizes.H * sizeof(A)) : 0),
        of_walk(of_saved + of_c),
        of_layer(of_y + sizes.directions * of_walk),
        directions(sizes.directions) {}

  Storage* y(int64_t layer) const { return reinterpret_cast<Storage*>(data + layer * of_layer); }
  Storage* saved(int64_t layer, int64_t d) const { return reinterpret_cast<Storage*>(walk(layer, d)); }
  A* c(int64_t layer, int64_t d) const { return reinterpret_cast<A*>(walk(layer, d) + of_saved); }

 private:
  static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  char* walk(int64_t layer, int64_t d) const { return data + layer * of_layer + of_y + d * of_walk; }
};

// States [layers * D, B, P or H], or without B, of one walk; zeros where there is no tensor.
template <class X>
Steps<const X> state_of(const Optional& t, int64_t k, const std::vector<X>& zeros) {
  if (!t.has_value()) return {zeros.data(), 0, 0, 1};
  const int64_t last = t->dim() - 1;
  return {data_of<X>(*t) + k * t->stride(0), 0, last == 2 ? t->stride(1) : 0, t->stride(last)};
}

template <class Storage>
std::vector<typename Arithmetic<Storage>::type> widened_vector(const Tensor* t) {
  std::vector<typename Arithmetic<Storage>::type> found(t ? t->size(0) : 0);
  for (size_t j = 0; j < found.size(); ++j) found[j] = widen(data_of<Storage>(*t)[j * t->stride(0)]);
  return found;
}

}  // namespace fastrnn
