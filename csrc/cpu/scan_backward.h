// The reverse scan of one layer in one direction: `scan_backward` of fastrnn/reference.py.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>

#include "scan.h"

namespace fastrnn {

template <class S>
struct BackwardScan : Scan {
  using Storage = S;
  using A = typename Arithmetic<S>::type;

  const Cell<A>& cell;
  Steps<const Storage> dy;        // [T, B, P]; none of the incoming gradients need exist
  Steps<const A> dc;              // [T, B, C]
  Steps<const Storage> dh_n;      // [1, B, P]
  Steps<const A> dc_n;            // [1, B, C]
  Steps<const A> dh_after;        // in place of dh_n where a scan of later steps wrote it as dh_before
  Steps<const Storage> saved, y;  // [T, B, saved * H], [T, B, P]
  Steps<const A> c;               // [T, B, C]
  Steps<const Storage> gx;        // [T, B, gates * H]; only where a layer norm here is of W_ih x or the sum
  Steps<const Storage> h0;        // [1, B, P]
  Steps<const A> c0;              // [1, B, C]
  Weights<Storage> weights;
  Steps<const Storage> recurrent_mask, zone_h, zone_c;  // [1, B, P or gates * P], [T, B, P], [T, B, C]
  Steps<const Storage> decay_h, decay_c;                // [T, B, P], [T, B, C]
  Steps<const Storage> step_inputs;                     // [T, B, inputs * H]
  std::optional<A> clip_norm, clip_value;
  Steps<Storage> dgx, dgh;            // [T, B, gates * H]; dgh only where it differs
  Steps<Storage> dh_new;              // [T, B, P], may not exist
  Steps<Storage> dh0;                 // [1, B, P]
  Steps<A> dh_before;                 // in place of dh0 where a scan of earlier steps reads it
  Steps<A> dc0;                       // [1, B, C]
  Steps<A> db_hh, dln_hh;             // [1, B, gates * H], may not exist
  Steps<A> db_ih, dln_ih;             // [1, B, gates * H]; with `weights.ln_ih`
  Steps<A> dln_c_weight, dln_c_bias;  // [1, B, H], may not exist
  Steps<Storage> dcell;               // [T, B, (parameters + inputs) * H], may not exist
  Steps<Storage> ddecay_h, ddecay_c;  // [T, B, P], [T, B, C], may not exist
  A* norms = nullptr;                 // [2, states, T, B] or null
  int64_t norms_stride = 0;           // from one state's to the next one's

  explicit BackwardScan(const Cell<A>& cell) : cell(cell) {}

  // Sequences from begin to end.
  void operator()(int64_t begin, int64_t end) const;

 private:
  static constexpr bool half = !std::is_same_v<Storage, A>;

  bool has_c() const { return cell.states > 1; }
  int64_t mask_width() const { return !recurrent_mask ? 0 : weights.masked_gates ? cell.gates * P : P; }
  bool reads_h_prev() const { return cell.reads_h_prev || dln_hh; }

  // Whether `cell.backward` does the work of `cell.total`: where nothing between them reads the totals.
  bool joined() const {
    return cell.joins && norms == nullptr && !clip_value && !clip_norm && weights.ln_c_weight.empty();
  }

  // One thread's rows.
  struct Work {
    Buffer<A> carried_h, carried_c;      // what the next step sent back
    Buffer<A> dh, dc;                    // plus the incoming gradients of this step's outputs
    Buffer<A> dh_new, dc_new;            // the part that zoneout passes to the new state
    Buffer<A> dh_cell;                   // of the h before the projection
    Buffer<A> total_h, total_c;          // the same, with the gradients between the states of this step
    Buffer<A> xhat, u, rstd;             // of the layer norm of c
    Buffer<A> h_prev, c_prev;            // the state before the step
    Buffer<A> saved, step_inputs;        // widened from a half type
    Buffer<A> dcell;                     // before it is narrowed to one
    Buffer<A> dgx, dgh;                  // after the layer norm of W_hh h, where there is one
    Buffer<A> gates, dgh_raw;            // W_hh h_prev and its gradient, before that layer norm
    Buffer<A> gx;                        // W_ih x, where a layer norm reads it
    Buffer<A> gates_of_head, h_of_head;  // of one head's product, or of one gate's with its mask
    Buffer<A> operand;                   // h_prev times the mask of one gate
    Buffer<A> dh_past_w;                 // what reaches h_prev past W_hh
    Buffer<A> h_undecayed, c_undecayed;  // the state before the step, before its decay
    Buffer<A> recurrent_mask, zone_h, zone_c, decay_h, decay_c;
    // Sums over the steps, of which there may be many.
    Buffer<double> db_hh, dln_hh, db_ih, dln_ih, dln_c_weight, dln_c_bias;
    Buffer<A> norm_of_state, norms_of_row, factor;  // of clipping by norm
    std::unique_ptr<typename Cell<A>::Memory> of_cell;
    Runs all, running, ended;

