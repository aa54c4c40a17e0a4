// The tensors of one call: as they come from Python, and checked, in the form that the scans take.
#pragma once

#include <string>

#include "../common/tensors.h"
#include "scan.h"

namespace fastrnn {

using Optional = std::optional<Tensor>;

template <class Storage>
const Storage* data_of(const Tensor& t) {
  return static_cast<const Storage*>(t.const_data_ptr());
}

// The named tuples of fastrnn/arguments.py, field by field, except that gx goes by itself: only the forward
// has it.
struct ScanInputs {
  const Optional& w_hh;
  const Tensor& h0;
  const Optional &c0, &b_hh, &w_hr, &ln_hh, &ln_c_weight, &ln_c_bias, &flags, &recurrent_mask, &zone_h,
      &zone_c, &decay_h, &decay_c, &parameters, &step_inputs, &clip_norm;
};
// The layer norms of a call, as in Walk of fastrnn/arguments.py.
struct LayerNorms {
  double eps;
  std::string of;
  bool c_carried;
  bool of_c = false;  // of a network; a scan has the weights
};
struct IncomingGradients {
  const Optional &dy, &dc, &dh_n, &dc_n;
};
struct Kept {
  const Tensor& y;
  const Optional& c;
  Tensor& saved;
};

// Gives the elements of a row the stride 1, which those of a transposed or expanded tensor do not have.
inline void make_last_dim_contiguous(Tensor& t) {
  int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) t = torch::stable::contiguous(t);
}

template <class Storage, class A>
struct Call {
  int64_t T, B, H, P, C;
  Frame frame;

  // like: gx [T, B, gates * H], or saved [T, B, planes * H].
  Call(const char* name, const Tensor& like, int64_t planes, const Tensor& h0, int64_t states)
      : T(like.size(0)),
        B(like.size(1)),
        H(like.size(2) / planes),
        P(h0.dim() == 2 ? h0.size(1) : 0),
        C((states - 1) * H),
        frame(like, B, H) {
    check(H * planes == like.size(2), name, " must have shape [T, B, ", planes, " * H], got ",
          shape_of(like));
    check(h0.dim() == 2, "h0 must have shape [B, P], got ", shape_of(h0));
  }

  // Of a network, whose sizes are known.
  Call(const Tensor& like, int64_t T, int64_t B, int64_t H, int64_t P, int64_t states)
      : T(T), B(B), H(H), P(P), C((states - 1) * H), frame(like, B, H) {}

  // [T, B, columns], or [B, columns] as one step.
  template <class X>
  Steps<const X> view(const char* name, const Optional& t, std::initializer_list<int64_t> shape) const {
    if (!t.has_value()) return {};
    return view<X>(name, *t, shape);
  }

  template <class X>
  Steps<const X> view(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) const {
    frame.expect<X>(name, t, shape);
    int64_t last = t.dim() - 1, j_stride = t.size(last) > 1 ? t.stride(last) : 1;
    return {static_cast<const X*>(t.const_data_ptr()), last == 2 ? t.stride(0) : 0, t.stride(last - 1),
            j_stride};
  }

  Steps<const uint8_t> flags(const Optional& t) const {
    if (!t.has_value()) return {};
    frame.expect<uint8_t>("flags", *t, {T, B});
    return {static_cast<const uint8_t*>(t->const_data_ptr()), t->stride(0), t->stride(1), 1};
  }

  // The value of a 0-d tensor of any dtype.
  std::optional<A> number(const char* name, const Optional& t) const {
    if (!t.has_value()) return std::nullopt;
    Tensor converted = t->scalar_type() == dtype_of<A>() ? *t : torch::stable::to(*t, dtype_of<A>());
    frame.expect<A>(name, converted, {});
    return *static_cast<const A*>(converted.const_data_ptr());
  }

