// The ops of a whole network on the CPU: `network_forward` and `network_backward`.
#include "network.h"

#include <torch/csrc/stable/library.h>

#include "../common/switches.h"

namespace fastrnn {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What both ops are given beside the initial states.
struct NetworkArguments {
  Tensor x;
  const Optional &batch_sizes, &reset_mask;
  const std::vector<Tensor>& weights;
  const std::string& cell;
  int64_t layers;
  bool bidirectional, bias, projects, batch_first;
};

// What the backward is given beside the gradients.
struct BackwardOptions {
  std::optional<double> clip_norm, clip_value;
  bool norms, needs_dx;
};

template <class Storage>
class Network {
 public:
  using A = typename Arithmetic<Storage>::type;

  Network(const Cell<Storage>& cell, const NetworkArguments& given, NetworkSizes sizes)
      : cell_(cell),
        has_c_(cell.states > 1),
        x_(given.x),
        weights_(given.weights),
        sizes_(sizes),
        call_(given.x, sizes.T, sizes.B, sizes.H, sizes.P, cell.states),
        width_(cell.gates * sizes.H),
        unbatched_(given.x.dim() == 2 && !sizes.packed()),
        no_h_(sizes.P),
        no_c_(sizes.H) {
    divide();
    if (given.reset_mask.has_value()) set_flags(*given.reset_mask);
  }

  Outputs forward(const Optional& h0, const Optional& c0, bool save) const {
    expect_states("h0", h0, "c0", c0);
    NetworkMemory<Storage> memory(sizes_, cell_, save);
    const int64_t bytes = sizes_.layers * memory.of_layer;
    Tensor kept = call_.frame.template empty<uint8_t>({save ? bytes : 0});
    Aligned<char> scratch(save ? 0 : bytes);
    memory.data = save ? static_cast<char*>(kept.mutable_data_ptr()) : scratch.data();
    Tensor y = like_input(sizes_.outputs()), h_n = state<Storage>(sizes_.P),
           c_n = has_c_ ? state<A>(sizes_.H) : none();
    for (int64_t layer = 0; layer < sizes_.layers; ++layer) {
      const Storage* input = layer == 0 ? data_of<Storage>(x_) : memory.y(layer - 1);
      Widened<Storage> rows(input, sizes_.rows(), sizes_.inputs(layer));
      for (int64_t d = 0; d < sizes_.directions; ++d)
        walk_forward(layer, d, rows.rows(), h0, c0, memory, save, h_n, c_n);
    }
    // The user may change the output in place.
    std::copy_n(memory.y(sizes_.layers - 1), sizes_.rows() * sizes_.outputs(),
                static_cast<Storage*>(y.mutable_data_ptr()));
    return Outputs(y, h_n, c_n, kept);
  }

