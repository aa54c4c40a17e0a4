// The step ops on the CPU: rows are shared among PyTorch's threads, and one row is walked with the widest
// vectors that the machine has. One binary serves all machines: each row function is compiled three times.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../step/ops.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTRNN_TARGET(isa) __attribute__((target(isa)))
#else
#define FASTRNN_TARGET(isa)
#endif

namespace fastrnn {
namespace {

enum class Vectors { baseline, avx2, avx512 };

Vectors widest_vectors() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Vectors::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Vectors::avx2;
#endif
  return Vectors::baseline;
}

template <class Row>
FASTRNN_HD void walk(const Row& row, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) row(b, OneThread{});
}

template <class Row>
FASTRNN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
void walk_avx512(const Row& row, int64_t begin, int64_t end) {
  walk(row, begin, end);
}

template <class Row>
FASTRNN_TARGET("avx2,fma")
void walk_avx2(const Row& row, int64_t begin, int64_t end) {
  walk(row, begin, end);
}

template <class Row>
void walk_baseline(const Row& row, int64_t begin, int64_t end) {
  walk(row, begin, end);
}

struct Cpu {
  // Gate elements that are worth a thread of their own: waking one costs some microseconds, more on a busy
  // machine.
  static constexpr int64_t grain = 16384;

  template <class Row>
  static void run(const Row& row, int64_t B, int64_t H, int32_t /*device_index*/) {
    static const Vectors vectors = widest_vectors();
    auto walk_rows = vectors == Vectors::avx512 ? walk_avx512<Row>
                     : vectors == Vectors::avx2 ? walk_avx2<Row>
                                                : walk_baseline<Row>;
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
