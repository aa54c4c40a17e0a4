// How the sequence kernels divide a layer. The CTAs of a group share the gate rows of one batch tile: each
// owns `units` hidden units of every gate, and their slice of W_hh.
#pragma once

#include <cstddef>

#include "primitives.cuh"

namespace fastrnn {

constexpr int kilobyte = 1024;
constexpr int shared_limit_sm80 = 163 * kilobyte;  // bytes that one CTA can have
constexpr int shared_limit_sm90 = 227 * kilobyte;

// The slice of W_hh of one CTA, as the operand of a product with K terms: planes * blocks strips of 16 rows.
// A warp takes one strip of every plane and a part of the terms; `blocks` neighbouring warps take different
// strips. Both operands come in chunks of 16 bytes per lane, four neighbouring lanes along K, and two
// products use a chunk up. Which product a term of a chunk belongs to does not matter, if both operands
// agree.
template <int planes_, int blocks_, int bytes, int K_, int rows_>
struct Slice {
  static constexpr int planes = planes_, blocks = blocks_, K = K_;
  static constexpr int rows = rows_;  // of the batch
  static constexpr int warps = 8, threads = warps * 32;
  static constexpr int splits = warps / blocks;  // warps that take different terms
  static constexpr int lane_terms = 16 / bytes, chunk = 4 * lane_terms;
  static constexpr int chunks = K / (chunk * splits);  // of one warp
  static constexpr int quads = chunks * planes * 2;    // of weights, per thread
  // Up to 128 registers of a thread hold weights; the rest of the slice is in shared memory. Reading
  // registers is free; shared memory gives 128 bytes a cycle, which would take the longest part of a step.
  // How many registers do not spill was found by compiling, and tests/test_csrc_build.py checks it.
  static constexpr bool deep = planes == 1 && rows > 8;  // many operands in flight
  static constexpr int most = deep ? 22 : quads <= 32 ? 32 : planes * rows <= 32 ? 30 : 26;
  static constexpr int held = quads < most ? quads : most;
  static constexpr int weight_bytes = (quads - held) * threads * int(sizeof(Quad));
  static constexpr int sum_bytes = splits * planes * rows * blocks * 16 * int(sizeof(float));
  // Quads of a thread that pass through the sums' memory at a time, on their way to registers.
  static constexpr int stage = sum_bytes / (threads * int(sizeof(Quad)));

  static constexpr bool whole = K % (chunk * splits) == 0;  // every warp has the same number of chunks
  static_assert(warps % blocks == 0 && rows % 8 == 0 && stage > 0);
};

// A bucket: up to K hidden units of a cell with `gates` gates and elements of `bytes`. In the forward a strip
// is 16 units of one gate, and the terms are h. In the backward a strip is 16 units, and the terms are the
// gradients of all gates: these are so many that every warp takes all strips, and no two warps the same
// terms.
template <int gates, int bytes, int K_, int rows_, int units_>
struct Tile {
  static constexpr int K = K_, rows = rows_, units = units_;
  static constexpr int strips = units / 16;  // of one gate
  // With three strips, the warps divide the gates instead, if there are four.
  static constexpr int blocks = strips < 3 ? strips : gates == 4 ? 4 : 1;
  using Forward = Slice<gates * strips / blocks, blocks, bytes, K, rows>;
  using Backward = Slice<strips, 1, bytes, gates * K, rows>;
  static constexpr bool whole = Forward::whole && Backward::whole;
  static constexpr int threads = Forward::threads;
  static constexpr int row_lanes = units < 32 ? units : 32;  // lanes that share a batch row
  static constexpr int thread_units =
      (units + row_lanes - 1) / row_lanes;  // units of a thread in the same row
  static constexpr int elements = (rows * row_lanes + threads - 1) / threads * thread_units;  // of one thread
};

// Element j of those (batch row, hidden unit) that a thread owns in all steps: `thread_units` units, 32
// apart, of some rows. Neighbouring lanes own neighbouring units.
template <class Tile>
struct ElementIndex {
  int row, unit;
  bool exists;

  FASTRNN_DEVICE explicit ElementIndex(int j)
      : row(thread_index() / Tile::row_lanes + j / Tile::thread_units * (Tile::threads / Tile::row_lanes)),
        unit(thread_index() % Tile::row_lanes + j % Tile::thread_units * Tile::row_lanes),
        exists(row < Tile::rows && unit < Tile::units) {}
};

// The sum over the lanes that share a batch row, pairwise in a fixed order.
template <class Tile>
FASTRNN_DEVICE double row_sum(double x) {
#pragma unroll
  for (int step = Tile::row_lanes / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
  return x;
}

}  // namespace fastrnn
