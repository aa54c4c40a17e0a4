// Launches the sequence kernels: chooses the instance that the device can run, sizes the grid so that CTAs
// that wait for each other are resident together, and allocates the workspace.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "buckets.cuh"
#include "persistent.h"

namespace fastrnn {

template <class Instance, class Scan, class Params>
__global__ void __launch_bounds__(Instance::Tile::threads, 1)
    walk_sequence(const __grid_constant__ Params p, const __grid_constant__ typename Instance::Cell cell) {
#ifdef __CUDA_ARCH__
  extern __shared__ Quad shared[];
  if constexpr (Instance::architecture * 10 <= __CUDA_ARCH__)
    Scan(p, cell, reinterpret_cast<char*>(shared)).run();
#endif
}

inline void check_cuda(cudaError_t error, const char* what) {
  // Clear the sticky error: it is reported here, and the next launch must not inherit it.
  if (error != cudaSuccess) cudaGetLastError();
  check(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "the limits of a CUDA device are not known");
  return value;
}

// One kernel: an instance forward or backward.
template <class Instance, class Scan, class Params>
class Kernel {
  using Tile = typename Instance::Tile;
  static constexpr auto* function = walk_sequence<Instance, Scan, Params>;

 public:
  // How many groups of `size` CTAs can be resident together.
  static int resident(int size, int device) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, int> known;
    std::lock_guard<std::mutex> lock(mutex);
    auto found = known.find({size, device});
    if (found == known.end()) found = known.emplace(std::pair(size, device), query(size, device)).first;
    return found->second;
  }

  // Launches `groups` groups of `size` CTAs for each direction.
  static void launch(const Params& p, const typename Instance::Cell& cell, int size, int groups,
                     cudaStream_t stream) {
    Launch launch(size, groups, p.D, stream);
    check_cuda(cudaLaunchKernelEx(&launch.config, function, p, cell),
               "a persistent fastrnn kernel did not launch");
  }

 private:
  struct Launch {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};

    Launch(int size, int groups, int directions, cudaStream_t stream) {
      config.gridDim = dim3(size, groups, directions);
      config.blockDim = dim3(Tile::threads);
      config.dynamicSmemBytes = Scan::shared_bytes;
      config.stream = stream;
      config.attrs = &attribute;
      config.numAttrs = 1;
      attribute.id = Instance::cluster ? cudaLaunchAttributeClusterDimension : cudaLaunchAttributeCooperative;
      if (Instance::cluster) {
        attribute.val.clusterDim = {unsigned(size), 1, 1};
      } else {
        attribute.val.cooperative = 1;
      }
    }
  };

  static int query(int size, int device) {
    if (attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 < Instance::architecture) return 0;
    // The device may run code for an older architecture, which has no body: see walk_sequence.
    cudaFuncAttributes code;
    check_cuda(cudaFuncGetAttributes(&code, function),
               "a persistent fastrnn kernel has no code for this device");
    if (code.ptxVersion < Instance::architecture) return 0;
    if (attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) < Scan::shared_bytes) return 0;
    check_cuda(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, Scan::shared_bytes),
        "a persistent fastrnn kernel does not get its shared memory");
    int count = 0;
    if constexpr (Instance::cluster) {
      Launch launch(size, 1, 1, nullptr);
      // A device need not support more than 8 CTAs per cluster, or sizes that are not powers of two.
      if (cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess ||
          cudaOccupancyMaxActiveClusters(&count, function, &launch.config) != cudaSuccess) {
        cudaGetLastError();
        return 0;
      }
      return count;
    }
    if (!attribute(cudaDevAttrCooperativeLaunch, device)) return 0;
    check_cuda(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, Tile::threads, Scan::shared_bytes),
        "the occupancy of a persistent fastrnn kernel is not known");
    return count * attribute(cudaDevAttrMultiProcessorCount, device) / size;
  }
};

// The implementation of Persistent, which persistent.h does not show.
template <class Cell, class Storage>
class Launcher {
 public:
  // CTAs of a group, 0 where the device cannot run the kernels, or not all directions at once.
  static int group_size(int64_t H, int64_t directions, Ways ways, int device) {
    int size = 0;
    with_instance(H, directions, ways, device, [&](auto, int found) { size = found; });
    return size;
  }

