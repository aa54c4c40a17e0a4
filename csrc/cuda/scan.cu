// The ops over the sequence kernels. The caller allocates the outputs: see fastrnn/backends/cuda.py.
#include <torch/csrc/stable/library.h>

#include "../common/switches.h"
#include "any_rnn.cuh"
#include "persistent.h"

namespace fastrnn {

namespace {

using Optional = std::optional<Tensor>;

// The cell that a kernel is instantiated for: one serves all nonlinearities of the RNN.
LSTM kernel_cell(LSTM cell) { return cell; }
GRU kernel_cell(GRU cell) { return cell; }
AnyRNN kernel_cell(RNN<Tanh>) { return {AnyRNN::tanh}; }
AnyRNN kernel_cell(RNN<Relu>) { return {AnyRNN::relu}; }
AnyRNN kernel_cell(RNN<LeakyRelu>) { return {AnyRNN::leaky_relu}; }
AnyRNN kernel_cell(RNN<Elu>) { return {AnyRNN::elu}; }

// f(cell, zero): the kernel's cell, and a value of its storage type.
template <class F>
auto with_kernels(const std::string& cell, const char* name, const Tensor& like, const F& f) {
  return with_cell(cell, [&](auto tag) {
    return with_dtype(name, like, [&](auto dtype) {
      using Storage = typename decltype(dtype)::Storage;
      if constexpr (std::is_same_v<Storage, double>) {
        check(false, name, " must not be float64: the persistent kernels accumulate in float32");
        return f(kernel_cell(tag), float{});
      } else {
        return f(kernel_cell(tag), Storage{});
      }
    });
  });
}

// Pointers to the tensors of one call, which must be on its device, of the given dtype, contiguous and of the
// given size.
struct Pointers {
  Frame frame;

