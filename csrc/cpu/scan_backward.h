// The reverse scan of one layer in one direction: `scan_backward` of fastrnn/reference.py.
#pragma once

#include <type_traits>

#include "../step/norm_row.cuh"
#include "scan.h"

namespace fastrnn {

template <class Cell, class S>
struct BackwardScan : Scan {
  using A = typename Arithmetic<S>::type;
  static constexpr bool has_c = Cell::states == 2;

  Steps<const S> dy;        // [T, B, P]; may not exist, as every gradient that comes in
  Steps<const A> dc;        // [T, B, H]
  Steps<const S> dh_n;      // [1, B, P]
  Steps<const A> dc_n;      // [1, B, H]
  Steps<const S> saved, y;  // [T, B, saved * H], [T, B, P]
  Steps<const A> c;         // [T, B, H]
  Steps<const S> h0;        // [1, B, P]
  Steps<const A> c0;        // [1, B, H]
  const Weights<S>& weights;
  Steps<const S> recurrent, zone_h, zone_c;  // [1, B, P], [T, B, P], [T, B, H]
  const A *clip_norm, *clip_value;           // null where nothing is clipped
  Steps<S> dgx, dgh;                         // [T, B, gates * H]; dgh only where it differs
  Steps<S> dh_new;                           // [T, B, P], may not exist
  Steps<S> dh0;                              // [1, B, P]
  Steps<A> dc0;                              // [1, B, H]
  Steps<A> db_hh, dln_hh;                    // [1, B, gates * H], may not exist
  Steps<A> dln_c_weight, dln_c_bias;         // [1, B, H], may not exist
  A* norms;                                  // [2, states, T, B] or null
  int64_t B;

  void operator()(int64_t begin, int64_t end) const {
    Work work(*this, std::min(block, end - begin));
    for (int64_t b = begin; b < end; b += block) sequences(b, std::min(block, end - b), work);
  }

 private:
  // A thread's own rows. carry_h, carry_c: the gradients that the next step sent back. dh, dc: with what
  // arrives at this step. fresh_h, fresh_c: what zoneout lets through. cell_h: of the h before the
  // projection. total_c: with the path from c to h inside the step. c_hat: c, normalised. gates: W_hh h_prev.
  // back_h: what goes back past W_hh. dln_...: sums over the steps, of which there may be many.
  struct Work {
    Buffer<A> carry_h, carry_c, dh, dc, fresh_h, fresh_c, cell_h, total_c, c_hat, h_prev, c_prev;
    Buffer<A> dgx, dgh, gates, draw, back_h, mask, share_h, share_c;
    Buffer<double> db_hh, dln_hh, dln_c_weight, dln_c_bias;
    Buffer<A> norm_of_state, norm_pair, factor;
    Runs all, running, ended;

    Work(const BackwardScan& scan, int64_t rows)
        : carry_h(rows, scan.P),
          carry_c(rows, has_c ? scan.H : 0),
          dh(rows, scan.P),
          dc(rows, has_c ? scan.H : 0),
          fresh_h(rows, scan.zone_h ? scan.P : 0),
          fresh_c(rows, scan.zone_c ? scan.H : 0),
          cell_h(rows, scan.weights.w_hr ? scan.H : 0),
          total_c(rows, has_c ? scan.H : 0),
          c_hat(rows, scan.dln_c_weight ? scan.H : 0),
          h_prev(rows, scan.dln_hh   ? scan.P
                       : Cell::split ? scan.H
                                     : 0),
          c_prev(rows, has_c ? scan.H : 0),
          dgx(rows, std::is_same_v<S, A> ? 0 : Cell::gates * scan.H),
          dgh(rows, Cell::split ? Cell::gates * scan.H : 0),
          gates(rows, scan.dln_hh ? Cell::gates * scan.H : 0),
          draw(rows, scan.dln_hh ? Cell::gates * scan.H : 0),
          back_h(rows, Cell::split ? scan.H : 0),
          mask(rows, scan.recurrent ? scan.P : 0),
          share_h(rows, scan.zone_h ? scan.P : 0),
          share_c(rows, scan.zone_c ? scan.H : 0),
          db_hh(rows, scan.dln_hh ? Cell::gates * scan.H : 0),
          dln_hh(rows, scan.dln_hh ? Cell::gates * scan.H : 0),
          dln_c_weight(rows, scan.dln_c_weight ? scan.H : 0),
          dln_c_bias(rows, scan.dln_c_weight ? scan.H : 0),
          norm_of_state(Cell::states, rows),
          norm_pair(rows, Cell::states),
          factor(1, rows) {}
  };

