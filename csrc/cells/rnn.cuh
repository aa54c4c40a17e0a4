// The simple recurrent network (Elman 1990): one gate, one template over the nonlinearity.
#pragma once

#include "macros.cuh"
#include "math.cuh"

namespace fastrnn {

// A nonlinearity: value(pre) and slope(pre), its derivative there.
struct Tanh {
  template <class A>
  FASTRNN_HD static A value(A pre) {
    return tanh_of(pre);
  }
  template <class A>
  FASTRNN_HD static A slope(A pre) {
    A h = tanh_of(pre);
    return A(1) - h * h;
  }
};

struct Relu {
  template <class A>
  FASTRNN_HD static A value(A pre) {
    return pre < A(0) ? A(0) : pre;  // in this order NaN stays NaN
  }
  template <class A>
  FASTRNN_HD static A slope(A pre) {
    return pre > A(0) ? A(1) : A(0);
  }
};

struct LeakyRelu {
  template <class A>
  FASTRNN_HD static A value(A pre) {
    return pre * slope(pre);
  }
  template <class A>
  FASTRNN_HD static A slope(A pre) {
    return pre > A(0) ? A(1) : A(0.01);
  }
};

struct Elu {
  template <class A>
  FASTRNN_HD static A value(A pre) {
    A below = expm1_of_negative(pre > A(0) ? A(0) : pre);
    return pre > A(0) ? pre : below;
  }
  template <class A>
  FASTRNN_HD static A slope(A pre) {
    return exp_of_negative(pre > A(0) ? A(0) : pre);
  }
};

// Per element. state: {h}. saved: the pre-activation. dgh equals dgx; h_prev acts through W_hh only.
template <class Nonlinearity>
struct RNN {
  static constexpr int gates = 1, states = 1, saved = 1;
  static constexpr bool distinct_dgh = false;

  template <class A>
  FASTRNN_HD static void forward(const A (&gx)[1], const A (&gh)[1], const A (&)[1], A (&state)[1],
                                 A (&saved)[1]) {
    saved[0] = gx[0] + gh[0];
    state[0] = Nonlinearity::value(saved[0]);
  }

  template <class A>
  FASTRNN_HD static void backward(const A (&saved)[1], const A (&)[1], const A (&dstate)[1], A (&dgx)[1],
                                  A (&dprev)[1]) {
    dgx[0] = dstate[0] * Nonlinearity::slope(saved[0]);
    dprev[0] = A(0);
  }
};

}  // namespace fastrnn