  template <class T>
  T* get(const char* name, const Optional& t, int64_t count) const {
    if (!t.has_value()) return nullptr;
    check(t->scalar_type() == dtype_of<T>(), name, " must be ", dtype_name(dtype_of<T>()), ", got ",
          dtype_name(t->scalar_type()));
    check(t->is_contiguous() && t->numel() == count, name, " must be contiguous and have ", count,
          " elements, got shape ", shape_of(*t));
    frame.check_device(name, *t);
    return static_cast<T*>(t->mutable_data_ptr());
  }
};

struct Sizes {
  int64_t D, T, B, H;
};

// y: [D, T, B, H], or [T, B, H] for a single direction.
Sizes sizes_of(const Tensor& y) {
  const int64_t dim = y.dim();
  check(dim == 3 || dim == 4, "y must have shape [T, B, H] or [D, T, B, H], got ", shape_of(y));
  return {dim == 4 ? y.size(0) : 1, y.size(dim - 3), y.size(dim - 2), y.size(dim - 1)};
}

Ways ways_of(const std::string& name) {
  check(name == "all" || name == "cluster" || name == "grid", "ways must be all, cluster or grid, got ",
        name);
  return name == "all" ? Ways::all : name == "cluster" ? Ways::cluster : Ways::grid;
}

// CTAs of a group, or 0 if the kernels cannot run. w_hh: [D, G*H, H], or [G*H, H] for a single direction.
int64_t persistent_group(Tensor w_hh, std::string cell, std::string ways) {
  return with_kernels(cell, "w_hh", w_hh, [&](auto kernel, auto zero) -> int64_t {
    const int64_t directions = w_hh.dim() == 3 ? w_hh.size(0) : 1;
    return Persistent<decltype(kernel), decltype(zero)>::group_size(w_hh.size(w_hh.dim() - 1), directions,
                                                                    ways_of(ways), w_hh.get_device_index());
  });
}

// A word in the host's memory that the device can write.
uint32_t* flag_address(const Tensor& timeout_flag) {
  check(timeout_flag.scalar_type() == ScalarType::Int && timeout_flag.numel() == 1,
        "timeout_flag must be one int32");
  return static_cast<uint32_t*>(timeout_flag.mutable_data_ptr());
}

void persistent_forward(Tensor gx, Tensor w_hh, Tensor h0, Optional c0, Optional b_hh, Optional flags,
                        std::string cell, bool reverse, std::string ways, Tensor y, Optional c, Tensor h_n,
                        Optional c_n, Optional saved, Tensor timeout_flag) {
  with_kernels(cell, "gx", gx, [&](auto kernel, auto zero) {
    using Cell = decltype(kernel);
    using Storage = decltype(zero);
    const auto [D, T, B, H] = sizes_of(y);
    const int64_t step = D * B * H;  // in all directions
    const Pointers from{Frame(gx, B, H)};
    ForwardParams<Storage> p{};
    p.T = T, p.D = static_cast<int>(D), p.B = static_cast<int>(B), p.H = static_cast<int>(H);
    p.reverse = reverse;
    p.gx = from.get<Storage>("gx", gx, T * step * Cell::gates);
    p.w_hh = from.get<Storage>("w_hh", w_hh, D * Cell::gates * H * H);
    p.b_hh = from.get<Storage>("b_hh", b_hh, D * Cell::gates * H);
    p.h0 = from.get<Storage>("h0", h0, step);
    p.c0 = from.get<float>("c0", c0, step);
    p.flags = from.get<uint8_t>("flags", flags, D * T * B);
    p.y = from.get<Storage>("y", y, T * step);
    p.h_n = from.get<Storage>("h_n", h_n, step);
    p.c_n = from.get<float>("c_n", c_n, step);
    p.c = from.get<float>("c", c, T * step);
    p.saved = from.get<Storage>("saved", saved, T * step * Cell::saved);
    p.link.timeout_flag = flag_address(timeout_flag);
    check(Cell::states == 1 || (p.c0 != nullptr && p.c_n != nullptr), "c0 and c_n are needed for this cell");
    Persistent<Cell, Storage>::forward(kernel, p, ways_of(ways), from.frame);
  });
}

void persistent_backward(Optional dy, Optional dc, Optional dh_n, Optional dc_n, Tensor y, Optional c,
                         Tensor saved, Tensor w_hh, Tensor h0, Optional c0, Optional flags,
                         Optional clip_norm, std::string cell, bool reverse, std::optional<double> clip_value,
                         std::string ways, Tensor dgx, Optional dgh, Tensor dh0, Optional dc0, Optional norms,
                         Tensor timeout_flag) {
  with_kernels(cell, "saved", saved, [&](auto kernel, auto zero) {
    using Cell = decltype(kernel);
    using Storage = decltype(zero);
    const auto [D, T, B, H] = sizes_of(y);
    const int64_t step = D * B * H;  // in all directions
    const int device = saved.get_device_index();
    // A norm comes in parts, one for each CTA of a group.
    const int64_t parts =
        norms.has_value() ? Persistent<Cell, Storage>::group_size(H, D, ways_of(ways), device) : 0;
    const Pointers from{Frame(saved, B, H)};
    BackwardParams<Storage> p{};
    p.T = T, p.D = static_cast<int>(D), p.B = static_cast<int>(B), p.H = static_cast<int>(H);
    p.reverse = reverse;
    p.dy = from.get<Storage>("dy", dy, T * step);
    p.dc = from.get<float>("dc", dc, T * step);
    p.dh_n = from.get<Storage>("dh_n", dh_n, step);
    p.dc_n = from.get<float>("dc_n", dc_n, step);
    p.saved = from.get<Storage>("saved", saved, T * step * Cell::saved);
    p.y = from.get<Storage>("y", y, T * step);
    p.c = from.get<float>("c", c, T * step);
    p.h0 = from.get<Storage>("h0", h0, step);
    p.c0 = from.get<float>("c0", c0, step);
    p.w_hh = from.get<Storage>("w_hh", w_hh, D * Cell::gates * H * H);
    p.flags = from.get<uint8_t>("flags", flags, D * T * B);
    p.clip_norm = from.get<float>("clip_norm", clip_norm, 1);
    p.clip_value = clip_value.has_value() ? static_cast<float>(*clip_value) : no_bound;
    p.dgx = from.get<Storage>("dgx", dgx, T * step * Cell::gates);
    p.dgh = from.get<Storage>("dgh", dgh, T * step * Cell::gates);
    p.dh0 = from.get<Storage>("dh0", dh0, step);
    p.dc0 = from.get<float>("dc0", dc0, step);
    p.norms = from.get<float>("norms", norms, D * 2 * Cell::states * T * B * parts);
    p.link.timeout_flag = flag_address(timeout_flag);
    check(Cell::states == 1 || (p.c != nullptr && p.c0 != nullptr && p.dc0 != nullptr),
          "c, c0 and dc0 are needed for this cell");
    check(!Cell::distinct_dgh || p.dgh != nullptr, "dgh is needed for this cell");
    Persistent<Cell, Storage>::backward(kernel, p, ways_of(ways), from.frame);
  });
}

}  // namespace
}  // namespace fastrnn

STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_c, m) {
  m.def("persistent_group(Tensor w_hh, str cell, str ways) -> int");
  m.def(
      "persistent_forward(Tensor gx, Tensor w_hh, Tensor h0, Tensor? c0, Tensor? b_hh, Tensor? flags, "
      "str cell, bool reverse, str ways, "
      "Tensor(a!) y, Tensor(b!)? c, Tensor(c!) h_n, Tensor(d!)? c_n, Tensor(e!)? saved, "
      "Tensor(f!) timeout_flag) -> ()");
  m.def(
      "persistent_backward(Tensor? dy, Tensor? dc, Tensor? dh_n, Tensor? dc_n, "
      "Tensor y, Tensor? c, Tensor saved, "
      "Tensor w_hh, Tensor h0, Tensor? c0, Tensor? flags, Tensor? clip_norm, "
      "str cell, bool reverse, float? clip_value, str ways, "
      "Tensor(a!) dgx, Tensor(b!)? dgh, Tensor(c!) dh0, Tensor(d!)? dc0, Tensor(e!)? norms, "
      "Tensor(f!) timeout_flag) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CUDA, m) {
  m.impl("persistent_group", TORCH_BOX(&fastrnn::persistent_group));
  m.impl("persistent_forward", TORCH_BOX(&fastrnn::persistent_forward));
  m.impl("persistent_backward", TORCH_BOX(&fastrnn::persistent_backward));
}