    Work(const BackwardScan& scan, int64_t rows)
        : carried_h(rows, scan.P),
          carried_c(rows, scan.C),
          dh(rows, scan.P),
          dc(rows, scan.C),
          dh_new(rows, scan.zone_h ? scan.P : 0),
          dc_new(rows, scan.zone_c ? scan.C : 0),
          dh_cell(rows, scan.weights.w_hr ? scan.H : 0),
          total_h(rows, scan.cell.adds_to_dh && !scan.joined() ? scan.H : 0),
          total_c(rows, scan.joined() ? 0 : scan.C),
          xhat(rows, scan.dln_c_weight ? scan.H : 0),
          u(rows, scan.dln_c_weight ? scan.H : 0),
          rstd(rows, scan.dln_c_weight ? 1 : 0),
          h_prev(rows, scan.reads_h_prev() ? scan.P : 0),
          c_prev(rows, scan.C),
          saved(rows, half ? scan.cell.saved * scan.H : 0),
          step_inputs(rows, half ? scan.cell.inputs * scan.H : 0),
          dcell(rows, half ? (scan.cell.parameters + scan.cell.inputs) * scan.H : 0),
          dgx(rows, half ? scan.cell.gates * scan.H : 0),
          dgh(rows, scan.cell.distinct_dgh ? scan.cell.gates * scan.H : 0),
          gates(rows, scan.dln_hh ? scan.cell.gates * scan.H : 0),
          dgh_raw(rows, scan.dln_hh ? scan.cell.gates * scan.H : 0),
          gx(rows, scan.weights.ln_of_sum || (half && scan.dln_ih) ? scan.cell.gates * scan.H : 0),
          gates_of_head(rows, scan.weights.masked_gates ? scan.H : scan.weights.w_hh.gates_of_head()),
          h_of_head(rows, scan.weights.masked_gates ? scan.P : scan.weights.w_hh.units_of_head()),
          operand(rows, scan.weights.forward_masked_gates ? scan.P : 0),
          dh_past_w(rows, scan.cell.gives_h_prev ? scan.H : 0),
          h_undecayed(rows, scan.decay_h ? scan.P : 0),
          c_undecayed(rows, scan.decay_c ? scan.C : 0),
          recurrent_mask(rows, scan.mask_width()),
          zone_h(rows, scan.zone_h ? scan.P : 0),
          zone_c(rows, scan.zone_c ? scan.C : 0),
          decay_h(rows, scan.decay_h ? scan.P : 0),
          decay_c(rows, scan.decay_c ? scan.C : 0),
          db_hh(rows, scan.dln_hh ? scan.cell.gates * scan.H : 0),
          dln_hh(rows, scan.dln_hh ? scan.cell.gates * scan.H : 0),
          db_ih(rows, scan.dln_ih ? scan.cell.gates * scan.H : 0),
          dln_ih(rows, scan.dln_ih ? scan.cell.gates * scan.H : 0),
          dln_c_weight(rows, scan.dln_c_weight ? scan.H : 0),
          dln_c_bias(rows, scan.dln_c_weight ? scan.H : 0),
          norm_of_state(scan.cell.states, rows),
          norms_of_row(rows, scan.cell.states),
          factor(1, rows),
          of_cell(scan.cell.memory()) {}
  };

