// The products with W_hh where each gate's rows of it get a masked copy of h of their own
// (recurrent_dropout_per_gate).
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "heads.h"

namespace fastrnn {

template <class Storage>
struct MaskedGates {
  using A = typename Arithmetic<Storage>::type;

  // W_hh's rows of each gate [H, P], as one direction of the scan multiplies with them; empty where all gates
  // share a mask.
  std::vector<std::unique_ptr<Packed<Storage>>> gates;
  int64_t H = 0, P = 0;

  explicit operator bool() const { return !gates.empty(); }

  // out [rows, gates * H] = W_hh h, with h times a part of `mask` [rows, gates * P] for each gate. `masked`
  // [rows, P] and `of_gate` [rows, H] are memory.
  void times(const Runs& runs, RowView<const A> h, RowView<const A> mask, RowView<A> masked,
             RowView<A> of_gate, RowView<A> out) const {
    for (size_t g = 0; g < gates.size(); ++g) {
      walk_runs(runs, Elementwise<Product, A>{P, {}, masked, {h, {mask.data + g * P, mask.stride}}});
      multiply(runs, *gates[g], {masked.data, masked.stride}, of_gate);
      for (auto [begin, end] : runs)
        for (int64_t r = begin; r < end; ++r) std::copy_n(of_gate[r], H, out[r] + g * H);
    }
  }

  // out [rows, P] = the sum over the gates of the mask times the transposed rows of W_hh times dgh. `of_gate`
  // [rows, P] is memory.
  void times_transposed(const Runs& runs, RowView<const A> dgh, RowView<const A> mask, RowView<A> of_gate,
                        RowView<A> out) const {
    for (size_t g = 0; g < gates.size(); ++g) {
      multiply(runs, *gates[g], {dgh.data + g * H, dgh.stride}, of_gate);
      RowView<const A> product{of_gate.data, of_gate.stride}, factor{mask.data + g * P, mask.stride};
      if (g == 0)
        walk_runs(runs, Elementwise<Product, A>{P, {}, out, {product, factor}});
      else
        walk_runs(runs, Elementwise<AddProduct, A>{P, {}, out, {{out.data, out.stride}, product, factor}});
    }
  }
};

}  // namespace fastrnn
