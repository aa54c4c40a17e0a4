// What the forward and the backward of a whole network share: the sizes, the chunks of steps, the tensors.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "network.h"
#include "network_products.h"

namespace fastrnn {

// What both ops are given beside the initial states.
struct NetworkArguments {
  Tensor x;
  const Optional &batch_sizes, &reset_mask;
  const std::vector<Tensor>& weights;
  const std::optional<std::vector<Tensor>>& masks;
  const std::string& cell;
  int64_t layers;
  bool bidirectional, bias, projects, batch_first;
  const LayerNorms& norms;
};

template <class Storage>
std::vector<typename Arithmetic<Storage>::type> widened_vector(const Tensor* t) {
  if (t == nullptr) return {};
  std::vector<typename Arithmetic<Storage>::type> found(t->size(0));
  const Storage* data = data_of<Storage>(*t);
  const int64_t stride = t->stride(0);
  for (size_t j = 0; j < found.size(); ++j) found[j] = widen(data[j * stride]);
  return found;
}

template <class Storage>
class NetworkBase {
 public:
  using A = typename Arithmetic<Storage>::type;

  NetworkBase(const Cell<A>& cell, const NetworkArguments& given, NetworkSizes sizes)
      : cell_(cell),
        has_c_(cell.states > 1),
        x_(given.x),
        weights_(given.weights),
        masks_(given.masks),
        norms_(given.norms),
        sizes_(sizes),
        call_(given.x, sizes.T, sizes.B, sizes.H, sizes.P, cell.states),
        width_(cell.gates * sizes.H),
        unbatched_(given.x.dim() == 2 && !sizes.packed()),
        no_h_(sizes.P),
        no_c_(sizes.H) {
    divide();
    if (given.reset_mask.has_value()) set_flags(*given.reset_mask);
  }

 protected:
  // Some steps from `time` on; `first` is the number of their first row.
  struct Chunk {
    int64_t time, steps, first, rows;
  };

  // Divides the steps into chunks, in the order of time. There is a single one where the rows of a step are
  // not side by side.
  void divide() {
    const int64_t most = sizes_.batch_first ? sizes_.rows() : NetworkSizes::rows_of_chunk(width_);
    for (int64_t time = 0; time < sizes_.T;) {
      Chunk next{time, 0, sizes_.row(time), 0};
      do next.rows += sizes_.running(time + next.steps++);
      while (time + next.steps < sizes_.T && next.rows <= most);
      chunks_.push_back(next);
      most_rows_ = std::max(most_rows_, next.rows);
      time += next.steps;
    }
  }

  // The k-th chunk of a walk.
  const Chunk& chunk(size_t k, int64_t d) const { return chunks_[d == 0 ? k : chunks_.size() - 1 - k]; }

  // As `fold_flags` of fastrnn/stack.py: a walk back in time enters t from t + 1, where a new segment may
  // begin.
  void set_flags(const Tensor& reset_mask) {
    const int64_t T = sizes_.T, B = sizes_.B;
    check(!sizes_.packed(), "packed rows have no resets");
    check(reset_mask.dim() == 2 && reset_mask.size(0) == T && reset_mask.size(1) == B &&
              reset_mask.scalar_type() == ScalarType::Bool && reset_mask.is_cpu(),
          "reset_mask must be bool [", T, ", ", B, "] on the CPU, got ", dtype_name(reset_mask.scalar_type()),
          ' ', shape_of(reset_mask));
    const bool* given = data_of<bool>(reset_mask);
    for (int64_t d = 0; d < sizes_.directions; ++d) {
      flags_[d].resize(T * B);
      for (int64_t t = d; t < T; ++t)
        for (int64_t b = 0; b < B; ++b)
          if (given[t * reset_mask.stride(0) + b * reset_mask.stride(1)]) flags_[d][(t - d) * B + b] = reset;
    }
  }

  template <class ScanOfCell>
  void set_steps(ScanOfCell& scan, const Chunk& now, int64_t k) const {
    const std::vector<uint8_t>& flags = flags_[scan.reverse];
    scan.T = now.steps;
    if (masks_.has_value()) {
      const NetworkMasks masks = masks_of(*masks_, k);
      if (masks.zone_h)
        scan.zone_h = mask("zone_h", *masks.zone_h, {sizes_.T, sizes_.B, sizes_.P}).from(now.time);
      if (masks.zone_c)
        scan.zone_c = mask("zone_c", *masks.zone_c, {sizes_.T, sizes_.B, sizes_.H}).from(now.time);
    }
    if (!flags.empty()) scan.flags = {flags.data() + now.time * sizes_.B, sizes_.B, 1, 1};
    scan.batch_sizes = sizes_.packed() ? sizes_.batch_sizes.data() + now.time : nullptr;
  }