  // All steps of `rows` sequences from b on.
  void walk(int64_t b, int64_t rows, Work& work) const {
    work.all = {{0, rows}};
    if (dh_after)
      read(work.all, P, dh_after, 0, b, work.carried_h);
    else
      read_or_zero<Storage>(dh_n, P, b, work.all, work.carried_h);
    if (has_c()) read_or_zero<A>(dc_n, C, b, work.all, work.carried_c);
    if (recurrent_mask) read(work.all, mask_width(), recurrent_mask, 0, b, work.recurrent_mask);
    each_parameter(
        b, work, [&](int64_t width, RowView<double> sums, RowView<A>) { fill_zero(work.all, width, sums); });
    for (int64_t i = T - 1; i >= 0; --i) {
      int64_t t = step(i);
      partition(t, b, rows, work.running, work.ended);
      load_incoming(i, b, work);
      backward_of_outputs(t, b, work);
      if (norms != nullptr) write_norms(t, b, work);
      if (clip_value) {
        clip_by_value(work);
        backward_of_outputs(t, b, work);
      }
      if (clip_norm) clip_by_norm(work);
      backward_of_cell(t, b, work);
      write_step(t, b, work);
      carry(t, b, work);
      write_padding(t, b, work.ended);
    }
    if (dh_before)
      walk_runs(work.all, Write<A, A>{P, work.carried_h, dh_before.at(0, b)});
    else
      walk_runs(work.all, Write<Storage, A>{P, work.carried_h, dh0.at(0, b)});
    if (has_c()) walk_runs(work.all, Write<A, A>{C, work.carried_c, dc0.at(0, b)});
    each_parameter(b, work, [&](int64_t width, RowView<double> sums, RowView<A> out) {
      walk_runs(work.all, Write<A, double>{width, {sums.data, sums.stride}, out});
    });
  }

  // f(width, sums, output) for the parameters whose gradient is summed here, from sequence b on.
  template <class F>
  void each_parameter(int64_t b, const Work& work, const F& f) const {
    if (db_hh) f(cell.gates * H, work.db_hh, db_hh.at(0, b));
    if (dln_hh) f(cell.gates * H, work.dln_hh, dln_hh.at(0, b));
    if (dln_ih) f(cell.gates * H, work.db_ih, db_ih.at(0, b));
    if (dln_ih) f(cell.gates * H, work.dln_ih, dln_ih.at(0, b));
    if (dln_c_weight) f(H, work.dln_c_weight, dln_c_weight.at(0, b));
    if (dln_c_bias) f(H, work.dln_c_bias, dln_c_bias.at(0, b));
  }

  // The buffers that hold these: a feature that is off has no buffer of its own.
  const Buffer<A>& dh_new_of(const Work& work) const { return zone_h ? work.dh_new : work.dh; }
  const Buffer<A>& dc_new_of(const Work& work) const { return zone_c ? work.dc_new : work.dc; }
  const Buffer<A>& dh_cell_of(const Work& work) const {
    return weights.w_hr ? work.dh_cell : dh_new_of(work);
  }

  static RowView<const A> read_only(const RowView<A>& rows) { return {rows.data, rows.stride}; }

  template <class X>
  static void read_or_zero(const Steps<const X>& from, int64_t width, int64_t b, const Runs& runs,
                           const Buffer<A>& to) {
    from ? read(runs, width, from, 0, b, to) : fill_zero<A>(runs, width, to);
  }

  // The state before the i-th step, from the states after each step and the initial one.
  template <class X>
  void previous(const Steps<const X>& states, const Steps<const X>& initial, int64_t width, int64_t i,
                int64_t b, const Work& work, const Buffer<A>& to) const {
    const Runs& runs = work.running;
    int64_t t = step(i);
    const Steps<const X>& from = i > 0 ? states : initial;
    const Read<X, A> row{width, from.at(i > 0 ? step(i - 1) : 0, b), from.j_stride, to};
    for (auto [begin, end] : runs) {
      // In packed rows a sequence has no row before it begins.
      if (i > 0 && batch_sizes != nullptr) end = std::min(end, batch_sizes[step(i - 1)] - b);
      if (begin < end) walk_rows(row, begin, end);
    }
    each_flagged(runs, t, b, start, [&](int64_t r) { read({{r, r + 1}}, width, initial, 0, b, to); });
    each_flagged(runs, t, b, reset, [&](int64_t r) { std::fill_n(to[r], width, A(0)); });
  }

