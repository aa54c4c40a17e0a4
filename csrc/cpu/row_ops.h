// What a scan does to a row (one sequence of the batch) besides the cell: conversions, masks, sums, clipping,
// norms, the layer norm of the gates.
//
// A row function is an object with operator()(b), which computes row b; walk_rows (vectors.h) calls it.
// Storage: the type in memory. A: the type of the arithmetic.
#pragma once

#include <cmath>

#include "../cells/layer_norm.cuh"
#include "../common/storage.cuh"
#include "vectors.h"

namespace fastrnn {

// [B, planes * H], contiguous in the last dimension
template <class T>
struct RowView {
  T* data;
  int64_t stride;

  FASTRNN_INLINE T* operator[](int64_t b) const { return data + b * stride; }
};

// The planes of element j of a row, to the type of the arithmetic and back.
template <int planes, class Storage, class A>
FASTRNN_INLINE void load(const Storage* row, int64_t H, int64_t j, A (&values)[planes]) {
  for (int k = 0; k < planes; ++k) values[k] = widen(row[k * H + j]);
}

template <int planes, class Storage, class A>
FASTRNN_INLINE void store(Storage* row, int64_t H, int64_t j, const A (&values)[planes]) {
  for (int k = 0; k < planes; ++k) narrow(values[k], row[k * H + j]);
}

template <class A>
FASTRNN_INLINE RowStats<A> row_stats(const A* x, int64_t H, A eps) {
  A sum = 0, squares = 0;
  FASTRNN_SIMD_REDUCE(+ : sum)
  for (int64_t j = 0; j < H; ++j) sum += x[j];
  A mean = sum / A(H);
  FASTRNN_SIMD_REDUCE(+ : squares)
  for (int64_t j = 0; j < H; ++j) squares += (x[j] - mean) * (x[j] - mean);
  return {mean, RowStats<A>::rstd_of(squares / A(H), eps)};
}

// To the type of the arithmetic. The elements of a row of `in` are `stride` apart.
template <class Storage, class A>
struct Read {
  int64_t width;
  RowView<const Storage> in;
  int64_t stride;
  RowView<A> out;

  FASTRNN_INLINE void operator()(int64_t b) const {
    const Storage* in_row = in[b];
    A* out_row = out[b];
    if (stride == 1) {
      FASTRNN_SIMD
      for (int64_t j = 0; j < width; ++j) out_row[j] = widen(in_row[j]);
    } else {
      for (int64_t j = 0; j < width; ++j) out_row[j] = widen(in_row[j * stride]);
    }
  }
};

// To the type in memory.
template <class Storage, class A>
struct Write {
  int64_t width;
  RowView<const A> in;
  RowView<Storage> out;

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A* in_row = in[b];
    Storage* out_row = out[b];
    FASTRNN_SIMD
    for (int64_t j = 0; j < width; ++j) narrow(in_row[j], out_row[j]);
  }
};

// out = op(b, in...), element by element. `out` may be one of `in`.
template <class Op, class A>
struct Elementwise {
  int64_t width;
  Op op;
  RowView<A> out;
  RowView<const A> in[Op::operands];

  FASTRNN_INLINE void operator()(int64_t b) const {
    A* out_row = out[b];
    const A* row[Op::operands];
    for (int k = 0; k < Op::operands; ++k) row[k] = in[k][b];
    FASTRNN_SIMD
    for (int64_t j = 0; j < width; ++j) {
      if constexpr (Op::operands == 1) out_row[j] = op(b, row[0][j]);
      if constexpr (Op::operands == 2) out_row[j] = op(b, row[0][j], row[1][j]);
      if constexpr (Op::operands == 3) out_row[j] = op(b, row[0][j], row[1][j], row[2][j]);
    }
  }
};

struct Copy {
  static constexpr int operands = 1;
  template <class A>
  FASTRNN_INLINE A operator()(int64_t, A x) const {
    return x;
  }
};

struct Sum {
  static constexpr int operands = 2;
  template <class A>
  FASTRNN_INLINE A operator()(int64_t, A x, A y) const {
    return x + y;
  }
};

struct Product {
  static constexpr int operands = 2;
  template <class A>
  FASTRNN_INLINE A operator()(int64_t, A x, A y) const {
    return x * y;
  }
};

struct AddProduct {
  static constexpr int operands = 3;
  template <class A>
  FASTRNN_INLINE A operator()(int64_t, A x, A y, A z) const {
    return x + y * z;
  }
};

// The part of a gradient that zoneout, keeping share z of the old state, passes to the new state.
struct ToNewState {
  static constexpr int operands = 2;
  template <class A>
  FASTRNN_INLINE A operator()(int64_t, A x, A z) const {
    return x * (A(1) - z);
  }
};

// From x (z = 0) to y (z = 1), exact at both ends.
struct Lerp {
  static constexpr int operands = 3;
  template <class A>
  FASTRNN_INLINE A operator()(int64_t, A x, A y, A z) const {
    return z < A(0.5) ? x + z * (y - x) : y - (y - x) * (A(1) - z);
  }
};

