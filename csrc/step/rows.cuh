// One row (one sequence of the batch) of each op, written once for a CPU thread and for a CUDA block
// (team.cuh).
//
// S: storage type, A: arithmetic type. Every loop gives an element to the same member of the team, so a
// member may read back what it wrote without a barrier.
#pragma once

#include "../cells/gru.cuh"
#include "../cells/layer_norm.cuh"
#include "../cells/lstm.cuh"
#include "../cells/rnn.cuh"
#include "storage.cuh"
#include "team.cuh"

namespace fastrnn {

// [B, planes * H], last dimension contiguous
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  FASTRNN_HD T* operator[](int64_t b) const { return data + b * stride; }
};

// Weight and bias of the layer norm of c, [H] each.
template <class A>
struct Affine {
  const A* weight;
  const A* bias;

  // tanh(LN(c)) of element j
  FASTRNN_HD A tanh(A xhat, int64_t j) const { return tanh_of(xhat * weight[j] + bias[j]); }
};

// planes of element j of a row
template <int planes, class S, class A>
FASTRNN_HD void load(const S* row, int64_t H, int64_t j, A (&values)[planes]) {
  for (int k = 0; k < planes; ++k) values[k] = widen(row[k * H + j]);
}

template <int planes, class S, class A>
FASTRNN_HD void store(S* row, int64_t H, int64_t j, const A (&values)[planes]) {
  for (int k = 0; k < planes; ++k) narrow(values[k], row[k * H + j]);
}

template <class A, class Team>
FASTRNN_HD RowStats<A> row_stats(const A* x, int64_t H, const Team& team) {
  A sum = 0, squares = 0;
  FASTRNN_SIMD_REDUCE(+ : sum)
  for (int64_t j = team.first; j < H; j += team.stride) sum += x[j];
  A mean = team.sum(sum) / A(H);
  FASTRNN_SIMD_REDUCE(+ : squares)
  for (int64_t j = team.first; j < H; j += team.stride) squares += (x[j] - mean) * (x[j] - mean);
  return {mean, RowStats<A>::rstd_of(team.sum(squares) / A(H))};
}

// gx, gh, state_prev -> state, saved. c may stand where c_prev does.
template <class Cell, class S, class A, bool layer_norm>
struct ForwardRow {
  static constexpr int work = Cell::gates;  // per element, in nonlinearities
  int64_t H;
  Rows<const S> gx;              // [B, gates * H]
  Rows<const A> gh;              // [B, gates * H]
  Rows<const A> h_prev, c_prev;  // [B, H]
  Affine<A> ln_c;
  Rows<A> h, c;   // [B, H]
  Rows<S> saved;  // [B, saved * H]

  template <class Team>
  FASTRNN_HD void operator()(int64_t b, const Team& team) const {
    const S* gx_row = gx[b];
    const A *gh_row = gh[b], *h_prev_row = h_prev[b], *c_prev_row = c_prev[b];
    A *h_row = h[b], *c_row = c[b];
    S* saved_row = saved[b];
    FASTRNN_SIMD
    for (int64_t j = team.first; j < H; j += team.stride) {
      A x[Cell::gates], y[Cell::gates], prev[Cell::states], state[Cell::states], keep[Cell::saved];
      load(gx_row, H, j, x);
      load(gh_row, H, j, y);
      prev[0] = h_prev_row[j];
      if constexpr (Cell::states == 2) prev[1] = c_prev_row[j];
      if constexpr (layer_norm) {
        Cell::pre_activations(x, y, keep);
        c_row[j] = Cell::cell_state(keep, prev[1]);
      } else {
        Cell::forward(x, y, prev, state, keep);
        h_row[j] = state[0];
        if constexpr (Cell::states == 2) c_row[j] = state[1];
      }
      store(saved_row, H, j, keep);
    }
    if constexpr (layer_norm) outputs(gx_row, gh_row, c_row, h_row, team);
  }

  template <class Team>
  FASTRNN_HD void outputs(const S* gx_row, const A* gh_row, const A* c_row, A* h_row,
                          const Team& team) const {
    RowStats<A> stats = row_stats(c_row, H, team);
    FASTRNN_SIMD
    for (int64_t j = team.first; j < H; j += team.stride) {
      A x[Cell::gates], y[Cell::gates], keep[Cell::saved];
      load(gx_row, H, j, x);  // not saved_row, which may be rounded to bfloat16
      load(gh_row, H, j, y);
      Cell::pre_activations(x, y, keep);
      h_row[j] = Cell::output(keep, ln_c.tanh(stats.xhat(c_row[j]), j));
    }
  }
};

// c of a row, from what was saved, into `c_row`; its statistics
template <class Cell, class S, class A, class Team>
FASTRNN_HD RowStats<A> recompute(const S* saved_row, const A* c_prev_row, A* c_row, int64_t H,
                                 const Team& team) {
  FASTRNN_SIMD
  for (int64_t j = team.first; j < H; j += team.stride) {
    A keep[Cell::saved];
    load(saved_row, H, j, keep);
    c_row[j] = Cell::cell_state(keep, c_prev_row[j]);
  }
  return row_stats(c_row, H, team);
}