  // dx, dh0, dc0, norms [layers * D, 2, states, T, B], and the weights' gradients, in the order of the
  // weights.
  std::vector<Tensor> backward(const Optional& dy, const Optional& dh_n, const Optional& dc_n,
                               const Optional& h0, const Optional& c0, const Tensor& kept,
                               const BackwardOptions& options) const {
    expect_states("h0", h0, "c0", c0);
    expect_states("dh_n", dh_n, "dc_n", dc_n);
    if (dy.has_value())
      check(dy->dim() == x_.dim() && dy->size(0) == x_.size(0) &&
                (x_.dim() == 2 || dy->size(1) == x_.size(1)) && dy->size(x_.dim() - 1) == sizes_.outputs() &&
                dy->scalar_type() == x_.scalar_type(),
            "dy must be as the output, got ", shape_of(*dy));
    NetworkMemory<Storage> memory(sizes_, cell_, true);
    check(kept.numel() == sizes_.layers * memory.of_layer && kept.scalar_type() == ScalarType::Byte,
          "kept must be that of the forward");
    memory.data = static_cast<char*>(kept.mutable_data_ptr());  // read only
    Tensor dx = options.needs_dx ? like_input(sizes_.I) : none();
    Tensor dh0 = state<Storage>(sizes_.P), dc0 = has_c_ ? state<A>(sizes_.H) : none();
    const int64_t norms_of_walk = 2 * cell_.states * sizes_.T * sizes_.B;
    Tensor norms = options.norms ? norms_of_all_walks() : none();
    std::vector<Tensor> found = {dx, dh0, dc0, norms};
    const size_t first_weight = found.size();
    for (const Tensor& weight : weights_) found.push_back(like(weight));
    const int64_t of_layer = sizes_.layers > 1 ? sizes_.rows() * sizes_.outputs() : 0;
    Aligned<Storage> dinput(of_layer), doutput(of_layer);
    Storage *above = doutput.data(), *below = dinput.data();
    for (int64_t layer = sizes_.layers - 1; layer >= 0; --layer, std::swap(above, below)) {
      Storage* to = layer > 0          ? below
                    : options.needs_dx ? static_cast<Storage*>(dx.mutable_data_ptr())
                                       : nullptr;
      for (int64_t d = 0; d < sizes_.directions; ++d) {
        const int64_t k = layer * sizes_.directions + d;
        BackwardScan<Storage> scan(cell_);
        fill(scan, d);
        if (options.clip_norm.has_value()) scan.clip_norm = static_cast<A>(*options.clip_norm);
        if (options.clip_value.has_value()) scan.clip_value = static_cast<A>(*options.clip_value);
        scan.norms_stride = sizes_.T * sizes_.B;
        A* const norms_of_this =
            options.norms ? static_cast<A*>(norms.mutable_data_ptr()) + k * norms_of_walk : nullptr;
        if (dh_n.has_value()) scan.dh_n = state_of<Storage>(dh_n, k, no_h_);
        if (dc_n.has_value()) scan.dc_n = state_of<A>(dc_n, k, no_c_);
        scan.dh0 = state_rows<Storage>(dh0, k, sizes_.P);
        if (has_c_) scan.dc0 = state_rows<A>(dc0, k, sizes_.H);
        Steps<const Storage> dy_of_layer;
        if (layer < sizes_.layers - 1)
          dy_of_layer = sizes_.template steps<const Storage>(above + d * sizes_.P, sizes_.outputs(), 0);
        else if (dy.has_value())
          dy_of_layer = incoming(*dy, d);
        walk_backward(layer, d, scan, dy_of_layer, norms_of_this, h0, c0, memory, to,
                      weights_of(&found[first_weight], k, sizes_));
      }
    }
    return found;
  }

 private:
  // Steps from `time` on, the rows of which begin with `first`.
  struct Chunk {
    int64_t time, steps, first, rows;
  };

  // Divides the steps into chunks, in the order of time. There is one where the rows of a step are not side
  // by side, and in a half type: the gradient of h would be rounded between two.
  void divide() {
    const bool whole = sizes_.batch_first || !std::is_same_v<Storage, A>;
    const int64_t most = whole ? sizes_.rows() : NetworkSizes::rows_of_chunk(width_);
    for (int64_t time = 0; time < sizes_.T;) {
      Chunk next{time, 0, sizes_.row(time), 0};
      do next.rows += sizes_.running(time + next.steps++);
      while (time + next.steps < sizes_.T && next.rows <= most);
      chunks_.push_back(next);
      most_rows_ = std::max(most_rows_, next.rows);
      time += next.steps;
    }
  }

  // The k-th chunk of a walk.
  const Chunk& chunk(size_t k, int64_t d) const { return chunks_[d == 0 ? k : chunks_.size() - 1 - k]; }

