// The operations of users' cells: each as a loop over elements, compiled for every width of vectors.
#pragma once

#include <cstdint>
#include <string_view>
#include <type_traits>

namespace fastrnn {

// out[j] = operation(x[j], y[j], z[j]) for j < n. An operation reads as many of x, y, z as it has operands;
// `out` may be one of them.
using Loop = void (*)(void* out, const void* x, const void* y, const void* z, int64_t n);

struct Operation {
  // What an operand or a result is: a condition is 1 or 0 in the type of the arithmetic.
  enum class Kind { number, condition };

  std::string_view name;
  int operands;
  Kind of_operands[3], result;
  Loop float32, float64;

  template <class A>
  Loop loop() const {
    if constexpr (std::is_same_v<A, float>) return float32;
    return float64;
  }
};

// The operation of this name, or null.
const Operation* find_operation(std::string_view name);

// out[j] = x[j]
Loop copy_loop(bool is_double);

}  // namespace fastrnn