// saved, state_prev, dstate -> dc with the path from c to h inside the step added
template <class Cell, class S, class A, bool layer_norm>
struct TotalRow {
  static constexpr int work = Cell::gates;  // per element, in nonlinearities
  int64_t H;
  Rows<const S> saved;           // [B, saved * H]
  Rows<const A> c_prev, dh, dc;  // [B, H]
  Affine<A> ln_c;
  Rows<A> scratch;   // [B, H], only with layer norm
  Rows<A> dc_total;  // [B, H]

  template <class Team>
  FASTRNN_HD void operator()(int64_t b, const Team& team) const {
    const S* saved_row = saved[b];
    const A *c_prev_row = c_prev[b], *dh_row = dh[b], *dc_row = dc[b];
    A* out_row = dc_total[b];
    if constexpr (layer_norm) {
      through_norm(saved_row, c_prev_row, dh_row, dc_row, scratch[b], out_row, team);
    } else {
      FASTRNN_SIMD
      for (int64_t j = team.first; j < H; j += team.stride) {
        A keep[Cell::saved];
        load(saved_row, H, j, keep);
        A prev[2] = {A(0), c_prev_row[j]}, dstate[2] = {dh_row[j], dc_row[j]};
        out_row[j] = Cell::total(keep, prev, dstate);
      }
    }
  }

  // xhat_row holds c, then xhat; out_row holds dL/dxhat until the last loop.
  template <class Team>
  FASTRNN_HD void through_norm(const S* saved_row, const A* c_prev_row, const A* dh_row, const A* dc_row,
                               A* xhat_row, A* out_row, const Team& team) const {
    RowStats<A> stats = recompute<Cell>(saved_row, c_prev_row, xhat_row, H, team);
    FASTRNN_SIMD
    for (int64_t j = team.first; j < H; j += team.stride) {
      A keep[Cell::saved];
      load(saved_row, H, j, keep);
      xhat_row[j] = stats.xhat(xhat_row[j]);
      A u = ln_c.tanh(xhat_row[j], j);
      out_row[j] = Cell::output_backward(keep, u, dh_row[j]) * ln_c.weight[j];
    }
    A sum = 0, sum_xhat = 0;
    FASTRNN_SIMD_REDUCE(+ : sum, sum_xhat)
    for (int64_t j = team.first; j < H; j += team.stride) {
      sum += out_row[j];
      sum_xhat += out_row[j] * xhat_row[j];
    }
    A mean = team.sum(sum) / A(H), mean_xhat = team.sum(sum_xhat) / A(H);
    FASTRNN_SIMD
    for (int64_t j = team.first; j < H; j += team.stride) {
      out_row[j] = dc_row[j] + stats.backward(out_row[j], xhat_row[j], mean, mean_xhat);
    }
  }
};

// saved, state_prev, dstate (total) -> dgx, dgh, dstate_prev
template <class Cell, class S, class A, bool layer_norm>
struct BackwardRow {
  static constexpr int work = Cell::gates;  // per element, in nonlinearities
  int64_t H;
  Rows<const S> saved;                   // [B, saved * H]
  Rows<const A> h_prev, c_prev, dh, dc;  // [B, H]
  Affine<A> ln_c;
  Rows<A> dgx, dgh;          // [B, gates * H]; dgh only where it differs from dgx
  Rows<A> dh_prev, dc_prev;  // [B, H]; dh_prev only where it is not zero

  template <class Team>
  FASTRNN_HD void operator()(int64_t b, const Team& team) const {
    const S* saved_row = saved[b];
    const A *h_prev_row = h_prev[b], *c_prev_row = c_prev[b], *dh_row = dh[b], *dc_row = dc[b];
    A *dgx_row = dgx[b], *dgh_row = dgh[b], *dh_prev_row = dh_prev[b], *dc_prev_row = dc_prev[b];
    RowStats<A> stats{};
    // dc_prev_row is scratch for c until the loop below.
    if constexpr (layer_norm) stats = recompute<Cell>(saved_row, c_prev_row, dc_prev_row, H, team);
    FASTRNN_SIMD
    for (int64_t j = team.first; j < H; j += team.stride) {
      A keep[Cell::saved], prev[Cell::states], dstate[Cell::states], dprev[Cell::states];
      A dx[Cell::gates], dy[Cell::gates];
      load(saved_row, H, j, keep);
      prev[0] = h_prev_row[j];
      dstate[0] = dh_row[j];
      if constexpr (Cell::states == 2) {
        prev[1] = c_prev_row[j];
        dstate[1] = dc_row[j];
      }
      if constexpr (layer_norm) {
        Cell::backward(keep, prev, ln_c.tanh(stats.xhat(dc_prev_row[j]), j), dstate, dx, dprev);
      } else if constexpr (Cell::split) {
        Cell::backward(keep, prev, dstate, dx, dy, dprev);
        store(dgh_row, H, j, dy);
        dh_prev_row[j] = dprev[0];
      } else {
        Cell::backward(keep, prev, dstate, dx, dprev);
      }
      store(dgx_row, H, j, dx);
      if constexpr (Cell::states == 2) dc_prev_row[j] = dprev[1];
    }
  }
};

}  // namespace fastrnn