  // As `fold_flags` of fastrnn/stack.py: a walk back in time enters t from t + 1, where a new segment may
  // begin.
  void set_flags(const Tensor& reset_mask) {
    const int64_t T = sizes_.T, B = sizes_.B;
    check(!sizes_.packed(), "packed rows have no resets");
    check(reset_mask.dim() == 2 && reset_mask.size(0) == T && reset_mask.size(1) == B &&
              reset_mask.scalar_type() == ScalarType::Bool && reset_mask.is_cpu(),
          "reset_mask must be bool [", T, ", ", B, "] on the CPU, got ", dtype_name(reset_mask.scalar_type()),
          ' ', shape_of(reset_mask));
    const bool* given = data_of<bool>(reset_mask);
    for (int64_t d = 0; d < sizes_.directions; ++d) {
      flags_[d].resize(T * B);
      for (int64_t t = d; t < T; ++t)
        for (int64_t b = 0; b < B; ++b)
          if (given[t * reset_mask.stride(0) + b * reset_mask.stride(1)]) flags_[d][(t - d) * B + b] = reset;
    }
  }

  template <class ScanOfCell>
  void set_steps(ScanOfCell& scan, const Chunk& now) const {
    const std::vector<uint8_t>& flags = flags_[scan.reverse];
    scan.T = now.steps;
    if (!flags.empty()) scan.flags = {flags.data() + now.time * sizes_.B, sizes_.B, 1, 1};
    scan.batch_sizes = sizes_.packed() ? sizes_.batch_sizes.data() + now.time : nullptr;
  }

  // One layer in one direction. `input`: all rows of the layer's input.
  void walk_forward(int64_t layer, int64_t d, RowView<const A> input, const Optional& h0, const Optional& c0,
                    const NetworkMemory<Storage>& memory, bool save, const Tensor& h_n,
                    const Tensor& c_n) const {
    const int64_t k = layer * sizes_.directions + d, H = sizes_.H, P = sizes_.P;
    NetworkWeights weights = weights_of(weights_.data(), k, sizes_);
    std::vector<A> b_ih = widened_vector<Storage>(weights.b_ih), b_hh = widened_vector<Storage>(weights.b_hh);
    if (!cell_.distinct_dgh)  // only the sum is used
      for (size_t j = 0; j < b_ih.size(); ++j) b_ih[j] += b_hh[j];
    MatrixProduct<Storage> product(transposed(matrix_of<Storage>(weights.w_ih)),
                                   b_ih.empty() ? nullptr : b_ih.data(), sizes_.rows(), true);
    ForwardScan<Storage> scan(cell_);
    fill(scan, d);
    scan.h0 = state_of<Storage>(h0, k, no_h_);
    if (has_c_) scan.c0 = state_of<A>(c0, k, no_c_);
    scan.h_n = state_rows<Storage>(h_n, k, P);
    if (has_c_) scan.c_n = state_rows<A>(c_n, k, H);
    const A* bias = cell_.distinct_dgh && !b_hh.empty() ? b_hh.data() : nullptr;
    scan.weights.w_hh = recurrence(transposed(matrix_of<Storage>(weights.w_hh)), bias, true);
    if (weights.w_hr) scan.weights.w_hr = projection(transposed(matrix_of<Storage>(*weights.w_hr)));
    // Where there is room, W_ih x is computed in the memory of what the cell saves, which replaces it.
    const bool in_saved = save && std::is_same_v<Storage, A> && padded<A>(width_) <= cell_.saved * H;
    Buffer<A> gx_of_chunk(in_saved ? 0 : most_rows_, width_);
    Aligned<Storage> narrowed(std::is_same_v<Storage, A> ? 0 : most_rows_ * width_);
    for (size_t number = 0; number < chunks_.size(); ++number) {
      const Chunk& now = chunk(number, d);
      set_steps(scan, now);
      if (save) {
        scan.saved =
            sizes_.steps(memory.saved(layer, d) + now.first * cell_.saved * H, cell_.saved * H, now.time);
        if (has_c_) scan.c = sizes_.steps(memory.c(layer, d) + now.first * H, H, now.time);
      }
      scan.y =
          sizes_.steps(memory.y(layer) + now.first * sizes_.outputs() + d * P, sizes_.outputs(), now.time);
      RowView<A> gx = gx_of_chunk;
      if constexpr (std::is_same_v<Storage, A>)
        if (in_saved) gx = {scan.saved.data, cell_.saved * H};
      product({input[now.first], input.stride}, 1, now.rows, gx);
      if constexpr (std::is_same_v<Storage, A>) {
        scan.gx = sizes_.template steps<const Storage>(gx.data, gx.stride, now.time);
      } else {
        walk_rows(Write<Storage, A>{width_, {gx.data, gx.stride}, {narrowed.data(), width_}}, 0, now.rows);
        scan.gx = sizes_.template steps<const Storage>(narrowed.data(), width_, now.time);
      }
      call_.run(scan, cell_.gates);
      scan.h0 = {scan.h_n.data, 0, P, 1}, scan.c0 = {scan.c_n.data, 0, H, 1};
    }
  }

