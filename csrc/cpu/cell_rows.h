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
};

// gx, gh, state_prev -> state, saved. c may be the same memory as c_prev.
template <class Cell, class A>
struct ForwardRow {
  int64_t H;
  RowView<const A> gx;              // [B, gates * H]
  RowView<const A> gh;              // [B, gates * H]
  RowView<const A> h_prev, c_prev;  // [B, H]
  RowView<A> h, c;                  // [B, H]
  RowView<A> saved;                 // [B, saved * H]

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
      Cell::forward(gx_j, gh_j, prev, state, saved_j);
      h_row[j] = state[0];
      if constexpr (Cell::states == 2) c_row[j] = state[1];
      store(saved_row, H, j, saved_j);
    }
  }
};

// The same with a layer norm of c.
template <class Cell, class A, bool carried>
struct NormedForwardRow {
  int64_t H;
  RowView<const A> gx, gh, c_prev;
  Affine<A> ln_c;
  RowView<A> h, c;
  RowView<A> saved;

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A *gx_row = gx[b], *gh_row = gh[b], *c_prev_row = c_prev[b], *weight = ln_c.weight,
            *bias = ln_c.bias;
    A *h_row = h[b], *c_row = c[b], *saved_row = saved[b];
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A gx_j[Cell::gates], gh_j[Cell::gates], saved_j[Cell::saved];
      load(gx_row, H, j, gx_j);
      load(gh_row, H, j, gh_j);
      Cell::pre_activations(gx_j, gh_j, saved_j);
      c_row[j] = Cell::cell_state(saved_j, c_prev_row[j]);
      store(saved_row, H, j, saved_j);
    }
    const RowStats<A> stats = row_stats(c_row, H, ln_c.eps);
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A saved_j[Cell::saved];
      load(saved_row, H, j, saved_j);
      const A normal = stats.xhat(c_row[j]) * weight[j] + bias[j];
      h_row[j] = Cell::output(saved_j, tanh_of(normal));
      if constexpr (carried) c_row[j] = normal;
    }
  }
};

// saved, state_prev, dstate -> dc plus the gradient that reaches c through this step's h
template <class Cell, class A>
struct TotalRow {
  int64_t H;
  RowView<const A> saved;           // [B, saved * H]
  RowView<const A> c_prev, dh, dc;  // [B, H]
  RowView<A> dc_total;              // [B, H]

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A *saved_row = saved[b], *c_prev_row = c_prev[b], *dh_row = dh[b], *dc_row = dc[b];
    A* out_row = dc_total[b];
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A saved_j[Cell::saved];
      load(saved_row, H, j, saved_j);
      A prev[2] = {A(0), c_prev_row[j]}, dstate[2] = {dh_row[j], dc_row[j]};
      out_row[j] = Cell::total(saved_j, prev, dstate);
    }
  }
};

// What the layer norm of c is in the backward of one step.
template <class A>
struct NormOfState {
  RowView<A> xhat, u;  // [B, H]: c normalised, and the tanh of it after weight and bias
  RowView<A> rstd;     // [B, 1]
};

// The same with a layer norm of c. Where the normalised c is carried, that is the state, and the gradient
// stops before the norm.
template <class Cell, class A, bool carried>
struct NormedTotalRow {
  int64_t H;
  RowView<const A> saved;           // [B, saved * H]
  RowView<const A> c_prev, dh, dc;  // [B, H]
  Affine<A> ln_c;
  NormOfState<A> norm;  // out
  RowView<A> dc_total;  // [B, H]

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A *saved_row = saved[b], *c_prev_row = c_prev[b], *dh_row = dh[b], *dc_row = dc[b],
            *weight = ln_c.weight, *bias = ln_c.bias;
    A *xhat_row = norm.xhat[b], *u_row = norm.u[b], *out_row = dc_total[b];
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A saved_j[Cell::saved];
      load(saved_row, H, j, saved_j);
      xhat_row[j] = Cell::cell_state(saved_j, c_prev_row[j]);  // c, as the cell computed it
    }
    const RowStats<A> stats = row_stats(xhat_row, H, ln_c.eps);
    norm.rstd[b][0] = stats.rstd;
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A saved_j[Cell::saved];
      load(saved_row, H, j, saved_j);
      const A xhat = stats.xhat(xhat_row[j]), u = tanh_of(xhat * weight[j] + bias[j]);
      const A du = Cell::output_backward(saved_j, u, dh_row[j]);
      xhat_row[j] = xhat, u_row[j] = u;
      out_row[j] = carried ? dc_row[j] + du : du * weight[j];
    }
    if constexpr (carried) return;
    A sum = 0, sum_xhat = 0;
    FASTRNN_SIMD_REDUCE(+ : sum, sum_xhat)
    for (int64_t j = 0; j < H; ++j) {
      sum += out_row[j];
      sum_xhat += out_row[j] * xhat_row[j];
    }
    const A mean = sum / A(H), mean_xhat = sum_xhat / A(H);
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j)
      out_row[j] = dc_row[j] + stats.backward(out_row[j], xhat_row[j], mean, mean_xhat);
  }
};

