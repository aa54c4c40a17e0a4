// The Euclidean norm of a row, over the whole range of its dtype.
#pragma once

#include "rows.cuh"

namespace fastrnn {

// float32: the squares of even the smallest and the largest number fit double. float64: scale by the largest.
template <class A>
struct NormRow {
  static constexpr int work = 1;
  int64_t H;
  Rows<const A> x;  // [B, H]
  A* norm;          // [B]

  template <class Team>
  FASTRNN_HD void operator()(int64_t b, const Team& team) const {
    const A* x_row = x[b];
    double scale = 1, squares = 0;
    if constexpr (sizeof(A) == sizeof(double)) scale = scale_of(x_row, team);
    FASTRNN_SIMD_REDUCE(+ : squares)
    for (int64_t j = team.first; j < H; j += team.stride) {
      double scaled = sizeof(A) == sizeof(double) ? x_row[j] / scale : x_row[j];
      squares += scaled * scaled;
    }
    norm[b] = static_cast<A>(scale * std::sqrt(team.sum(squares)));
  }

  // The largest magnitude where it can serve as a divisor, else 1: a zero row stays zero, inf and NaN show.
  template <class Team>
  FASTRNN_HD A scale_of(const A* x_row, const Team& team) const {
    A largest = 0;
    for (int64_t j = team.first; j < H; j += team.stride) {
      A magnitude = std::abs(x_row[j]);
      largest = magnitude > largest ? magnitude : largest;  // passes over NaN, which the sum will show
    }
    largest = team.max(largest);
    return largest > A(0) && largest <= A(1.7976931348623157e308) ? largest : A(1);
  }
};

}  // namespace fastrnn
