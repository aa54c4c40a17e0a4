// All steps of one layer in one direction: `scan_forward` of fastrnn/reference.py.
#pragma once

#include "scan.h"

namespace fastrnn {

template <class S>
struct ForwardScan : Scan {
  using Storage = S;
  using A = typename Arithmetic<S>::type;

  const Cell<A>& cell;
  Steps<const Storage> gx, zone_h, zone_c;  // [T, B, gates * H], [T, B, P], [T, B, C]
  Steps<const Storage> decay_h, decay_c;    // [T, B, P], [T, B, C]
  Steps<const Storage> step_inputs;         // [T, B, inputs * H]
  Steps<const Storage> h0, recurrent_mask;  // [1, B, P]; the mask [1, B, gates * P] with `masked_gates`
  Steps<const A> c0;                        // [1, B, C]
  Weights<Storage> weights;
  Steps<Storage> y, saved;  // [T, B, P]; [T, B, saved * H], may not exist
  Steps<A> c;               // [T, B, C], may not exist
  Steps<Storage> h_n;       // [1, B, P]
  Steps<A> c_n;             // [1, B, C]

  explicit ForwardScan(const Cell<A>& cell) : cell(cell) {}

  // Sequences from begin to end.
  void operator()(int64_t begin, int64_t end) const;

 private:
  static constexpr bool half = !std::is_same_v<Storage, A>;

  bool has_c() const { return cell.states > 1; }
  int64_t mask_width() const { return !recurrent_mask ? 0 : weights.masked_gates ? cell.gates * P : P; }
  bool normalizes_gx() const { return !weights.ln_ih.empty(); }
  // Whether the cell saves into memory of the thread: a half type is narrowed from there; and where there is
  // no output, some cells need the memory all the same.
  bool saves_aside() const { return saved ? half : cell.always_saves; }

  // One thread's rows. h, c: the states. operand: h times the recurrent mask. cell_h: h as the cell returns
  // it. projected_h: after the projection.
  struct Work {
    Buffer<A> h, operand, gates, gates_of_head, cell_h, projected_h, c, c_before, recurrent_mask, zone_h,
        zone_c, decay_h, decay_c;
    // What the cell saves, unless that goes straight to the output; the operands of a half type, widened.
    Buffer<A> saved, gx, step_inputs;
    Buffer<A> no_gx;  // zeros, which the cell gets where W_ih x is inside the layer norm
    std::unique_ptr<typename Cell<A>::Memory> of_cell;
    Runs all, running, ended;

    Work(const ForwardScan& scan, int64_t rows)
        : h(rows, scan.P),
          operand(rows, scan.recurrent_mask ? scan.P : 0),
          gates(rows, scan.cell.recurrent ? scan.cell.gates * scan.H : 0),
          gates_of_head(rows, scan.weights.masked_gates ? scan.H : scan.weights.w_hh.gates_of_head()),
          cell_h(rows, scan.H),
          projected_h(rows, scan.weights.w_hr ? scan.P : 0),
          c(rows, scan.C),
          c_before(rows, scan.zone_c ? scan.C : 0),
          recurrent_mask(rows, scan.mask_width()),
          zone_h(rows, scan.zone_h ? scan.P : 0),
          zone_c(rows, scan.zone_c ? scan.C : 0),
          decay_h(rows, scan.decay_h ? scan.P : 0),
          decay_c(rows, scan.decay_c ? scan.C : 0),
          saved(rows, scan.saves_aside() ? scan.cell.saved * scan.H : 0),
          gx(rows, half || scan.weights.ln_of_sum || scan.normalizes_gx() ? scan.cell.gates * scan.H : 0),
          step_inputs(rows, half ? scan.cell.inputs * scan.H : 0),
          no_gx(1, scan.weights.ln_of_sum ? scan.cell.gates * scan.H : 0),
          of_cell(scan.cell.memory()) {
      if (scan.weights.ln_of_sum) std::fill_n(no_gx[0], scan.cell.gates * scan.H, A(0));
    }
  };

  // All steps of `rows` sequences from b on.
  void walk(int64_t b, int64_t rows, Work& work) const {
    work.all = {{0, rows}};
    read(work.all, P, h0, 0, b, work.h);
    if (has_c()) read(work.all, C, c0, 0, b, work.c);
    if (recurrent_mask) read(work.all, mask_width(), recurrent_mask, 0, b, work.recurrent_mask);
    for (int64_t i = 0; i < T; ++i) {
      partition(step(i), b, rows, work.running, work.ended);
      run_step(step(i), b, work);
      write_padding(step(i), b, work.ended);
    }
    walk_runs(work.all, Write<Storage, A>{P, work.h, h_n.at(0, b)});
    if (has_c()) walk_runs(work.all, Write<A, A>{C, work.c, c_n.at(0, b)});
  }

