// How long a group of CTAs takes to agree that a step is complete, by each of the means that a persistent
// kernel has. Every kernel runs `rounds` rounds of nothing but the agreement; the caller divides. Built and
// called by latency.py.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../csrc/cuda/primitives.cuh"

namespace cg = cooperative_groups;

namespace {

enum Kind { counter, flag, cluster, cluster_edge, kernel_edge };  // in the order of KINDS in latency.py

bool by_cluster(int kind) { return kind == cluster || kind == cluster_edge; }

constexpr int kThreads = 128;
constexpr long long kBound = 1LL << 31;  // clocks: about a second, after which a wait gives up

// Waits until ready() or the bound; false when it gave up.
template <class Ready>
__device__ bool wait(Ready ready) {
  for (long long begin = clock64(); !ready();) {
    if (clock64() - begin > kBound) return false;
  }
  return true;
}

// One counter per group, one arrival per CTA and round. A CTA that gives up leaves, and its peers follow.
__global__ void counter_barrier(unsigned* counters, int ctas, int rounds, int* failed) {
  unsigned* counter = counters + blockIdx.x / ctas * 32;  // a cache line of its own
  for (unsigned round = 1; round <= rounds; ++round) {
    __syncthreads();
    bool lost = false;
    if (threadIdx.x == 0) {
      fastrnn::add_release(counter, 1);
      lost = !wait([&] { return fastrnn::load_acquire(counter) >= round * ctas; });
    }
    if (__syncthreads_or(lost)) {
      *failed = 1;
      return;
    }
  }
}

// Every CTA publishes a word that holds the round's number, and reads those of its group: the data are their
// own flag.
__global__ void data_as_flag(unsigned* words, int ctas, int rounds, int* failed) {
  const int total = gridDim.x, first = blockIdx.x / ctas * ctas;
  for (unsigned round = 1; round <= rounds; ++round) {
    volatile unsigned* slot = words + round % 3 * total;
    if (threadIdx.x == 0) slot[blockIdx.x] = round;
    if (__syncthreads_or(threadIdx.x < ctas && !wait([&] { return slot[first + threadIdx.x] == round; }))) {
      *failed = 1;
      return;
    }
  }
}

// A thread-block cluster as the scan uses it (csrc/cuda/exchange.cuh): every CTA sends 16 bytes to every CTA,
// where they are counted, and sends again when all of its threads have read.
__global__ void cluster_delivery(unsigned*, int ctas, int rounds, int* failed) {
#if __CUDA_ARCH__ >= 900
  __shared__ fastrnn::Quad received[2][16];
  __shared__ fastrnn::Delivery deliveries[2];
  if (threadIdx.x == 0) fastrnn::init(deliveries), fastrnn::init(deliveries + 1);
  fastrnn::arrive_at_cluster();
  fastrnn::wait_for_cluster();
  for (unsigned round = 1; round <= rounds; ++round) {
    fastrnn::Quad* slot = received[round % 2];
    fastrnn::Delivery* delivery = deliveries + round % 2;
    const fastrnn::Quad sent{{round, round, round, round}};
    if (threadIdx.x < ctas) fastrnn::send(slot + blockIdx.x % ctas, threadIdx.x, sent, delivery);
    if (threadIdx.x == 0) fastrnn::announce(delivery, ctas * sizeof sent);
    fastrnn::await(delivery, (round - 1) / 2);
    if (threadIdx.x < ctas && slot[threadIdx.x].word[3] != round) *failed = 1;
    __syncthreads();
  }
#else
  *failed = 1;
#endif
}

// The same with the hardware's barrier: a word to the neighbour, and every block waits for all others.
__global__ void cluster_barrier(unsigned*, int ctas, int rounds, int* failed) {
#if __CUDA_ARCH__ >= 900
  __shared__ unsigned received[2];
  cg::cluster_group cluster = cg::this_cluster();
  unsigned* neighbour = cluster.map_shared_rank(received, (cluster.block_rank() + 1) % ctas);
  cluster.sync();
  for (unsigned round = 1; round <= rounds; ++round) {
    if (threadIdx.x == 0) neighbour[round % 2] = round;
    cluster.sync();
    if (threadIdx.x == 0 && received[round % 2] != round) *failed = 1;
  }
#else
  *failed = 1;
#endif
}

__global__ void nothing(unsigned*) {}

#define CHECK(call)                                     \
  do {                                                  \
    cudaError_t status = (call);                        \
    if (status != cudaSuccess) return -1000.0 - status; \
  } while (0)

// Seconds that `launch` takes on the stream, after a first run that is not timed.
template <class Launch>
double timed(cudaStream_t stream, Launch launch) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float milliseconds = 0;
  for (int pass = 0; pass < 2; ++pass) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(launch());
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
  }
  CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return milliseconds * 1e-3;
}

