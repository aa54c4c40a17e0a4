// x Wᵀ + bias for all steps at once, by the product that the scan uses.
#include <torch/csrc/stable/library.h>

#include "../step/ops.h"
#include "product.h"

namespace fastrnn {
namespace {

// A thread's share of the rows of out = in * matrix, in blocks whose rows stay near while the matrix passes
// by.
template <class A>
struct Blocks {
  static constexpr int64_t block = 128;  // rows
  const Packed<A>& matrix;
  Rows<const A> in;
  int64_t in_stride;
  Rows<A> out;

  void operator()(int64_t begin, int64_t end) const {
    bool whole = padded<A>(matrix.N) == matrix.N;
    Aligned<A> memory(whole ? 0 : block * padded<A>(matrix.N));
    for (int64_t b = begin; b < end; b += block) {
      int64_t rows = std::min(block, end - b);
      Rows<A> to = whole ? Rows<A>{out[b], out.stride} : Rows<A>{memory.data(), padded<A>(matrix.N)};
      walk_widest(Multiply<A>{matrix, {in[b], in.stride}, in_stride, to}, 0, rows);
      for (int64_t r = 0; !whole && r < rows; ++r) std::copy_n(to[r], matrix.N, out[b + r]);
    }
  }
};

template <class A>
Tensor linear_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  int64_t M = x.size(0), K = x.size(1), N = weight.size(0);
  Frame frame(x, M, K);
  frame.expect<A>("x", x, {M, K});
  frame.expect<A>("weight", weight, {N, K});
  if (bias.has_value()) {
    frame.expect<A>("bias", *bias, {N});
    check(N <= 1 || bias->stride(0) == 1, "bias must be contiguous, got stride ", bias->stride(0));
  }
  Packed<A> matrix(static_cast<const A*>(weight.const_data_ptr()), K, N, weight.stride(1), weight.stride(0),
                   bias.has_value() ? static_cast<const A*>(bias->const_data_ptr()) : nullptr);
  Tensor out = frame.empty<A>({M, N});
  Blocks<A> blocks{
      matrix, {static_cast<const A*>(x.const_data_ptr()), x.stride(0)}, x.stride(1), rows<A>(out)};
  constexpr int64_t grain = 1 << 21;  // multiplications that are worth waking a thread
  torch::stable::parallel_for(0, M, grain / std::max<int64_t>(K * N, 1) + 1, blocks);
  return out;
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  check(x.dim() == 2 && weight.dim() == 2, "x must have shape [M, K] and weight [N, K], got ", shape_of(x),
        " and ", shape_of(weight));
  return x.scalar_type() == ScalarType::Double ? linear_of<double>(x, weight, bias)
                                               : linear_of<float>(x, weight, bias);
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_c, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CPU, m) { m.impl("linear", TORCH_BOX(&fastrnn::linear)); }
