// The backward of a whole network, with the gradients of the weights.
#pragma once

#include "network_base.h"
#include "scan_backward.h"

namespace fastrnn {

// What the backward is given beside the gradients.
struct BackwardOptions {
  std::optional<double> clip_norm, clip_value;
  bool norms, needs_dx;
};

template <class Storage>
class NetworkBackward : NetworkBase<Storage> {
  using Base = NetworkBase<Storage>;
  using Base::sizes_, Base::cell_, Base::has_c_, Base::call_, Base::width_, Base::x_, Base::weights_,
      Base::chunks_, Base::most_rows_, Base::no_h_, Base::no_c_, Base::unbatched_, Base::chunk,
      Base::set_steps, Base::fill, Base::recurrence, Base::projection, Base::none, Base::like_input,
      Base::expect_states;
  using typename Base::Chunk;

 public:
  using A = typename Base::A;
  using Base::Base;

  // dx, dh0, dc0, norms [layers * D, 2, states, T, B], and the weights' gradients, in the order of the
  // weights.
  std::vector<Tensor> backward(const Optional& dy, const Optional& dh_n, const Optional& dc_n,
                               const Optional& h0, const Optional& c0, const Tensor& kept,
                               const BackwardOptions& options) const {
    expect_states("h0", h0, "c0", c0);
    expect_states("dh_n", dh_n, "dc_n", dc_n);
    if (dy.has_value())
      check(dy->dim() == x_.dim() && dy->size(0) == x_.size(0) &&
                (x_.dim() == 2 || dy->size(1) == x_.size(1)) && dy->size(x_.dim() - 1) == sizes_.outputs() &&
                dy->scalar_type() == x_.scalar_type(),
            "dy must be as the output, got ", shape_of(*dy));
    NetworkMemory<Storage> memory(sizes_, cell_, true);
    check(kept.numel() == sizes_.layers * memory.of_layer && kept.scalar_type() == ScalarType::Byte,
          "kept must be that of the forward");
    memory.data = static_cast<char*>(kept.mutable_data_ptr());  // read only
    Tensor dx = options.needs_dx ? like_input(sizes_.I) : none();
    Tensor dh0 = this->template state<Storage>(sizes_.P),
           dc0 = has_c_ ? this->template state<A>(sizes_.H) : none();
    const int64_t norms_of_walk = 2 * cell_.states * sizes_.T * sizes_.B;
    Tensor norms = options.norms ? norms_of_all_walks() : none();
    std::vector<Tensor> found = {dx, dh0, dc0, norms};
    const size_t first_weight = found.size();
    for (const Tensor& weight : weights_) found.push_back(like(weight));
    const int64_t of_layer = sizes_.layers > 1 ? sizes_.rows() * sizes_.outputs() : 0;
    Aligned<Storage> dinput(of_layer), doutput(of_layer);
    Storage *above = doutput.data(), *below = dinput.data();
    for (int64_t layer = sizes_.layers - 1; layer >= 0; --layer, std::swap(above, below)) {
      Storage* to = layer > 0          ? below
                    : options.needs_dx ? static_cast<Storage*>(dx.mutable_data_ptr())
                                       : nullptr;
      for (int64_t d = 0; d < sizes_.directions; ++d) {
        const int64_t k = layer * sizes_.directions + d;
        BackwardScan<Storage> scan(cell_);
        fill(scan, k, weights_of(weights_.data(), k, sizes_));
        if (options.clip_norm.has_value()) scan.clip_norm = static_cast<A>(*options.clip_norm);
        if (options.clip_value.has_value()) scan.clip_value = static_cast<A>(*options.clip_value);
        scan.norms_stride = sizes_.T * sizes_.B;
        A* const norms_of_this =
            options.norms ? static_cast<A*>(norms.mutable_data_ptr()) + k * norms_of_walk : nullptr;
        if (dh_n.has_value()) scan.dh_n = state_of<Storage>(dh_n, k, no_h_);
        if (dc_n.has_value()) scan.dc_n = state_of<A>(dc_n, k, no_c_);
        scan.dh0 = this->template state_rows<Storage>(dh0, k, sizes_.P);
        if (has_c_) scan.dc0 = this->template state_rows<A>(dc0, k, sizes_.H);
        Steps<const Storage> dy_of_layer;
        if (layer < sizes_.layers - 1)
          dy_of_layer = sizes_.template steps<const Storage>(above + d * sizes_.P, sizes_.outputs(), 0);
        else if (dy.has_value())
          dy_of_layer = incoming(*dy, d);
        walk_backward(layer, d, scan, dy_of_layer, norms_of_this, h0, c0, memory, to,
                      weights_of(&found[first_weight], k, sizes_));
      }
    }
    return found;
  }

