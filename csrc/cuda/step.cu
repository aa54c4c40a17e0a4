// The step ops on CUDA: one thread block per row of the batch. The same rows as on the CPU, and the same
// equations.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../step/ops.h"

namespace fastrnn {
namespace {

constexpr int warp = 32;
constexpr int max_threads = 256;

// The threads of one block. Sums go pairwise in a fixed order: same input, same bits.
struct Block {
  int64_t first = threadIdx.x;
  int64_t stride = blockDim.x;

  template <class A>
  __device__ A sum(A part) const {
    return reduce(part, [](A x, A y) { return x + y; });
  }
  template <class A>
  __device__ A max(A part) const {
    return reduce(part, [](A x, A y) { return x > y ? x : y; });
  }

  // What every thread found, combined; every thread gets it. blockDim.x is a multiple of the warp, at most
  // warp^2.
  template <class A, class Combine>
  __device__ A reduce(A part, Combine combine) const {
    __shared__ A of_warp[max_threads / warp];
    for (int step = warp / 2; step > 0; step /= 2) part = combine(part, __shfl_xor_sync(~0u, part, step));
    if (threadIdx.x % warp == 0) of_warp[threadIdx.x / warp] = part;
    __syncthreads();
    part = of_warp[0];
    for (unsigned w = 1; w < blockDim.x / warp; ++w) part = combine(part, of_warp[w]);
    __syncthreads();  // of_warp is free again
    return part;
  }
};

template <class Row>
__global__ void __launch_bounds__(max_threads) walk(const __grid_constant__ Row row, int64_t B) {
  Block block;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) row(b, block);
}

struct Cuda {
  template <class Row>
  static void run(const Row& row, int64_t B, int64_t H, int32_t device_index) {
    if (B == 0) return;
    torch::stable::accelerator::DeviceGuard guard(device_index);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    int64_t threads = std::clamp<int64_t>((H + warp - 1) / warp * warp, warp, max_threads);
    int64_t blocks = std::min<int64_t>(B, int64_t{1} << 20);
    walk<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0,
           static_cast<cudaStream_t>(stream)>>>(row, B);
    cudaError_t error = cudaGetLastError();
    check(error == cudaSuccess, "a fastrnn kernel did not launch: ", cudaGetErrorString(error));
  }
};

}  // namespace
}  // namespace fastrnn

// The schemas stand in csrc/cpu/step.cpp, whose library is loaded first.
STABLE_TORCH_LIBRARY_IMPL(fastrnn_c, CUDA, m) { fastrnn::Ops<fastrnn::Cuda>::implement(m); }
