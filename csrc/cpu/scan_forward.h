// All steps of one layer in one direction: `scan_forward` of fastrnn/reference.py.
#pragma once

#include "scan.h"

namespace fastrnn {

template <class Cell, class S>
struct ForwardScan : Scan {
  using A = typename Arithmetic<S>::type;
  static constexpr bool has_c = Cell::states == 2;

  Steps<const S> gx, zone_h, zone_c;  // [T, B, gates * H], [T, B, P], [T, B, H]
  Steps<const S> h0, recurrent;       // [1, B, P]
  Steps<const A> c0;                  // [1, B, H]
  const Weights<S>& weights;          // b_hh is the start of w_hh, unless it stands behind a layer norm
  Steps<S> y, saved;                  // [T, B, P]; [T, B, saved * H], may not exist
  Steps<A> c;                         // [T, B, H], may not exist
  Steps<S> h_n;                       // [1, B, P]
  Steps<A> c_n;                       // [1, B, H]

  void operator()(int64_t begin, int64_t end) const {
    Work work(*this, std::min(block, end - begin));
    for (int64_t b = begin; b < end; b += block) sequences(b, std::min(block, end - b), work);
  }

 private:
  // A thread's own rows. h and c are the states; `fresh` is the cell's h, `out` the projected one.
  struct Work {
    Buffer<A> h, operand, gates, fresh, out, c, c_before, mask, share_h, share_c;
    Buffer<S> unsaved;
    Runs all, running, ended;

    Work(const ForwardScan& scan, int64_t rows)
        : h(rows, scan.P),
          operand(rows, scan.recurrent ? scan.P : 0),
          gates(rows, Cell::gates * scan.H),
          fresh(rows, scan.H),
          out(rows, scan.weights.w_hr ? scan.P : 0),
          c(rows, has_c ? scan.H : 0),
          c_before(rows, scan.zone_c ? scan.H : 0),
          mask(rows, scan.recurrent ? scan.P : 0),
          share_h(rows, scan.zone_h ? scan.P : 0),
          share_c(rows, scan.zone_c ? scan.H : 0),
          unsaved(rows, scan.saved ? 0 : Cell::saved * scan.H) {}
  };

  void sequences(int64_t b, int64_t rows, Work& work) const {
    work.all = {{0, rows}};
    read(work.all, P, h0, 0, b, work.h);
    if (has_c) read(work.all, H, c0, 0, b, work.c);
    if (recurrent) read(work.all, P, recurrent, 0, b, work.mask);
    for (int64_t i = 0; i < T; ++i) {
      split(step(i), b, rows, work.running, work.ended);
      advance(step(i), b, work);
      rest(step(i), b, work.ended);
    }
    walk_runs(work.all, Write<S, A>{P, work.h, h_n.at(0, b)});
    if (has_c) walk_runs(work.all, Write<A, A>{H, work.c, c_n.at(0, b)});
  }

  void advance(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    each_flagged(runs, t, b, reset, [&](int64_t r) {
      std::fill_n(work.h[r], P, A(0));
      if (has_c) std::fill_n(work.c[r], H, A(0));
    });
    if (recurrent) elementwise(runs, P, Product{}, work.operand, work.h, work.mask);
    multiply(runs, *weights.w_hh, recurrent ? work.operand : work.h, work.gates);
    if (!weights.ln_hh.empty()) {
      const A* bias = weights.b_hh.empty() ? nullptr : weights.b_hh.data();
      walk_runs(runs, NormalizeGates<A>{Cell::gates * H, weights.ln_hh.data(), bias, work.gates});
    }
    if (zone_c) elementwise(runs, H, Copy{}, work.c_before, work.c);
    cell(t, b, work);
    const Buffer<A>& out = weights.w_hr ? work.out : work.fresh;
    if (weights.w_hr) multiply(runs, *weights.w_hr, work.fresh, out);
    if (zone_h) {
      read(runs, P, zone_h, t, b, work.share_h);
      elementwise(runs, P, Lerp{}, out, out, work.h, work.share_h);
    }
    if (zone_c) {
      read(runs, H, zone_c, t, b, work.share_c);
      elementwise(runs, H, Lerp{}, work.c, work.c, work.c_before, work.share_c);
    }
    walk_runs(runs, Write<S, A>{P, out, y.at(t, b)});
    walk_runs(runs, Read<S, A>{P, {y.at(t, b).data, y.b_stride}, 1, work.h});  // rounded to storage, as y
    if (c) walk_runs(runs, Write<A, A>{H, work.c, c.at(t, b)});
  }

  void cell(int64_t t, int64_t b, Work& work) const {
    Rows<S> keep = saved ? saved.at(t, b) : Rows<S>(work.unsaved);
    // The cells with a c read no h, which a projection makes narrower than H; c is updated where it stands.
    const Buffer<A>& h_prev = has_c ? work.c : work.h;
    Affine<A> ln_c = weights.ln_c();
    walk_cell<ForwardRow, Cell, S>(work.running, H, ln_c, gx.at(t, b), work.gates, h_prev, work.c, ln_c,
                                   work.fresh, work.c, keep);
  }

  // Where a sequence has ended, its state stays and its outputs are zero.
  void rest(int64_t t, int64_t b, const Runs& ended) const {
    fill_zero(ended, P, y.at(t, b));
    if (saved) fill_zero(ended, Cell::saved * H, saved.at(t, b));
    if (c) fill_zero(ended, H, c.at(t, b));
  }
};

}  // namespace fastrnn