  void run_step(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    if (decay_h) {
      read(runs, P, decay_h, t, b, work.decay_h);
      elementwise(runs, P, Product{}, work.h, work.h, work.decay_h);
    }
    if (decay_c) {
      read(runs, C, decay_c, t, b, work.decay_c);
      elementwise(runs, C, Product{}, work.c, work.c, work.decay_c);
    }
    each_flagged(runs, t, b, reset, [&](int64_t r) {
      std::fill_n(work.h[r], P, A(0));
      if (has_c()) std::fill_n(work.c[r], C, A(0));
    });
    if (cell.recurrent) product_of_gates(t, b, work);
    if (zone_c) elementwise(runs, C, Copy{}, work.c_before, work.c);
    run_cell(t, b, work);
    const Buffer<A>& new_h = weights.w_hr ? work.projected_h : work.cell_h;
    if (weights.w_hr) multiply(runs, *weights.w_hr, work.cell_h, new_h);
    if (zone_h) {
      read(runs, P, zone_h, t, b, work.zone_h);
      elementwise(runs, P, Lerp{}, new_h, new_h, work.h, work.zone_h);
    }
    if (zone_c) {
      read(runs, C, zone_c, t, b, work.zone_c);
      elementwise(runs, C, Lerp{}, work.c, work.c, work.c_before, work.zone_c);
    }
    walk_runs(runs, Write<Storage, A>{P, new_h, y.at(t, b)});
    // The next step reads h as rounded to storage.
    walk_runs(runs, Read<Storage, A>{P, {y.at(t, b).data, y.b_stride}, 1, work.h});
    if (c) walk_runs(runs, Write<A, A>{C, work.c, c.at(t, b)});
  }

  void product_of_gates(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    if (weights.masked_gates) {
      weights.masked_gates.times(runs, work.h, work.recurrent_mask, work.operand, work.gates_of_head,
                                 work.gates);
    } else {
      if (recurrent_mask) elementwise(runs, P, Product{}, work.operand, work.h, work.recurrent_mask);
      weights.w_hh.times(runs, recurrent_mask ? work.operand : work.h, work.gates_of_head, work.gates);
    }
    if (weights.ln_hh.empty()) return;
    if (weights.ln_of_sum) {
      read(runs, cell.gates * H, gx, t, b, work.gx);
      elementwise(runs, cell.gates * H, Sum{}, work.gates, work.gates, work.gx);
    }
    const A* bias = weights.b_hh.empty() ? nullptr : weights.b_hh.data();
    walk_runs(runs, NormalizeGates<A>{weights.ln_groups, cell.gates * H / weights.ln_groups, weights.ln_eps,
                                      weights.ln_hh.data(), bias, work.gates, work.gates});
  }

  // W_ih x as the cell gets it.
  RowView<const A> gx_of_cell(int64_t t, int64_t b, Work& work) const {
    if (weights.ln_of_sum) return {work.no_gx[0], 0};
    const RowView<const A> rows = in_arithmetic(work.running, cell.gates * H, gx, t, b, work.gx);
    if (!normalizes_gx()) return rows;
    const A* bias = weights.b_ih.empty() ? nullptr : weights.b_ih.data();
    walk_runs(work.running, NormalizeGates<A>{1, cell.gates * H, weights.ln_eps, weights.ln_ih.data(), bias,
                                              rows, work.gx});
    return work.gx;
  }

  // c is updated in place.
  void run_cell(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    RowView<A> to_save{nullptr, 0};
    if (saves_aside()) to_save = work.saved;
    if constexpr (!half)
      if (saved) to_save = saved.at(t, b);
    const ForwardStep<A> step{H,
                              gx_of_cell(t, b, work),
                              work.gates,
                              work.h,
                              work.c,
                              weights.parameters(),
                              in_arithmetic(runs, cell.inputs * H, step_inputs, t, b, work.step_inputs),
                              weights.ln_c(),
                              work.cell_h,
                              work.c,
                              to_save};
    cell.forward(runs, step, work.of_cell.get());
    if (half && saved) walk_runs(runs, Write<Storage, A>{cell.saved * H, work.saved, saved.at(t, b)});
  }

  // After the end of a sequence its outputs are zero; its state stays.
  void write_padding(int64_t t, int64_t b, const Runs& ended) const {
    fill_zero(ended, P, y.at(t, b));
    if (saved) fill_zero(ended, cell.saved * H, saved.at(t, b));
    if (c) fill_zero(ended, C, c.at(t, b));
  }
};

template <class S>
void ForwardScan<S>::operator()(int64_t begin, int64_t end) const {
  const int64_t rows = std::min(block(), end - begin);
  Work work(*this, rows);
  for (int64_t b = begin; b < end; b += rows) walk(b, std::min(rows, end - b), work);
}

#define FASTRNN_INSTANCE(S) extern template struct ForwardScan<S>;
FASTRNN_EACH_STORAGE(FASTRNN_INSTANCE)
#undef FASTRNN_INSTANCE

}  // namespace fastrnn