  // One layer in one direction, with its scan ready but for the steps. `dy`: of all its steps. `norms`: of
  // this walk, [2, states, T, B], or null. `to`: the gradient of the layer's input, or null; `found`: the
  // weights' gradients.
  void walk_backward(int64_t layer, int64_t d, BackwardScan<Storage>& scan, const Steps<const Storage>& dy,
                     A* norms, const Optional& h0, const Optional& c0, const NetworkMemory<Storage>& memory,
                     Storage* to, const NetworkWeights& found) const {
    const int64_t k = layer * sizes_.directions + d, H = sizes_.H, P = sizes_.P,
                  inputs = sizes_.inputs(layer);
    const Storage* input = layer == 0 ? data_of<Storage>(x_) : memory.y(layer - 1);
    NetworkWeights weights = weights_of(weights_.data(), k, sizes_);
    scan.weights.w_hh = recurrence(matrix_of<Storage>(weights.w_hh), nullptr, false);
    if (weights.w_hr) scan.weights.w_hr = projection(matrix_of<Storage>(*weights.w_hr));
    MatrixProduct<Storage> to_input(matrix_of<Storage>(weights.w_ih), nullptr, to ? sizes_.rows() : 0);
    Aligned<Storage> dgx(most_rows_ * width_), dgh(cell_.distinct_dgh ? most_rows_ * width_ : 0);
    const int64_t projected_rows = sizes_.projects ? most_rows_ : 0;
    Aligned<Storage> dh_new(projected_rows * P);
    Buffer<A> h_prev(most_rows_, P), unprojected(projected_rows, H);
    const Steps<const Storage> first_h = state_of<Storage>(h0, k, no_h_);
    const Steps<const A> first_c = has_c_ ? state_of<A>(c0, k, no_c_) : Steps<const A>{};
    std::vector<Storage> h_before;
    std::vector<A> c_before;
    std::vector<double> db_ih(width_), db_hh(cell_.distinct_dgh ? width_ : 0);
    const Storage* y = memory.y(layer) + d * P;
    for (size_t number = chunks_.size(); number-- > 0;) {
      const Chunk& now = chunk(number, d);
      const bool adds = number + 1 < chunks_.size();
      set_steps(scan, now);
      scan.dgx = sizes_.steps(dgx.data(), width_, now.time);
      if (cell_.distinct_dgh) scan.dgh = sizes_.steps(dgh.data(), width_, now.time);
      if (sizes_.projects) scan.dh_new = sizes_.steps(dh_new.data(), P, now.time);
      if (dy) scan.dy = dy.from(now.time);
      if (norms != nullptr) scan.norms = norms + now.time * sizes_.B;
      scan.saved = sizes_.template steps<const Storage>(memory.saved(layer, d) + now.first * cell_.saved * H,
                                                        cell_.saved * H, now.time);
      scan.y =
          sizes_.template steps<const Storage>(y + now.first * sizes_.outputs(), sizes_.outputs(), now.time);
      if (has_c_) scan.c = sizes_.template steps<const A>(memory.c(layer, d) + now.first * H, H, now.time);
      scan.h0 = first_h, scan.c0 = first_c;
      if (number > 0) {
        const int64_t before = d == 0 ? now.time - 1 : now.time + now.steps;
        scan.h0 = states_after<Storage>(before, P, y, sizes_.outputs(), first_h, h_before);
        if (has_c_) scan.c0 = states_after<A>(before, H, memory.c(layer, d), H, first_c, c_before);
      }
      call_.run(scan, cell_.gates);
      scan.dh_n = {scan.dh0.data, 0, P, 1}, scan.dc_n = {scan.dc0.data, 0, H, 1};
      previous_states(scan, now, h_prev);
      Widened<Storage> of_x(dgx.data(), now.rows, width_), of_h(dgh.data(), dgh_rows(now), width_);
      const RowView<const A> dgh_of_chunk = cell_.distinct_dgh ? of_h.rows() : of_x.rows();
      of_matrix(of_x.rows(), matrix_of<Storage>(input + now.first * inputs, now.rows, inputs), found.w_ih,
                adds);
      of_matrix(dgh_of_chunk, Matrix<A>{h_prev[0], now.rows, P, padded<A>(P), 1}, found.w_hh, adds);
      if (sizes_.projects) {
        unproject(scan, now.rows, unprojected);
        Widened<Storage> of_h_new(dh_new.data(), now.rows, P);
        of_matrix(of_h_new.rows(), Matrix<A>{unprojected[0], now.rows, H, padded<A>(H), 1}, *found.w_hr,
                  adds);
      }
      if (sizes_.bias) add_rows(of_x.rows(), now.rows, db_ih);
      if (sizes_.bias && cell_.distinct_dgh) add_rows(of_h.rows(), now.rows, db_hh);
      if (to != nullptr)
        product_into(to_input, of_x.rows(), 1, now.rows, inputs, to + now.first * inputs, d > 0);
    }
    if (!sizes_.bias) return;
    store_sums<Storage>(db_ih, *found.b_ih);
    store_sums<Storage>(cell_.distinct_dgh ? db_hh : db_ih, *found.b_hh);
  }

