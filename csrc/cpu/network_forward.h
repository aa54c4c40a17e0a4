// The forward of a whole network: layer by layer, direction by direction, chunk by chunk.
#pragma once

#include <tuple>

#include "network_base.h"
#include "scan_forward.h"

namespace fastrnn {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Storage>
class NetworkForward : NetworkBase<Storage> {
  using Base = NetworkBase<Storage>;
  using Base::sizes_, Base::cell_, Base::has_c_, Base::call_, Base::width_, Base::x_, Base::weights_,
      Base::chunks_, Base::most_rows_, Base::no_h_, Base::no_c_, Base::chunk, Base::set_steps, Base::fill,
      Base::recurrence, Base::projection, Base::none, Base::like_input, Base::expect_states;
  using typename Base::Chunk;

 public:
  using A = typename Base::A;
  using Base::Base;

  Outputs forward(const Optional& h0, const Optional& c0, bool save) const {
    expect_states("h0", h0, "c0", c0);
    NetworkMemory<Storage> memory(sizes_, cell_, save);
    Tensor kept = call_.frame.template empty<uint8_t>({save ? sizes_.layers * memory.of_layer : 0});
    Aligned<char> scratch(save ? 0 : (sizes_.layers - 1) * memory.of_layer);
    memory.data = save ? static_cast<char*>(kept.mutable_data_ptr()) : scratch.data();
    Tensor y = like_input(sizes_.outputs()), h_n = this->template state<Storage>(sizes_.P),
           c_n = has_c_ ? this->template state<A>(sizes_.H) : none();
    Storage* const output = static_cast<Storage*>(y.mutable_data_ptr());
    // The backward has y for itself, since the user may change the output in place.
    if (!save) memory.output = output;
    for (int64_t layer = 0; layer < sizes_.layers; ++layer) {
      const Storage* input = layer == 0 ? data_of<Storage>(x_) : memory.y(layer - 1);
      const Operand<Storage> rows(input, sizes_.rows(), sizes_.inputs(layer));
      for (int64_t d = 0; d < sizes_.directions; ++d)
        walk_forward(layer, d, rows, h0, c0, memory, save, h_n, c_n);
    }
    if (save) {
      const Storage* last = memory.y(sizes_.layers - 1);
      share(sizes_.rows() * sizes_.outputs(), grain_of_copies,
            [&](int64_t begin, int64_t end) { std::copy(last + begin, last + end, output + begin); });
    }
    return Outputs(y, h_n, c_n, kept);
  }

 private:
  static constexpr bool half = !std::is_same_v<Storage, A>;

  // One layer in one direction. `input`: all rows of the layer's input.
  void walk_forward(int64_t layer, int64_t d, const Operand<Storage>& input, const Optional& h0,
                    const Optional& c0, const NetworkMemory<Storage>& memory, bool save, const Tensor& h_n,
                    const Tensor& c_n) const {
    const int64_t k = layer * sizes_.directions + d, H = sizes_.H, P = sizes_.P;
    NetworkWeights weights = weights_of(weights_.data(), k, sizes_);
    std::vector<A> b_ih = widened_vector<Storage>(weights.b_ih), b_hh = widened_vector<Storage>(weights.b_hh);
    const bool of_sum = sizes_.norms_gates && !sizes_.norms_x;
    if (of_sum)  // they are added after its layer norm
      for (size_t j = 0; j < b_ih.size(); ++j) b_hh[j] += b_ih[j];
    else if (!cell_.distinct_dgh && !sizes_.norms_gates)  // only the sum is used
      for (size_t j = 0; j < b_ih.size(); ++j) b_ih[j] += b_hh[j];
    const bool adds_bias = !b_ih.empty() && !sizes_.norms_gates;
    MatrixProduct<Storage> product(transposed(matrix_of<Storage>(weights.w_ih)),
                                   adds_bias ? b_ih.data() : nullptr, sizes_.rows(), true);
    ForwardScan<Storage> scan(cell_);
    fill(scan, k, weights);
    scan.weights.ln_ih = widened_vector<Storage>(weights.ln_ih);
    scan.h0 = state_of<Storage>(h0, k, no_h_);
    if (has_c_) scan.c0 = state_of<A>(c0, k, no_c_);
    scan.h_n = this->template state_rows<Storage>(h_n, k, P);
    if (has_c_) scan.c_n = this->template state_rows<A>(c_n, k, H);
    const bool in_product = cell_.distinct_dgh && !b_hh.empty() && !sizes_.norms_gates;
    scan.weights.w_hh = recurrence(transposed(matrix_of<Storage>(weights.w_hh)),
                                   in_product ? b_hh.data() : nullptr, !scan.recurrent_mask);
    if (sizes_.norms_gates) scan.weights.b_ih = std::move(b_ih), scan.weights.b_hh = std::move(b_hh);
    if (weights.w_hr) scan.weights.w_hr = projection(transposed(matrix_of<Storage>(*weights.w_hr)));
    const bool keeps_gx = save && sizes_.norms_gates;
    // Where there is room, W_ih x is computed in the memory of what the cell saves, which replaces it.
    const bool in_saved = save && !keeps_gx && !half && padded<A>(width_) <= cell_.saved * H;
    Buffer<A> gx_of_chunk(in_saved || (keeps_gx && !half) ? 0 : most_rows_, width_);
    Aligned<Storage> narrowed(half && !keeps_gx ? most_rows_ * width_ : 0);
    for (size_t number = 0; number < chunks_.size(); ++number) {
      const Chunk& now = chunk(number, d);
      set_steps(scan, now, k);
      if (save) {
        scan.saved =
            sizes_.steps(memory.saved(layer, d) + now.first * cell_.saved * H, cell_.saved * H, now.time);
        if (has_c_) scan.c = sizes_.steps(memory.c(layer, d) + now.first * H, H, now.time);
      }
      scan.y =
          sizes_.steps(memory.y(layer) + now.first * sizes_.outputs() + d * P, sizes_.outputs(), now.time);
      const RowView<Storage> kept{keeps_gx ? memory.gx(layer, d) + now.first * memory.width_gx : nullptr,
                                  memory.width_gx};
      RowView<A> gx = gx_of_chunk;
      if constexpr (!half) {
        if (keeps_gx) gx = kept;
        if (in_saved) gx = {scan.saved.data, cell_.saved * H};
      }
      input.with_rows(now.first, [&](auto rows) { product(rows, 1, now.rows, gx); });
      if constexpr (!half) {
        scan.gx = sizes_.template steps<const Storage>(gx.data, gx.stride, now.time);
      } else {
        const RowView<Storage> to = keeps_gx ? kept : RowView<Storage>{narrowed.data(), width_};
        const Write<Storage, A> row{width_, {gx.data, gx.stride}, to};
        share_rows(now.rows, width_, [&](int64_t begin, int64_t end) { walk_rows(row, begin, end); });
        scan.gx = sizes_.template steps<const Storage>(to.data, to.stride, now.time);
      }
      call_.run(scan, cell_.gates);
      scan.h0 = {scan.h_n.data, 0, P, 1}, scan.c0 = {scan.c_n.data, 0, H, 1};
    }
  }
};

}  // namespace fastrnn