  template <bool forward, class Params>
  static void run(const Cell& cell, Params p, Ways ways, const Frame& frame) {
    with_instance(p.H, p.D, ways, frame.device_index, [&](auto instance, int size) {
      using Instance = decltype(instance);
      if constexpr (forward) {
        launch<ForwardKernel<Instance>, Instance, typename Instance::Tile::Forward>(cell, p, frame, size);
      } else {
        launch<BackwardKernel<Instance>, Instance, typename Instance::Tile::Backward>(cell, p, frame, size);
      }
    });
  }

 private:
  static constexpr uint32_t wait_limit = 1u << 24;  // polls of at least half a microsecond: some ten seconds

  template <class Instance>
  using ForwardKernel = Kernel<Instance, typename Instance::Forward, ForwardParams<Storage>>;
  template <class Instance>
  using BackwardKernel = Kernel<Instance, typename Instance::Backward, BackwardParams<Storage>>;

  // f(instance, group size) for the best instance whose forward and backward can both run, if there is one.
  template <class F>
  static void with_instance(int64_t H, int64_t directions, Ways ways, int device, const F& f) {
    torch::stable::accelerator::DeviceGuard guard(device);
    with_bucket(H, [&](auto bucket) {
      return (ways != Ways::grid &&
              try_instance<ByCluster<Cell, Storage, bucket>>(H, directions, device, f)) ||
             (ways != Ways::cluster &&
              (try_instance<ByWideGrid<Cell, Storage, bucket>>(H, directions, device, f) ||
               try_instance<ByGrid<Cell, Storage, bucket>>(H, directions, device, f)));
    });
  }

  template <class Instance, class F>
  static bool try_instance(int64_t H, int64_t directions, int device, const F& f) {
    if constexpr (Instance::exists) {
      const int size = static_cast<int>((H + Instance::Tile::units - 1) / Instance::Tile::units);
      // Different clusters do not wait for each other, so more of them may be launched than fit.
      const int64_t fewest = Instance::cluster ? 1 : directions;
      const bool runs = ForwardKernel<Instance>::resident(size, device) >= fewest &&
                        BackwardKernel<Instance>::resident(size, device) >= fewest;
      if (runs) f(Instance{}, size);
      return runs;
    }
    return false;
  }

  template <class Kernel, class Instance, class Slice, class Params>
  static void launch(const Cell& cell, Params& p, const Frame& frame, int size) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(frame.device_index, &stream));
    int groups = (p.B + Slice::rows - 1) / Slice::rows;
    const int most = Instance::cluster ? 65535 : Kernel::resident(size, frame.device_index) / p.D;
    groups = std::min(groups, most);
    // [D, groups] each: slots, norms, arrivals (a cache line)
    const int64_t line = 32, norms = int64_t{2} * size * Slice::rows;
    const int64_t slots =
        int64_t{2} * Slice::rows * Slice::K * int64_t{sizeof(Storage)} / int64_t{sizeof(float)};
    const int64_t all = int64_t{p.D} * groups;
    Tensor workspace = frame.empty<float>({Instance::cluster ? 0 : all * (line + norms + slots)});
    float* next = static_cast<float*>(workspace.mutable_data_ptr());
    if (!Instance::cluster)
      check_cuda(
          cudaMemsetAsync(next, 0, workspace.numel() * sizeof(float), static_cast<cudaStream_t>(stream)),
          "the workspace of a persistent fastrnn kernel");
    p.link.wait_limit = wait_limit;
    p.link.slots = next;
    p.link.norms = next + all * slots;
    p.link.arrivals = reinterpret_cast<uint32_t*>(p.link.norms + all * norms);
    Kernel::launch(p, cell, size, groups, static_cast<cudaStream_t>(stream));
  }
};

template <class Cell, class Storage>
int Persistent<Cell, Storage>::group_size(int64_t H, int64_t directions, Ways ways, int device) {
  return Launcher<Cell, Storage>::group_size(H, directions, ways, device);
}
template <class Cell, class Storage>
void Persistent<Cell, Storage>::forward(const Cell& cell, const ForwardParams<Storage>& p, Ways ways,
                                        const Frame& frame) {
  Launcher<Cell, Storage>::template run<true>(cell, p, ways, frame);
}
template <class Cell, class Storage>
void Persistent<Cell, Storage>::backward(const Cell& cell, const BackwardParams<Storage>& p, Ways ways,
                                         const Frame& frame) {
  Launcher<Cell, Storage>::template run<false>(cell, p, ways, frame);
}

}  // namespace fastrnn
