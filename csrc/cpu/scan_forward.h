// All steps of one layer in one direction: `scan_forward` of fastrnn/reference.py.
#pragma once

#include "scan.h"

namespace fastrnn {

template <class Cell, class Storage>
struct ForwardScan : Scan {
  using A = typename Arithmetic<Storage>::type;
  static constexpr bool has_c = Cell::states == 2;

  Steps<const Storage> gx, zone_h, zone_c;  // [T, B, gates * H], [T, B, P], [T, B, H]
  Steps<const Storage> h0, recurrent_mask;  // [1, B, P]
  Steps<const A> c0;                        // [1, B, H]
  Weights<Storage> weights;
  Steps<Storage> y, saved;  // [T, B, P]; [T, B, saved * H], may not exist
  Steps<A> c;               // [T, B, H], may not exist
  Steps<Storage> h_n;       // [1, B, P]
  Steps<A> c_n;             // [1, B, H]

  // Sequences from begin to end.
  void operator()(int64_t begin, int64_t end) const {
    Work work(*this, std::min(block, end - begin));
    for (int64_t b = begin; b < end; b += block) walk(b, std::min(block, end - b), work);
  }

 private:
  // One thread's rows. h, c: the states. operand: h times the recurrent mask. cell_h: h as the cell returns
  // it. projected_h: after the projection.
  struct Work {
    Buffer<A> h, operand, gates, cell_h, projected_h, c, c_before, recurrent_mask, zone_h, zone_c;
    Buffer<Storage> unsaved;  // what the cell would save
    Runs all, running, ended;

    Work(const ForwardScan& scan, int64_t rows)
        : h(rows, scan.P),
          operand(rows, scan.recurrent_mask ? scan.P : 0),
          gates(rows, Cell::gates * scan.H),
          cell_h(rows, scan.H),
          projected_h(rows, scan.weights.w_hr ? scan.P : 0),
          c(rows, has_c ? scan.H : 0),
          c_before(rows, scan.zone_c ? scan.H : 0),
          recurrent_mask(rows, scan.recurrent_mask ? scan.P : 0),
          zone_h(rows, scan.zone_h ? scan.P : 0),
          zone_c(rows, scan.zone_c ? scan.H : 0),
          unsaved(rows, scan.saved ? 0 : Cell::saved * scan.H) {}
  };

  // All steps of `rows` sequences from b on.
  void walk(int64_t b, int64_t rows, Work& work) const {
    work.all = {{0, rows}};
    read(work.all, P, h0, 0, b, work.h);
    if (has_c) read(work.all, H, c0, 0, b, work.c);
    if (recurrent_mask) read(work.all, P, recurrent_mask, 0, b, work.recurrent_mask);
    for (int64_t i = 0; i < T; ++i) {
      partition(step(i), b, rows, work.running, work.ended);
      run_step(step(i), b, work);
      write_padding(step(i), b, work.ended);
    }
    walk_runs(work.all, Write<Storage, A>{P, work.h, h_n.at(0, b)});
    if (has_c) walk_runs(work.all, Write<A, A>{H, work.c, c_n.at(0, b)});
  }

  void run_step(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    each_flagged(runs, t, b, reset, [&](int64_t r) {
      std::fill_n(work.h[r], P, A(0));
      if (has_c) std::fill_n(work.c[r], H, A(0));
    });
    if (recurrent_mask) elementwise(runs, P, Product{}, work.operand, work.h, work.recurrent_mask);
    multiply(runs, *weights.w_hh, recurrent_mask ? work.operand : work.h, work.gates);
    if (!weights.ln_hh.empty()) {
      const A* bias = weights.b_hh.empty() ? nullptr : weights.b_hh.data();
      walk_runs(runs, NormalizeGates<A>{Cell::gates * H, weights.ln_hh.data(), bias, work.gates});
    }
    if (zone_c) elementwise(runs, H, Copy{}, work.c_before, work.c);
    run_cell(t, b, work);
    const Buffer<A>& new_h = weights.w_hr ? work.projected_h : work.cell_h;
    if (weights.w_hr) multiply(runs, *weights.w_hr, work.cell_h, new_h);
    if (zone_h) {
      read(runs, P, zone_h, t, b, work.zone_h);
      elementwise(runs, P, Lerp{}, new_h, new_h, work.h, work.zone_h);
    }
    if (zone_c) {
      read(runs, H, zone_c, t, b, work.zone_c);
      elementwise(runs, H, Lerp{}, work.c, work.c, work.c_before, work.zone_c);
    }
    walk_runs(runs, Write<Storage, A>{P, new_h, y.at(t, b)});
    // The next step reads h as rounded to storage.
    walk_runs(runs, Read<Storage, A>{P, {y.at(t, b).data, y.b_stride}, 1, work.h});
    if (c) walk_runs(runs, Write<A, A>{H, work.c, c.at(t, b)});
  }

  void run_cell(int64_t t, int64_t b, Work& work) const {
    RowView<Storage> saved_rows = saved ? saved.at(t, b) : RowView<Storage>(work.unsaved);
    // A cell with a c reads no h, which a projection makes narrower than H. c is updated in place.
    const Buffer<A>& h_prev = has_c ? work.c : work.h;
    Affine<A> ln_c = weights.ln_c();
    walk_cell<ForwardRow, Cell, Storage>(work.running, H, ln_c, gx.at(t, b), work.gates, h_prev, work.c, ln_c,
                                         work.cell_h, work.c, saved_rows);
  }

  // After the end of a sequence its outputs are zero; its state stays.
  void write_padding(int64_t t, int64_t b, const Runs& ended) const {
    fill_zero(ended, P, y.at(t, b));
    if (saved) fill_zero(ended, Cell::saved * H, saved.at(t, b));
    if (c) fill_zero(ended, H, c.at(t, b));
  }
};

}  // namespace fastrnn
