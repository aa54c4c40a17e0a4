// The step ops on the CPU: rows are shared among PyTorch's threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../step/ops.h"
#include "vectors.h"

namespace fastrnn {
namespace {

struct Cpu {
  // Gate elements that are worth a thread of their own: waking one costs some microseconds, more on a busy
  // machine.
  static constexpr int64_t grain = 16384;

  template <class Row>
  static void run(const Row& row, int64_t B, int64_t H, int32_t /*device_index*/) {
    int64_t row_work = std::max<int64_t>(H * Row::work, 1);
    int64_t rows_per_thread = (grain + row_work - 1) / row_work;
    torch::stable::parallel_for(0, B, rows_per_thread,
                                [&](int64_t begin, int64_t end) { walk_rows(row, begin, end); });
  }
};

}  // namespace
}  // namespace fastrnn

// Shapes and meaning: see fastrnn/reference.py, whose `forward`, `total` and `backward` these are, one step
// each.
STABLE_TORCH_LIBRARY_FRAGMENT(fastrnn_c, m) {
  m.def(
      "cell_forward(str cell, Tensor gx, Tensor gh, Tensor h_prev, Tensor? c_prev, Tensor? ln_c_weight, "
      "Tensor? ln_c_bias) -> (Tensor h, Tensor c, Tensor saved)");
  m.def(
      "cell_total(str cell, Tensor saved, Tensor c_prev, Tensor dh, Tensor dc, Tensor? ln_c_weight, "
      "Tensor? ln_c_bias) -> Tensor dc_total");
  m.def(
      "cell_backward(str cell, Tensor saved, Tensor h_prev, Tensor? c_prev, Tensor dh, Tensor? dc, "
      "Tensor? ln_c_weight, Tensor? ln_c_bias) -> (Tensor dgx, Tensor dgh, Tensor dh_prev, Tensor dc_prev)");
  m.def("row_norm(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CPU, m) { fastrnn::Ops<fastrnn::Cpu>::implement(m); }
