// The ops of a whole network on the CPU, `network_forward` and `network_backward`: their checks and schemas.
#include <torch/csrc/stable/library.h>

#include "../common/switches.h"
#include "network_backward.h"
#include "network_forward.h"

namespace fastrnn {
namespace {

ScalarType arithmetic_of(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

void to_arithmetic(Optional& t) {
  if (t.has_value() && t->scalar_type() != arithmetic_of(t->scalar_type()))
    t = torch::stable::to(*t, arithmetic_of(t->scalar_type()));
}

// Sets T, B and what else is known of packed rows.
void set_packed(NetworkSizes& sizes, const Tensor& batch_sizes, int64_t rows) {
  check(batch_sizes.dim() == 1 && batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.is_cpu(),
        "batch_sizes must be int64 [T] on the CPU, got ", dtype_name(batch_sizes.scalar_type()), ' ',
        shape_of(batch_sizes));
  const int64_t* given = data_of<int64_t>(batch_sizes);
  sizes.T = batch_sizes.size(0), sizes.B = 0;
  sizes.first_rows.push_back(0);
  for (int64_t t = 0; t < sizes.T; ++t) {
    const int64_t running = given[t * batch_sizes.stride(0)];
    check(running > 0 && (t == 0 || running <= sizes.batch_sizes.back()),
          "batch_sizes must be positive, none larger than the one before");
    sizes.B = std::max(sizes.B, running);
    sizes.batch_sizes.push_back(running);
    sizes.first_rows.push_back(sizes.first_rows.back() + running);
  }
  sizes.batch_sizes.push_back(0);
  check(sizes.first_rows.back() == rows, "x must have a row for each of batch_sizes, ",
        sizes.first_rows.back(), ", got ", rows);
}

// The sizes of a call, with `x` made contiguous, and all that does not depend on the dtype checked.
NetworkSizes sizes_of(NetworkArguments& given) {
  Tensor& x = given.x;
  const std::vector<Tensor>& weights = given.weights;
  const bool packed = given.batch_sizes.has_value();
  check(x.dim() == 2 || (x.dim() == 3 && !packed), "x must have two or three dimensions, two if packed, got ",
        shape_of(x));
  NetworkSizes sizes;
  sizes.layers = given.layers, sizes.directions = given.bidirectional ? 2 : 1;
  sizes.bias = given.bias, sizes.projects = given.projects;
  const bool norms = !given.norms.of.empty();
  sizes.norms_gates = norms, sizes.norms_x = given.norms.of == "separate", sizes.norms_c = given.norms.of_c;
  check(norms || !sizes.norms_c, "a layer norm of c needs one of the gates");
  const int64_t each = sizes.weights_of_walk();
  check(given.layers > 0 && static_cast<int64_t>(weights.size()) == each * sizes.walks(), "a network needs ",
        each, " weights for each layer and direction");
  const Tensor &w_hh = weights[1], &w_hr = weights[given.projects ? 2 + 2 * given.bias : 0];
  check(w_hh.dim() == 2, "w_hh must have shape [gates * H, P], got ", shape_of(w_hh));
  check(!given.projects || w_hr.dim() == 2, "w_hr must have shape [P, H], got ", shape_of(w_hr));
  x = torch::stable::contiguous(x);
  const bool batched = x.dim() == 3;
  sizes.batch_first = given.batch_first && batched;
  const int64_t time = sizes.batch_first ? 1 : 0;
  check(x.size(time) > 0, "a network needs at least one step, got ", shape_of(x));
  sizes.T = x.size(time), sizes.B = batched ? x.size(1 - time) : 1, sizes.I = x.size(x.dim() - 1);
  sizes.P = w_hh.size(1), sizes.H = given.projects ? w_hr.size(1) : sizes.P;
  if (packed) set_packed(sizes, *given.batch_sizes, x.size(0));
  return sizes;
}

template <class Storage>
void expect_weights(const NetworkArguments& given, const NetworkSizes& sizes, const CellTraits& cell) {
  check(!sizes.projects || cell.states > 1, "a projection is for the LSTM");
  check(!sizes.norms_c || cell.states > 1, "a layer norm of c is for the LSTM");
  check(!sizes.projects || (!sizes.norms_gates && !given.masks.has_value()),
        "a network with a projection has no layer norms and no masks here");
  check(!given.masks.has_value() || static_cast<int64_t>(given.masks->size()) == 3 * sizes.walks(),
        "a network has no masks, or three for each layer and direction");
  const Frame frame(given.x, sizes.B, sizes.H);
  const int64_t width = cell.gates * sizes.H;
  for (int64_t k = 0; k < sizes.walks(); ++k) {
    const NetworkWeights w = weights_of(given.weights.data(), k, sizes);
    frame.expect<Storage>("w_ih", w.w_ih, {width, sizes.inputs(k / sizes.directions)});
    frame.expect<Storage>("w_hh", w.w_hh, {width, sizes.P});
    if (w.b_ih) frame.expect<Storage>("b_ih", *w.b_ih, {width});
    if (w.b_hh) frame.expect<Storage>("b_hh", *w.b_hh, {width});
    if (w.w_hr) frame.expect<Storage>("w_hr", *w.w_hr, {sizes.P, sizes.H});
    if (w.ln_ih) frame.expect<Storage>("ln_ih", *w.ln_ih, {width});
    if (w.ln_hh) frame.expect<Storage>("ln_hh", *w.ln_hh, {width});
    if (w.ln_c_weight) frame.expect<Storage>("ln_c_weight", *w.ln_c_weight, {sizes.H});
    if (w.ln_c_bias) frame.expect<Storage>("ln_c_bias", *w.ln_c_bias, {sizes.H});
  }
}

// f(network) with a Network of the dtype of `x`.
template <template <class> class Network, class F>
auto with_network(NetworkArguments& given, const F& f) {
  const NetworkSizes sizes = sizes_of(given);
  return with_dtype("x", given.x, [&](auto dtype) {
    using Storage = typename decltype(dtype)::Storage;
    const auto& cell = built_in_cell<typename Arithmetic<Storage>::type>(given.cell);
    expect_weights<Storage>(given, sizes, cell);
    return f(Network<Storage>(cell, given, sizes));
  });
}

LayerNorms norms_of(double eps, const std::string& of, const std::string& of_c) {
  check(of_c.empty() || of_c == "inside" || of_c == "carried",
        "ln_c should be empty, inside or carried, got ", of_c);
  return {eps, of, of_c == "carried", !of_c.empty()};
}

Outputs network_forward(Tensor x, Optional batch_sizes, Optional reset_mask, Optional h0, Optional c0,
                        std::vector<Tensor> weights, std::string cell, int64_t layers, bool bidirectional,
                        bool bias, bool projects, bool batch_first, bool save,
                        std::optional<std::vector<Tensor>> masks, double ln_eps, std::string ln_of,
                        std::string ln_c) {
  to_arithmetic(c0);
  const LayerNorms norms = norms_of(ln_eps, ln_of, ln_c);
  NetworkArguments given{x,      batch_sizes,   reset_mask, weights,  masks,       cell,
                         layers, bidirectional, bias,       projects, batch_first, norms};
  Outputs found =
      with_network<NetworkForward>(given, [&](const auto& network) { return network.forward(h0, c0, save); });
  Tensor& c_n = std::get<2>(found);
  if (c_n.scalar_type() != x.scalar_type()) c_n = torch::stable::to(c_n, x.scalar_type());
  return found;
}

std::vector<Tensor> network_backward(Optional dy, Optional dh_n, Optional dc_n, Tensor x,
                                     Optional batch_sizes, Optional reset_mask, Optional h0, Optional c0,
                                     std::vector<Tensor> weights, Tensor kept, std::string cell,
                                     int64_t layers, bool bidirectional, bool bias, bool projects,
                                     bool batch_first, std::optional<double> clip_norm,
                                     std::optional<double> clip_value, bool norms, bool needs_dx,
                                     std::optional<std::vector<Tensor>> masks, double ln_eps,
                                     std::string ln_of, std::string ln_c) {
  to_arithmetic(c0), to_arithmetic(dc_n);
  const LayerNorms norms_of_call = norms_of(ln_eps, ln_of, ln_c);
  NetworkArguments given{x,      batch_sizes,   reset_mask, weights,  masks,       cell,
                         layers, bidirectional, bias,       projects, batch_first, norms_of_call};
  const BackwardOptions options{clip_norm, clip_value, norms, needs_dx};
  std::vector<Tensor> found = with_network<NetworkBackward>(
      given, [&](const auto& network) { return network.backward(dy, dh_n, dc_n, h0, c0, kept, options); });
  if (found[2].scalar_type() != x.scalar_type()) found[2] = torch::stable::to(found[2], x.scalar_type());
  return found;
}

}  // namespace
}  // namespace fastrnn

// x [T, B, I], [B, T, I] with batch_first, [T, I], or with batch_sizes [T] packed rows [rows, I]; reset_mask
// bool [T, B] or none; h0 [layers * D, B, P] and c0 [layers * D, B, H] or none for zeros; weights of each
// layer and direction in the order of fastrnn/cell_table.py; masks of each layer and direction, as in
// NetworkMasks, or none; ln_of, the layer norm of the gates: "separate", "sum", "gates" or empty; ln_c, that
// of c: "inside", "carried" or empty. `kept` holds what the backward reads, as bytes. What does not exist is
// an empty tensor.
#define FASTRNN_NETWORK \
  "str cell, int layers, bool bidirectional, bool bias, bool projects, bool batch_first, "
#define FASTRNN_NORMS_AND_MASKS "Tensor[]? masks=None, float ln_eps=1e-5, str ln_of=\"\", str ln_c=\"\""

STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_c, m) {
  m.def(
      "network_forward(Tensor x, Tensor? batch_sizes, Tensor? reset_mask, Tensor? h0, Tensor? c0, "
      "Tensor[] weights, " FASTRNN_NETWORK "bool save, " FASTRNN_NORMS_AND_MASKS
      ") -> (Tensor y, Tensor h_n, Tensor c_n, Tensor kept)");
  // dx, dh0, dc0, norms [layers * D, 2, states, T, B], and the gradients of the weights.
  m.def(
      "network_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? batch_sizes, "
      "Tensor? reset_mask, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor kept, " FASTRNN_NETWORK
      "float? clip_norm, float? clip_value, bool norms, bool needs_dx, " FASTRNN_NORMS_AND_MASKS
      ") -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CPU, m) {
  m.impl("network_forward", TORCH_BOX(&fastrnn::network_forward));
  m.impl("network_backward", TORCH_BOX(&fastrnn::network_backward));
}