// To [-bound, bound]; NaN stays NaN.
template <class A>
struct Clamp {
  static constexpr int operands = 1;
  A bound;
  FASTRNN_INLINE A operator()(int64_t, A x) const { return x < -bound ? -bound : x > bound ? bound : x; }
};

template <class A>
struct Scale {
  static constexpr int operands = 1;
  const A* factor;  // [B]
  FASTRNN_INLINE A operator()(int64_t b, A x) const { return x * factor[b]; }
};

// Layer norm of the gates: of `groups` parts of `width` units each, every part by itself.
template <class A>
struct NormalizeGates {
  int64_t groups, width;
  A eps;
  const A *weight, *bias;  // [groups * width]; bias may be null
  RowView<const A> gates;  // [B, groups * width]
  RowView<A> out;          // the same; may be the same memory

  FASTRNN_INLINE void operator()(int64_t b) const {
    for (int64_t g = 0; g < groups; ++g) part(b, g * width);
  }

  FASTRNN_INLINE void part(int64_t b, int64_t from) const {
    const A *row = gates[b] + from, *weight_row = weight + from;
    A* out_row = out[b] + from;
    RowStats<A> stats = row_stats(row, width, eps);
    FASTRNN_SIMD
    for (int64_t j = 0; j < width; ++j) out_row[j] = stats.xhat(row[j]) * weight_row[j];
    if (bias == nullptr) return;
    const A* bias_row = bias + from;
    FASTRNN_SIMD
    for (int64_t j = 0; j < width; ++j) out_row[j] += bias_row[j];
  }
};

// dL/d(W_hh h) from dgh, which is the gradient after that layer norm; adds the row's part of dL/dweight
// and dL/dbias.
template <class A>
struct NormalizeGatesBackward {
  int64_t groups, width;
  A eps;
  const A* weight;                 // [groups * width]
  RowView<const A> dgh, gates;     // [B, groups * width]; gates: W_hh h
  RowView<A> out;                  // [B, groups * width]
  RowView<double> dweight, dbias;  // [B, groups * width]

  FASTRNN_INLINE void operator()(int64_t b) const {
    for (int64_t g = 0; g < groups; ++g) part(b, g * width);
  }

  FASTRNN_INLINE void part(int64_t b, int64_t from) const {
    // `weight` is copied because g++ does not vectorise a reduction that reads it from the struct.
    const A *dgh_row = dgh[b] + from, *gates_row = gates[b] + from, *weight_row = weight + from;
    A* out_row = out[b] + from;
    double *dweight_row = dweight[b] + from, *dbias_row = dbias[b] + from;
    RowStats<A> stats = row_stats(gates_row, width, eps);
    A sum = 0, sum_xhat = 0;
    FASTRNN_SIMD_REDUCE(+ : sum, sum_xhat)
    for (int64_t j = 0; j < width; ++j) {
      A dxhat = dgh_row[j] * weight_row[j];
      sum += dxhat;
      sum_xhat += dxhat * stats.xhat(gates_row[j]);
    }
    A mean = sum / A(width), mean_xhat = sum_xhat / A(width);
    FASTRNN_SIMD
    for (int64_t j = 0; j < width; ++j) {
      A xhat = stats.xhat(gates_row[j]);
      dweight_row[j] += double(dgh_row[j] * xhat);
      dbias_row[j] += double(dgh_row[j]);
      out_row[j] = stats.backward(dgh_row[j] * weight_row[j], xhat, mean, mean_xhat);
    }
  }
};

// The Euclidean norm of a row, which neither overflows nor underflows: in float32, the squares of even the
// smallest and the largest number fit double; in float64, the row is divided by its largest element.
template <class A>
struct NormRow {
  int64_t H;
  RowView<const A> x;  // [B, H]
  A* norm;             // [B]

  FASTRNN_INLINE void operator()(int64_t b) const {
    const A* x_row = x[b];
    double scale = 1, squares = 0;
    if constexpr (sizeof(A) == sizeof(double)) scale = scale_of(x_row);
    FASTRNN_SIMD_REDUCE(+ : squares)
    for (int64_t j = 0; j < H; ++j) {
      double scaled = sizeof(A) == sizeof(double) ? x_row[j] / scale : x_row[j];
      squares += scaled * scaled;
    }
    norm[b] = static_cast<A>(scale * std::sqrt(squares));
  }

  // The largest magnitude if one can divide by it, otherwise 1: a zero row gives 0, inf and NaN stay visible.
  FASTRNN_INLINE A scale_of(const A* x_row) const {
    A largest = 0;
    for (int64_t j = 0; j < H; ++j) {
      A magnitude = std::abs(x_row[j]);
      largest = magnitude > largest ? magnitude : largest;  // false for NaN, which the sum will show
    }
    return largest > A(0) && largest <= A(1.7976931348623157e308) ? largest : A(1);
  }
};

}  // namespace fastrnn