 private:
  static constexpr bool half = !std::is_same_v<Storage, A>;

  // What the scan of a chunk writes, beside what the weights of the walk were multiplied with; and sums over
  // the chunks for the biases.
  struct Work {
    Aligned<Storage> dgx, dgh, dh_new;  // [rows, gates * H], the second where it differs, and [rows, P]
    Aligned<Storage> h_prev;            // [rows, P]
    Buffer<A> unprojected;              // [rows, H]
    Aligned<A> dh_between;              // [B, P], from one chunk to the one before
    // The sums over the chunks: in a half type, they are rounded once.
    Aligned<A> dw_ih, dw_hh, dw_hr;
    std::vector<double> db_ih, db_hh;
    // Of the layer norms: the sums over the chunks, and what a scan finds for each sequence, [B, gates * H]
    // or [B, H].
    std::vector<double> dln_ih, dln_hh, dln_c_weight, dln_c_bias;
    Aligned<A> of_b_ih, of_b_hh, of_ln_ih, of_ln_hh, of_ln_c_weight, of_ln_c_bias;

    Work(int64_t rows, int64_t inputs, const NetworkSizes& sizes, const CellTraits& cell)
        : dgx(rows * cell.gates * sizes.H),
          dgh(cell.distinct_dgh || sizes.norms_gates ? rows * cell.gates * sizes.H : 0),
          dh_new(sizes.projects ? rows * sizes.P : 0),
          h_prev(rows * sizes.P),
          unprojected(sizes.projects ? rows : 0, sizes.H),
          dh_between(sizes.B * sizes.P),
          dw_ih(half ? cell.gates * sizes.H * inputs : 0),
          dw_hh(half ? cell.gates * sizes.H * sizes.P : 0),
          dw_hr(half && sizes.projects ? sizes.P * sizes.H : 0),
          db_ih(cell.gates * sizes.H),
          db_hh(cell.distinct_dgh || sizes.norms_gates ? cell.gates * sizes.H : 0),
          dln_ih(sizes.norms_x ? cell.gates * sizes.H : 0),
          dln_hh(sizes.norms_gates ? cell.gates * sizes.H : 0),
          dln_c_weight(sizes.norms_c ? sizes.H : 0),
          dln_c_bias(sizes.norms_c ? sizes.H : 0),
          of_b_ih(sizes.B * dln_ih.size()),
          of_b_hh(sizes.B * dln_hh.size()),
          of_ln_ih(sizes.B * dln_ih.size()),
          of_ln_hh(sizes.B * dln_hh.size()),
          of_ln_c_weight(sizes.B * dln_c_weight.size()),
          of_ln_c_bias(sizes.B * dln_c_bias.size()) {}
  };

