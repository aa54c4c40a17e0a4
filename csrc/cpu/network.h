// A whole network in one call: all layers and directions, the products with the inputs as well as the scans.
//
// Rows of all steps are in the order of the input in memory, [T, B], [B, T] or packed, so that nothing is
// transposed or padded.
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"

namespace fastrnn {

// The sizes of a network and of its input. P: the width of h, H without a projection. A walk is one layer in
// one direction.
struct NetworkSizes {
  int64_t T = 0, B = 0, I = 0, H = 0, P = 0, layers = 0, directions = 0;
  bool batch_first = false, bias = false, projects = false;
  // Whether there is a layer norm of W_ih x by itself, of W_hh h or of the sum, and of c.
  bool norms_x = false, norms_gates = false, norms_c = false;
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
  int64_t weights_of_walk() const { return 2 + 2 * bias + projects + norms_x + norms_gates + 2 * norms_c; }
  int64_t outputs() const { return directions * P; }
  int64_t inputs(int64_t layer) const { return layer == 0 ? I : outputs(); }
  // The most rows of consecutive steps whose products and scan are computed together, while they are in the
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

// The parameters of one walk.
struct NetworkWeights {
  const Tensor &w_ih, &w_hh;  // [gates * H, inputs], [gates * H, P]
  const Tensor *b_ih, *b_hh;  // [gates * H] or null
  const Tensor* w_hr;         // [P, H] or null
  // Of layer norms, [gates * H] and [H], or null.
  const Tensor *ln_ih, *ln_hh, *ln_c_weight, *ln_c_bias;
};

// Those of the k-th walk, from the tensors of all walks in torch.nn's order.
inline NetworkWeights weights_of(const Tensor* all, int64_t k, const NetworkSizes& sizes) {
  const Tensor* next = all + k * sizes.weights_of_walk();
  auto take = [&next](bool exists) { return exists ? next++ : nullptr; };
  const Tensor *w_ih = take(true), *w_hh = take(true), *b_ih = take(sizes.bias), *b_hh = take(sizes.bias),
               *w_hr = take(sizes.projects), *ln_ih = take(sizes.norms_x), *ln_hh = take(sizes.norms_gates),
               *ln_c_weight = take(sizes.norms_c), *ln_c_bias = take(sizes.norms_c);
  return {*w_ih, *w_hh, b_ih, b_hh, w_hr, ln_ih, ln_hh, ln_c_weight, ln_c_bias};
}

// The masks of the k-th walk: recurrent_mask [B, P], zone_h [T, B, P], zone_c [T, B, H]; null where one does
// not exist.
struct NetworkMasks {
  const Tensor *recurrent, *zone_h, *zone_c;
};

// From those of all walks, of which a mask that does not exist is an empty tensor.
inline NetworkMasks masks_of(const std::vector<Tensor>& all, int64_t k) {
  auto existing = [&all, k](int64_t n) {
    const Tensor& t = all[3 * k + n];
    return t.numel() > 0 ? &t : nullptr;
  };
  return {existing(0), existing(1), existing(2)};
}

// What the backward needs, in one piece of memory: of each layer y [rows, D * P], of each walk `saved`
// [rows, saved * H], both in the storage type, and of each walk c [rows, H] in the type of the arithmetic;
// with a layer norm of the gates also W_ih x [rows, width_gx], before it.
template <class Storage>
struct NetworkMemory {
  using A = typename Arithmetic<Storage>::type;

  int64_t width_gx;                                        // as wide as a product writes its rows
  int64_t of_y, of_saved, of_c, of_gx, of_walk, of_layer;  // bytes
  int64_t layers, directions;
  char* data = nullptr;
  Storage* output = nullptr;  // the y of the last layer, unless it is in `data`, too

  NetworkMemory(const NetworkSizes& sizes, const CellTraits& cell, bool keeps)
      : width_gx(std::is_same_v<Storage, A> ? padded<A>(cell.gates * sizes.H) : cell.gates * sizes.H),
        of_y(aligned(sizes.rows() * sizes.outputs() * sizeof(Storage))),
        of_saved(keeps ? aligned(sizes.rows() * cell.saved * sizes.H * sizeof(Storage)) : 0),
        of_c(keeps && cell.states > 1 ? aligned(sizes.rows() * sizes.H * sizeof(A)) : 0),
        of_gx(keeps && sizes.norms_gates ? aligned(sizes.rows() * width_gx * sizeof(Storage)) : 0),
        of_walk(of_saved + of_c + of_gx),
        of_layer(of_y + sizes.directions * of_walk),
        layers(sizes.layers),
        directions(sizes.directions) {}

  Storage* y(int64_t layer) const {
    if (output != nullptr && layer == layers - 1) return output;
    return reinterpret_cast<Storage*>(data + layer * of_layer);
  }
  Storage* saved(int64_t layer, int64_t d) const { return reinterpret_cast<Storage*>(walk(layer, d)); }
  A* c(int64_t layer, int64_t d) const { return reinterpret_cast<A*>(walk(layer, d) + of_saved); }
  Storage* gx(int64_t layer, int64_t d) const {
    return reinterpret_cast<Storage*>(walk(layer, d) + of_saved + of_c);
  }

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

}  // namespace fastrnn
