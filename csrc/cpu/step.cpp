// The ops of one step of a whole network, `lstm_step` and so on: for streams, where one sequence or a few go
// on by one step at a time.
#include <torch/csrc/stable/library.h>

#include "../common/switches.h"
#include "dots.h"
#include "network.h"

namespace fastrnn {
namespace {

constexpr int64_t unit = 16;        // hidden units that a thread takes at once: a cache line of results
constexpr int64_t grain = 1 << 18;  // multiplications that are worth waking a thread

// f(begin, end) over [0, count) in whole units; work: multiplications of each.
template <class F>
void share_units(int64_t count, int64_t work, const F& f) {
  share((count + unit - 1) / unit, grain / (unit * work) + 1,
        [&](int64_t begin, int64_t end) { f(begin * unit, std::min(end * unit, count)); });
}

// One layer, with a cell of csrc/cells. Which thread computes a hidden unit does not change its bits.
template <class Cell, class A>
struct StepOfLayer {
  static constexpr int64_t gates = Cell::gates, states = Cell::states;

  int64_t B, I, P, H;
  RowView<const A> x, h_prev, c_prev;  // [B, I], [B, P], [B, H]
  RowView<const A> w_ih, w_hh;         // [gates * H, I], [gates * H, P]
  const A *b_ih, *b_hh;                // [gates * H]
  RowView<A> h, c;                     // [B, H], h before the projection

  // Hidden units from begin to end, in blocks of as many as a vector has lanes. Of one sequence, a gate of
  // many blocks is computed before the next gate, since long reads of a matrix are faster than short ones;
  // several sequences read the rows of a block while they are in the cache.
  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    constexpr int64_t lanes = Dots<A, bytes>::lanes, most = 64 / lanes;
    // Rows of blocks, of planes [lanes] each. before, now: the states h and c around the step.
    alignas(64) A gx[most * gates * lanes], gh[most * gates * lanes],
        before[most * 2 * lanes] = {}, now[most * 2 * lanes], saved[Cell::saved * lanes];
    const ForwardRow<Cell, A> cell{lanes,
                                   {gx, gates * lanes},
                                   {gh, gates * lanes},
                                   {before, 2 * lanes},
                                   {before + lanes, 2 * lanes},
                                   {now, 2 * lanes},
                                   {now + lanes, 2 * lanes},
                                   {saved, 0}};
    const int64_t at_once = B > 1 ? 1 : most;
    for (int64_t first = begin; first < end; first += at_once * lanes) {
      const int64_t last = std::min(first + at_once * lanes, end);
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t g = 0; g < gates; ++g)
          for (int64_t j = first, plane = g * lanes; j < last; j += lanes, plane += gates * lanes)
            gate<bytes>(g, j, std::min(lanes, last - j), b, gx + plane, gh + plane);
        for (int64_t j = first, block = 0; j < last; j += lanes, ++block) {
          const int64_t count = std::min(lanes, last - j), h_plane = block * 2 * lanes,
                        c_plane = h_plane + lanes;
          if constexpr (states == 1) std::copy_n(h_prev[b] + j, count, before + h_plane);
          if constexpr (states == 2) std::copy_n(c_prev[b] + j, count, before + c_plane);
          cell(block);
          std::copy_n(now + h_plane, count, h[b] + j);
          if constexpr (states == 2) std::copy_n(now + c_plane, count, c[b] + j);
        }
      }
    }
  }

 private:
  // Gate g of `count` units from j on, of sequence b. A gate reads only the sum of both products, which goes
  // to gx; except the one that multiplies W_hh h by another gate.
  template <int bytes>
  FASTRNN_INLINE void gate(int64_t g, int64_t j, int64_t count, int64_t b, A* gx, A* gh) const {
    constexpr int64_t lanes = Dots<A, bytes>::lanes;
    const bool apart = Cell::distinct_dgh && g == gates - 1;
    const int64_t first = g * H + j, rows = (g + 1) * H;
    alignas(64) A bias_x[lanes] = {}, bias_h[lanes] = {};
    std::copy_n(b_ih + first, count, bias_x);
    std::copy_n(b_hh + first, count, bias_h);
    Dots<A, bytes> of_x;
    of_x.add(w_ih, first, rows, x[b], I);
    if (apart) {
      Dots<A, bytes> of_h;
      of_h.add(w_hh, first, rows, h_prev[b], P);
      of_h.store(gh);
    } else {
      of_x.add(w_hh, first, rows, h_prev[b], P);
      std::fill_n(gh, lanes, A(0));
    }
    of_x.store(gx);
    FASTRNN_SIMD
    for (int64_t l = 0; l < lanes; ++l) {
      gx[l] += apart ? bias_x[l] : bias_x[l] + bias_h[l];
      gh[l] += apart ? bias_h[l] : A(0);
    }
  }
};