// saved, state_prev, dstate (total, unless `joined`) -> dgx, dgh, dstate_prev
template <class Cell, class A, bool joined = false>
struct BackwardRow {
  int64_t H;
  RowView<const A> saved;                   // [B, saved * H]
  RowView<const A> h_prev, c_prev, dh, dc;  // [B, H]
  RowView<A> dgx, dgh;                      // [B, gates * H]; dgh only where it differs from dgx
  RowView<A> dh_prev, dc_prev;              // [B, H]; dh_prev (past W_hh) only where it is not zero

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A* saved_row = saved[b];
    const A *h_prev_row = h_prev[b], *c_prev_row = c_prev[b], *dh_row = dh[b], *dc_row = dc[b];
    A *dgx_row = dgx[b], *dgh_row = dgh[b], *dh_prev_row = dh_prev[b], *dc_prev_row = dc_prev[b];
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
      if constexpr (Cell::distinct_dgh) {
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
};

// The same with a layer norm of c, of which it adds the row's part of dL/dweight and dL/dbias.
template <class Cell, class A, bool carried>
struct NormedBackwardRow {
  int64_t H;
  RowView<const A> saved;           // [B, saved * H]
  RowView<const A> c_prev, dh, dc;  // [B, H]; dc: total
  Affine<A> ln_c;
  NormOfState<A> norm;             // of NormedTotalRow
  RowView<A> dgx;                  // [B, gates * H]
  RowView<A> dc_prev;              // [B, H]
  RowView<double> dweight, dbias;  // [B, H]

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A *saved_row = saved[b], *c_prev_row = c_prev[b], *dh_row = dh[b], *dc_row = dc[b],
            *weight = ln_c.weight, *xhat_row = norm.xhat[b], *u_row = norm.u[b];
    A *dgx_row = dgx[b], *dc_prev_row = dc_prev[b];
    double *dweight_row = dweight[b], *dbias_row = dbias[b];
    const RowStats<A> stats{A(0), norm.rstd[b][0]};
    A mean = 0, mean_xhat = 0;
    if constexpr (carried) {
      A sum = 0, sum_xhat = 0;
      FASTRNN_SIMD_REDUCE(+ : sum, sum_xhat)
      for (int64_t j = 0; j < H; ++j) {
        const A dxhat = dc_row[j] * weight[j];
        sum += dxhat;
        sum_xhat += dxhat * xhat_row[j];
      }
      mean = sum / A(H), mean_xhat = sum_xhat / A(H);
    }
    FASTRNN_SIMD
    for (int64_t j = 0; j < H; ++j) {
      A saved_j[Cell::saved], dgx_j[Cell::gates], dprev[2];
      load(saved_row, H, j, saved_j);
      const A xhat = xhat_row[j], u = u_row[j];
      A prev[2] = {A(0), c_prev_row[j]}, dstate[2] = {dh_row[j], dc_row[j]};
      // dL/d(the norm's output)
      const A dnormal = carried ? dstate[1] : Cell::output_backward(saved_j, u, dstate[0]);
      if constexpr (carried) dstate[1] = stats.backward(dstate[1] * weight[j], xhat, mean, mean_xhat);
      Cell::backward(saved_j, prev, u, dstate, dgx_j, dprev);
      store(dgx_row, H, j, dgx_j);
      dc_prev_row[j] = dprev[1];
      dweight_row[j] += double(dnormal * xhat);
      dbias_row[j] += double(dnormal);
    }
  }
};

}  // namespace fastrnn
