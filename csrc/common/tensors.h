// Tensors of PyTorch's stable ABI: allocation, and checks whose messages name the argument.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "storage.cuh"

namespace fastrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline const char* dtype_name(ScalarType type) { return torch::headeronly::toString(type); }

// A shape as a part of a message. It becomes text only where the message is written.
struct Shape {
  const int64_t* sizes;
  int64_t dim;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (int64_t k = 0; k < shape.dim; ++k) out << (k ? ", " : "") << shape.sizes[k];
  return out << ']';
}

inline Shape shape_of(const Tensor& t) { return {t.sizes().data(), t.dim()}; }

template <class T>
constexpr ScalarType dtype_of();
template <>
constexpr ScalarType dtype_of<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType dtype_of<double>() {
  return ScalarType::Double;
}
template <>
constexpr ScalarType dtype_of<BFloat16>() {
  return ScalarType::BFloat16;
}
template <>
constexpr ScalarType dtype_of<Float16>() {
  return ScalarType::Half;
}
template <>
constexpr ScalarType dtype_of<uint8_t>() {
  return ScalarType::Byte;
}

// What every tensor of one call has in common: the batch, the hidden size, the device.
struct Frame {
  int64_t B, H;
  int32_t device_type, device_index;

  Frame(const Tensor& like, int64_t B, int64_t H) : B(B), H(H), device_index(like.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  }

  // Checks the dtype, shape and device of an argument.
  template <class T>
  void expect(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) const {
    check(t.scalar_type() == dtype_of<T>(), name, " must be ", dtype_name(dtype_of<T>()), ", got ",
          dtype_name(t.scalar_type()));
    bool same = t.dim() == static_cast<int64_t>(shape.size());
    for (int64_t k = 0; same && k < t.dim(); ++k) same = t.size(k) == shape.begin()[k];
    check(same, name, " must have shape ", Shape{shape.begin(), static_cast<int64_t>(shape.size())}, ", got ",
          shape_of(t));
    check_device(name, t);
  }

  // A new contiguous tensor of T, uninitialised.
  template <class T>
  Tensor empty(std::initializer_list<int64_t> sizes) const {
    int64_t dim = static_cast<int64_t>(sizes.size()), strides[max_dim];
    check(dim <= max_dim, "at most ", max_dim, " dimensions, got ", dim);
    for (int64_t k = dim - 1, next = 1; k >= 0; --k) {
      strides[k] = next;
      next *= sizes.begin()[k] > 0 ? sizes.begin()[k] : 1;
    }
    static const int32_t dtype =
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype_of<T>()));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dim, sizes.begin(), strides, dtype, device_type, device_index, &handle));
    return Tensor(handle);
  }

  void check_device(const char* name, const Tensor& t) const {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    check(type == device_type && t.get_device_index() == device_index, name,
          " must be on the same device as the other tensors");
  }

 private:
  static constexpr int64_t max_dim = 4;
};

}  // namespace fastrnn