  // A parameter [length] in the arithmetic type; empty where it does not exist.
  std::vector<A> vector(const char* name, const Optional& t, int64_t length) const {
    if (!t.has_value()) return {};
    frame.expect<Storage>(name, *t, {length});
    std::vector<A> found(length);
    const Storage* data = static_cast<const Storage*>(t->const_data_ptr());
    const int64_t stride = t->stride(0);
    for (int64_t j = 0; j < length; ++j) found[j] = widen(data[j * stride]);
    return found;
  }

  // Whether each thread reads the weights only once: for a single step, in one block of rows that all run.
  bool reads_once(const Steps<const uint8_t>& flags) const {
    if (T > 1 || B > Scan::block()) return false;
    for (int64_t b = 0; T == 1 && b < B; ++b)
      if (flags && (*flags.at(0, b).data & pad)) return false;
    return true;
  }

  // The matrix [rows, columns], or its transpose, as the right operand of products.
  Matrix<Storage> matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns,
                         bool transposed) const {
    frame.expect<Storage>(name, t, {rows, columns});
    Matrix<Storage> found{static_cast<const Storage*>(t.const_data_ptr()), rows, columns, t.stride(0),
                          t.stride(1)};
    if (transposed) std::swap(found.K, found.N), std::swap(found.k_stride, found.n_stride);
    return found;
  }

  std::unique_ptr<Packed<Storage>> packed(const char* name, const Tensor& t, int64_t rows, int64_t columns,
                                          bool transposed, bool once, const std::vector<A>& bias,
                                          bool exact = false) const {
    return std::make_unique<Packed<Storage>>(matrix(name, t, rows, columns, transposed), once,
                                             bias.empty() ? nullptr : bias.data(), exact);
  }

  // W_hh [gates * H, P], or in heads [N, gates * H / N, H / N], as `packed`; `bias` [gates * H] or empty.
  Recurrence<Storage> recurrence(const Tensor& t, int64_t width, bool transposed, bool once,
                                 const std::vector<A>& bias, bool exact) const {
    if (t.dim() != 3)
      return Recurrence<Storage>::dense(matrix("w_hh", t, width, P, transposed), once,
                                        bias.empty() ? nullptr : bias.data(), exact, T, B);
    Recurrence<Storage> found;
    const int64_t N = t.size(0), gates = width / H;
    check(N > 1 && H % N == 0 && P == H, "w_hh must have heads that divide H = ", H, ", got ", shape_of(t));
    const int64_t K = H / N;
    found.gates = gates, found.units = K;
    frame.expect<Storage>("w_hh", t, {N, gates * K, K});
    const Storage* data = static_cast<const Storage*>(t.const_data_ptr());
    std::vector<A> own(bias.empty() ? 0 : gates * K);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t j = 0; j < static_cast<int64_t>(own.size()); ++j) own[j] = bias[j / K * H + n * K + j % K];
      Matrix<Storage> matrix{data + n * t.stride(0), gates * K, K, t.stride(1), t.stride(2)};
      if (transposed) std::swap(matrix.K, matrix.N), std::swap(matrix.k_stride, matrix.n_stride);
      found.heads.push_back(
          std::make_unique<Packed<Storage>>(matrix, once, own.empty() ? nullptr : own.data(), exact));
    }
    return found;
  }

  // Whether each gate has a recurrent mask of its own.
  bool masks_gates(const Optional& mask, int64_t width) const {
    return mask.has_value() && width > H && mask->dim() == 2 && mask->size(1) == width / H * P &&
           mask->size(1) != P;
  }

  // W_hh [gates * H, P] as one matrix for each gate, as `packed`; `bias` [gates * H] or empty.
  MaskedGates<Storage> masked_gates(const Tensor& t, int64_t width, bool transposed, bool once,
                                    const std::vector<A>& bias) const {
    frame.expect<Storage>("w_hh", t, {width, P});
    MaskedGates<Storage> found;
    found.H = H, found.P = P;
    const Storage* data = static_cast<const Storage*>(t.const_data_ptr());
    for (int64_t begin = 0; begin < width; begin += H) {
      Matrix<Storage> matrix{data + begin * t.stride(0), H, P, t.stride(0), t.stride(1)};
      if (transposed) std::swap(matrix.K, matrix.N), std::swap(matrix.k_stride, matrix.n_stride);
      found.gates.push_back(
          std::make_unique<Packed<Storage>>(matrix, once, bias.empty() ? nullptr : bias.data() + begin));
    }
    return found;
  }

  // Whether the tensors that depend on the cell are there.
  void check_cell(const CellTraits& cell, const ScanInputs& inputs) const {
    check((cell.states > 1) == inputs.c0.has_value(), "c0 is for the cells with a c, and needed there");
    check(cell.recurrent == inputs.w_hh.has_value(), "w_hh is for the recurrent cells, and needed there");
    check(cell.recurrent || !(inputs.b_hh.has_value() || inputs.ln_hh.has_value()),
          "b_hh and ln_hh are for the recurrent cells");
    check((cell.parameters > 0) == inputs.parameters.has_value(),
          "parameters is for the cells with parameters, and needed there");
    check((cell.inputs > 0) == inputs.step_inputs.has_value(),
          "step_inputs is for the cells with inputs, and needed there");
    check(cell.built_in || !inputs.w_hr.has_value(), "w_hr is for the built-in cells");
    check(cell.built_in || P == H, "h0 must have shape [", B, ", ", H, "], got ", shape_of(inputs.h0));
    check(cell.built_in || !inputs.ln_c_weight.has_value(), "ln_c_weight is for the built-in cells");
  }

  // The forward multiplies with the transposes of w_hh and w_hr [P, H].
  Weights<Storage> weights(const ScanInputs& inputs, int64_t width, int64_t parameters, bool forward,
                           bool once) const {
    check(inputs.ln_c_weight.has_value() == inputs.ln_c_bias.has_value(),
          "ln_c_weight and ln_c_bias must be given together");
    const bool normalised = inputs.ln_hh.has_value();
    Weights<Storage> found;
    if (forward) found.b_hh = vector("b_hh", inputs.b_hh, width);
    found.ln_hh = vector("ln_hh", inputs.ln_hh, width);
    found.ln_c_weight = vector("ln_c_weight", inputs.ln_c_weight, H);
    found.ln_c_bias = vector("ln_c_bias", inputs.ln_c_bias, H);
    found.of_cell = vector("parameters", inputs.parameters, parameters * H);
    // With a layer norm, the bias is added after it.
    const std::vector<A> no_bias;
    const std::vector<A>& bias = normalised ? no_bias : found.b_hh;
    if (inputs.w_hh.has_value() && masks_gates(inputs.recurrent_mask, width)) {
      found.masked_gates = masked_gates(*inputs.w_hh, width, forward, once, bias);
      if (!forward && normalised)
        found.forward_masked_gates = masked_gates(*inputs.w_hh, width, true, once, {});
    } else if (inputs.w_hh.has_value()) {
      // h times a mask or a decay is not rounded to the storage type, nor are the backward's gradients.
      const bool exact_h = !inputs.recurrent_mask.has_value() && !inputs.decay_h.has_value();
      found.w_hh = recurrence(*inputs.w_hh, width, forward, once, bias, forward && exact_h);
      if (!forward && normalised)
        found.forward_w_hh = recurrence(*inputs.w_hh, width, true, once, {}, exact_h);
    }
    if (inputs.w_hr.has_value()) found.w_hr = packed("w_hr", *inputs.w_hr, P, H, forward, once, {});
    return found;
  }

  static void set_norms(Weights<Storage>& weights, const LayerNorms& norms, int64_t gates) {
    check(norms.of == "separate" || norms.of == "sum" || norms.of == "gates",
          "ln_of should be separate, sum or gates, got ", norms.of);
    weights.ln_eps = static_cast<A>(norms.eps);
    weights.ln_of_sum = norms.of != "separate";
    weights.ln_groups = norms.of == "gates" ? gates : 1;
    weights.ln_c_carried = norms.c_carried;
  }

  // The fields that the forward and the backward scan share.
  template <class ScanOfCell>
  void fill(ScanOfCell& scan, const ScanInputs& inputs, bool forward, bool reverse,
            const LayerNorms& norms) const {
    scan.T = T, scan.B = B, scan.H = H, scan.P = P, scan.C = C;
    scan.reverse = reverse;
    scan.flags = flags(inputs.flags);
    scan.weights =
        weights(inputs, scan.cell.gates * H, scan.cell.parameters, forward, reads_once(scan.flags));
    check(norms.of == "separate" || inputs.ln_hh.has_value(), "a layer norm of the sum needs ln_hh");
    set_norms(scan.weights, norms, scan.cell.gates);
    scan.h0 = view<Storage>("h0", inputs.h0, {B, P});
    scan.c0 = view<A>("c0", inputs.c0, {B, C});
    scan.recurrent_mask = view<Storage>("recurrent_mask", inputs.recurrent_mask,
                                        {B, scan.weights.masked_gates ? scan.cell.gates * P : P});
    scan.zone_h = view<Storage>("zone_h", inputs.zone_h, {T, B, P});
    scan.zone_c = view<Storage>("zone_c", inputs.zone_c, {T, B, C});
    scan.decay_h = view<Storage>("decay_h", inputs.decay_h, {T, B, P});
    scan.decay_c = view<Storage>("decay_c", inputs.decay_c, {T, B, C});
    check(scan.C == 0 || inputs.decay_h.has_value() == inputs.decay_c.has_value(),
          "decay_h and decay_c must be given together");
    // Its rows are contiguous: `scan_forward` and `scan_backward` see to it.
    scan.step_inputs = view<Storage>("step_inputs", inputs.step_inputs, {T, B, scan.cell.inputs * H});
  }

  // A new tensor of these sizes, or an empty one of the storage type, as in fastrnn/arguments.py, if `exists`
  // is false.
  template <class X>
  Tensor output(bool exists, std::initializer_list<int64_t> sizes) const {
    return exists ? frame.template empty<X>(sizes) : frame.template empty<Storage>({0});
  }

  // How many steps run in the sequences before each, and last in all of them.
  std::vector<int64_t> steps_before(const Scan& scan) const {
    std::vector<int64_t> before(B + 1);
    for (int64_t b = 0, longest = scan.T; b < B; ++b) {
      int64_t steps = scan.T;
      for (int64_t t = 0; scan.flags && t < scan.T; ++t) steps -= *scan.flags.at(t, b).data & pad ? 1 : 0;
      if (scan.batch_sizes != nullptr) {
        while (longest > 0 && scan.batch_sizes[longest - 1] <= b) --longest;
        steps = longest;
      }
      before[b + 1] = before[b] + std::max<int64_t>(steps, 1);  // an empty sequence needs a thread, too
    }
    return before;
  }

  // scan(begin, end) over the batch, shared among PyTorch's threads: each walks about as many steps as the
  // others, however long the sequences, and gets at least some 15 us of work, since to wake one costs a few.
  template <class ScanOfCell>
  void run(const ScanOfCell& scan, int64_t gates) const {
    if (Team* team = scan.weights.w_hh.team.get()) return team->lead([&] { scan(0, B); });
    constexpr int64_t grain = 1 << 21;  // multiplications
    const int64_t terms = scan.weights.w_hh.in_heads() ? scan.weights.w_hh.units : P;
    int64_t step_work = std::max<int64_t>(gates * H * (terms + 16), 1);
    std::vector<int64_t> before = steps_before(scan);
    share(before[B], (grain + step_work - 1) / step_work, [&](int64_t from, int64_t to) {
      auto first = [&](int64_t steps) {
        return std::lower_bound(before.begin(), before.end(), steps) - before.begin();
      };
      if (first(from) < first(to)) scan(first(from), first(to));
    });
  }
};

// What `Call::output` made; one step where it has no time.
template <class X>
Steps<X> output_view(const Tensor& t) {
  if (t.numel() == 0) return {};
  return {static_cast<X*>(t.mutable_data_ptr()), t.dim() == 3 ? t.stride(0) : 0, t.stride(t.dim() - 2), 1};
}

}  // namespace fastrnn
