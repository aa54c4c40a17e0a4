// What the scan's two directions share: time, flags, memory of their own, and how rows are walked.
//
// Sequences are independent, so a thread takes some of the batch and walks all steps alone. It does so in
// blocks of rows whose working set stays near, and leaves out the rows whose sequence has ended.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "elementwise.h"
#include "product.h"

namespace fastrnn {

// Bits of the flags, as in fastrnn/cells.py.
constexpr uint8_t pad = 1, reset = 2, start = 4;

// [T, B, columns]; data is null where the tensor does not exist
template <class T>
struct Steps {
  T* data;
  int64_t t_stride, b_stride, j_stride;

  explicit operator bool() const { return data != nullptr; }
  // the rows of step t, from sequence b on
  Rows<T> at(int64_t t, int64_t b) const { return {data + t * t_stride + b * b_stride, b_stride}; }
};

// [block, columns] of a thread's own, uninitialised
template <class A>
class Buffer {
 public:
  Buffer(int64_t rows, int64_t columns) : stride_(padded<A>(columns)), memory_(rows * stride_) {}
  operator Rows<A>() const { return {memory_.data(), stride_}; }
  operator Rows<const A>() const { return {memory_.data(), stride_}; }
  A* operator[](int64_t b) const { return memory_.data() + b * stride_; }

 private:
  int64_t stride_;
  Aligned<A> memory_;
};

// What acts inside the recursion; null or empty where it does not exist.
template <class S>
struct Weights {
  using A = typename Arithmetic<S>::type;

  std::unique_ptr<Packed<S>> w_hh, w_hr;  // each as its direction of the scan multiplies with it
  std::unique_ptr<Packed<S>>
      forward_w_hh;                       // in the backward with a layer norm of W_hh h, which it needs again
  std::vector<A> b_hh, ln_hh;             // [gates * H]
  std::vector<A> ln_c_weight, ln_c_bias;  // [H]

  Affine<A> ln_c() const {
    if (ln_c_weight.empty()) return {nullptr, nullptr};
    return {ln_c_weight.data(), ln_c_bias.data()};
  }
};

using Runs = std::vector<std::pair<int64_t, int64_t>>;  // rows of a block: from, to

template <class Row>
void walk_runs(const Runs& runs, const Row& row) {
  for (auto [begin, end] : runs) walk_rows(row, begin, end);
}

// Row<Cell, S, A, layer norm of c or not>{H, fields...}
template <template <class, class, class, bool> class Row, class Cell, class S, class A, class... Fields>
void walk_cell(const Runs& runs, int64_t H, const Affine<A>& ln_c, const Fields&... fields) {
  if constexpr (Cell::states == 2) {
    if (ln_c.weight != nullptr) return walk_runs(runs, Row<Cell, S, A, true>{H, fields...});
  }
  walk_runs(runs, Row<Cell, S, A, false>{H, fields...});
}

template <class Op, class A, class... In>
void elementwise(const Runs& runs, int64_t width, const Op& op, const Buffer<A>& out, const In&... in) {
  walk_runs(runs, Elementwise<Op, A>{width, op, out, {in...}});
}

template <class S>
void multiply(const Runs& runs, const Packed<S>& matrix, Rows<const typename Packed<S>::A> in,
              Rows<typename Packed<S>::A> out) {
  for (auto [begin, end] : runs) walk_widest(Multiply<S>{matrix, in, 1, out}, begin, end);
}

struct Scan {
  static constexpr int64_t block = 64;  // rows

  int64_t T, H, P;
  bool reverse;  // the direction of the forward
  Steps<const uint8_t> flags;

  // the step that the forward takes as its i-th
  int64_t step(int64_t i) const { return reverse ? T - 1 - i : i; }

  bool flagged(int64_t t, int64_t b, uint8_t bit) const { return flags && (*flags.at(t, b).data & bit); }

  // of `rows` sequences from b on, those that still run at step t, and those that do not
  void split(int64_t t, int64_t b, int64_t rows, Runs& running, Runs& ended) const {
    running.clear(), ended.clear();
    for (int64_t r = 0; r < rows;) {
      int64_t from = r;
      bool over = flagged(t, b + r, pad);
      while (++r < rows && flagged(t, b + r, pad) == over) continue;
      (over ? ended : running).emplace_back(from, r);
    }
  }

  // f(r) for the rows of `runs` that carry `bit` at step t
  template <class F>
  void each_flagged(const Runs& runs, int64_t t, int64_t b, uint8_t bit, const F& f) const {
    if (!flags) return;
    for (auto [begin, end] : runs)
      for (int64_t r = begin; r < end; ++r)
        if (flagged(t, b + r, bit)) f(r);
  }
};

template <class T>
void fill_zero(const Runs& runs, int64_t width, Rows<T> rows) {
  for (auto [begin, end] : runs)
    for (int64_t r = begin; r < end; ++r) std::fill_n(rows[r], width, T{});
}

template <class S, class A>
void read(const Runs& runs, int64_t width, const Steps<const S>& from, int64_t t, int64_t b,
          const Buffer<A>& to) {
  walk_runs(runs, Read<S, A>{width, from.at(t, b), from.j_stride, to});
}

}  // namespace fastrnn
