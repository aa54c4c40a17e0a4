// The simple recurrent network with its nonlinearity chosen at run time, so that one kernel serves all four.
#pragma once

#include "../cells/rnn.cuh"

namespace fastrnn {

struct AnyRNN {
  static constexpr int gates = 1, states = 1, saved = 1;
  static constexpr bool distinct_dgh = false;
  enum Kind { tanh, relu, leaky_relu, elu } kind;

  template <class F>
  FASTRNN_HD void choose(const F& f) const {
    if (kind == tanh) {
      f(RNN<Tanh>{});
    } else if (kind == relu) {
      f(RNN<Relu>{});
    } else if (kind == leaky_relu) {
      f(RNN<LeakyRelu>{});
    } else {
      f(RNN<Elu>{});
    }
  }
  FASTRNN_HD void forward(const float (&gx)[1], const float (&gh)[1], const float (&prev)[1],
                          float (&state)[1], float (&saved)[1]) const {
    choose([&](auto cell) { decltype(cell)::forward(gx, gh, prev, state, saved); });
  }
  FASTRNN_HD void backward(const float (&saved)[1], const float (&prev)[1], const float (&dstate)[1],
                           float (&dgx)[1], float (&dprev)[1]) const {
    choose([&](auto cell) { decltype(cell)::backward(saved, prev, dstate, dgx, dprev); });
  }
};

}  // namespace fastrnn