  // One layer in one direction, with its scan ready but for the steps. `dy`: of all its steps. `norms`: of
  // this walk, [2, states, T, B], or null. `to`: the gradient of the layer's input, or null; `found`: the
  // weights' gradients.
  void walk_backward(int64_t layer, int64_t d, BackwardScan<Storage>& scan, const Steps<const Storage>& dy,
                     A* norms, const Optional& h0, const Optional& c0, const NetworkMemory<Storage>& memory,
                     Storage* to, const NetworkWeights& found) const {
    const int64_t k = layer * sizes_.directions + d, H = sizes_.H, P = sizes_.P,
                  inputs = sizes_.inputs(layer);
    const Storage *input = layer == 0 ? data_of<Storage>(x_) : memory.y(layer - 1),
                  *y = memory.y(layer) + d * P;
    const NetworkWeights weights = weights_of(weights_.data(), k, sizes_);
    scan.weights.w_hh = recurrence(matrix_of<Storage>(weights.w_hh), nullptr, false);
    if (sizes_.norms_gates)
      scan.weights.forward_w_hh =
          recurrence(transposed(matrix_of<Storage>(weights.w_hh)), nullptr, !scan.recurrent_mask);
    scan.weights.ln_ih = widened_vector<Storage>(weights.ln_ih);
    if (weights.w_hr) scan.weights.w_hr = projection(matrix_of<Storage>(*weights.w_hr));
    MatrixProduct<Storage> to_input(matrix_of<Storage>(weights.w_ih), nullptr, to ? sizes_.rows() : 0,
                                    reads_storage<Storage>());
    Work work(most_rows_, inputs, sizes_, cell_);
    const Steps<const Storage> first_h = state_of<Storage>(h0, k, no_h_);
    const Steps<const A> first_c = has_c_ ? state_of<A>(c0, k, no_c_) : Steps<const A>{};
    std::vector<Storage> h_before;
    std::vector<A> c_before;
    for (size_t number = chunks_.size(); number-- > 0;) {
      const Chunk& now = chunk(number, d);
      set_steps(scan, now, k);
      set_chunk(scan, now, memory.saved(layer, d), y, memory.c(layer, d), work);
      if (sizes_.norms_gates)
        scan.gx = sizes_.template steps<const Storage>(memory.gx(layer, d) + now.first * memory.width_gx,
                                                       memory.width_gx, now.time);
      if (dy) scan.dy = dy.from(now.time);
      if (norms != nullptr) scan.norms = norms + now.time * sizes_.B;
      scan.h0 = first_h, scan.c0 = first_c;
      if (number > 0) {
        const int64_t before = d == 0 ? now.time - 1 : now.time + now.steps;
        scan.h0 = states_after<Storage>(before, P, y, sizes_.outputs(), first_h, h_before);
        if (has_c_) scan.c0 = states_after<A>(before, H, memory.c(layer, d), H, first_c, c_before);
      }
      if (number > 0)
        scan.dh_before = {work.dh_between.data(), 0, P, 1};
      else
        scan.dh_before = {};
      call_.run(scan, cell_.gates);
      scan.dh_after = {work.dh_between.data(), 0, P, 1}, scan.dc_n = {scan.dc0.data, 0, H, 1};
      const Operand<Storage> of_x(work.dgx.data(), now.rows, width_);
      of_weights(scan, now, of_x, input, inputs, work, found, number + 1 < chunks_.size());
      if (to != nullptr)
        of_x.with_rows(0, [&](auto rows) {
          product_into(to_input, rows, 1, now.rows, inputs, to + now.first * inputs, d > 0);
        });
    }
    store_matrix(work.dw_ih, found.w_ih);
    store_matrix(work.dw_hh, found.w_hh);
    if (sizes_.projects) store_matrix(work.dw_hr, *found.w_hr);
    if (sizes_.norms_x) store_sums<Storage>(work.dln_ih, *found.ln_ih);
    if (sizes_.norms_gates) store_sums<Storage>(work.dln_hh, *found.ln_hh);
    if (sizes_.norms_c) {
      store_sums<Storage>(work.dln_c_weight, *found.ln_c_weight);
      store_sums<Storage>(work.dln_c_bias, *found.ln_c_bias);
    }
    if (!sizes_.bias) return;
    const bool of_sum = sizes_.norms_gates && !sizes_.norms_x;  // to which both are added
    store_sums<Storage>(of_sum ? work.db_hh : work.db_ih, *found.b_ih);
    store_sums<Storage>(has_dgh() ? work.db_hh : work.db_ih, *found.b_hh);
  }

  // Gives a scan its part of what the forward kept of a walk, and the memory for its gradients.
  void set_chunk(BackwardScan<Storage>& scan, const Chunk& now, const Storage* saved, const Storage* y,
                 const A* c, const Work& work) const {
    const int64_t width_saved = cell_.saved * sizes_.H, outputs = sizes_.outputs();
    scan.saved = sizes_.steps(saved + now.first * width_saved, width_saved, now.time);
    scan.y = sizes_.steps(y + now.first * outputs, outputs, now.time);
    if (has_c_) scan.c = sizes_.steps(c + now.first * sizes_.H, sizes_.H, now.time);
    scan.dgx = sizes_.steps(work.dgx.data(), width_, now.time);
    if (has_dgh()) scan.dgh = sizes_.steps(work.dgh.data(), width_, now.time);
    if (sizes_.norms_x)
      scan.db_ih = {work.of_b_ih.data(), 0, width_, 1}, scan.dln_ih = {work.of_ln_ih.data(), 0, width_, 1};
    if (sizes_.norms_gates)
      scan.db_hh = {work.of_b_hh.data(), 0, width_, 1}, scan.dln_hh = {work.of_ln_hh.data(), 0, width_, 1};
    if (sizes_.norms_c)
      scan.dln_c_weight = {work.of_ln_c_weight.data(), 0, sizes_.H, 1},
      scan.dln_c_bias = {work.of_ln_c_bias.data(), 0, sizes_.H, 1};
    if (sizes_.projects) scan.dh_new = sizes_.steps(work.dh_new.data(), sizes_.P, now.time);
  }

