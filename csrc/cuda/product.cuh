// The product of a step: sums^T [strips, 16, rows] = W [strips, 16, K] x^T, where x [rows, K] comes from the
// exchange, and W is this CTA's slice, read once before the first step.
#pragma once

#include "tile.cuh"

namespace fastrnn {

template <class Storage, class Slice>
class Product {
 public:
  static constexpr int shared_bytes = Slice::weight_bytes + Slice::sum_bytes;

  // shared: [weight_bytes, sum_bytes]. weight(strip, unit, k): the slice, zero outside of W.
  template <class Weight>
  FASTRNN_DEVICE Product(char* shared, const Weight& weight)
      : warp_(thread_index() / 32),
        lane_(thread_index() % 32),
        rest_(reinterpret_cast<Quad*>(shared) + thread_index()),
        sums_(reinterpret_cast<float*>(shared + Slice::weight_bytes)) {
    // Through the shared memory of the sums: straight into so many registers, all loads would be in flight at
    // once and need as many registers again.
    Quad* stage = reinterpret_cast<Quad*>(sums_) + thread_index();
#pragma unroll
    for (int first = 0; first < Slice::held; first += Slice::stage) {
#pragma unroll 1
      for (int k = 0; k < Slice::stage && first + k < Slice::held; ++k)
        stage[k * Slice::threads] = fragment(weight, first + k);
#pragma unroll
      for (int k = 0; k < Slice::stage && first + k < Slice::held; ++k)
        held_[first + k] = stage[k * Slice::threads];
    }
#pragma unroll 1
    for (int q = Slice::held; q < Slice::quads; ++q)
      rest_[(q - Slice::held) * Slice::threads] = fragment(weight, q);
    sync_block();  // the stage is free
  }

  // Leaves the sums of every split in shared memory. A barrier must come before `sum`.
  template <class Exchange>
  FASTRNN_DEVICE void run(const Exchange& exchange) {
    make_opaque(warp_), make_opaque(lane_);
    float acc[ways][Slice::planes][tiles][4] = {};
    const Storage* from = exchange.slot_address(lane_ / 4, first_term(0));
    Quad x[depth][tiles];
#pragma unroll
    for (int c = 0; c < depth; ++c) load<Exchange>(from, c, x[c]);
#pragma unroll
    for (int c = 0; c < Slice::chunks; ++c) {
      if ((c + 1) * 2 * Slice::planes > Slice::held)
        sync_warp();  // otherwise weights are read too early, into too many registers
#pragma unroll
      for (int plane = 0; plane < Slice::planes; ++plane) {
        const int q = (c * Slice::planes + plane) * 2;
        multiply(acc, plane, weights(q), weights(q + 1), x[c % depth]);
      }
      if (c + depth < Slice::chunks) load<Exchange>(from, c + depth, x[c % depth]);
    }
#pragma unroll
    for (int plane = 0; plane < Slice::planes; ++plane) {
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float total = acc[0][plane][n][i];
          if constexpr (ways == 2) total += acc[1][plane][n][i];
          int row = n * 8 + lane_ % 4 * 2 + i % 2, unit = warp_ / Slice::splits * 16 + lane_ / 4 + i / 2 * 8;
          sums_[at(warp_ % Slice::splits, plane, row, unit)] = total;
        }
      }
    }
  }

  // The sum of one row and unit (of the strip's 16), added in the order of the splits.
  FASTRNN_DEVICE float sum(int strip, int row, int unit) const {
    float total = 0;
#pragma unroll
    for (int split = 0; split < Slice::splits; ++split)
      total += sums_[at(split, strip / Slice::blocks, row, strip % Slice::blocks * 16 + unit)];
    return total;
  }

 private:
  static constexpr int tiles = Slice::rows / 8, width = Slice::blocks * 16;
  // Chunks of x in flight: some 32 KB of a CTA, about what the level-2 cache delivers within its latency.
  static constexpr int depth = Slice::chunks < 8 / tiles ? Slice::chunks : 8 / tiles;
  static constexpr int ways =
      Slice::planes == 1 ? 2 : 1;  // so that a product need not wait for the previous one

  int warp_, lane_;
  Quad held_[Slice::held];  // of quads [chunks, planes, 2], the first
  Quad* rest_;              // the rest, `threads` apart; a thread reads only what it wrote
  float* sums_;             // [splits, planes, rows, blocks * 16], the last swizzled

  FASTRNN_DEVICE static int at(int split, int plane, int row, int unit) {
    int swizzled = unit ^ (row / 2 % (width / 8) * 8);  // the rows of one store lie in different banks
    return ((split * Slice::planes + plane) * Slice::rows + row) * width + swizzled;
  }

  FASTRNN_DEVICE Quad weights(int q) const {
    return q < Slice::held ? held_[q] : rest_[(q - Slice::held) * Slice::threads];
  }

  FASTRNN_DEVICE int first_term(int c) const {
    return (warp_ % Slice::splits * Slice::chunks + c) * Slice::chunk + lane_ % 4 * Slice::lane_terms;
  }

  // Quad q of the weights: from row lane / 4 of this warp's 16 rows of a plane, or 8 rows further if q is
  // odd.
  template <class Weight>
  FASTRNN_DEVICE Quad fragment(const Weight& weight, int q) const {
    union {
      Storage terms[Slice::lane_terms];
      Quad quad;
    } made;
    const int strip = q / 2 % Slice::planes * Slice::blocks + warp_ / Slice::splits;
    int unit = lane_ / 4 + q % 2 * 8, term = first_term(q / (2 * Slice::planes));
    make_opaque(unit), make_opaque(term);
#pragma unroll
    for (int i = 0; i < Slice::lane_terms; ++i) made.terms[i] = weight(strip, unit, term + i);
    return made.quad;
  }

  template <class Exchange>
  FASTRNN_DEVICE static void load(const Storage* from, int c, Quad (&x)[tiles]) {
#pragma unroll
    for (int n = 0; n < tiles; ++n) x[n] = Exchange::read(from + n * 8 * Exchange::stride + c * Slice::chunk);
  }

  FASTRNN_DEVICE static void multiply(float (&acc)[ways][Slice::planes][tiles][4], int plane, const Quad& low,
                                      const Quad& high, const Quad (&x)[tiles]) {
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
      mma<Storage>(acc[0][plane][n], low.word[0], high.word[0], low.word[1], high.word[1], x[n].word[0],
                   x[n].word[1]);
      mma<Storage>(acc[ways - 1][plane][n], low.word[2], high.word[2], low.word[3], high.word[3],
                   x[n].word[2], x[n].word[3]);
    }
  }
};

}  // namespace fastrnn
