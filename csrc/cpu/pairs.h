// Products of bfloat16 numbers by pairs of terms, as processors with AVX512-BF16 add them: in float32, twice
// as many terms an instruction as of float32, with weights of half the size.
//
// They lose nothing only where the left operand holds bfloat16 numbers: Packed's `exact`.
#pragma once

#include <atomic>

#include "../common/storage.cuh"
#include "vectors.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define FASTRNN_AVX512_BF16
#include <immintrin.h>
#endif

namespace fastrnn {

using Pair = uint32_t;  // two terms, the first in the lower half

enum class PairProducts : int64_t { none, portable, avx512 };

inline PairProducts fastest_pair_products() {
#ifdef FASTRNN_AVX512_BF16
  __builtin_cpu_init();
  if (widest_vectors() == Vectors::avx512 && __builtin_cpu_supports("avx512bf16"))
    return PairProducts::avx512;
#endif
  return PairProducts::none;
}

// How the products are computed that may go by pairs. Tests change it.
inline std::atomic<PairProducts>& pair_products() {
  static std::atomic<PairProducts> chosen{fastest_pair_products()};
  return chosen;
}

// add(sum, x, weight): adds the product of x with each element of `weight` to the sums.

template <class A>
struct SingleTerms {
  using Word = A;

  template <class Vector>
  static FASTRNN_INLINE void add(Vector& sum, A x, const Vector& weight) {
    sum += x * weight;
  }
};

// For tests. It has the instruction's bits (Intel's manual, VDPBF16PS), except that this takes denormal
// numbers for zero: the second product is added and the sum rounded, then the first. The products are exact
// in float32.
struct PortablePairs {
  using Word = Pair;

  template <class Sums, class Pairs>
  static FASTRNN_INLINE void add(Sums& sum, Pair x, const Pairs& weight) {
    constexpr Pair second = 0xFFFF0000u;
    sum += float_of(x & second) * (Sums)(weight & second);
    sum += float_of(x << 16) * (Sums)(weight << 16);
  }
};

#ifdef FASTRNN_AVX512_BF16
#define FASTRNN_PAIRS_ISA FASTRNN_TARGET("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

struct Avx512Pairs {
  using Word = Pair;

  // Not FASTRNN_INLINE: its callers have this target only once they are inlined into `walk_avx512_bf16`.
  template <class Sums, class Pairs>
  FASTRNN_PAIRS_ISA static inline void add(Sums& sum, Pair x, const Pairs& weight) {
    sum = (Sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)_mm512_set1_epi32(x));
  }
};

template <class Body>
FASTRNN_PAIRS_ISA void walk_avx512_bf16(const Body& body, int64_t begin, int64_t end) {
  body.template walk<64>(begin, end);
}
#endif

}  // namespace fastrnn