  // h before the projection of a chunk's rows, [rows, H].
  void unproject(const BackwardScan<Storage>& scan, int64_t rows, const Buffer<A>& to) const {
    constexpr int64_t grain = 1 << 14;  // elements that are worth waking a thread
    const int64_t H = sizes_.H;
    const UnprojectedRow<Storage, A> row{H, {scan.saved.data, cell_.saved * H}, {scan.c.data, H}, to};
    share(rows, grain / H + 1, [&](int64_t begin, int64_t end) { walk_rows(row, begin, end); });
  }

  int64_t dgh_rows(const Chunk& now) const { return cell_.distinct_dgh ? now.rows : 0; }

  // The states [B, columns] of all sequences after step t of a walk, from rows `stride` apart; of those that
  // it has not begun, the initial ones. `merged` holds the states where they come from both.
  template <class X>
  Steps<const X> states_after(int64_t t, int64_t columns, const X* rows, int64_t stride,
                              const Steps<const X>& initial, std::vector<X>& merged) const {
    const int64_t running = sizes_.running(t);
    const X* found = rows + sizes_.row(t) * stride;
    if (running == sizes_.B) return {found, 0, sizes_.b_step() * stride, 1};
    merged.resize(sizes_.B * columns);
    for (int64_t b = 0; b < sizes_.B; ++b)
      for (int64_t j = 0; j < columns; ++j)
        merged[b * columns + j] =
            b < running ? found[b * stride + j] : initial.at(0, b).data[j * initial.j_stride];
    return {merged.data(), 0, columns, 1};
  }