  // The gradients of the weights, in `found` and in the sums for the biases: their part of a chunk, which is
  // added if `adds`. `dgx`: of the chunk; `input`: of all rows.
  void of_weights(const BackwardScan<Storage>& scan, const Chunk& now, const Operand<Storage>& dgx,
                  const Storage* input, int64_t inputs, Work& work, const NetworkWeights& found,
                  bool adds) const {
    const int64_t rows = now.rows, H = sizes_.H, P = sizes_.P;
    previous_states(scan, now, work.h_prev.data());
    if (scan.recurrent_mask) mask_states(scan, now, work.h_prev.data());
    const Operand<Storage> distinct(work.dgh.data(), has_dgh() ? rows : 0, width_);
    const Operand<Storage>& dgh = has_dgh() ? distinct : dgx;
    A *const dw_ih = sums_of(found.w_ih, work.dw_ih), *const dw_hh = sums_of(found.w_hh, work.dw_hh);
    of_matrix(dgx, matrix_of<Storage>(input + now.first * inputs, rows, inputs), width_, dw_ih, adds);
    const Operand<Storage> h_prev(work.h_prev.data(), rows, P);
    h_prev.with_rows(0, [&](auto h) { of_matrix(dgh, matrix_of(h.data, rows, P), width_, dw_hh, adds); });
    if (sizes_.projects) {
      unproject(scan, rows, work.unprojected);
      Aligned<A> dh_new(rows * P);
      const Read<Storage, A> row{P, {work.dh_new.data(), P}, 1, {dh_new.data(), P}};
      share_rows(rows, P, [&](int64_t begin, int64_t end) { walk_rows(row, begin, end); });
      of_matrix(RowView<const A>{dh_new.data(), P}, Matrix<A>{work.unprojected[0], rows, H, padded<A>(H), 1},
                P, sums_of(*found.w_hr, work.dw_hr), adds);
    }
    if (sizes_.norms_gates) return of_norms(work);
    if (!sizes_.bias) return;
    add_rows(RowView<const Storage>{work.dgx.data(), width_}, rows, work.db_ih);
    if (cell_.distinct_dgh) add_rows(RowView<const Storage>{work.dgh.data(), width_}, rows, work.db_hh);
  }

  // Adds what a scan found for each sequence.
  void of_norms(Work& work) const {
    auto add = [this](const Aligned<A>& of_sequences, std::vector<double>& sums) {
      const int64_t columns = sums.size();
      if (columns > 0) add_rows(RowView<const A>{of_sequences.data(), columns}, sizes_.B, sums);
    };
    add(work.of_b_hh, work.db_hh), add(work.of_ln_hh, work.dln_hh);
    if (sizes_.norms_x) add(work.of_b_ih, work.db_ih), add(work.of_ln_ih, work.dln_ih);
    add(work.of_ln_c_weight, work.dln_c_weight), add(work.of_ln_c_bias, work.dln_c_bias);
  }

  // Whether the gradients of W_ih x and W_hh h differ.
  bool has_dgh() const { return cell_.distinct_dgh || sizes_.norms_gates; }

  // h before the projection of a chunk's rows, [rows, H].
  void unproject(const BackwardScan<Storage>& scan, int64_t rows, const Buffer<A>& to) const {
    constexpr int64_t grain = 1 << 14;  // elements that are worth waking a thread
    const int64_t H = sizes_.H;
    const UnprojectedRow<Storage, A> row{H, {scan.saved.data, cell_.saved * H}, {scan.c.data, H}, to};
    share(rows, grain / H + 1, [&](int64_t begin, int64_t end) { walk_rows(row, begin, end); });
  }

  // The states [B, columns] of all sequences after step t of a walk, from rows `stride` apart; of those that
  // it has not begun, the initial ones. `merged` holds the states where they come from both.
  template <class X>
  Steps<const X> states_after(int64_t t, int64_t columns, const X* rows, int64_t stride,
                              const Steps<const X>& initial, std::vector<X>& merged) const {
    const int64_t running = sizes_.running(t);
    const X* found = rows + sizes_.row(t) * stride;
    if (running == sizes_.B) return {found, 0, sizes_.b_step() * stride, 1};
    merged.resize(sizes_.B * columns);
    for (int64_t b = 0; b < sizes_.B; ++b)
      for (int64_t j = 0; j < columns; ++j)
        merged[b * columns + j] =
            b < running ? found[b * stride + j] : initial.at(0, b).data[j * initial.j_stride];
    return {merged.data(), 0, columns, 1};
  }

  // Where the gradient of a matrix is summed: `own` in a half type.
  static A* sums_of(const Tensor& found, const Aligned<A>& own) {
    return half ? own.data() : static_cast<A*>(found.mutable_data_ptr());
  }