  // The operands of the i-th step. dh and dc become the sum of what the next step sent back and the incoming
  // gradients.
  void load_incoming(int64_t i, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    int64_t t = step(i);
    if (decay_h) {
      previous(y, h0, P, i, b, work, work.h_undecayed);
      read(runs, P, decay_h, t, b, work.decay_h);
      if (reads_h_prev()) elementwise(runs, P, Product{}, work.h_prev, work.h_undecayed, work.decay_h);
    } else if (reads_h_prev()) {
      previous(y, h0, P, i, b, work, work.h_prev);
    }
    if (decay_c) {
      previous(c, c0, C, i, b, work, work.c_undecayed);
      read(runs, C, decay_c, t, b, work.decay_c);
      elementwise(runs, C, Product{}, work.c_prev, work.c_undecayed, work.decay_c);
    } else if (has_c()) {
      previous(c, c0, C, i, b, work, work.c_prev);
    }
    if (dy) {
      read(runs, P, dy, t, b, work.dh);
      elementwise(runs, P, Sum{}, work.dh, work.carried_h, work.dh);
    } else {
      elementwise(runs, P, Copy{}, work.dh, work.carried_h);
    }
    if (dc) {
      read(runs, C, dc, t, b, work.dc);
      elementwise(runs, C, Sum{}, work.dc, work.carried_c, work.dc);
    } else if (has_c()) {
      elementwise(runs, C, Copy{}, work.dc, work.carried_c);
    }
    if (zone_h) read(runs, P, zone_h, t, b, work.zone_h);
    if (zone_c) read(runs, C, zone_c, t, b, work.zone_c);
    if (half) read(runs, cell.saved * H, saved, t, b, work.saved);
    if (half && step_inputs) read(runs, cell.inputs * H, step_inputs, t, b, work.step_inputs);
  }

  // Through zoneout and projection: from dh and dc to dh_cell, and to total_h and total_c.
  void backward_of_outputs(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    if (zone_h) elementwise(runs, P, ToNewState{}, work.dh_new, work.dh, work.zone_h);
    if (weights.w_hr) multiply(runs, *weights.w_hr, dh_new_of(work), work.dh_cell);
    if (zone_c) elementwise(runs, C, ToNewState{}, work.dc_new, work.dc, work.zone_c);
    if (!joined()) cell.total(runs, step_of(t, b, work), work.of_cell.get());
  }

  // The rows of a step in the type of the arithmetic: the memory itself, or those of the thread.
  template <class X>
  static RowView<A> rows_of(const Steps<X>& steps, int64_t t, int64_t b, const Buffer<A>& own) {
    if constexpr (!half) {
      const RowView<X> rows = steps.at(t, b);
      return {const_cast<A*>(rows.data), rows.stride};
    }
    return own;
  }

  BackwardStep<A> step_of(int64_t t, int64_t b, Work& work) const {
    return {H,
            read_only(rows_of(saved, t, b, work.saved)),
            work.h_prev,
            work.c_prev,
            weights.parameters(),
            read_only(rows_of(step_inputs, t, b, work.step_inputs)),
            weights.ln_c(),
            dh_cell_of(work),
            dc_new_of(work),
            work.total_h,
            work.total_c,
            {work.xhat, work.u, work.rstd},
            rows_of(dgx, t, b, work.dgx),
            work.dgh,
            work.dh_past_w,
            work.carried_c,
            rows_of(dcell, t, b, work.dcell),
            work.dln_c_weight,
            work.dln_c_bias};
  }

  // The norms of step t from sequence b on; `part`: 0 total, 1 carried.
  A* norms_at(int64_t part, int64_t state, int64_t t, int64_t b) const {
    return norms + (part * cell.states + state) * norms_stride + t * B + b;
  }

  // The plane of state k > 0.
  RowView<const A> state_beyond_h(const Buffer<A>& planes, int64_t k) const {
    RowView<A> rows = planes;
    return {rows.data + (k - 1) * H, rows.stride};
  }

  void write_norms(int64_t t, int64_t b, Work& work) const {
    walk_runs(work.running, NormRow<A>{P, work.dh, norms_at(0, 0, t, b)});
    walk_runs(work.running, NormRow<A>{P, work.carried_h, norms_at(1, 0, t, b)});
    for (int64_t k = 1; k < cell.states; ++k) {
      walk_runs(work.running, NormRow<A>{H, state_beyond_h(work.total_c, k), norms_at(0, k, t, b)});
      walk_runs(work.running, NormRow<A>{H, state_beyond_h(work.carried_c, k), norms_at(1, k, t, b)});
    }
  }

  void clip_by_value(Work& work) const {
    elementwise(work.running, P, Clamp<A>{*clip_value}, work.dh, work.dh);
    if (has_c()) elementwise(work.running, C, Clamp<A>{*clip_value}, work.dc, work.dc);
  }

