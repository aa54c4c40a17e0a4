// A launch of the sequence kernels on the emulator (emulated.h).
#pragma once

#include "cuda/buckets.cuh"

namespace fastrnn {

// The layout of a launch, and what must happen in it.
struct Layout {
  int groups;             // of a direction; 0: one per batch tile
  unsigned seed;          // of the order in which threads get their turn
  int wait_limit;         // polls
  int missing;            // CTA of the first direction's first group that never starts, or -1
  uint32_t timeout_flag;  // out: a wait has given up
};

template <class Scan, class Instance, class Params, class Cell>
void launch(Params& p, const Cell& cell, Layout& layout, int K) {
  using Tile = typename Instance::Tile;
  using Storage = typename Instance::Storage;
  const int size = (p.H + Tile::units - 1) / Tile::units, tiles = (p.B + Tile::rows - 1) / Tile::rows;
  const int groups = layout.groups ? layout.groups : tiles, all = p.D * groups;
  std::vector<uint32_t> arrivals(all * 32);
  std::vector<char> slots(static_cast<size_t>(all) * 2 * Tile::rows * K * sizeof(Storage));
  std::vector<float> norms(static_cast<size_t>(all) * 2 * size * Tile::rows);
  layout.timeout_flag = 0;
  p.link = {static_cast<uint32_t>(layout.wait_limit), arrivals.data(), slots.data(), norms.data(),
            &layout.timeout_flag};
  emulated::launch(p.D, groups, size, Tile::threads, Scan::shared_bytes, layout.seed, [&](char* shared) {
    if (block_direction() == 0 && block_group() == 0 && block_rank() == layout.missing) return;
    Scan(p, cell, shared).run();
  });
}

}  // namespace fastrnn
