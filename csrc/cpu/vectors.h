// Loops over rows, compiled for every width of vectors; the widest that the machine has is chosen at run
// time, so that one binary serves all machines.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTRNN_TARGET(isa) __attribute__((target(isa)))
#else
#define FASTRNN_TARGET(isa)
#endif

// Of its own accord g++ makes loops of half the width.
#ifdef __clang__
#define FASTRNN_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#define FASTRNN_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"
#endif

// A function without it would not be compiled for the caller's vectors.
#define FASTRNN_INLINE inline __attribute__((always_inline))

// FASTRNN_SIMD: before a loop whose iterations are independent. FASTRNN_UNROLL: before a short loop whose
// values must stay in registers.
#if defined(__GNUC__)
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

enum class Vectors { baseline, avx2, avx512 };

inline Vectors widest_vectors() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Vectors::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Vectors::avx2;
#endif
  return Vectors::baseline;
}

// A body has walk<bytes>(begin, end), which computes the rows from begin to end with vectors of `bytes`.
template <class Body>
FASTRNN_TARGET(FASTRNN_AVX512)
void walk_avx512(const Body& body, int64_t begin, int64_t end) {
  body.template walk<64>(begin, end);
}

template <class Body>
FASTRNN_TARGET("avx2,fma")
void walk_avx2(const Body& body, int64_t begin, int64_t end) {
  body.template walk<32>(begin, end);
}

template <class Body>
void walk_baseline(const Body& body, int64_t begin, int64_t end) {
  body.template walk<16>(begin, end);
}

template <class Body>
void walk_widest(const Body& body, int64_t begin, int64_t end) {
  static const Vectors vectors = widest_vectors();
  auto walk = vectors == Vectors::avx512 ? walk_avx512<Body>
              : vectors == Vectors::avx2 ? walk_avx2<Body>
                                         : walk_baseline<Body>;
  walk(body, begin, end);
}

// A row function of row_ops.h or cell_rows.h as a body: one row after another.
template <class Row>
struct RowByRow {
  const Row& row;

  template <int bytes>
  FASTRNN_INLINE void walk(int64_t begin, int64_t end) const {
    for (int64_t b = begin; b < end; ++b) row(b);
  }
};

template <class Row>
void walk_rows(const Row& row, int64_t begin, int64_t end) {
  walk_widest(RowByRow<Row>{row}, begin, end);
}

}  // namespace fastrnn
