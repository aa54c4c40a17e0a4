// Tensors of PyTorch's stable ABI: checks that name the argument, and allocation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "rows.cuh"

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

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t k = 0; k < t.dim(); ++k) text << (k ? ", " : "") << t.size(k);
  text << ']';
  return text.str();
}

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

// What every tensor of one call shares.
struct Frame {
  int64_t B, H;
  int32_t device_type, device_index;

  Frame(const Tensor& like, int64_t B, int64_t H) : B(B), H(H), device_index(like.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  }

  // [B, columns] of T, checked
  template <class T>
  Rows<const T> input(const char* name, const Tensor& t, int64_t columns) const {
    check(t.scalar_type() == dtype_of<T>(), name, " must be ", dtype_name(dtype_of<T>()), ", got ",
          dtype_name(t.scalar_type()));
    check(t.dim() == 2 && t.size(0) == B && t.size(1) == columns, name, " must have shape [", B, ", ",
          columns, "], got ", shape_of(t));
    check(columns <= 1 || t.stride(1) == 1, name, " must be contiguous in its last dimension, got stride ",
          t.stride(1));
    check_device(name, t);
    return {static_cast<const T*>(t.const_data_ptr()), t.stride(0)};
  }

  template <class T>
  Rows<const T> input(const char* name, const std::optional<Tensor>& t, int64_t columns) const {
    check(t.has_value(), name, " is needed for this cell, got None");
    return input<T>(name, *t, columns);
  }

  // [H] of A, checked
  template <class A>
  const A* vector(const char* name, const Tensor& t) const {
    check(t.scalar_type() == dtype_of<A>(), name, " must be ", dtype_name(dtype_of<A>()), ", got ",
          dtype_name(t.scalar_type()));
    check(t.dim() == 1 && t.size(0) == H && (H <= 1 || t.stride(0) == 1), name,
          " must be contiguous of shape [", H, "], got ", shape_of(t));
    check_device(name, t);
    return static_cast<const A*>(t.const_data_ptr());
  }

  // a new contiguous tensor; [0] where sizes says so
  template <class T>
  Tensor empty(std::initializer_list<int64_t> sizes) const {
    int64_t strides[2] = {1, 1};
    if (sizes.size() == 2) strides[0] = sizes.begin()[1];
    static const int32_t dtype =
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype_of<T>()));
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                           strides, dtype, device_type, device_index,
                                                           &handle));
    return Tensor(handle);
  }

 private:
  void check_device(const char* name, const Tensor& t) const {
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    check(type == device_type && t.get_device_index() == device_index, name,
          " must be on the same device as the other tensors");
  }
};

template <class T>
Rows<T> rows(const Tensor& t) {
  if (t.numel() == 0) return {nullptr, 0};
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0)};
}

}  // namespace fastrnn