  static void store_matrix(const Aligned<A>& sums, const Tensor& to) {
    if constexpr (half) {
      const int64_t rows = to.size(0), columns = to.size(1);
      const Write<Storage, A> row{
          columns, {sums.data(), columns}, {static_cast<Storage*>(to.mutable_data_ptr()), columns}};
      share_rows(rows, columns, [&](int64_t begin, int64_t end) { walk_rows(row, begin, end); });
    }
  }

  // The gradient of a matrix with `outputs` rows: the transpose of dout [rows, outputs] times the rows that
  // the matrix was multiplied with; or its part of these rows, added, if `adds`.
  template <class In>
  void of_matrix(const Operand<Storage>& dout, const Matrix<In>& multiplied, int64_t outputs, A* sums,
                 bool adds) const {
    dout.with_rows(0, [&](auto rows) { of_matrix(rows, multiplied, outputs, sums, adds); });
  }
  template <class Left, class In>
  void of_matrix(RowView<const Left> dout, const Matrix<In>& multiplied, int64_t outputs, A* sums,
                 bool adds) const {
    MatrixProduct<In> product(multiplied, nullptr, outputs, reads_storage<Storage>());
    product_into(product, RowView<const Left>{dout.data, 1}, dout.stride, outputs, multiplied.N, sums, adds);
  }

  // Of packed rows, those after the end of a sequence are zero.
  Tensor norms_of_all_walks() const {
    const std::vector<int64_t> sizes{sizes_.layers * sizes_.directions, 2, cell_.states, sizes_.T, sizes_.B};
    return sizes_.packed() ? torch::stable::new_zeros(x_, sizes, dtype_of<A>())
                           : torch::stable::new_empty(x_, sizes, dtype_of<A>());
  }

  Tensor like(const Tensor& t) const {
    return t.dim() == 2 ? call_.frame.template empty<Storage>({t.size(0), t.size(1)})
                        : call_.frame.template empty<Storage>({t.size(0)});
  }
  // The gradient of the output, in any layout, of one direction.
  Steps<const Storage> incoming(const Tensor& dy, int64_t d) const {
    const int64_t last = dy.dim() - 1, t = sizes_.batch_first && !unbatched_ ? 1 : 0;
    const Storage* data = data_of<Storage>(dy) + d * sizes_.P * dy.stride(last);
    if (sizes_.packed()) return {data, 0, dy.stride(0), dy.stride(last), sizes_.first_rows.data()};
    return {data, dy.stride(t), unbatched_ ? 0 : dy.stride(1 - t), dy.stride(last)};
  }

  // Multiplies the rows of the states with their sequences' mask.
  void mask_states(const BackwardScan<Storage>& scan, const Chunk& now, Storage* states) const {
    const int64_t P = sizes_.P, stride = scan.recurrent_mask.j_stride;
    share(scan.T, grain_of_copies / std::max<int64_t>(sizes_.B * P, 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = now.time + begin; t < now.time + end; ++t) {
        const RowView<Storage> rows{states + (sizes_.row(t) - now.first) * P, sizes_.b_step() * P};
        for (int64_t b = 0; b < sizes_.running(t); ++b) {
          const Storage* mask = scan.recurrent_mask.at(0, b).data;
          Storage* row = rows[b];
          for (int64_t j = 0; j < P; ++j) narrow(A(widen(row[j])) * A(widen(mask[j * stride])), row[j]);
        }
      }
    });
  }

  // The state that each step of the chunk starts from, [rows, P].
  void previous_states(const BackwardScan<Storage>& scan, const Chunk& now, Storage* to) const {
    const int64_t P = sizes_.P;
    share(scan.T, grain_of_copies / std::max<int64_t>(sizes_.B * P, 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = scan.step(i), time = now.time + t, running = sizes_.running(time);
        // Of a walk back in time, the sequences from `old` on begin at this step.
        const int64_t old = i == 0 ? 0 : std::min(running, sizes_.running(now.time + scan.step(i - 1)));
        const RowView<Storage> rows{to + (sizes_.row(time) - now.first) * P, sizes_.b_step() * P};
        for (int64_t b = 0; b < running; ++b) {
          if (scan.flags && scan.flagged(t, b, reset)) {
            std::fill_n(rows[b], P, Storage{});
          } else if (b < old) {
            std::copy_n(scan.y.at(scan.step(i - 1), b).data, P, rows[b]);
          } else {
            const Storage* first = scan.h0.at(0, b).data;
            for (int64_t j = 0; j < P; ++j) rows[b][j] = first[j * scan.h0.j_stride];
          }
        }
      }
    });
  }
};

}  // namespace fastrnn
