// The scan ops on the CPU. PyTorch's dispatcher calls `scan_forward` and `scan_backward` with flat arguments,
// which become the structs of arguments.h.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/switches.h"
#include "arguments.h"
#include "scan_backward.h"
#include "scan_forward.h"

namespace fastrnn {
namespace {

using ScanOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using ScanGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor, Tensor>;

template <class Storage>
using CellOf = Cell<typename Arithmetic<Storage>::type>;

// f(dtype, cell) with the dtype of `t` and the cell of this name or text.
template <class F>
auto with_cell_of(const std::string& cell, const char* name, const Tensor& t, const F& f) {
  check(t.dim() == 3, name, " must have shape [T, B, planes * H], got ", shape_of(t));
  return with_dtype(name, t, [&](auto dtype) {
    using A = typename Arithmetic<typename decltype(dtype)::Storage>::type;
    return cell.rfind("cell ", 0) == 0 ? f(dtype, *program_cell<A>(cell)) : f(dtype, built_in_cell<A>(cell));
  });
}

template <class Storage>
ScanOutputs forward(const CellOf<Storage>& cell, Tensor& gx, const ScanInputs& inputs, bool reverse,
                    const LayerNorms& layer_norms, bool save) {
  using A = typename Arithmetic<Storage>::type;
  Call<Storage, A> call("gx", gx, cell.gates, inputs.h0, cell.states);
  call.check_cell(cell, inputs);
  auto [T, B, H, P, C] = std::tuple(call.T, call.B, call.H, call.P, call.C);
  const bool has_c = cell.states > 1;
  make_last_dim_contiguous(gx);
  Tensor y = call.template output<Storage>(true, {T, B, P}),
         c = call.template output<A>(has_c && save, {T, B, C});
  Tensor h_n = call.template output<Storage>(true, {B, P}), c_n = call.template output<A>(has_c, {B, C});
  Tensor saved = call.template output<Storage>(save, {T, B, cell.saved * H});

  ForwardScan<Storage> scan(cell);
  call.fill(scan, inputs, true, reverse, layer_norms);
  scan.gx = call.template view<Storage>("gx", gx, {T, B, cell.gates * H});
  scan.y = output_view<Storage>(y);
  scan.c = output_view<A>(c);
  scan.h_n = output_view<Storage>(h_n);
  scan.c_n = output_view<A>(c_n);
  scan.saved = output_view<Storage>(saved);
  call.run(scan, cell.gates);
  return ScanOutputs(y, c, h_n, c_n, saved);
}

template <class Storage>
ScanGradients backward(const CellOf<Storage>& cell, const IncomingGradients& incoming, const Kept& kept,
                       const Optional& gx, const ScanInputs& inputs, bool reverse,
                       std::optional<double> clip_value, const LayerNorms& layer_norms, bool with_norms) {
  using A = typename Arithmetic<Storage>::type;
  Call<Storage, A> call("saved", kept.saved, cell.saved, inputs.h0, cell.states);
  call.check_cell(cell, inputs);
  const bool has_c = cell.states > 1, ln_hh = inputs.ln_hh.has_value(), ln_c = inputs.ln_c_weight.has_value();
  check(has_c == kept.c.has_value(), "c is for the cells with a c, and needed there");
  auto [T, B, H, P, C] = std::tuple(call.T, call.B, call.H, call.P, call.C);
  const int64_t width = cell.gates * H, of_cell = (cell.parameters + cell.inputs) * H;
  make_last_dim_contiguous(kept.saved);
  Tensor dgx = call.template output<Storage>(true, {T, B, width}),
         dgh = call.template output<Storage>(cell.distinct_dgh || ln_hh, {T, B, width});
  Tensor dh0 = call.template output<Storage>(true, {B, P}), dc0 = call.template output<A>(has_c, {B, C});
  Tensor dh_new = call.template output<Storage>(inputs.w_hr.has_value(), {T, B, P});
  Tensor db_hh = call.template output<A>(ln_hh, {B, width}),
         dln_hh = call.template output<A>(ln_hh, {B, width});
  Tensor dln_c_weight = call.template output<A>(ln_c, {B, H}),
         dln_c_bias = call.template output<A>(ln_c, {B, H});
  Tensor dcell = call.template output<Storage>(of_cell > 0, {T, B, of_cell});
  Tensor ddecay_h = call.template output<Storage>(inputs.decay_h.has_value(), {T, B, P}),
         ddecay_c = call.template output<Storage>(inputs.decay_c.has_value(), {T, B, C});
  Tensor norms = call.template output<A>(with_norms, {2, cell.states, T, B});

  BackwardScan<Storage> scan(cell);
  call.fill(scan, inputs, false, reverse, layer_norms);
  scan.clip_norm = call.number("clip_norm", inputs.clip_norm);
  if (clip_value.has_value()) scan.clip_value = static_cast<A>(*clip_value);
  scan.dy = call.template view<Storage>("dy", incoming.dy, {T, B, P});
  scan.dc = call.template view<A>("dc", incoming.dc, {T, B, C});
  scan.dh_n = call.template view<Storage>("dh_n", incoming.dh_n, {B, P});
  scan.dc_n = call.template view<A>("dc_n", incoming.dc_n, {B, C});
  scan.saved = call.template view<Storage>("saved", kept.saved, {T, B, cell.saved * H});
  if (scan.weights.ln_of_sum) {
    check(gx.has_value(), "a layer norm of the sum needs gx");
    scan.gx = call.template view<Storage>("gx", gx, {T, B, width});
  }
  scan.y = call.template view<Storage>("y", kept.y, {T, B, P});
  scan.c = call.template view<A>("c", kept.c, {T, B, C});
  scan.dgx = output_view<Storage>(dgx);
  scan.dgh = output_view<Storage>(dgh);
  scan.dh0 = output_view<Storage>(dh0);
  scan.dc0 = output_view<A>(dc0);
  scan.dh_new = output_view<Storage>(dh_new);
  scan.db_hh = output_view<A>(db_hh);
  scan.dln_hh = output_view<A>(dln_hh);
  scan.dln_c_weight = output_view<A>(dln_c_weight);
  scan.dln_c_bias = output_view<A>(dln_c_bias);
  scan.dcell = output_view<Storage>(dcell);
  scan.ddecay_h = output_view<Storage>(ddecay_h);
  scan.ddecay_c = output_view<Storage>(ddecay_c);
  scan.norms = with_norms ? static_cast<A*>(norms.mutable_data_ptr()) : nullptr;
  scan.norms_stride = T * B;
  call.run(scan, cell.gates);
  return ScanGradients(dgx, dgh, dh0, dc0, dh_new, db_hh, dln_hh, dln_c_weight, dln_c_bias, dcell, ddecay_h,
                       ddecay_c, norms);
}

// The rows of the step inputs are read as they are.
void make_rows_contiguous(Optional& step_inputs) {
  if (!step_inputs.has_value()) return;
  check(step_inputs->dim() == 3, "step_inputs must have shape [T, B, inputs * H], got ",
        shape_of(*step_inputs));
  make_last_dim_contiguous(*step_inputs);
}

// Python passes the tuples of fastrnn/arguments.py as they are: that is why some arguments are not used.
ScanOutputs scan_forward(Tensor gx, Optional w_hh, Tensor h0, Optional c0, Optional b_hh, Optional w_hr,
                         Optional ln_hh, Optional ln_c_weight, Optional ln_c_bias, Optional flags,
                         Optional recurrent_mask, Optional zone_h, Optional zone_c, Optional decay_h,
                         Optional decay_c, Optional parameters, Optional step_inputs, Optional clip_norm,
                         std::string cell, bool reverse, std::string /*backend*/,
                         std::optional<double> /*clip_value*/, double ln_eps, std::string ln_of,
                         bool ln_c_carried, bool save) {
  LayerNorms layer_norms{ln_eps, ln_of, ln_c_carried};
  make_rows_contiguous(step_inputs);
  ScanInputs inputs{w_hh,        h0,        c0,         b_hh,           w_hr,     ln_hh,
                    ln_c_weight, ln_c_bias, flags,      recurrent_mask, zone_h,   zone_c,
                    decay_h,     decay_c,   parameters, step_inputs,    clip_norm};
  return with_cell_of(cell, "gx", gx, [&](auto dtype, const auto& of) {
    return forward<typename decltype(dtype)::Storage>(of, gx, inputs, reverse, layer_norms, save);
  });
}

ScanGradients scan_backward(Optional dy, Optional dc, Optional dh_n, Optional dc_n, Optional dsaved, Tensor y,
                            Optional c, Tensor saved, Optional gx, Optional w_hh, Tensor h0, Optional c0,
                            Optional b_hh, Optional w_hr, Optional ln_hh, Optional ln_c_weight,
                            Optional ln_c_bias, Optional flags, Optional recurrent_mask, Optional zone_h,
                            Optional zone_c, Optional decay_h, Optional decay_c, Optional parameters,
                            Optional step_inputs, Optional clip_norm, std::string cell, bool reverse,
                            std::string /*backend*/, std::optional<double> clip_value, double ln_eps,
                            std::string ln_of, bool ln_c_carried, bool norms) {
  LayerNorms layer_norms{ln_eps, ln_of, ln_c_carried};
  check(!dsaved.has_value(), "the cpu backend does not take dsaved; the reference does");
  make_rows_contiguous(step_inputs);
  ScanInputs inputs{w_hh,        h0,        c0,         b_hh,           w_hr,     ln_hh,
                    ln_c_weight, ln_c_bias, flags,      recurrent_mask, zone_h,   zone_c,
                    decay_h,     decay_c,   parameters, step_inputs,    clip_norm};
  return with_cell_of(cell, "saved", saved, [&](auto dtype, const auto& of) {
    return backward<typename decltype(dtype)::Storage>(of, {dy, dc, dh_n, dc_n}, {y, c, saved}, gx, inputs,
                                                       reverse, clip_value, layer_norms, norms);
  });
}

}  // namespace
}  // namespace fastrnn

