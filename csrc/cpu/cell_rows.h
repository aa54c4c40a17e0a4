// One step of a cell on a row (one sequence of the batch): forward, the total gradient of c, backward.
#pragma once

#include "../cells/gru.cuh"
#include "../cells/lstm.cuh"
#include "../cells/rnn.cuh"
#include "row_ops.h"

namespace fastrnn {

// Weight and bias of the layer norm of c, [H] each; null without one. carried: it is the normalised c that is
// carried on; else the norm is inside the tanh.
template <class A>
struct Affine {
  const A* weight;
  const A* bias;
  A eps;
  bool carried;

  // LN(c) of element j, and its tanh
  FASTRNN_INLINE A apply(A xhat, int64_t j) const { return xhat * weight[j] + bias[j]; }
  FASTRNN_INLINE A tanh(A xhat, int64_t j) const { return tanh_of(apply(xhat, j)); }
};

// gx, gh, state_prev -> state, saved. c may be the same memory as c_prev.
template <class Cell, class A, bool layer_norm>
struct ForwardRow {
  int64_t H;
  RowView<const A> gx;              // [B, gates * H]
  RowView<const A> gh;              // [B, gates * H]
  RowView<const A> h_prev, c_prev;  // [B, H]
  Affine<A> ln_c;
  RowView<A> h, c;   // [B, H]
  RowView<A> saved;  // [B, saved * H]

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A* gx_row = gx[b];
    const A *gh_row = gh[b], *h_prev_row = h_prev[b], *c_prev_row = c_prev[b];
    A *h_row = h[b], *c_row = c[b];
    A* saved_row = saved[b];
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A gx_j[Cell::gates], gh_j[Cell::gates], prev[Cell::states], state[Cell::states], saved_j[Cell::saved];
      load(gx_row, H, j, gx_j);
      load(gh_row, H, j, gh_j);
      prev[0] = h_prev_row[j];
      if constexpr (Cell::states == 2) prev[1] = c_prev_row[j];
      if constexpr (layer_norm) {
        Cell::pre_activations(gx_j, gh_j, saved_j);
        c_row[j] = Cell::cell_state(saved_j, prev[1]);
      } else {
        Cell::forward(gx_j, gh_j, prev, state, saved_j);
        h_row[j] = state[0];
        if constexpr (Cell::states == 2) c_row[j] = state[1];
      }
      store(saved_row, H, j, saved_j);
    }
    if constexpr (layer_norm) outputs(gx_row, gh_row, c_row, h_row);
  }

  // h, which needs all of c; and c itself, where the normalised one is carried.
  FASTRNN_INLINE void outputs(const A* gx_row, const A* gh_row, A* c_row, A* h_row) const {
    const bool carried = ln_c.carried;
    RowStats<A> stats = row_stats(c_row, H, ln_c.eps);
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A gx_j[Cell::gates], gh_j[Cell::gates], saved_j[Cell::saved];
      load(gx_row, H, j, gx_j);
      load(gh_row, H, j, gh_j);
      Cell::pre_activations(gx_j, gh_j, saved_j);
      A normal = ln_c.apply(stats.xhat(c_row[j]), j);
      h_row[j] = Cell::output(saved_j, tanh_of(normal));
      c_row[j] = carried ? normal : c_row[j];
    }
  }
};

// Computes c of a row again from what was saved, into `c_row`, and returns its statistics.
template <class Cell, class A>
FASTRNN_INLINE RowStats<A> recompute(const A* saved_row, const A* c_prev_row, A* c_row, int64_t H, A eps) {
  FASTRNN_SIMD
  for (int64_t j = 0; j < H; ++j) {
    A saved_j[Cell::saved];
    load(saved_row, H, j, saved_j);
    c_row[j] = Cell::cell_state(saved_j, c_prev_row[j]);
  }
  return row_stats(c_row, H, eps);
}

// saved, state_prev, dstate -> dc plus the gradient that reaches c through this step's h
template <class Cell, class A, bool layer_norm>
struct TotalRow {
  int64_t H;
  RowView<const A> saved;           // [B, saved * H]
  RowView<const A> c_prev, dh, dc;  // [B, H]
  Affine<A> ln_c;
  RowView<A> c_hat;     // [B, H], out: c normalised; only with layer norm
  RowView<A> dc_total;  // [B, H]

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A* saved_row = saved[b];
    const A *c_prev_row = c_prev[b], *dh_row = dh[b], *dc_row = dc[b];
    A* out_row = dc_total[b];
    if constexpr (layer_norm) {
      through_layer_norm(saved_row, c_prev_row, dh_row, dc_row, c_hat[b], out_row);
    } else {
      FASTRNN_SIMD
      for (int64_t j = 0; j < H; ++j) {
        A saved_j[Cell::saved];
        load(saved_row, H, j, saved_j);
        A prev[2] = {A(0), c_prev_row[j]}, dstate[2] = {dh_row[j], dc_row[j]};
        out_row[j] = Cell::total(saved_j, prev, dstate);
      }
    }
  }

  // xhat_row holds c, then xhat; out_row holds dL/dxhat until the last loop. Where the normalised c is
  // carried, that is the state, and the gradient stops before the norm.
  FASTRNN_INLINE void through_layer_norm(const A* saved_row, const A* c_prev_row, const A* dh_row,
                                         const A* dc_row, A* xhat_row, A* out_row) const {
    RowStats<A> stats = recompute<Cell>(saved_row, c_prev_row, xhat_row, H, ln_c.eps);
    const bool carried = ln_c.carried;
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A saved_j[Cell::saved];
      load(saved_row, H, j, saved_j);
      xhat_row[j] = stats.xhat(xhat_row[j]);
      A u = ln_c.tanh(xhat_row[j], j);
      A du = Cell::output_backward(saved_j, u, dh_row[j]);
      out_row[j] = carried ? dc_row[j] + du : du * ln_c.weight[j];
    }
    if (carried) return;
    A sum = 0, sum_xhat = 0;
    FASTRNN_SIMD_REDUCE(+ : sum, sum_xhat)
    for (int64_t j = 0; j < H; ++j) {
      sum += out_row[j];
      sum_xhat += out_row[j] * xhat_row[j];
    }
    A mean = sum / A(H), mean_xhat = sum_xhat / A(H);
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      out_row[j] = dc_row[j] + stats.backward(out_row[j], xhat_row[j], mean, mean_xhat);
    }
  }
};