  // Scales each row so that the joint norm of its dh and total_c is at most clip_norm; a NaN stays visible.
  void clip_by_norm(Work& work) const {
    const Runs& runs = work.running;
    const Buffer<A>&parts = work.norm_of_state, &row = work.norms_of_row, &factor = work.factor;
    walk_runs(runs, NormRow<A>{P, work.dh, parts[0]});
    for (int64_t k = 1; k < cell.states; ++k)
      walk_runs(runs, NormRow<A>{H, state_beyond_h(work.total_c, k), parts[k]});
    for (auto [begin, end] : runs)
      for (int64_t r = begin; r < end; ++r)
        for (int64_t k = 0; k < cell.states; ++k) row[r][k] = parts[k][r];
    walk_runs(runs, NormRow<A>{cell.states, row, factor[0]});
    for (auto [begin, end] : runs)
      for (int64_t r = begin; r < end; ++r) {
        A joint = factor[0][r];
        factor[0][r] = *clip_norm / (joint <= *clip_norm ? *clip_norm : joint);
      }
    Scale<A> scale{factor[0]};
    elementwise(runs, P, scale, work.dh, work.dh);
    if (zone_h) elementwise(runs, P, scale, work.dh_new, work.dh_new);
    if (weights.w_hr) elementwise(runs, H, scale, work.dh_cell, work.dh_cell);
    if (cell.adds_to_dh) elementwise(runs, H, scale, work.total_h, work.total_h);
    if (has_c()) elementwise(runs, C, scale, work.total_c, work.total_c);
    if (zone_c) elementwise(runs, C, scale, work.dc, work.dc);
  }

  // dgx, dgh, dh_past_w, dcell; carried_c becomes the gradient of c_prev.
  void backward_of_cell(int64_t t, int64_t b, Work& work) const {
    cell.backward(work.running, step_of(t, b, work), joined(), work.of_cell.get());
  }

  // The gradient of W_hh h_prev at step t, before its layer norm where there is one.
  RowView<const A> dgh_rows(int64_t t, int64_t b, const Work& work) const {
    if (dln_hh) return work.dgh_raw;
    return read_only(cell.distinct_dgh ? RowView<A>(work.dgh) : rows_of(dgx, t, b, work.dgx));
  }

  void backward_of_gate_norm(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    RowView<A> dgh = cell.distinct_dgh ? RowView<A>(work.dgh) : rows_of(dgx, t, b, work.dgx);
    if (weights.forward_masked_gates) {
      weights.forward_masked_gates.times(runs, work.h_prev, work.recurrent_mask, work.operand,
                                         work.gates_of_head, work.gates);
    } else {
      if (recurrent_mask) elementwise(runs, P, Product{}, work.h_prev, work.h_prev, work.recurrent_mask);
      weights.forward_w_hh.times(runs, work.h_prev, work.gates_of_head, work.gates);
    }
    if (weights.ln_of_sum) {
      read(runs, cell.gates * H, gx, t, b, work.gx);
      elementwise(runs, cell.gates * H, Sum{}, work.gates, work.gates, work.gx);
    }
    walk_runs(runs, NormalizeGatesBackward<A>{weights.ln_groups,
                                              cell.gates * H / weights.ln_groups,
                                              weights.ln_eps,
                                              weights.ln_hh.data(),
                                              {dgh.data, dgh.stride},
                                              work.gates,
                                              work.dgh_raw,
                                              work.dln_hh,
                                              work.db_hh});
  }

  // dgx, in place.
  void backward_of_gx_norm(int64_t t, int64_t b, Work& work) const {
    const int64_t width = cell.gates * H;
    if (half) read(work.running, width, gx, t, b, work.gx);
    const RowView<A> rows = rows_of(dgx, t, b, work.dgx);
    walk_runs(work.running, NormalizeGatesBackward<A>{1, width, weights.ln_eps, weights.ln_ih.data(),
                                                      read_only(rows), read_only(rows_of(gx, t, b, work.gx)),
                                                      rows, work.dln_ih, work.db_ih});
  }