  // The gradient of a matrix, `found` = the transpose of dout [rows, its outputs] times the rows that the
  // matrix was multiplied with; or its part of these rows, added, if `adds`.
  template <class In>
  void of_matrix(RowView<const A> dout, const Matrix<In>& multiplied, const Tensor& found, bool adds) const {
    const int64_t outputs = found.size(0);
    MatrixProduct<In> product(multiplied, nullptr, outputs);
    product_into(product, {dout.data, 1}, dout.stride, outputs, multiplied.N,
                 static_cast<Storage*>(found.mutable_data_ptr()), adds);
  }

  // Of packed rows, those after the end of a sequence are zero.
  Tensor norms_of_all_walks() const {
    const std::vector<int64_t> sizes{sizes_.layers * sizes_.directions, 2, cell_.states, sizes_.T, sizes_.B};
    return sizes_.packed() ? torch::stable::new_zeros(x_, sizes, dtype_of<A>())
                           : torch::stable::new_empty(x_, sizes, dtype_of<A>());
  }

  Tensor none() const { return call_.frame.template empty<Storage>({0}); }
  Tensor like(const Tensor& t) const {
    return t.dim() == 2 ? call_.frame.template empty<Storage>({t.size(0), t.size(1)})
                        : call_.frame.template empty<Storage>({t.size(0)});
  }
  Tensor like_input(int64_t columns) const {
    if (x_.dim() == 2) return call_.frame.template empty<Storage>({x_.size(0), columns});
    return call_.frame.template empty<Storage>({x_.size(0), x_.size(1), columns});
  }
  // Initial states, or gradients of the final ones.
  void expect_states(const char* name_h, const Optional& h, const char* name_c, const Optional& c) const {
    if (h.has_value()) expect_state<Storage>(name_h, *h, sizes_.P);
    if (c.has_value()) expect_state<A>(name_c, *c, sizes_.H);
  }
  template <class X>
  void expect_state(const char* name, const Tensor& t, int64_t columns) const {
    if (unbatched_)
      call_.frame.template expect<X>(name, t, {sizes_.walks(), columns});
    else
      call_.frame.template expect<X>(name, t, {sizes_.walks(), sizes_.B, columns});
  }
  // [layers * D, B, columns], without B for an unbatched input.
  template <class X>
  Tensor state(int64_t columns) const {
    return unbatched_ ? call_.frame.template empty<X>({sizes_.walks(), columns})
                      : call_.frame.template empty<X>({sizes_.walks(), sizes_.B, columns});
  }
  // The rows of one walk in what `state` made.
  template <class X>
  Steps<X> state_rows(const Tensor& t, int64_t k, int64_t columns) const {
    return {static_cast<X*>(t.mutable_data_ptr()) + k * sizes_.B * columns, 0, columns, 1};
  }

  // Whether each thread reads the weights of the scan only once.
  bool once() const { return sizes_.T == 1 && sizes_.B <= Scan::block; }
  Recurrence<Storage> recurrence(const Matrix<Storage>& matrix, const A* bias, bool exact) const {
    return Recurrence<Storage>::dense(matrix, once(), bias, exact, sizes_.T, sizes_.B);
  }
  std::unique_ptr<Packed<Storage>> projection(const Matrix<Storage>& matrix) const {
    return std::make_unique<Packed<Storage>>(matrix, once(), nullptr);
  }

  template <class ScanOfCell>
  void fill(ScanOfCell& scan, int64_t d) const {
    scan.B = sizes_.B, scan.H = sizes_.H, scan.P = sizes_.P, scan.C = call_.C;
    scan.reverse = d == 1;
  }

  // The gradient of the output, in any layout, of one direction.
  Steps<const Storage> incoming(const Tensor& dy, int64_t d) const {
    const int64_t last = dy.dim() - 1, t = sizes_.batch_first && !unbatched_ ? 1 : 0;
    const Storage* data = data_of<Storage>(dy) + d * sizes_.P * dy.stride(last);
    if (sizes_.packed()) return {data, 0, dy.stride(0), dy.stride(last), sizes_.first_rows.data()};
    return {data, dy.stride(t), unbatched_ ? 0 : dy.stride(1 - t), dy.stride(last)};
  }

