// A whole network in one call: all layers and directions, the products with the inputs as well as the scans.
//
// Rows of all steps are in the order of the input in memory, [T, B] or [B, T], so that nothing is transposed.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "scan_backward.h"
#include "scan_forward.h"

namespace fastrnn {

// The sizes of a network and of its input.
struct NetworkSizes {
  int64_t T, B, I, H, layers, directions;
  bool batch_first, bias;

  int64_t rows() const { return T * B; }
  int64_t t_step() const { return batch_first ? 1 : B; }
  int64_t b_step() const { return batch_first ? T : 1; }
  int64_t row(int64_t t, int64_t b) const { return t * t_step() + b * b_step(); }
  int64_t outputs() const { return directions * H; }
  int64_t inputs(int64_t layer) const { return layer == 0 ? I : outputs(); }
  // All steps of rows `stride` apart.
  template <class X>
  Steps<X> steps(X* data, int64_t stride) const {
    return {data, t_step() * stride, b_step() * stride, 1};
  }
};

// The parameters of one layer in one direction.
struct NetworkWeights {
  const Tensor &w_ih, &w_hh;  // [gates * H, inputs], [gates * H, H]
  const Tensor *b_ih, *b_hh;  // [gates * H] or null
};

inline NetworkWeights weights_of(const std::vector<Tensor>& all, int64_t k, bool bias) {
  const Tensor* first = &all[k * (bias ? 4 : 2)];
  return {first[0], first[1], bias ? first + 2 : nullptr, bias ? first + 3 : nullptr};
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

// f(cell) with one of torch's.
template <class F>
auto with_cell_of_torch(const std::string& name, const F& f) {
  if (name == "lstm") return f(LSTM{});
  if (name == "gru") return f(GRU{});
  if (name == "rnn_tanh") return f(RNN<Tanh>{});
  if (name == "rnn_relu") return f(RNN<Relu>{});
  throw std::runtime_error("cell must be lstm, gru, rnn_tanh or rnn_relu, got " + name);
}

// out [rows, padded(N)] = in [rows, K] times the matrix, plus `bias` [N] or null, shared among the threads.
template <class Storage>
void product(RowView<const typename Matrix<Storage>::A> in, int64_t in_stride, int64_t rows,
             const Matrix<Storage>& matrix, const typename Matrix<Storage>::A* bias,
             RowView<typename Matrix<Storage>::A> out) {
  constexpr int64_t grain = 1 << 20;  // multiplications that are worth waking a thread
  Packed<Storage> packed(matrix, true, bias);
  torch::stable::parallel_for(0, rows, grain / std::max<int64_t>(matrix.K * matrix.N, 1) + 1,
                              [&](int64_t begin, int64_t end) {
                                walk_widest(Multiply<Storage>{packed, in, in_stride, out}, begin, end);
                              });
}

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

// out [rows, N] contiguous = `product`, plus what `out` holds if `adds`.
template <class Storage, class Out>
void product_into(RowView<const typename Matrix<Storage>::A> in, int64_t in_stride, int64_t rows,
                  const Matrix<Storage>& matrix, Out* out, bool adds = false) {
  using A = typename Matrix<Storage>::A;
  const int64_t N = matrix.N;
  if constexpr (std::is_same_v<Out, A>)
    if (!adds && N % panel_width<A> == 0)
      return product<Storage>(in, in_stride, rows, matrix, nullptr, {out, N});
  Buffer<A> found(rows, N);
  product<Storage>(in, in_stride, rows, matrix, nullptr, found);
  for (int64_t r = 0; adds && r < rows; ++r)
    for (int64_t j = 0; j < N; ++j) found[r][j] += widen(out[r * N + j]);
  walk_rows(Write<Out, A>{N, found, {out, N}}, 0, rows);
}

// Column sums of `rows` [rows, width], each in one chain of doubles.
template <class A, class Storage>
void sum_rows(RowView<const A> in, int64_t rows, int64_t width, Storage* out) {
  std::vector<double> sums(width);
  for (int64_t r = 0; r < rows; ++r) {
    const A* row = in[r];
    for (int64_t j = 0; j < width; ++j) sums[j] += row[j];
  }
  for (int64_t j = 0; j < width; ++j) narrow(static_cast<A>(sums[j]), out[j]);
}

// What the backward needs, in one piece of memory: of each layer y [rows, D * H] in the storage type, and of
// each layer and direction `saved` [rows, saved * H], and c [rows, H] in the type of the arithmetic.
template <class Cell>
struct NetworkMemory {
  using Storage = typename Cell::Storage;
  using A = typename Cell::A;

  int64_t of_y, of_saved, of_c, of_walk, of_layer, directions;  // bytes
  char* data = nullptr;

  NetworkMemory(const NetworkSizes& sizes, bool keeps)
      : of_y(aligned(sizes.rows() * sizes.outputs() * sizeof(Storage))),
        of_saved(keeps ? aligned(sizes.rows() * Cell::saved * sizes.H * sizeof(Storage)) : 0),
        of_c(keeps && Cell::states > 1 ? aligned(sizes.rows() * sizes.H * sizeof(A)) : 0),
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

// States [layers * D, B, H], or without B, of one layer and direction; zeros where there is no tensor.
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
