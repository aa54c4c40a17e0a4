// Layer norm over H, per element; the caller computes the row's sums. Biased variance (Ba et al. 2016).
#pragma once

#include <cmath>

#include "macros.cuh"

namespace fastrnn {

template <class A>
struct RowStats {
  A mean, rstd;  // of one row of H; rstd = 1 / sqrt(variance + eps)

  FASTRNN_HD static A rstd_of(A variance, A eps) { return A(1) / std::sqrt(variance + eps); }
  FASTRNN_HD A xhat(A x) const { return (x - mean) * rstd; }

  // dL/dx, from dL/dxhat, xhat, and the means over the row of dxhat and of dxhat * xhat
  FASTRNN_HD A backward(A dxhat, A xhat, A mean_dxhat, A mean_dxhat_xhat) const {
    return rstd * (dxhat - mean_dxhat - xhat * mean_dxhat_xhat);
  }
};

}  // namespace fastrnn