  Tensor none() const { return call_.frame.template empty<Storage>({0}); }
  Tensor like_input(int64_t columns) const {
    if (x_.dim() == 2) return call_.frame.template empty<Storage>({x_.size(0), columns});
    return call_.frame.template empty<Storage>({x_.size(0), x_.size(1), columns});
  }
  // Initial states, or gradients of the final ones.
  void expect_states(const char* name_h, const Optional& h, const char* name_c, const Optional& c) const {
    if (h.has_value()) expect_state<Storage>(name_h, *h, sizes_.P);
    if (c.has_value()) expect_state<A>(name_c, *c, sizes_.H);
  }
  template <class X>
  void expect_state(const char* name, const Tensor& t, int64_t columns) const {
    if (unbatched_)
      call_.frame.template expect<X>(name, t, {sizes_.walks(), columns});
    else
      call_.frame.template expect<X>(name, t, {sizes_.walks(), sizes_.B, columns});
  }
  // [layers * D, B, columns], without B for an unbatched input.
  template <class X>
  Tensor state(int64_t columns) const {
    return unbatched_ ? call_.frame.template empty<X>({sizes_.walks(), columns})
                      : call_.frame.template empty<X>({sizes_.walks(), sizes_.B, columns});
  }
  // The rows of one walk in what `state` made.
  template <class X>
  Steps<X> state_rows(const Tensor& t, int64_t k, int64_t columns) const {
    return {static_cast<X*>(t.mutable_data_ptr()) + k * sizes_.B * columns, 0, columns, 1};
  }

  // Whether each thread reads the weights of the scan only once.
  bool once() const { return sizes_.T == 1 && sizes_.B <= Scan::block(); }
  Recurrence<Storage> recurrence(const Matrix<Storage>& matrix, const A* bias, bool exact) const {
    return Recurrence<Storage>::dense(matrix, once(), bias, exact, sizes_.T, sizes_.B);
  }
  std::unique_ptr<Packed<Storage>> projection(const Matrix<Storage>& matrix) const {
    return std::make_unique<Packed<Storage>>(matrix, once(), nullptr);
  }

  // All of the k-th walk that the forward and the backward scan share but W_hh and W_hr.
  template <class ScanOfCell>
  void fill(ScanOfCell& scan, int64_t k, const NetworkWeights& given) const {
    scan.B = sizes_.B, scan.H = sizes_.H, scan.P = sizes_.P, scan.C = call_.C;
    scan.reverse = k % sizes_.directions == 1;
    if (masks_.has_value()) {
      const NetworkMasks masks = masks_of(*masks_, k);
      if (masks.recurrent)
        scan.recurrent_mask = mask("recurrent_mask", *masks.recurrent, {sizes_.B, sizes_.P});
    }
    if (!sizes_.norms_gates) return;
    Call<Storage, A>::set_norms(scan.weights, norms_, cell_.gates);
    scan.weights.ln_hh = widened_vector<Storage>(given.ln_hh);
    scan.weights.ln_c_weight = widened_vector<Storage>(given.ln_c_weight);
    scan.weights.ln_c_bias = widened_vector<Storage>(given.ln_c_bias);
  }

  Steps<const Storage> mask(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) const {
    return call_.template view<Storage>(name, t, shape);
  }

  const Cell<A>& cell_;
  const bool has_c_;
  const Tensor& x_;
  const std::vector<Tensor>& weights_;
  const std::optional<std::vector<Tensor>>& masks_;
  const LayerNorms& norms_;
  NetworkSizes sizes_;
  Call<Storage, A> call_;
  int64_t width_;
  bool unbatched_;
  std::vector<Chunk> chunks_;
  int64_t most_rows_ = 0;
  std::vector<uint8_t> flags_[2];  // of each direction, [T, B]; empty without resets
  std::vector<Storage> no_h_;
  std::vector<A> no_c_;
};

}  // namespace fastrnn
