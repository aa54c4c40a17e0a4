// What a scan does to rows besides the cell: conversions, masks, sums, clipping, the layer norm of the gates.
#pragma once

#include "../step/rows.cuh"

namespace fastrnn {

// storage -> arithmetic; the elements of a row of `in` lie `stride` apart
template <class S, class A>
struct Read {
  int64_t width;
  Rows<const S> in;
  int64_t stride;
  Rows<A> out;

  template <class Team>
  FASTRNN_HD void operator()(int64_t b, const Team& team) const {
    const S* in_row = in[b];
    A* out_row = out[b];
    if (stride == 1) {
      FASTRNN_SIMD
      for (int64_t j = team.first; j < width; j += team.stride) out_row[j] = widen(in_row[j]);
    } else {
      for (int64_t j = team.first; j < width; j += team.stride) out_row[j] = widen(in_row[j * stride]);
    }
  }
};

// arithmetic -> storage
template <class S, class A>
struct Write {
  int64_t width;
  Rows<const A> in;
  Rows<S> out;

  template <class Team>
  FASTRNN_HD void operator()(int64_t b, const Team& team) const {
    const A* in_row = in[b];
    S* out_row = out[b];
    FASTRNN_SIMD
    for (int64_t j = team.first; j < width; j += team.stride) narrow(in_row[j], out_row[j]);
  }
};

// out = op(b, in...), element by element; `out` may be one of `in`
template <class Op, class A>
struct Elementwise {
  int64_t width;
  Op op;
  Rows<A> out;
  Rows<const A> in[Op::operands];

  template <class Team>
  FASTRNN_HD void operator()(int64_t b, const Team& team) const {
    A* out_row = out[b];
    const A* row[Op::operands];
    for (int k = 0; k < Op::operands; ++k) row[k] = in[k][b];
    FASTRNN_SIMD
    for (int64_t j = team.first; j < width; j += team.stride) {
      if constexpr (Op::operands == 1) out_row[j] = op(b, row[0][j]);
      if constexpr (Op::operands == 2) out_row[j] = op(b, row[0][j], row[1][j]);
      if constexpr (Op::operands == 3) out_row[j] = op(b, row[0][j], row[1][j], row[2][j]);
    }
  }
};

struct Copy {
  static constexpr int operands = 1;
  template <class A>
  FASTRNN_HD A operator()(int64_t, A x) const {
    return x;
  }
};

struct Sum {
  static constexpr int operands = 2;
  template <class A>
  FASTRNN_HD A operator()(int64_t, A x, A y) const {
    return x + y;
  }
};

struct Product {
  static constexpr int operands = 2;
  template <class A>
  FASTRNN_HD A operator()(int64_t, A x, A y) const {
    return x * y;
  }
};

struct AddProduct {
  static constexpr int operands = 3;
  template <class A>
  FASTRNN_HD A operator()(int64_t, A x, A y, A z) const {
    return x + y * z;
  }
};

// what zoneout with share z lets through
struct Rest {
  static constexpr int operands = 2;
  template <class A>
  FASTRNN_HD A operator()(int64_t, A x, A z) const {
    return x * (A(1) - z);
  }
};

// from x to y by share z, exact at both ends
struct Lerp {
  static constexpr int operands = 3;
  template <class A>
  FASTRNN_HD A operator()(int64_t, A x, A y, A z) const {
    return z < A(0.5) ? x + z * (y - x) : y - (y - x) * (A(1) - z);
  }
};

// NaN stays
template <class A>
struct Clamp {
  static constexpr int operands = 1;
  A bound;
  FASTRNN_HD A operator()(int64_t, A x) const { return x < -bound ? -bound : x > bound ? bound : x; }
};

template <class A>
struct Scale {
  static constexpr int operands = 1;
  const A* factor;  // [B]
  FASTRNN_HD A operator()(int64_t b, A x) const { return x * factor[b]; }
};

// Layer norm of W_hh h, in place: [B, width]
template <class A>
struct NormalizeGates {
  int64_t width;
  const A *weight, *bias;  // [width]; bias may be null
  Rows<A> gates;

  template <class Team>
  FASTRNN_HD void operator()(int64_t b, const Team& team) const {
    A* row = gates[b];
    RowStats<A> stats = row_stats(row, width, team);
    FASTRNN_SIMD
    for (int64_t j = team.first; j < width; j += team.stride) row[j] = stats.xhat(row[j]) * weight[j];
    if (bias == nullptr) return;
    FASTRNN_SIMD
    for (int64_t j = team.first; j < width; j += team.stride) row[j] += bias[j];
  }
};

// dL/d(W_hh h) from dgh, behind that layer norm, and what the row adds to dL/dweight and dL/dbias
template <class A>
struct NormalizeGatesBackward {
  int64_t width;
  const A* weight;              // [width]
  Rows<const A> dgh, gates;     // [B, width]; gates: W_hh h
  Rows<A> out;                  // [B, width]
  Rows<double> dweight, dbias;  // [B, width]

  template <class Team>
  FASTRNN_HD void operator()(int64_t b, const Team& team) const {
    // A copy of `weight`: g++ does not vectorise a reduction that reads it from the struct.
    const A *dgh_row = dgh[b], *gates_row = gates[b], *weight_row = weight;
    A* out_row = out[b];
    double *dweight_row = dweight[b], *dbias_row = dbias[b];
    RowStats<A> stats = row_stats(gates_row, width, team);
    A sum = 0, sum_xhat = 0;
    FASTRNN_SIMD_REDUCE(+ : sum, sum_xhat)
    for (int64_t j = team.first; j < width; j += team.stride) {
      A dxhat = dgh_row[j] * weight_row[j];
      sum += dxhat;
      sum_xhat += dxhat * stats.xhat(gates_row[j]);
    }
    A mean = team.sum(sum) / A(width), mean_xhat = team.sum(sum_xhat) / A(width);
    FASTRNN_SIMD
    for (int64_t j = team.first; j < width; j += team.stride) {
      A xhat = stats.xhat(gates_row[j]);
      dweight_row[j] += double(dgh_row[j] * xhat);
      dbias_row[j] += double(dgh_row[j]);
      out_row[j] = stats.backward(dgh_row[j] * weight_row[j], xhat, mean, mean_xhat);
    }
  }
};

// What the row adds to dL/dweight and dL/dbias of the layer norm of c, from dL/dh and c's xhat
template <class Cell, class S, class A>
struct CellNormGradients {
  int64_t H;
  Rows<const S> saved;     // [B, saved * H]
  Rows<const A> xhat, dh;  // [B, H]
  Affine<A> ln_c;
  Rows<double> dweight, dbias;  // [B, H]

  template <class Team>
  FASTRNN_HD void operator()(int64_t b, const Team& team) const {
    const S* saved_row = saved[b];
    const A *xhat_row = xhat[b], *dh_row = dh[b];
    double *dweight_row = dweight[b], *dbias_row = dbias[b];
    FASTRNN_SIMD
    for (int64_t j = team.first; j < H; j += team.stride) {
      A keep[Cell::saved];
      load(saved_row, H, j, keep);
      A du = Cell::output_backward(keep, ln_c.tanh(xhat_row[j], j), dh_row[j]);
      dweight_row[j] += double(du * xhat_row[j]);
      dbias_row[j] += double(du);
    }
  }
};

}  // namespace fastrnn
