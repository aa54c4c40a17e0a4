// GRU, gates in order r z n (Cho et al. 2014), in cuDNN's form: the reset gate is applied after the product.
#pragma once

#include "macros.cuh"
#include "math.cuh"

namespace fastrnn {

// Per element. gx = W_ih x + b_ih, gh = W_hh h_prev + b_hh: [gates]. state: {h}.
// saved: pre-activations r z n, and gh_n, which the reset gate multiplies.
struct GRU {
  static constexpr int gates = 3, states = 1, saved = 4;
  static constexpr bool distinct_dgh = true;  // dgx and dgh differ in n

  template <class A>
  FASTRNN_HD static void forward(const A (&gx)[3], const A (&gh)[3], const A (&prev)[1], A (&state)[1],
                                 A (&saved)[4]) {
    saved[0] = gx[0] + gh[0];
    saved[1] = gx[1] + gh[1];
    saved[2] = gx[2] + sigmoid(saved[0]) * gh[2];
    saved[3] = gh[2];
    A n = tanh_of(saved[2]);
    state[0] = n + sigmoid(saved[1]) * (prev[0] - n);
  }

  // dprev: {dh_prev}, without the path through W_hh.
  template <class A>
  FASTRNN_HD static void backward(const A (&saved)[4], const A (&prev)[1], const A (&dstate)[1], A (&dgx)[3],
                                  A (&dgh)[3], A (&dprev)[1]) {
    A r = sigmoid(saved[0]), z = sigmoid(saved[1]), n = tanh_of(saved[2]);
    A dh = dstate[0];
    A dn = dh * (A(1) - z) * (A(1) - n * n);
    A dz = dh * (prev[0] - n) * z * (A(1) - z);
    A dr = dn * saved[3] * r * (A(1) - r);
    dgx[0] = dgh[0] = dr;
    dgx[1] = dgh[1] = dz;
    dgx[2] = dn;
    dgh[2] = dn * r;
    dprev[0] = dh * z;
  }
};

}  // namespace fastrnn