  // The state that each step of the chunk starts from, [rows, P].
  void previous_states(const BackwardScan<Storage>& scan, const Chunk& now, const Buffer<A>& to) const {
    const int64_t P = sizes_.P;
    for (int64_t i = 0; i < scan.T; ++i) {
      const int64_t t = scan.step(i), time = now.time + t, running = sizes_.running(time);
      // Of a walk back in time, the sequences from `old` on begin at this step.
      const int64_t old = i == 0 ? 0 : std::min(running, sizes_.running(now.time + scan.step(i - 1)));
      RowView<A> rows{to[sizes_.row(time) - now.first], sizes_.b_step() * padded<A>(P)};
      if (old > 0)
        walk_rows(Read<Storage, A>{P, scan.y.at(scan.step(i - 1), 0), scan.y.j_stride, rows}, 0, old);
      walk_rows(Read<Storage, A>{P, scan.h0.at(0, 0), scan.h0.j_stride, rows}, old, running);
      for (int64_t b = 0; scan.flags && b < running; ++b)
        if (scan.flagged(t, b, reset)) std::fill_n(rows[b], P, A(0));
    }
  }

  const Cell<Storage>& cell_;
  const bool has_c_;
  const Tensor& x_;
  const std::vector<Tensor>& weights_;
  NetworkSizes sizes_;
  Call<Storage, A> call_;
  int64_t width_;
  bool unbatched_;
  std::vector<Chunk> chunks_;
  int64_t most_rows_ = 0;
  std::vector<uint8_t> flags_[2];  // of each direction, [T, B]; empty without resets
  std::vector<Storage> no_h_;
  std::vector<A> no_c_;
};

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

// f(network) of this cell, with `x` made contiguous and everything checked.
template <class F>
auto with_network(NetworkArguments& given, const F& f) {
  Tensor& x = given.x;
  const std::vector<Tensor>& weights = given.weights;
  const auto [layers, bidirectional, bias, projects, batch_first] =
      std::tuple(given.layers, given.bidirectional, given.bias, given.projects, given.batch_first);
  check(x.dim() == 2 || (x.dim() == 3 && !given.batch_sizes.has_value()),
        "x must have two or three dimensions, two if packed, got ", shape_of(x));
  const int64_t each = 2 + 2 * bias + projects, directions = bidirectional ? 2 : 1;
  check(layers > 0 && static_cast<int64_t>(weights.size()) == each * layers * directions, "a network needs ",
        each, " weights for each layer and direction");
  x = torch::stable::contiguous(x);
  const bool unbatched = x.dim() == 2;
  const int64_t time = batch_first && !unbatched ? 1 : 0;
  check(x.size(time) > 0, "a network needs at least one step, got ", shape_of(x));
  const Tensor &w_hh = weights[1], &last = weights[each - 1];
  check(w_hh.dim() == 2, "w_hh must have shape [gates * H, P], got ", shape_of(w_hh));
  check(!projects || last.dim() == 2, "w_hr must have shape [P, H], got ", shape_of(last));
  NetworkSizes sizes{x.size(time),
                     unbatched ? 1 : x.size(1 - time),
                     x.size(x.dim() - 1),
                     projects ? last.size(1) : w_hh.size(1),
                     w_hh.size(1),
                     layers,
                     directions,
                     batch_first && !unbatched,
                     bias,
                     projects,
                     {},
                     {}};
  if (given.batch_sizes.has_value()) set_packed(sizes, *given.batch_sizes, x.size(0));
  return with_dtype("x", x, [&](auto dtype) {
    using Storage = typename decltype(dtype)::Storage;
    const Cell<Storage>& equations = built_in_cell<Storage>(given.cell);
    check(!projects || equations.states > 1, "a projection is for the LSTM");
    Frame frame(x, sizes.B, sizes.H);
    const int64_t width = equations.gates * sizes.H;
    for (int64_t k = 0; k < sizes.walks(); ++k) {
      NetworkWeights w = weights_of(weights.data(), k, sizes);
      frame.expect<Storage>("w_ih", w.w_ih, {width, sizes.inputs(k / directions)});
      frame.expect<Storage>("w_hh", w.w_hh, {width, sizes.P});
      if (bias) frame.expect<Storage>("b_ih", *w.b_ih, {width});
      if (bias) frame.expect<Storage>("b_hh", *w.b_hh, {width});
      if (projects) frame.expect<Storage>("w_hr", *w.w_hr, {sizes.P, sizes.H});
    }
    return f(Network<Storage>(equations, given, sizes));
  });
}

Outputs network_forward(Tensor x, Optional batch_sizes, Optional reset_mask, Optional h0, Optional c0,
                        std::vector<Tensor> weights, std::string cell, int64_t layers, bool bidirectional,
                        bool bias, bool projects, bool batch_first, bool save) {
  to_arithmetic(c0);
  NetworkArguments given{x,      batch_sizes,   reset_mask, weights,  cell,
                         layers, bidirectional, bias,       projects, batch_first};
  Outputs found = with_network(given, [&](const auto& network) { return network.forward(h0, c0, save); });
  Tensor& c_n = std::get<2>(found);
  if (c_n.scalar_type() != x.scalar_type()) c_n = torch::stable::to(c_n, x.scalar_type());
  return found;
}

std::vector<Tensor> network_backward(Optional dy, Optional dh_n, Optional dc_n, Tensor x,
                                     Optional batch_sizes, Optional reset_mask, Optional h0, Optional c0,
                                     std::vector<Tensor> weights, Tensor kept, std::string cell,
                                     int64_t layers, bool bidirectional, bool bias, bool projects,
                                     bool batch_first, std::optional<double> clip_norm,
                                     std::optional<double> clip_value, bool norms, bool needs_dx) {
  to_arithmetic(c0), to_arithmetic(dc_n);
  NetworkArguments given{x,      batch_sizes,   reset_mask, weights,  cell,
                         layers, bidirectional, bias,       projects, batch_first};
  const BackwardOptions options{clip_norm, clip_value, norms, needs_dx};
  std::vector<Tensor> found = with_network(
      given, [&](const auto& network) { return network.backward(dy, dh_n, dc_n, h0, c0, kept, options); });
  if (found[2].scalar_type() != x.scalar_type()) found[2] = torch::stable::to(found[2], x.scalar_type());
  return found;
}

}  // namespace
}  // namespace fastrnn

// x [T, B, I], [B, T, I] with batch_first, [T, I], or with batch_sizes [T] packed rows [rows, I]; reset_mask
// bool [T, B] or none; h0 [layers * D, B, P] and c0 [layers * D, B, H] or none for zeros; weights of each
// layer and direction in torch.nn's order. `kept` holds what the backward reads, as bytes. What does not
// exist is an empty tensor.
#define FASTRNN_NETWORK \
  "str cell, int layers, bool bidirectional, bool bias, bool projects, bool batch_first, "

STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_c, m) {
  m.def(
      "network_forward(Tensor x, Tensor? batch_sizes, Tensor? reset_mask, Tensor? h0, Tensor? c0, "
      "Tensor[] weights, " FASTRNN_NETWORK "bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor kept)");
  // dx, dh0, dc0, norms [layers * D, 2, states, T, B], and the gradients of the weights.
  m.def(
      "network_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? batch_sizes, "
      "Tensor? reset_mask, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor kept, " FASTRNN_NETWORK
      "float? clip_norm, float? clip_value, bool norms, bool needs_dx) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CPU, m) {
  m.impl("network_forward", TORCH_BOX(&fastrnn::network_forward));
  m.impl("network_backward", TORCH_BOX(&fastrnn::network_backward));
}
