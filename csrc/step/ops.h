// The four ops, from tensors to row functions: checks, allocation, and the choice of cell and dtype. `Device`
// runs a row function over the batch: Device::run(row_function, B, H, device_index).
#pragma once

#include <string>
#include <tuple>
#include <type_traits>

#include "norm_row.cuh"
#include "tensors.h"

namespace fastrnn {

template <class S>
struct Dtype {
  using Storage = S;
  using Acc = typename Arithmetic<S>::type;
};

template <class F>
auto with_cell(const std::string& name, const F& f) {
  if (name == "lstm") return f(LSTM{});
  if (name == "gru") return f(GRU{});
  if (name == "rnn_tanh") return f(RNN<Tanh>{});
  if (name == "rnn_relu") return f(RNN<Relu>{});
  if (name == "rnn_leaky_relu") return f(RNN<LeakyRelu>{});
  if (name == "rnn_elu") return f(RNN<Elu>{});
  throw std::runtime_error("cell must be lstm, gru, rnn_tanh, rnn_relu, rnn_leaky_relu or rnn_elu, got " +
                           name);
}

template <class F>
auto with_dtype(const char* name, const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(Dtype<float>{});
    case ScalarType::Double:
      return f(Dtype<double>{});
    case ScalarType::BFloat16:
      return f(Dtype<BFloat16>{});
    case ScalarType::Half:
      return f(Dtype<Float16>{});
    default:
      throw std::runtime_error(std::string(name) + " must be float32, float64, bfloat16 or float16, got " +
                               dtype_name(t.scalar_type()));
  }
}

template <class Device>
struct Ops {
  using Optional = std::optional<Tensor>;

  // Weight and bias of LN(c), both or neither; only the LSTM has it.
  template <class Cell, class A>
  static Affine<A> affine(const Frame& frame, const Optional& weight, const Optional& bias) {
    check(weight.has_value() == bias.has_value(), "ln_c_weight and ln_c_bias must be given together");
    if (!weight.has_value()) return {nullptr, nullptr};
    check(Cell::states == 2, "ln_c_weight is for the lstm only: the other cells have no cell state");
    return {frame.vector<A>("ln_c_weight", *weight), frame.vector<A>("ln_c_bias", *bias)};
  }

  // Row<Cell, S, A, layer_norm>{fields...} over the batch
  template <template <class, class, class, bool> class Row, class Cell, class S, class A, class... Fields>
  static void run(const Frame& frame, const Affine<A>& ln_c, const Fields&... fields) {
    if constexpr (Cell::states == 2) {
      if (ln_c.weight != nullptr) {
        Device::run(Row<Cell, S, A, true>{frame.H, fields...}, frame.B, frame.H, frame.device_index);
        return;
      }
    }
    Device::run(Row<Cell, S, A, false>{frame.H, fields...}, frame.B, frame.H, frame.device_index);
  }

  static std::tuple<Tensor, Tensor, Tensor> cell_forward(std::string cell, Tensor gx, Tensor gh,
                                                         Tensor h_prev, Optional c_prev, Optional ln_c_weight,
                                                         Optional ln_c_bias) {
    return with_cell(cell, [&](auto tag) {
      return with_dtype("gx", gx, [&](auto dtype) {
        using Cell = decltype(tag);
        using S = typename decltype(dtype)::Storage;
        using A = typename decltype(dtype)::Acc;
        constexpr bool has_c = Cell::states == 2;
        check(h_prev.dim() == 2, "h_prev must have shape [B, H], got ", shape_of(h_prev));
        Frame frame(gx, h_prev.size(0), h_prev.size(1));
        int64_t B = frame.B, H = frame.H;
        Rows<const S> gx_rows = frame.template input<S>("gx", gx, Cell::gates * H);
        Rows<const A> gh_rows = frame.template input<A>("gh", gh, Cell::gates * H);
        Rows<const A> h_rows = frame.template input<A>("h_prev", h_prev, H), c_rows{};
        if constexpr (has_c) c_rows = frame.template input<A>("c_prev", c_prev, H);
        Affine<A> ln_c = affine<Cell, A>(frame, ln_c_weight, ln_c_bias);
        Tensor h = frame.template empty<A>({B, H}), saved = frame.template empty<S>({B, Cell::saved * H});
        Tensor c = has_c ? frame.template empty<A>({B, H}) : frame.template empty<A>({0});
        run<ForwardRow, Cell, S>(frame, ln_c, gx_rows, gh_rows, h_rows, c_rows, ln_c, rows<A>(h), rows<A>(c),
                                 rows<S>(saved));
        return std::make_tuple(h, c, saved);
      });
    });
  }

