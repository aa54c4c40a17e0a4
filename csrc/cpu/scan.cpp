// The scan ops on the CPU, from tensors to `ForwardScan` and `BackwardScan`: checks, allocation, the choice
// of cell and dtype. The batch is shared among PyTorch's threads.
#include <torch/csrc/stable/library.h>

#include "../step/ops.h"
#include "scan_backward.h"
#include "scan_forward.h"

namespace fastrnn {
namespace {

using Optional = std::optional<Tensor>;

// Sizes of one call, and its tensors in the form that the scans take. S: storage type, A: arithmetic type.
template <class S, class A>
struct Call {
  int64_t T, B, H, P;
  Frame frame;

  // like [T, B, ...], w_hh [gates * H, P]
  Call(const Tensor& like, const Tensor& w_hh, int64_t gates)
      : T(like.size(0)),
        B(like.size(1)),
        H(w_hh.size(0) / gates),
        P(w_hh.size(1)),
        frame(like, like.size(1), w_hh.size(0) / gates) {}

  // [T, B, columns], or [B, columns] as one step. `dense`: elements of a row lie side by side.
  template <class X>
  Steps<const X> steps(const char* name, const Optional& t, std::initializer_list<int64_t> shape,
                       bool dense = false) const {
    if (!t.has_value()) return {nullptr, 0, 0, 0};
    frame.expect<X>(name, *t, shape);
    int64_t last = t->dim() - 1, columns = t->size(last);
    int64_t stride = columns > 1 ? t->stride(last) : 1;
    check(!dense || stride == 1, name, " must be contiguous in its last dimension, got stride ", stride);
    return {static_cast<const X*>(t->const_data_ptr()), last == 2 ? t->stride(0) : 0, t->stride(last - 1),
            stride};
  }

  Steps<const uint8_t> flags(const Optional& t) const {
    if (!t.has_value()) return {nullptr, 0, 0, 0};
    frame.expect<uint8_t>("flags", *t, {T, B});
    return {static_cast<const uint8_t*>(t->const_data_ptr()), t->stride(0), t->stride(1), 1};
  }

  // A parameter [length] of S in the arithmetic type; empty where it does not exist.
  std::vector<A> numbers(const char* name, const Optional& t, int64_t length) const {
    if (!t.has_value()) return {};
    frame.expect<S>(name, *t, {length});
    std::vector<A> found(length);
    const S* data = static_cast<const S*>(t->const_data_ptr());
    for (int64_t j = 0; j < length; ++j) found[j] = widen(data[j * t->stride(0)]);
    return found;
  }

  // Whether each thread goes through the weights but once: one step, in one block of rows that all run.
  bool once(const Steps<const uint8_t>& flags) const {
    if (T > 1 || B > Scan::block) return false;
    for (int64_t b = 0; T == 1 && b < B; ++b)
      if (flags && (*flags.at(0, b).data & pad)) return false;
    return true;
  }

  // The matrix [rows, columns], or its transpose, to be multiplied from the left; null where it does not
  // exist.
  std::unique_ptr<Packed<S>> packed(const char* name, const Optional& t, int64_t rows, int64_t columns,
                                    bool transposed, bool once, const std::vector<A>& bias) const {
    if (!t.has_value()) return nullptr;
    frame.expect<S>(name, *t, {rows, columns});
    Matrix<S> matrix{static_cast<const S*>(t->const_data_ptr()), rows, columns, t->stride(0), t->stride(1)};
    if (transposed) std::swap(matrix.K, matrix.N), std::swap(matrix.k_stride, matrix.n_stride);
    return std::make_unique<Packed<S>>(matrix, once, bias.empty() ? nullptr : bias.data());
  }

  // w_hh [width, P] and w_hr [P, H] stand transposed in the forward.
  Weights<S> weights(bool forward, bool once, int64_t width, const Optional& w_hh, const Optional& b_hh,
                     const Optional& w_hr, const Optional& ln_hh, const Optional& ln_c_weight,
                     const Optional& ln_c_bias) const {
    check(ln_c_weight.has_value() == ln_c_bias.has_value(),
          "ln_c_weight and ln_c_bias must be given together");
    Weights<S> found;
    found.b_hh = numbers("b_hh", b_hh, width);
    found.ln_hh = numbers("ln_hh", ln_hh, width);
    found.ln_c_weight = numbers("ln_c_weight", ln_c_weight, H);
    found.ln_c_bias = numbers("ln_c_bias", ln_c_bias, H);
    // behind a layer norm, the bias stands behind it, too
    std::vector<A> bias = ln_hh.has_value() ? std::vector<A>{} : found.b_hh;
    found.w_hh = packed("w_hh", w_hh, width, P, forward, once, bias);
    if (!forward && ln_hh.has_value()) found.forward_w_hh = packed("w_hh", w_hh, width, P, true, once, {});
    found.w_hr = packed("w_hr", w_hr, P, H, forward, once, {});
    return found;
  }

  // A new tensor of these sizes, or an empty one where it is not wanted.
  template <class X>
  Tensor output(bool wanted, std::initializer_list<int64_t> sizes) const {
    return wanted ? frame.empty<X>(sizes) : frame.empty<X>({0});
  }