// Memory of a thread that its later steps use again.
template <class A>
A* workspace(int64_t count) {
  thread_local std::vector<A> memory;
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

struct StepSizes {
  int64_t B, I, H, P, layers = 0;
  bool bias = false, projects = false;

  int64_t weights_of_layer() const { return 2 + 2 * bias + projects; }
};

template <class A>
RowView<const A> rows_of(const Tensor& t) {
  return {data_of<A>(t), t.stride(0)};
}

template <class Cell, class A>
std::vector<Tensor> step_of_network(const StepSizes& sizes, const Frame& frame, const Tensor& x,
                                    const Optional& h0, const Optional& c0,
                                    const std::vector<Tensor>& weights) {
  const int64_t B = sizes.B, H = sizes.H, P = sizes.P, layers = sizes.layers;
  const bool bias = sizes.bias, projects = sizes.projects;
  const int64_t width = Cell::gates * H;
  Tensor y = frame.empty<A>({B, P}), h_n = frame.empty<A>({layers, B, P});
  std::vector<Tensor> found = {y, h_n};
  if (Cell::states == 2) found.push_back(frame.empty<A>({layers, B, H}));
  // Of the zeros one row is read for all sequences. Unprojected h's come after them.
  const int64_t longest = std::max(width, P);
  A* zeros = workspace<A>(longest + (projects ? B * H : 0));
  std::fill_n(zeros, longest, A(0));
  auto rows_of_state = [&](const Tensor& t, int64_t layer) {
    const int64_t columns = t.size(2);
    return RowView<A>{static_cast<A*>(t.mutable_data_ptr()) + layer * B * columns, columns};
  };
  auto given = [&](const Optional& t, int64_t layer) {
    if (!t.has_value()) return RowView<const A>{zeros, 0};
    return RowView<const A>{data_of<A>(*t) + layer * t->stride(0), t->stride(1)};
  };
  RowView<const A> input = rows_of<A>(x);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Tensor* own = &weights[layer * sizes.weights_of_layer()];
    const RowView<A> h = rows_of_state(h_n, layer);
    StepOfLayer<Cell, A> step{B,
                              layer == 0 ? sizes.I : P,
                              P,
                              H,
                              input,
                              given(h0, layer),
                              given(c0, layer),
                              rows_of<A>(own[0]),
                              rows_of<A>(own[1]),
                              bias ? data_of<A>(own[2]) : zeros,
                              bias ? data_of<A>(own[3]) : zeros,
                              projects ? RowView<A>{zeros + longest, H} : h,
                              Cell::states == 2 ? rows_of_state(found.back(), layer) : RowView<A>{}};
    share_units(H, Cell::gates * (step.I + P) * B,
                [&](int64_t begin, int64_t end) { walk_widest(step, begin, end); });
    if (projects) {
      const TimesRows<A> times{B, H, P, {step.h.data, H}, rows_of<A>(own[2 + 2 * bias]), h};
      share_units(P, H * B, [&](int64_t begin, int64_t end) { walk_widest(times, begin, end); });
    }
    input = {h.data, P};
  }
  std::copy_n(input.data, B * P, static_cast<A*>(y.mutable_data_ptr()));
  return found;
}