// saved, state_prev, dstate (total, unless `joined`) -> dgx, dgh, dstate_prev
template <class Cell, class A, bool layer_norm, bool joined = false>
struct BackwardRow {
  int64_t H;
  RowView<const A> saved;                   // [B, saved * H]
  RowView<const A> h_prev, c_prev, dh, dc;  // [B, H]
  Affine<A> ln_c;
  RowView<A> dgx, dgh;          // [B, gates * H]; dgh only where it differs from dgx
  RowView<A> dh_prev, dc_prev;  // [B, H]; dh_prev (past W_hh) only where it is not zero

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A* saved_row = saved[b];
    const A *h_prev_row = h_prev[b], *c_prev_row = c_prev[b], *dh_row = dh[b], *dc_row = dc[b];
    A *dgx_row = dgx[b], *dgh_row = dgh[b], *dh_prev_row = dh_prev[b], *dc_prev_row = dc_prev[b];
    RowStats<A> stats{};
    A mean = 0, mean_xhat = 0;
    const bool carried = layer_norm && ln_c.carried;
    // dc_prev_row is scratch for c until the loop below.
    if constexpr (layer_norm) {
      stats = recompute<Cell>(saved_row, c_prev_row, dc_prev_row, H, ln_c.eps);
      if (carried) means(stats, dc_row, dc_prev_row, mean, mean_xhat);
    }
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A saved_j[Cell::saved], prev[Cell::states], dstate[Cell::states], dprev[Cell::states];
      A dgx_j[Cell::gates], dgh_j[Cell::gates];
      load(saved_row, H, j, saved_j);
      prev[0] = h_prev_row[j];
      dstate[0] = dh_row[j];
      if constexpr (Cell::states == 2) {
        prev[1] = c_prev_row[j];
        dstate[1] = dc_row[j];
      }
      if constexpr (joined) dstate[1] = Cell::total(saved_j, prev, dstate);
      if constexpr (layer_norm) {
        A xhat = stats.xhat(dc_prev_row[j]);
        if (carried) dstate[1] = stats.backward(dc_row[j] * ln_c.weight[j], xhat, mean, mean_xhat);
        Cell::backward(saved_j, prev, ln_c.tanh(xhat, j), dstate, dgx_j, dprev);
      } else if constexpr (Cell::distinct_dgh) {
        Cell::backward(saved_j, prev, dstate, dgx_j, dgh_j, dprev);
        store(dgh_row, H, j, dgh_j);
        dh_prev_row[j] = dprev[0];
      } else {
        Cell::backward(saved_j, prev, dstate, dgx_j, dprev);
      }
      store(dgx_row, H, j, dgx_j);
      if constexpr (Cell::states == 2) dc_prev_row[j] = dprev[1];
    }
  }

  // The means of dL/dxhat and of dL/dxhat * xhat, where the normalised c is carried; `dc_row`: its gradient.
  FASTRNN_INLINE void means(const RowStats<A>& stats, const A* dc_row, const A* c_row, A& mean,
                            A& mean_xhat) const {
    const A* weight_row = ln_c.weight;
    A sum = 0, sum_xhat = 0;
    FASTRNN_SIMD_REDUCE(+ : sum, sum_xhat)
    for (int64_t j = 0; j < H; ++j) {
      A dxhat = dc_row[j] * weight_row[j];
      sum += dxhat;
      sum_xhat += dxhat * stats.xhat(c_row[j]);
    }
    mean = sum / A(H), mean_xhat = sum_xhat / A(H);
  }
};

// Adds the row's part of dL/dweight and dL/dbias of the layer norm of c, from dL/dh and c's xhat; where the
// normalised c is carried, from its gradient.
template <class Cell, class A>
struct CellNormGradients {
  int64_t H;
  RowView<const A> saved;         // [B, saved * H]
  RowView<const A> xhat, dh, dc;  // [B, H]
  Affine<A> ln_c;
  RowView<double> dweight, dbias;  // [B, H]

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A* saved_row = saved[b];
    const A *xhat_row = xhat[b], *dh_row = dh[b], *dc_row = dc[b];
    const bool carried = ln_c.carried;
    double *dweight_row = dweight[b], *dbias_row = dbias[b];
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A saved_j[Cell::saved];
      load(saved_row, H, j, saved_j);
      A du = Cell::output_backward(saved_j, ln_c.tanh(xhat_row[j], j), dh_row[j]);
      du = carried ? dc_row[j] : du;
      dweight_row[j] += double(du * xhat_row[j]);
      dbias_row[j] += double(du);
    }
  }
};

}  // namespace fastrnn