  // The steps that run of the sequences before each, and last of all of them.
  std::vector<int64_t> steps_before(const Steps<const uint8_t>& flags) const {
    std::vector<int64_t> before(B + 1);
    for (int64_t b = 0; b < B; ++b) {
      int64_t own = T;
      for (int64_t t = 0; flags && t < T; ++t) own -= *flags.at(t, b).data & pad ? 1 : 0;
      before[b + 1] = before[b] + std::max<int64_t>(own, 1);  // an empty one is somebody's, too
    }
    return before;
  }

  // f(begin, end) over the batch: each thread walks about as many steps as the others, however long the
  // sequences, and gets at least some 15 us of work: waking one costs a few.
  template <class F>
  void share(int64_t gates, const Steps<const uint8_t>& flags, const F& f) const {
    constexpr int64_t grain = 1 << 21;  // multiplications
    int64_t step_work = std::max<int64_t>(gates * H * (P + 16), 1);
    std::vector<int64_t> before = steps_before(flags);
    torch::stable::parallel_for(
        0, before[B], (grain + step_work - 1) / step_work, [&](int64_t from, int64_t to) {
          auto first = [&](int64_t steps) {
            return std::lower_bound(before.begin(), before.end(), steps) - before.begin();
          };
          if (first(from) < first(to)) f(first(from), first(to));
        });
  }
};

// What `Call::output` made, as steps; one step where it has no time.
template <class X>
Steps<X> written(const Tensor& t) {
  if (t.numel() == 0) return {nullptr, 0, 0, 0};
  return {static_cast<X*>(t.mutable_data_ptr()), t.dim() == 3 ? t.stride(0) : 0, t.stride(t.dim() - 2), 1};
}

template <class F>
auto with_cell_and_dtype(const std::string& cell, const char* name, const Tensor& t, const Tensor& w_hh,
                         const F& f) {
  check(t.dim() == 3, name, " must have shape [T, B, planes * H], got ", shape_of(t));
  check(w_hh.dim() == 2, "w_hh must have shape [gates * H, P], got ", shape_of(w_hh));
  return with_cell(cell,
                   [&](auto tag) { return with_dtype(name, t, [&](auto dtype) { return f(tag, dtype); }); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_forward(
    std::string cell, Tensor gx, Tensor w_hh, Optional b_hh, Tensor h0, Optional c0, Optional w_hr,
    Optional ln_hh, Optional ln_c_weight, Optional ln_c_bias, Optional flags, Optional recurrent_mask,
    Optional zone_h, Optional zone_c, bool reverse, bool save) {
  return with_cell_and_dtype(cell, "gx", gx, w_hh, [&](auto tag, auto dtype) {
    using Cell = decltype(tag);
    using S = typename decltype(dtype)::Storage;
    using A = typename decltype(dtype)::Acc;
    constexpr bool has_c = Cell::states == 2;
    Call<S, A> call(gx, w_hh, Cell::gates);
    auto [T, B, H, P] = std::tuple(call.T, call.B, call.H, call.P);
    int64_t width = Cell::gates * H;
    check(has_c == c0.has_value(), "c0 is for the cells with a c, and needed there");
    Weights<S> weights = call.weights(true, call.once(call.flags(flags)), width, w_hh, b_hh, w_hr, ln_hh,
                                      ln_c_weight, ln_c_bias);
    Tensor y = call.template output<S>(true, {T, B, P}),
           c = call.template output<A>(has_c && save, {T, B, H});
    Tensor h_n = call.template output<S>(true, {B, P}), c_n = call.template output<A>(has_c, {B, H});
    Tensor saved = call.template output<S>(save, {T, B, Cell::saved * H});
    ForwardScan<Cell, S> scan{
        {T, H, P, reverse, call.flags(flags)},
        call.template steps<S>("gx", gx, {T, B, width}, true),
        call.template steps<S>("zone_h", zone_h, {T, B, P}),
        call.template steps<S>("zone_c", zone_c, {T, B, H}),
        call.template steps<S>("h0", h0, {B, P}),
        call.template steps<S>("recurrent_mask", recurrent_mask, {B, P}),
        call.template steps<A>("c0", c0, {B, H}),
        weights,
        written<S>(y),
        written<S>(saved),
        written<A>(c),
        written<S>(h_n),
        written<A>(c_n),
    };
    call.share(Cell::gates, scan.flags, scan);
    return std::make_tuple(y, c, h_n, c_n, saved);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    std::string cell, Optional dy, Optional dc, Optional dh_n, Optional dc_n, Tensor saved, Tensor y,
    Optional c, Tensor h0, Optional c0, Tensor w_hh, Optional w_hr, Optional ln_hh, Optional ln_c_weight,
    Optional ln_c_bias, Optional flags, Optional recurrent_mask, Optional zone_h, Optional zone_c,
    Optional clip_norm, std::optional<double> clip_value, bool reverse, bool norms) {
  return with_cell_and_dtype(cell, "saved", saved, w_hh, [&](auto tag, auto dtype) {
    using Cell = decltype(tag);
    using S = typename decltype(dtype)::Storage;
    using A = typename decltype(dtype)::Acc;
    constexpr bool has_c = Cell::states == 2;
    Call<S, A> call(saved, w_hh, Cell::gates);
    auto [T, B, H, P] = std::tuple(call.T, call.B, call.H, call.P);
    int64_t width = Cell::gates * H;
    check(has_c == c0.has_value() && has_c == c.has_value(),
          "c and c0 are for the cells with a c, and needed there");
    Weights<S> weights = call.weights(false, call.once(call.flags(flags)), width, w_hh, {}, w_hr, ln_hh,
                                      ln_c_weight, ln_c_bias);
    if (clip_norm.has_value()) call.frame.template expect<A>("clip_norm", *clip_norm, {});
    A bound = static_cast<A>(clip_value.value_or(0));
    Tensor dgx = call.template output<S>(true, {T, B, width}),
           dgh = call.template output<S>(Cell::split || ln_hh.has_value(), {T, B, width});
    Tensor dh0 = call.template output<S>(true, {B, P}), dc0 = call.template output<A>(has_c, {B, H});
    Tensor dh_new = call.template output<S>(w_hr.has_value(), {T, B, P});
    Tensor db_hh = call.template output<A>(ln_hh.has_value(), {B, width}),
           dln_hh = call.template output<A>(ln_hh.has_value(), {B, width});
    Tensor dln_c_weight = call.template output<A>(ln_c_weight.has_value(), {B, H}),
           dln_c_bias = call.template output<A>(ln_c_weight.has_value(), {B, H});
    Tensor report = call.template output<A>(norms, {2, Cell::states, T, B});
    BackwardScan<Cell, S> scan{
        {T, H, P, reverse, call.flags(flags)},
        call.template steps<S>("dy", dy, {T, B, P}),
        call.template steps<A>("dc", dc, {T, B, H}),
        call.template steps<S>("dh_n", dh_n, {B, P}),
        call.template steps<A>("dc_n", dc_n, {B, H}),
        call.template steps<S>("saved", saved, {T, B, Cell::saved * H}, true),
        call.template steps<S>("y", y, {T, B, P}),
        call.template steps<A>("c", c, {T, B, H}),
        call.template steps<S>("h0", h0, {B, P}),
        call.template steps<A>("c0", c0, {B, H}),
        weights,
        call.template steps<S>("recurrent_mask", recurrent_mask, {B, P}),
        call.template steps<S>("zone_h", zone_h, {T, B, P}),
        call.template steps<S>("zone_c", zone_c, {T, B, H}),
        clip_norm.has_value() ? static_cast<const A*>(clip_norm->const_data_ptr()) : nullptr,
        clip_value.has_value() ? &bound : nullptr,
        written<S>(dgx),
        written<S>(dgh),
        written<S>(dh_new),
        written<S>(dh0),
        written<A>(dc0),
        written<A>(db_hh),
        written<A>(dln_hh),
        written<A>(dln_c_weight),
        written<A>(dln_c_bias),
        norms ? static_cast<A*>(report.mutable_data_ptr()) : nullptr,
        B,
    };
    call.share(Cell::gates, scan.flags, scan);
    return std::make_tuple(dgx, dgh, dh0, dc0, dh_new, db_hh, dln_hh, dln_c_weight, dln_c_bias, report);
  });
}

}  // namespace
}  // namespace fastrnn

// Shapes and meaning: see fastrnn/ops.py, whose ops these are on a CPU.
STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_c, m) {
  m.def(
      "scan_forward(str cell, Tensor gx, Tensor w_hh, Tensor? b_hh, Tensor h0, Tensor? c0, Tensor? w_hr, "
      "Tensor? ln_hh, Tensor? ln_c_weight, Tensor? ln_c_bias, Tensor? flags, Tensor? recurrent_mask, "
      "Tensor? zone_h, Tensor? zone_c, bool reverse, bool save) -> "
      "(Tensor y, Tensor c, Tensor h_n, Tensor c_n, Tensor saved)");
  m.def(
      "scan_backward(str cell, Tensor? dy, Tensor? dc, Tensor? dh_n, Tensor? dc_n, Tensor saved, Tensor y, "
      "Tensor? c, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? w_hr, Tensor? ln_hh, Tensor? ln_c_weight, "
      "Tensor? ln_c_bias, Tensor? flags, Tensor? recurrent_mask, "
      "Tensor? zone_h, Tensor? zone_c, Tensor? clip_norm, float? clip_value, bool reverse, bool norms) -> "
      "(Tensor dgx, Tensor dgh, Tensor dh0, Tensor dc0, Tensor dh_new, Tensor db_hh, Tensor dln_hh, "
      "Tensor dln_c_weight, Tensor dln_c_bias, Tensor norms)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CPU, m) {
  m.impl("scan_forward", TORCH_BOX(&fastrnn::scan_forward));
  m.impl("scan_backward", TORCH_BOX(&fastrnn::scan_backward));
}