  void sequences(int64_t b, int64_t rows, Work& work) const {
    work.all = {{0, rows}};
    receive<S>(dh_n, P, b, work.all, work.carry_h);
    if (has_c) receive<A>(dc_n, H, b, work.all, work.carry_c);
    if (recurrent) read(work.all, P, recurrent, 0, b, work.mask);
    each_sum(b, work, [&](int64_t width, Rows<double> sums, Rows<A>) { fill_zero(work.all, width, sums); });
    for (int64_t i = T - 1; i >= 0; --i) {
      int64_t t = step(i);
      split(t, b, rows, work.running, work.ended);
      arrive(i, b, work);
      through_outputs(t, b, work);
      if (norms != nullptr) report(t, b, work);
      if (clip_value != nullptr) {
        clamp(work);
        through_outputs(t, b, work);
      }
      if (clip_norm != nullptr) shorten(work);
      through_cell(t, b, work);
      depart(t, b, work);
      rest(t, b, work.ended);
    }
    walk_runs(work.all, Write<S, A>{P, work.carry_h, dh0.at(0, b)});
    if (has_c) walk_runs(work.all, Write<A, A>{H, work.carry_c, dc0.at(0, b)});
    each_sum(b, work, [&](int64_t width, Rows<double> sums, Rows<A> out) {
      walk_runs(work.all, Write<A, double>{width, {sums.data, sums.stride}, out});
    });
  }

  // f(width, sums, where they shall stand) for the layer norms that there are, from sequence b on
  template <class F>
  void each_sum(int64_t b, const Work& work, const F& f) const {
    if (db_hh) f(Cell::gates * H, work.db_hh, db_hh.at(0, b));
    if (dln_hh) f(Cell::gates * H, work.dln_hh, dln_hh.at(0, b));
    if (dln_c_weight) f(H, work.dln_c_weight, dln_c_weight.at(0, b));
    if (dln_c_bias) f(H, work.dln_c_bias, dln_c_bias.at(0, b));
  }

  // The buffers in which these stand: a feature that is off needs none of its own.
  const Buffer<A>& fresh_h(const Work& work) const { return zone_h ? work.fresh_h : work.dh; }
  const Buffer<A>& fresh_c(const Work& work) const { return zone_c ? work.fresh_c : work.dc; }
  const Buffer<A>& cell_h(const Work& work) const { return weights.w_hr ? work.cell_h : fresh_h(work); }

  template <class X>
  static void receive(const Steps<const X>& from, int64_t width, int64_t b, const Runs& runs,
                      const Buffer<A>& to) {
    from ? read(runs, width, from, 0, b, to) : fill_zero<A>(runs, width, to);
  }

  // The state before the i-th step, from those after each step and the initial one.
  template <class X>
  void previous(const Steps<const X>& states, const Steps<const X>& initial, int64_t width, int64_t i,
                int64_t b, const Work& work, const Buffer<A>& to) const {
    const Runs& runs = work.running;
    int64_t t = step(i);
    i > 0 ? read(runs, width, states, step(i - 1), b, to) : read(runs, width, initial, 0, b, to);
    each_flagged(runs, t, b, start, [&](int64_t r) { read({{r, r + 1}}, width, initial, 0, b, to); });
    each_flagged(runs, t, b, reset, [&](int64_t r) { std::fill_n(to[r], width, A(0)); });
  }