#define FASTRNN_INPUTS                                                                                    \
  "Tensor? w_hh, Tensor h0, Tensor? c0, Tensor? b_hh, Tensor? w_hr, Tensor? ln_hh, Tensor? ln_c_weight, " \
  "Tensor? ln_c_bias, Tensor? flags, Tensor? recurrent_mask, Tensor? zone_h, Tensor? zone_c, "            \
  "Tensor? decay_h, Tensor? decay_c, Tensor? parameters, Tensor? step_inputs, Tensor? clip_norm, "
#define FASTRNN_WALK \
  "str cell, bool reverse, str backend, float? clip_value, float ln_eps, str ln_of, bool ln_c_carried, "

// The schemas of fastrnn/ops.py: shapes and meaning are in fastrnn/arguments.py.
STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_c, m) {
  m.def("scan_forward(Tensor gx, " FASTRNN_INPUTS FASTRNN_WALK
        "bool save) -> (Tensor y, Tensor c, Tensor h_n, Tensor c_n, Tensor saved)");
  m.def(
      "scan_backward(Tensor? dy, Tensor? dc, Tensor? dh_n, Tensor? dc_n, Tensor? dsaved, "
      "Tensor y, Tensor? c, Tensor saved, Tensor? gx, " FASTRNN_INPUTS FASTRNN_WALK
      "bool norms) -> (Tensor dgx, Tensor dgh, Tensor dh0, Tensor dc0, Tensor dh_new, Tensor db_hh, "
      "Tensor dln_hh, Tensor dln_c_weight, Tensor dln_c_bias, Tensor dcell, Tensor ddecay_h, Tensor "
      "ddecay_c, Tensor norms)");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CPU, m) {
  m.impl("scan_forward", TORCH_BOX(&fastrnn::scan_forward));
  m.impl("scan_backward", TORCH_BOX(&fastrnn::scan_backward));
}