// A graph of `rounds` empty kernels, each after the one before it.
double kernel_edges(cudaStream_t stream, int blocks, int rounds) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int round = 0; round < rounds; ++round) nothing<<<blocks, kThreads, 0, stream>>>(nullptr);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  double seconds = timed(stream, [&] { return cudaGraphLaunch(executable, stream); });
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
  return seconds < 0 ? seconds : seconds / rounds;
}

// The launch of `groups` groups of `ctas` CTAs; `attribute` has to live as long.
cudaLaunchConfig_t configure(int kind, int ctas, int groups, cudaStream_t stream,
                             cudaLaunchAttribute& attribute) {
  attribute.id = by_cluster(kind) ? cudaLaunchAttributeClusterDimension : cudaLaunchAttributeCooperative;
  if (by_cluster(kind)) {
    attribute.val.clusterDim.x = ctas;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas * groups);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

constexpr void (*kKernels[])(unsigned*, int, int, int*) = {counter_barrier, data_as_flag, cluster_delivery,
                                                           cluster_barrier};

}  // namespace

// How many groups of `ctas` CTAs run at once, one CTA an SM. A cluster lies within a part of
// the chip, so that fewer fit. Negative: -1000 - the CUDA error.
extern "C" double groups_at_once(int kind, int ctas) {
  int device, sms, clusters;
  CHECK(cudaGetDevice(&device));
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  if (!by_cluster(kind)) return sms / ctas;
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = configure(kind, ctas, 1, nullptr, attribute);
  CHECK(cudaFuncSetAttribute(kKernels[kind], cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  CHECK(cudaOccupancyMaxActiveClusters(&clusters, kKernels[kind], &config));
  return clusters < sms / ctas ? clusters : sms / ctas;
}

// Seconds per agreement of `groups` groups of `ctas` CTAs each, no more than run at once. Negative:
// -1 a wait gave up, or what was sent did not arrive; else -1000 - the CUDA error.
extern "C" double agreement_seconds(int kind, int ctas, int groups, int rounds) {
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  if (kind == kernel_edge) {
    double seconds = kernel_edges(stream, ctas * groups, rounds);
    CHECK(cudaStreamDestroy(stream));
    return seconds;
  }
  unsigned* words;
  int *failed, gave_up;
  const size_t bytes = 3 * 32 * sizeof(unsigned) * ctas * groups;
  CHECK(cudaMalloc(&words, bytes));
  CHECK(cudaMalloc(&failed, sizeof(int)));
  CHECK(cudaMemset(failed, 0, sizeof(int)));
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = configure(kind, ctas, groups, stream, attribute);
  if (by_cluster(kind))
    CHECK(cudaFuncSetAttribute(kKernels[kind], cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  double seconds = timed(stream, [&] {
    cudaError_t status = cudaMemsetAsync(words, 0, bytes, stream);
    return status != cudaSuccess ? status
                                 : cudaLaunchKernelEx(&config, kKernels[kind], words, ctas, rounds, failed);
  });
  CHECK(cudaMemcpy(&gave_up, failed, sizeof(int), cudaMemcpyDeviceToHost));
  CHECK(cudaFree(words));
  CHECK(cudaFree(failed));
  CHECK(cudaStreamDestroy(stream));
  return gave_up ? -1 : seconds < 0 ? seconds : seconds / rounds;
}
