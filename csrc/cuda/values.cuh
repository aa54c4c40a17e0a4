// Numbers in the form in which the sequence kernels store and send them.
#pragma once

#include "primitives.cuh"

namespace fastrnn {

template <class T>
FASTRNN_DEVICE T rounded(float x) {
  T out;
  narrow(x, out);
  return out;
}

template <class T>
FASTRNN_DEVICE T not_a_number() {
  return rounded<T>(float_of(0x7FC00000u));
}

// x as an operand of the tensor cores.
template <class Storage>
FASTRNN_DEVICE Storage operand_of(float x) {
  if constexpr (sizeof(Storage) == 4) {
    return operand(x);
  } else {
    return rounded<Storage>(x);
  }
}

}  // namespace fastrnn
