// Who walks a row: one CPU thread here; a CUDA block in cuda/. A team says where its members start, how far
// they step, and adds up (or takes the maximum of) what each of them found.
#pragma once

#include <cstdint>

#include "../cells/macros.cuh"

// In front of a loop over a row whose iterations do not depend on each other; and of a short one whose values
// shall stay in registers.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define FASTRNN_PRAGMA(text) _Pragma(#text)
#define FASTRNN_SIMD FASTRNN_PRAGMA(omp simd)
#define FASTRNN_SIMD_REDUCE(...) FASTRNN_PRAGMA(omp simd reduction(__VA_ARGS__))
#define FASTRNN_UNROLL FASTRNN_PRAGMA(GCC unroll 16)
#else
#define FASTRNN_SIMD
#define FASTRNN_SIMD_REDUCE(...)
#define FASTRNN_UNROLL
#endif

namespace fastrnn {

struct OneThread {
  static constexpr int64_t first = 0, stride = 1;

  template <class A>
  FASTRNN_HD A sum(A part) const {
    return part;
  }
  template <class A>
  FASTRNN_HD A max(A part) const {
    return part;
  }
};

}  // namespace fastrnn