  // dh and dc: what the next step sent back, and what arrives from the outputs of this one.
  void arrive(int64_t i, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    int64_t t = step(i);
    if (Cell::split || dln_hh) previous(y, h0, P, i, b, work, work.h_prev);
    if constexpr (has_c) previous(c, c0, H, i, b, work, work.c_prev);
    if (dy) {
      read(runs, P, dy, t, b, work.dh);
      elementwise(runs, P, Sum{}, work.dh, work.carry_h, work.dh);
    } else {
      elementwise(runs, P, Copy{}, work.dh, work.carry_h);
    }
    if (dc) {
      read(runs, H, dc, t, b, work.dc);
      elementwise(runs, H, Sum{}, work.dc, work.carry_c, work.dc);
    } else if (has_c) {
      elementwise(runs, H, Copy{}, work.dc, work.carry_c);
    }
    if (zone_h) read(runs, P, zone_h, t, b, work.share_h);
    if (zone_c) read(runs, H, zone_c, t, b, work.share_c);
  }

  // Behind zoneout and projection: the gradients of the cell's own h and c.
  void through_outputs(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    if (zone_h) elementwise(runs, P, Rest{}, work.fresh_h, work.dh, work.share_h);
    if (weights.w_hr) multiply(runs, *weights.w_hr, fresh_h(work), work.cell_h);
    if (zone_c) elementwise(runs, H, Rest{}, work.fresh_c, work.dc, work.share_c);
    if constexpr (has_c) {
      Affine<A> ln_c = weights.ln_c();
      walk_cell<TotalRow, Cell, S>(runs, H, ln_c, saved.at(t, b), work.c_prev, cell_h(work), fresh_c(work),
                                   ln_c, work.c_hat, work.total_c);
    }
  }

  // Row `part` (0 total, 1 carried) and `state` of the report, from sequence b of step t on.
  A* norms_at(int64_t part, int64_t state, int64_t t, int64_t b) const {
    return norms + ((part * Cell::states + state) * T + t) * B + b;
  }

  void report(int64_t t, int64_t b, Work& work) const {
    walk_runs(work.running, NormRow<A>{P, work.dh, norms_at(0, 0, t, b)});
    walk_runs(work.running, NormRow<A>{P, work.carry_h, norms_at(1, 0, t, b)});
    if constexpr (has_c) {
      walk_runs(work.running, NormRow<A>{H, work.total_c, norms_at(0, 1, t, b)});
      walk_runs(work.running, NormRow<A>{H, work.carry_c, norms_at(1, 1, t, b)});
    }
  }

  void clamp(Work& work) const {
    elementwise(work.running, P, Clamp<A>{*clip_value}, work.dh, work.dh);
    if (has_c) elementwise(work.running, H, Clamp<A>{*clip_value}, work.dc, work.dc);
  }

  // Scales each row so that the joint norm of its dh and total_c is at most clip_norm; a NaN stays visible.
  void shorten(Work& work) const {
    const Runs& runs = work.running;
    const Buffer<A>&parts = work.norm_of_state, &pair = work.norm_pair, &factor = work.factor;
    walk_runs(runs, NormRow<A>{P, work.dh, parts[0]});
    if (has_c) walk_runs(runs, NormRow<A>{H, work.total_c, parts[1]});
    for (auto [begin, end] : runs)
      for (int64_t r = begin; r < end; ++r)
        for (int64_t k = 0; k < Cell::states; ++k) pair[r][k] = parts[k][r];
    walk_runs(runs, NormRow<A>{Cell::states, pair, factor[0]});
    for (auto [begin, end] : runs)
      for (int64_t r = begin; r < end; ++r) {
        A joint = factor[0][r];
        factor[0][r] = *clip_norm / (joint <= *clip_norm ? *clip_norm : joint);
      }
    Scale<A> scale{factor[0]};
    elementwise(runs, P, scale, work.dh, work.dh);
    if (zone_h) elementwise(runs, P, scale, work.fresh_h, work.fresh_h);
    if (weights.w_hr) elementwise(runs, H, scale, work.cell_h, work.cell_h);
    if (has_c) elementwise(runs, H, scale, work.total_c, work.total_c);
    if (zone_c) elementwise(runs, H, scale, work.dc, work.dc);
  }

