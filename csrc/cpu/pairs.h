// Products of bfloat16 numbers by pairs of terms, as processors with AVX512-BF16 and AMX add them: in
// float32, more terms an instruction than of float32, with weights of half the size.
#pragma once

#include <atomic>

#include "../common/storage.cuh"
#include "vectors.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define FASTRNN_AVX512_BF16
#include <immintrin.h>
#endif
#if defined(FASTRNN_AVX512_BF16) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTRNN_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastrnn {

using Pair = uint32_t;                // two terms, the first in the lower half
constexpr int64_t rows_of_tile = 16;  // of AMX; also the words of a row

// The instructions of AVX512-BF16 or of AMX, or the same arithmetic in plain C++, for tests.
enum class PairProducts : int64_t { none, portable, avx512, portable_tiles, amx };

inline bool by_tiles(PairProducts kind) {
  return kind == PairProducts::portable_tiles || kind == PairProducts::amx;
}

// Whether the processor has AMX with bfloat16, and Linux lets this process use it.
inline bool may_use_amx() {
#ifdef FASTRNN_AMX
  constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;  // Intel's manual, CPUID leaf 7, EDX
  constexpr long request = 0x1023, tile_data = 18;       // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tiles) &&
         syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

inline bool may_use_avx512_pairs() {
#ifdef FASTRNN_AVX512_BF16
  __builtin_cpu_init();
  return widest_vectors() == Vectors::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

inline PairProducts fastest_pair_products() {
  static const PairProducts fastest = may_use_avx512_pairs() && may_use_amx() ? PairProducts::amx
                                      : may_use_avx512_pairs()                ? PairProducts::avx512
                                                                              : PairProducts::none;
  return fastest;
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
#define FASTRNN_PAIRS_ISA FASTRNN_TARGET("avx512bf16," FASTRNN_AVX512)

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
