// What the sequence kernels need of the machine. A build without nvcc takes the same names from an emulator
// on its include path (tests/emulator), where a fiber is a CUDA thread: so a C++ compiler runs the same index
// arithmetic, exchange and order of steps.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/storage.cuh"

namespace fastrnn {

// 16 bytes: the most that one lane loads, stores or sends at a time.
struct alignas(16) Quad {
  uint32_t word[4];
};

}  // namespace fastrnn

#ifndef __CUDACC__
#include <emulated.h>
#else

#define FASTRNN_DEVICE __device__ __forceinline__

namespace fastrnn {

FASTRNN_DEVICE int thread_index() { return threadIdx.x; }
// The grid is [directions, groups, CTAs of a group].
FASTRNN_DEVICE int block_rank() { return blockIdx.x; }
FASTRNN_DEVICE int block_group() { return blockIdx.y; }
FASTRNN_DEVICE int group_size() { return gridDim.x; }
FASTRNN_DEVICE int group_count() { return gridDim.y; }
FASTRNN_DEVICE void sync_block() { __syncthreads(); }
// The compiler moves no access to memory across it.
FASTRNN_DEVICE void sync_warp() { __syncwarp(); }

// After this the compiler knows nothing of x: it computes what follows from x where it is used, rather than
// once before the loop, to be held in registers.
FASTRNN_DEVICE void make_opaque(int& x) { asm volatile("" : "+r"(x)); }

// Read blockIdx.z afresh each time, so that the addresses derived from it (most of them) are recomputed
// rather than held in registers.
FASTRNN_DEVICE int block_direction() {
  int direction = blockIdx.z;
  make_opaque(direction);
  return direction;
}

// The `value` of lane `lane`. All 32 lanes of a warp call it together; the same holds for mma.
FASTRNN_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(~0u, value, lane); }
FASTRNN_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

// x rounded to the ten bits that the tensor cores keep of a float32, which they would otherwise cut off.
FASTRNN_DEVICE float operand(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// d [16, 8] += a [16, k] b [k, 8]; k = 16 for the half types, 8 for float32. The PTX ISA (mma) says which
// lane holds which element.
#define FASTRNN_MMA(instruction)                                                    \
  asm volatile(instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
template <class Storage>
FASTRNN_DEVICE void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                        uint32_t b1) {
  if constexpr (sizeof(Storage) == 4)
    FASTRNN_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  else if constexpr (std::is_same_v<Storage, BFloat16>)
    FASTRNN_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  else
    FASTRNN_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
#undef FASTRNN_MMA

// From global memory that other CTAs write during the launch: past the level-1 cache, which is not coherent.
FASTRNN_DEVICE Quad load_shared_by_grid(const Quad* p) {
  uint4 x = __ldcg(reinterpret_cast<const uint4*>(p));
  return {{x.x, x.y, x.z, x.w}};
}
FASTRNN_DEVICE float load_shared_by_grid(const float* p) { return __ldcg(p); }

FASTRNN_DEVICE void add_release(uint32_t* p, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
FASTRNN_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
// The host reads the flag without waiting for the kernel.
FASTRNN_DEVICE void set_timeout_flag(uint32_t* p) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(1u) : "memory");
}

// Thread-block clusters (sm_90). A Delivery in a CTA's shared memory counts the bytes that peers send there;
// it is complete when all announced bytes have arrived. The alternative, ordinary stores and a fence, would
// also wait for everything that the CTA wrote to global memory.
struct alignas(16) Delivery {
  uint64_t barrier;
};
FASTRNN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// The address in CTA `rank` that corresponds to `p` in this CTA's shared memory.
FASTRNN_DEVICE uint32_t at_peer(const void* p, int rank) {
  uint32_t there = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
#endif
  return there;
}
FASTRNN_DEVICE void send(void* p, int rank, Quad x, Delivery* delivery) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
          at_peer(p, rank)),
      "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3]), "r"(at_peer(delivery, rank))
      : "memory");
#endif
}
FASTRNN_DEVICE void send(float* p, int rank, float x, Delivery* delivery) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(at_peer(p, rank)),
      "r"(__float_as_uint(x)), "r"(at_peer(delivery, rank))
      : "memory");
#endif
}
// One thread calls `init` before the CTAs of the cluster meet, and `announce` once per round.
FASTRNN_DEVICE void init(Delivery* delivery) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(delivery))
      : "memory");
#endif
}
FASTRNN_DEVICE void announce(Delivery* delivery, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(delivery)),
               "r"(bytes)
               : "memory");
#endif
}
// Waits until delivery number `count`, from 0, is complete. Every thread that reads what was sent calls it.
FASTRNN_DEVICE void await(Delivery* delivery, uint32_t count) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(delivery)), "r"(count % 2)
        : "memory");
  } while (!done);
#endif
}
FASTRNN_DEVICE void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
FASTRNN_DEVICE void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

}  // namespace fastrnn

#endif
