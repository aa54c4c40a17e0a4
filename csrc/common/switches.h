// From the name of a cell and the dtype of a tensor to C++ types: f is called with a value of that type.
#pragma once

#include <string>

#include "../cells/gru.cuh"
#include "../cells/lstm.cuh"
#include "../cells/rnn.cuh"
#include "tensors.h"

namespace fastrnn {

// The C++ types of a dtype: how a number is stored, and how it is computed with.
template <class T>
struct Dtype {
  using Storage = T;
  using Acc = typename Arithmetic<T>::type;
};

template <class F>
auto with_cell(const std::string& name, const F& f) {
  if (name == "lstm") return f(LSTM{});
  if (name == "gru") return f(GRU{});
  if (name == "rnn_tanh") return f(RNN<Tanh>{});
  if (name == "rnn_relu") return f(RNN<Relu>{});
  if (name == "rnn_leaky_relu") return f(RNN<LeakyRelu>{});
  if (name == "rnn_elu") return f(RNN<Elu>{});
  throw std::runtime_error("cell must be lstm, gru, rnn_tanh, rnn_relu, rnn_leaky_relu or rnn_elu, got " +
                           name);
}

template <class F>
auto with_dtype(const char* name, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(Dtype<float>{});
    case ScalarType::Double:
      return f(Dtype<double>{});
    case ScalarType::BFloat16:
      return f(Dtype<BFloat16>{});
    case ScalarType::Half:
      return f(Dtype<Float16>{});
    default:
      throw std::runtime_error(std::string(name) + " must be float32, float64, bfloat16 or float16, got " +
                               dtype_name(t.scalar_type()));
  }
}

}  // namespace fastrnn