template <class A>
void check_step(const StepSizes& sizes, int64_t gates, int64_t states, const Frame& frame, const Tensor& x,
                const Optional& h0, const Optional& c0, const std::vector<Tensor>& weights) {
  const int64_t B = sizes.B, H = sizes.H, P = sizes.P, layers = sizes.layers;
  const bool bias = sizes.bias, projects = sizes.projects;
  frame.expect<A>("x", x, {B, sizes.I});
  if (h0.has_value()) frame.expect<A>("h0", *h0, {layers, B, P});
  check(states == 2 || !projects, "a projection is for the LSTM");
  if (c0.has_value()) frame.expect<A>("c0", *c0, {layers, B, H});
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Tensor* own = &weights[layer * sizes.weights_of_layer()];
    frame.expect<A>("w_ih", own[0], {gates * H, layer == 0 ? sizes.I : P});
    frame.expect<A>("w_hh", own[1], {gates * H, P});
    if (bias) frame.expect<A>("b_ih", own[2], {gates * H});
    if (bias) frame.expect<A>("b_hh", own[3], {gates * H});
    if (projects) frame.expect<A>("w_hr", own[2 + 2 * bias], {P, H});
  }
}

// What is not said is read from the weights, since each argument of an op takes time: a layer has W_ih and
// W_hh, biases if the third is a vector, and last W_hr if W_hh has other columns than units.
template <class Cell>
std::vector<Tensor> network_step(Tensor& x, Optional& h0, Optional c0, std::vector<Tensor>& weights) {
  check(x.dim() == 2, "x must have shape [B, I], got ", shape_of(x));
  const int64_t count = static_cast<int64_t>(weights.size());
  check(count > 1 && weights[1].dim() == 2, "a network needs w_ih and w_hh [gates * H, P] for each layer");
  StepSizes sizes{x.size(0), x.size(1), weights[1].size(0) / Cell::gates, weights[1].size(1)};
  sizes.bias = count > 2 && weights[2].dim() == 1, sizes.projects = sizes.P != sizes.H;
  const int64_t each = sizes.weights_of_layer();
  check(count % each == 0, "a network needs ", each, " weights for each layer, got ", count);
  sizes.layers = count / each;
  Frame frame(x, sizes.B, sizes.H);
  auto run = [&](auto number) {
    using A = decltype(number);
    check_step<A>(sizes, Cell::gates, Cell::states, frame, x, h0, c0, weights);
    make_last_dim_contiguous(x);
    if (h0.has_value()) make_last_dim_contiguous(*h0);
    if (c0.has_value()) make_last_dim_contiguous(*c0);
    for (Tensor& weight : weights) make_last_dim_contiguous(weight);
    return step_of_network<Cell, A>(sizes, frame, x, h0, c0, weights);
  };
  return x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

std::vector<Tensor> lstm_step(Tensor x, Optional h0, Optional c0, std::vector<Tensor> weights) {
  return network_step<LSTM>(x, h0, c0, weights);
}

template <class Cell>
std::vector<Tensor> step_of(Tensor x, Optional h0, std::vector<Tensor> weights) {
  return network_step<Cell>(x, h0, {}, weights);
}

}  // namespace
}  // namespace fastrnn

// x [B, I]; h0 [layers, B, P] and c0 [layers, B, H], or none for zeros; weights of each layer in torch.nn's
// order. Returns y [B, P], h and, of the LSTM, c: all new tensors.
STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_c, m) {
  m.def("lstm_step(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights) -> Tensor[]");
  m.def("gru_step(Tensor x, Tensor? h0, Tensor[] weights) -> Tensor[]");
  m.def("rnn_tanh_step(Tensor x, Tensor? h0, Tensor[] weights) -> Tensor[]");
  m.def("rnn_relu_step(Tensor x, Tensor? h0, Tensor[] weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CPU, m) {
  m.impl("lstm_step", TORCH_BOX(&fastrnn::lstm_step));
  m.impl("gru_step", TORCH_BOX(&fastrnn::step_of<fastrnn::GRU>));
  m.impl("rnn_tanh_step", TORCH_BOX(&fastrnn::step_of<fastrnn::RNN<fastrnn::Tanh>>));
  m.impl("rnn_relu_step", TORCH_BOX(&fastrnn::step_of<fastrnn::RNN<fastrnn::Relu>>));
}