  void write_step(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    int64_t width = cell.gates * H;
    if (dln_hh) backward_of_gate_norm(t, b, work);
    if (dln_ih) backward_of_gx_norm(t, b, work);
    if (half) walk_runs(runs, Write<Storage, A>{width, work.dgx, dgx.at(t, b)});
    if (half && dcell)
      walk_runs(runs, Write<Storage, A>{(cell.parameters + cell.inputs) * H, work.dcell, dcell.at(t, b)});
    if (dh_new) walk_runs(runs, Write<Storage, A>{P, dh_new_of(work), dh_new.at(t, b)});
    if (weights.ln_of_sum) walk_runs(runs, Write<Storage, A>{width, work.dgh_raw, dgx.at(t, b)});
    if (dgh) walk_runs(runs, Write<Storage, A>{width, dgh_rows(t, b, work), dgh.at(t, b)});
  }

  // carried_h and carried_c become the gradients that the step before receives.
  void carry(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    if (cell.recurrent) {
      if (weights.masked_gates) {
        weights.masked_gates.times_transposed(runs, dgh_rows(t, b, work), work.recurrent_mask, work.h_of_head,
                                              work.carried_h);
      } else {
        weights.w_hh.times_transposed(runs, dgh_rows(t, b, work), work.gates_of_head, work.h_of_head,
                                      work.carried_h);
        if (recurrent_mask)
          elementwise(runs, P, Product{}, work.carried_h, work.carried_h, work.recurrent_mask);
      }
      if (cell.gives_h_prev) elementwise(runs, P, Sum{}, work.carried_h, work.carried_h, work.dh_past_w);
    } else if (cell.gives_h_prev) {
      elementwise(runs, P, Copy{}, work.carried_h, work.dh_past_w);
    } else {
      fill_zero<A>(runs, P, work.carried_h);
    }
    if (zone_h) elementwise(runs, P, AddProduct{}, work.carried_h, work.carried_h, work.dh, work.zone_h);
    if (zone_c) elementwise(runs, C, AddProduct{}, work.carried_c, work.carried_c, work.dc, work.zone_c);
    each_flagged(runs, t, b, reset, [&](int64_t r) {
      std::fill_n(work.carried_h[r], P, A(0));
      if (has_c()) std::fill_n(work.carried_c[r], C, A(0));
    });
    if (decay_h) through_decay(runs, P, work.h_undecayed, work.decay_h, work.carried_h, ddecay_h.at(t, b));
    if (decay_c) through_decay(runs, C, work.c_undecayed, work.decay_c, work.carried_c, ddecay_c.at(t, b));
  }

  // carried becomes the gradient of the state before its decay, from that of the state after it. `undecayed`
  // is overwritten.
  static void through_decay(const Runs& runs, int64_t width, const Buffer<A>& undecayed,
                            const Buffer<A>& decay, const Buffer<A>& carried, RowView<Storage> ddecay) {
    elementwise(runs, width, Product{}, undecayed, undecayed, carried);
    walk_runs(runs, Write<Storage, A>{width, undecayed, ddecay});
    elementwise(runs, width, Product{}, carried, carried, decay);
  }

  // After the end of a sequence the gradients of its inputs are zero; those of its state stay.
  void write_padding(int64_t t, int64_t b, const Runs& ended) const {
    fill_zero(ended, cell.gates * H, dgx.at(t, b));
    if (dgh) fill_zero(ended, cell.gates * H, dgh.at(t, b));
    if (dcell) fill_zero(ended, (cell.parameters + cell.inputs) * H, dcell.at(t, b));
    if (dh_new) fill_zero(ended, P, dh_new.at(t, b));
    if (ddecay_h) fill_zero(ended, P, ddecay_h.at(t, b));
    if (ddecay_c) fill_zero(ended, C, ddecay_c.at(t, b));
    if (norms == nullptr) return;
    for (int64_t part = 0; part < 2; ++part)
      for (int64_t state = 0; state < cell.states; ++state)
        for (auto [begin, end] : ended)
          std::fill(norms_at(part, state, t, b + begin), norms_at(part, state, t, b + end), A(0));
  }
};

template <class S>
void BackwardScan<S>::operator()(int64_t begin, int64_t end) const {
  const int64_t rows = std::min(block(), end - begin);
  Work work(*this, rows);
  for (int64_t b = begin; b < end; b += rows) walk(b, std::min(rows, end - b), work);
}

#define FASTRNN_INSTANCE(S) extern template struct BackwardScan<S>;
FASTRNN_EACH_STORAGE(FASTRNN_INSTANCE)
#undef FASTRNN_INSTANCE

}  // namespace fastrnn
