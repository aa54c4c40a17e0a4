// The widest vectors that the machine has, chosen at run time: one binary serves all machines, since whatever
// goes through `walk_widest` is compiled three times.
#pragma once

#include <cstdint>

#include "../cells/macros.cuh"
#include "../step/team.cuh"

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTRNN_TARGET(isa) __attribute__((target(isa)))
#else
#define FASTRNN_TARGET(isa)
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

// A body has walk<bytes>(begin, end): its rows from begin to end, with vectors of so many bytes.
template <class Body>
FASTRNN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
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

// A row function of step/rows.cuh as a body: one row after another, by one thread.
template <class Row>
struct RowByRow {
  const Row& row;

  template <int bytes>
  FASTRNN_HD void walk(int64_t begin, int64_t end) const {
    for (int64_t b = begin; b < end; ++b) row(b, OneThread{});
  }
};

template <class Row>
void walk_rows(const Row& row, int64_t begin, int64_t end) {
  walk_widest(RowByRow<Row>{row}, begin, end);
}

}  // namespace fastrnn
