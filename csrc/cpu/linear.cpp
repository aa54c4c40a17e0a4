// The product of fastrnn/linear.py, for processors on which it is the fastest at hand.
#include <torch/csrc/stable/library.h>

#include "../common/tensors.h"
#include "long_product.h"

namespace fastrnn {
namespace {

// A float32 matrix [rows, columns] of any layout.
Matrix<float> matrix_of(const char* name, const Tensor& t) {
  check(t.dim() == 2 && t.scalar_type() == ScalarType::Float, name, " must be a float32 matrix, got ",
        dtype_name(t.scalar_type()), ' ', shape_of(t));
  return {static_cast<const float*>(t.const_data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// x [M, K], weight [N, K], bias [N] -> x Wᵀ + b [M, N], N a multiple of panel_width.
Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const int64_t M = x.size(0), N = weight.size(0);
  Matrix<float> rows = matrix_of("x", x), matrix = matrix_of("weight", weight);
  check(rows.N == matrix.N, "x and weight must have as many columns, got ", shape_of(x), " and ",
        shape_of(weight));
  check(N % panel_width<float> == 0, "weight must have a multiple of ", panel_width<float>, " rows, got ", N);
  std::swap(matrix.K, matrix.N), std::swap(matrix.k_stride, matrix.n_stride);
  Frame frame(x, M, N);
  frame.check_device("weight", weight);
  if (bias.has_value()) {
    frame.expect<float>("bias", *bias, {N});
    if (N > 1 && bias->stride(0) != 1) bias = torch::stable::contiguous(*bias);
  }
  Tensor out = frame.empty<float>({M, N});
  long_product(rows, matrix, bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
               {static_cast<float*>(out.mutable_data_ptr()), N});
  return out;
}

// Whether this product is faster than MKL's and oneDNN's, where that was measured: on AMD's processors with
// AVX2. MKL's fastest products run on Intel's processors only.
bool prefers_linear() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return widest_vectors() == Vectors::avx2 && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Whether a whole network with these products is faster than one with MKL's and oneDNN's, in long calls, too:
// where that was measured, and on all processors with AVX-512.
bool prefers_network() { return prefers_linear() || widest_vectors() == Vectors::avx512; }

// Chooses, for all later calls, how the products that may go by pairs are computed: PairProducts, as a
// number. Returns the choice before. For tests, which reach the code around an instruction that few
// processors have.
int64_t choose_pair_products(int64_t chosen) {
  const PairProducts kind = static_cast<PairProducts>(chosen);
  const bool anywhere =
      kind == PairProducts::none || kind == PairProducts::portable || kind == PairProducts::portable_tiles;
  const bool avx512 = kind == PairProducts::avx512 && may_use_avx512_pairs();
  check(anywhere || avx512 || kind == fastest_pair_products(), "this processor has no pair products of kind ",
        chosen);
  return static_cast<int64_t>(pair_products().exchange(kind));
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_c, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("prefers_linear() -> bool");
  m.def("prefers_network() -> bool");
  m.def("choose_pair_products(int chosen) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CPU, m) { m.impl("linear", TORCH_BOX(&fastrnn::linear)); }
STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CompositeExplicitAutograd, m) {
  m.impl("prefers_linear", TORCH_BOX(&fastrnn::prefers_linear));
  m.impl("prefers_network", TORCH_BOX(&fastrnn::prefers_network));
  m.impl("choose_pair_products", TORCH_BOX(&fastrnn::choose_pair_products));
}