  // dgx and dgh; carry_c becomes what goes back through the cell.
  void through_cell(int64_t t, int64_t b, Work& work) const {
    // Only the GRU's backward reads h_prev.
    const Buffer<A>& h_prev = Cell::split ? work.h_prev : cell_h(work);
    Affine<A> ln_c = weights.ln_c();
    walk_cell<BackwardRow, Cell, S>(work.running, H, ln_c, saved.at(t, b), h_prev, work.c_prev, cell_h(work),
                                    work.total_c, ln_c, gate_gradients(t, b, work), work.dgh, work.back_h,
                                    work.carry_c);
    if constexpr (has_c) {
      if (dln_c_weight)
        walk_runs(work.running, CellNormGradients<Cell, S, A>{H, saved.at(t, b), work.c_hat, cell_h(work),
                                                              ln_c, work.dln_c_weight, work.dln_c_bias});
    }
  }

  // In float32 and float64 the gradients of the gates are worked out where they shall stand.
  Rows<A> gate_gradients(int64_t t, int64_t b, const Work& work) const {
    if constexpr (std::is_same_v<S, A>) return dgx.at(t, b);
    return work.dgx;
  }

  // In work.draw the gradient of W_hh h_prev, from that of its layer norm.
  void through_layer_norm(Rows<const A> of_gates, Work& work) const {
    const Runs& runs = work.running;
    if (recurrent) elementwise(runs, P, Product{}, work.h_prev, work.h_prev, work.mask);
    multiply(runs, *weights.forward_w_hh, work.h_prev, work.gates);
    walk_runs(runs, NormalizeGatesBackward<A>{Cell::gates * H, weights.ln_hh.data(), of_gates, work.gates,
                                              work.draw, work.dln_hh, work.db_hh});
  }

  // Writes the outputs of the step; carry_h and carry_c become what the step before receives.
  void depart(int64_t t, int64_t b, Work& work) const {
    const Runs& runs = work.running;
    int64_t width = Cell::gates * H;
    if constexpr (!std::is_same_v<S, A>) walk_runs(runs, Write<S, A>{width, work.dgx, dgx.at(t, b)});
    if (dh_new) walk_runs(runs, Write<S, A>{P, fresh_h(work), dh_new.at(t, b)});
    Rows<A> of_gates = Cell::split ? Rows<A>(work.dgh) : gate_gradients(t, b, work);
    Rows<const A> of_product{of_gates.data, of_gates.stride};
    if (dln_hh) {
      through_layer_norm(of_product, work);
      of_product = work.draw;
    }
    if (dgh) walk_runs(runs, Write<S, A>{width, of_product, dgh.at(t, b)});
    multiply(runs, *weights.w_hh, of_product, work.carry_h);
    if (recurrent) elementwise(runs, P, Product{}, work.carry_h, work.carry_h, work.mask);
    if constexpr (Cell::split) elementwise(runs, P, Sum{}, work.carry_h, work.carry_h, work.back_h);
    if (zone_h) elementwise(runs, P, AddProduct{}, work.carry_h, work.carry_h, work.dh, work.share_h);
    if (zone_c) elementwise(runs, H, AddProduct{}, work.carry_c, work.carry_c, work.dc, work.share_c);
    each_flagged(runs, t, b, reset, [&](int64_t r) {
      std::fill_n(work.carry_h[r], P, A(0));
      if (has_c) std::fill_n(work.carry_c[r], H, A(0));
    });
  }

  // Where a sequence has ended, the gradients of its state stay and those of its inputs are zero.
  void rest(int64_t t, int64_t b, const Runs& ended) const {
    fill_zero(ended, Cell::gates * H, dgx.at(t, b));
    if (dgh) fill_zero(ended, Cell::gates * H, dgh.at(t, b));
    if (dh_new) fill_zero(ended, P, dh_new.at(t, b));
    if (norms == nullptr) return;
    for (int64_t part = 0; part < 2; ++part)
      for (int64_t state = 0; state < Cell::states; ++state)
        for (auto [begin, end] : ended)
          std::fill(norms_at(part, state, t, b + begin), norms_at(part, state, t, b + end), A(0));
  }
};

}  // namespace fastrnn
