// What the forward and the backward scan share: views of tensors in time, buffers, and the walk over rows.
//
// Sequences are independent, so each thread takes some of the batch and walks all steps alone. It does so in
// blocks of rows whose working set stays in the cache, and skips the rows whose sequence has ended.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cell.h"
#include "gate_masks.h"
#include "heads.h"
#include "instances.h"

namespace fastrnn {

// Bits of the flags, as in fastrnn/cell_table.py.
constexpr uint8_t pad = 1, reset = 2, start = 4;

// [T, B, columns], or packed rows [rows, columns]; data is null where the tensor does not exist.
template <class T>
struct Steps {
  T* data = nullptr;
  int64_t t_stride = 0, b_stride = 0, j_stride = 0;
  const int64_t* first_rows = nullptr;  // of packed rows: the number of each step's first one

  explicit operator bool() const { return data != nullptr; }
  // The rows of step t, from sequence b on.
  RowView<T> at(int64_t t, int64_t b) const {
    const int64_t before = first_rows ? (first_rows[t] - first_rows[0]) * b_stride : t * t_stride;
    return {data + before + b * b_stride, b_stride};
  }
  // The steps from t on.
  Steps from(int64_t t) const {
    return {at(t, 0).data, t_stride, b_stride, j_stride, first_rows ? first_rows + t : nullptr};
  }
};

// [rows, columns] of one thread, uninitialised.
template <class A>
class Buffer {
 public:
  Buffer(int64_t rows, int64_t columns) : stride_(padded<A>(columns)), memory_(rows * stride_) {}
  operator RowView<A>() const { return {memory_.data(), stride_}; }
  operator RowView<const A>() const { return {memory_.data(), stride_}; }
  A* operator[](int64_t b) const { return memory_.data() + b * stride_; }

 private:
  int64_t stride_;
  Aligned<A> memory_;
};

// The parameters of the recursion; null or empty where they do not exist.
template <class Storage>
struct Weights {
  using A = typename Arithmetic<Storage>::type;

  // Each as its direction of the scan multiplies with it. The start of the forward's w_hh is b_hh, unless a
  // layer norm comes between them.
  Recurrence<Storage> w_hh;
  std::unique_ptr<Packed<Storage>> w_hr;
  // In place of w_hh and forward_w_hh where each gate has a recurrent mask.
  MaskedGates<Storage> masked_gates, forward_masked_gates;
  // The backward computes W_hh h again where a layer norm follows it.
  Recurrence<Storage> forward_w_hh;
  std::vector<A> b_hh, ln_hh;             // [gates * H]
  std::vector<A> b_ih, ln_ih;             // [gates * H]: where the scan normalises W_ih x itself
  std::vector<A> ln_c_weight, ln_c_bias;  // [H]
  std::vector<A> of_cell;                 // [parameters * H]
  A ln_eps = 0;                           // of all layer norms
  // Whether that of the gates is of W_ih x + W_hh h, in how many parts; whether that of c is of the carried
  // c.
  bool ln_of_sum = false, ln_c_carried = false;
  int64_t ln_groups = 1;

  Affine<A> ln_c() const {
    if (ln_c_weight.empty()) return {nullptr, nullptr, ln_eps, false};
    return {ln_c_weight.data(), ln_c_bias.data(), ln_eps, ln_c_carried};
  }

  RowView<const A> parameters() const { return {of_cell.data(), 0}; }
};

template <class Op, class A, class... In>
void elementwise(const Runs& runs, int64_t width, const Op& op, const Buffer<A>& out, const In&... in) {
  walk_runs(runs, Elementwise<Op, A>{width, op, out, {in...}});
}

struct Scan {
  // The rows that a thread walks through the steps together. Products by tiles take so little time that W_hh,
  // which each block reads in every step, has to serve more rows.
  static int64_t block() { return by_tiles(pair_products()) ? 128 : 64; }

  int64_t T, B, H, P, C;  // C: the width of the states beyond h
  bool reverse;           // whether the forward walks back in time
  Steps<const uint8_t> flags;
  // Of packed rows, which have no padding and no flags: the sequences that run at each step, the longest
  // first, and at the step after the last.
  const int64_t* batch_sizes = nullptr;

  // The time of the forward's i-th step.
  int64_t step(int64_t i) const { return reverse ? T - 1 - i : i; }

  bool flagged(int64_t t, int64_t b, uint8_t bit) const {
    // A walk back in time starts each sequence at its last step.
    if (batch_sizes != nullptr) return bit == start && reverse && b >= batch_sizes[t + 1];
    return flags && (*flags.at(t, b).data & bit);
  }

  // Of `rows` sequences from b on, those that run at step t and those that have ended.
  void partition(int64_t t, int64_t b, int64_t rows, Runs& running, Runs& ended) const {
    running.clear(), ended.clear();
    if (batch_sizes != nullptr) {
      const int64_t longest = std::min(std::max<int64_t>(batch_sizes[t] - b, 0), rows);
      if (longest > 0) running.emplace_back(0, longest);
      return;
    }
    for (int64_t r = 0; r < rows;) {
      int64_t begin = r;
      bool is_padding = flagged(t, b + r, pad);
      while (++r < rows && flagged(t, b + r, pad) == is_padding) continue;
      (is_padding ? ended : running).emplace_back(begin, r);
    }
  }

  // f(r) for the rows of `runs` that carry `bit` at step t.
  template <class F>
  void each_flagged(const Runs& runs, int64_t t, int64_t b, uint8_t bit, const F& f) const {
    if (!flags && batch_sizes == nullptr) return;
    for (auto [begin, end] : runs)
      for (int64_t r = begin; r < end; ++r)
        if (flagged(t, b + r, bit)) f(r);
  }
};

template <class T>
void fill_zero(const Runs& runs, int64_t width, RowView<T> rows) {
  for (auto [begin, end] : runs)
    for (int64_t r = begin; r < end; ++r) std::fill_n(rows[r], width, T{});
}

template <class Storage, class A>
void read(const Runs& runs, int64_t width, const Steps<const Storage>& from, int64_t t, int64_t b,
          const Buffer<A>& to) {
  walk_runs(runs, Read<Storage, A>{width, from.at(t, b), from.j_stride, to});
}

// Rows whose columns lie side by side, in the type of the arithmetic: the memory itself, or `copy`.
template <class Storage, class A>
RowView<const A> in_arithmetic(const Runs& runs, int64_t width, const Steps<const Storage>& from, int64_t t,
                               int64_t b, const Buffer<A>& copy) {
  if constexpr (std::is_same_v<Storage, A>) return from.at(t, b);
  if (from) read(runs, width, from, t, b, copy);
  return copy;
}

}  // namespace fastrnn