  static Tensor cell_total(std::string cell, Tensor saved, Tensor c_prev, Tensor dh, Tensor dc,
                           Optional ln_c_weight, Optional ln_c_bias) {
    check(cell == "lstm", "cell_total is for the lstm only (for the others it is the identity), got ", cell);
    return with_dtype("saved", saved, [&](auto dtype) {
      using S = typename decltype(dtype)::Storage;
      using A = typename decltype(dtype)::Acc;
      check(dh.dim() == 2, "dh must have shape [B, H], got ", shape_of(dh));
      Frame frame(saved, dh.size(0), dh.size(1));
      int64_t B = frame.B, H = frame.H;
      Affine<A> ln_c = affine<LSTM, A>(frame, ln_c_weight, ln_c_bias);
      Tensor total = frame.template empty<A>({B, H});
      Tensor scratch =
          ln_c.weight != nullptr ? frame.template empty<A>({B, H}) : frame.template empty<A>({0});
      run<TotalRow, LSTM, S>(frame, ln_c, frame.template input<S>("saved", saved, LSTM::saved * H),
                             frame.template input<A>("c_prev", c_prev, H),
                             frame.template input<A>("dh", dh, H), frame.template input<A>("dc", dc, H), ln_c,
                             rows<A>(scratch), rows<A>(total));
      return total;
    });
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> cell_backward(std::string cell, Tensor saved,
                                                                  Tensor h_prev, Optional c_prev, Tensor dh,
                                                                  Optional dc, Optional ln_c_weight,
                                                                  Optional ln_c_bias) {
    return with_cell(cell, [&](auto tag) {
      return with_dtype("saved", saved, [&](auto dtype) {
        using Cell = decltype(tag);
        using S = typename decltype(dtype)::Storage;
        using A = typename decltype(dtype)::Acc;
        constexpr bool has_c = Cell::states == 2;
        check(dh.dim() == 2, "dh must have shape [B, H], got ", shape_of(dh));
        Frame frame(saved, dh.size(0), dh.size(1));
        int64_t B = frame.B, H = frame.H;
        Rows<const S> saved_rows = frame.template input<S>("saved", saved, Cell::saved * H);
        Rows<const A> h_rows = frame.template input<A>("h_prev", h_prev, H), c_rows{}, dc_rows{};
        Rows<const A> dh_rows = frame.template input<A>("dh", dh, H);
        if constexpr (has_c) {
          c_rows = frame.template input<A>("c_prev", c_prev, H);
          dc_rows = frame.template input<A>("dc", dc, H);
        }
        Affine<A> ln_c = affine<Cell, A>(frame, ln_c_weight, ln_c_bias);
        auto optional = [&](bool exists, int64_t columns) {
          return exists ? frame.template empty<A>({B, columns}) : frame.template empty<A>({0});
        };
        Tensor dgx = optional(true, Cell::gates * H), dgh = optional(Cell::split, Cell::gates * H);
        Tensor dh_prev = optional(Cell::split, H), dc_prev = optional(has_c, H);
        run<BackwardRow, Cell, S>(frame, ln_c, saved_rows, h_rows, c_rows, dh_rows, dc_rows, ln_c,
                                  rows<A>(dgx), rows<A>(dgh), rows<A>(dh_prev), rows<A>(dc_prev));
        return std::make_tuple(dgx, dgh, dh_prev, dc_prev);
      });
    });
  }

  static Tensor row_norm(Tensor x) {
    auto of_type = [&](auto zero) {
      using A = decltype(zero);
      check(x.dim() == 2, "x must have shape [B, H], got ", shape_of(x));
      Frame frame(x, x.size(0), x.size(1));
      Rows<const A> x_rows = frame.template input<A>("x", x, frame.H);
      Tensor norm = frame.template empty<A>({frame.B});
      Device::run(NormRow<A>{frame.H, x_rows, rows<A>(norm).data}, frame.B, frame.H, frame.device_index);
      return norm;
    };
    return x.scalar_type() == ScalarType::Double ? of_type(0.0) : of_type(0.0f);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("cell_forward", TORCH_BOX(&cell_forward));
    m.impl("cell_total", TORCH_BOX(&cell_total));
    m.impl("cell_backward", TORCH_BOX(&cell_backward));
    m.impl("row_norm", TORCH_BOX(&row_norm));
  }
};

}  // namespace fastrnn
