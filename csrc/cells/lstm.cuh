// LSTM, gates in order i f g o (Hochreiter & Schmidhuber 1997; Gers et al. 2000).
#pragma once

#include "macros.cuh"
#include "math.cuh"

namespace fastrnn {

// Per element. gx = W_ih x + b_ih, gh = W_hh h_prev + b_hh: [gates]. state: {h, c}. saved: pre-activations i
// f g o. u = tanh(c), or tanh(LN(c)) if c has a layer norm, which the caller computes, since its sums run
// over the row.
struct LSTM {
  static constexpr int gates = 4, states = 2, saved = 4;
  static constexpr bool distinct_dgh = false;  // dgx == dgh

  template <class A>
  FASTRNN_HD static A cell_state(const A (&saved)[4], A c_prev) {
    return sigmoid(saved[1]) * c_prev + sigmoid(saved[0]) * tanh_of(saved[2]);
  }

  // h = sig(o) u
  template <class A>
  FASTRNN_HD static A output(const A (&saved)[4], A u) {
    return sigmoid(saved[3]) * u;
  }

  // dL/d(argument of the tanh in u)
  template <class A>
  FASTRNN_HD static A output_backward(const A (&saved)[4], A u, A dh) {
    return dh * sigmoid(saved[3]) * (A(1) - u * u);
  }

  template <class A>
  FASTRNN_HD static void pre_activations(const A (&gx)[4], const A (&gh)[4], A (&saved)[4]) {
    for (int k = 0; k < gates; ++k) saved[k] = gx[k] + gh[k];
  }

  template <class A>
  FASTRNN_HD static void forward(const A (&gx)[4], const A (&gh)[4], const A (&prev)[2], A (&state)[2],
                                 A (&saved)[4]) {
    pre_activations(gx, gh, saved);
    state[1] = cell_state(saved, prev[1]);
    state[0] = output(saved, tanh_of(state[1]));
  }

  // dc plus the gradient that reaches c through this step's h; for c without a layer norm
  template <class A>
  FASTRNN_HD static A total(const A (&saved)[4], const A (&prev)[2], const A (&dstate)[2]) {
    A u = tanh_of(cell_state(saved, prev[1]));
    return dstate[1] + output_backward(saved, u, dstate[0]);
  }

  // dstate: {dh, total dc}. dprev: {0, dc_prev}, without the path through W_hh. dgh equals dgx.
  template <class A>
  FASTRNN_HD static void backward(const A (&saved)[4], const A (&prev)[2], A u, const A (&dstate)[2],
                                  A (&dgx)[4], A (&dprev)[2]) {
    A i = sigmoid(saved[0]), f = sigmoid(saved[1]), g = tanh_of(saved[2]), o = sigmoid(saved[3]);
    A dh = dstate[0], dc = dstate[1];
    dgx[0] = dc * g * i * (A(1) - i);
    dgx[1] = dc * prev[1] * f * (A(1) - f);
    dgx[2] = dc * i * (A(1) - g * g);
    dgx[3] = dh * u * o * (A(1) - o);
    dprev[0] = A(0);
    dprev[1] = dc * f;
  }

  template <class A>
  FASTRNN_HD static void backward(const A (&saved)[4], const A (&prev)[2], const A (&dstate)[2], A (&dgx)[4],
                                  A (&dprev)[2]) {
    backward(saved, prev, tanh_of(cell_state(saved, prev[1])), dstate, dgx, dprev);
  }
};

}  // namespace fastrnn
