// The addresses of a thread's elements, and the batch tiles of its group.
#pragma once

#include "tile.cuh"

namespace fastrnn {

// Addresses this thread's elements. In a tensor [T, B, planes, H] the step is a 64-bit offset, the position
// within the step a 32-bit one, to save registers; the launcher checks that B * planes * H fits.
template <class Tile>
class TileIndexer {
 public:
  // first: the batch tile's first row
  FASTRNN_DEVICE TileIndexer(int B, int H, int first)
      : B_(B), H_(H), first_(first), unit_(block_rank() * Tile::units + ElementIndex<Tile>(0).unit) {}

  // A copy for one step. The compiler cannot derive its addresses before the loop over steps, where they
  // would occupy registers that the weights need.
  FASTRNN_DEVICE TileIndexer without_kept_addresses() const {
    TileIndexer copy = *this;
    make_opaque(copy.first_), make_opaque(copy.unit_);
    return copy;
  }

  // Whether the j-th element is inside the batch and H.
  FASTRNN_DEVICE bool inside(int j) const {
    return ElementIndex<Tile>(j).exists && row(j) < B_ && unit(j) < H_;
  }
  // Whether the j-th element has a column among those that the group exchanges. The last CTA may have units
  // beyond them.
  FASTRNN_DEVICE bool exchanged(int j) const {
    return ElementIndex<Tile>(j).exists && (Tile::K % Tile::units == 0 || unit(j) < Tile::K);
  }
  FASTRNN_DEVICE int row(int j) const { return first_ + ElementIndex<Tile>(j).row; }
  FASTRNN_DEVICE int unit(int j) const { return unit_ + j % Tile::thread_units * Tile::row_lanes; }

  // The j-th element of step t, plane `plane` of `planes`.
  template <int planes = 1, class T>
  FASTRNN_DEVICE T& at(T* tensor, int64_t t, int j, int plane = 0) const {
    return tensor[t * (int64_t{B_} * planes * H_) + (row(j) * planes + plane) * H_ + unit(j)];
  }

 private:
  int B_, H_, first_, unit_;
};

// Elements of a batch tile that have a column among those that the group exchanges.
template <class Tile>
FASTRNN_DEVICE int exchanged_elements() {
  const int units = group_size() * Tile::units;
  return Tile::rows * (Tile::K % Tile::units == 0 || units < Tile::K ? units : Tile::K);
}

// The index of step i of a walk over T steps, counted over all directions. Directions alternate; the first
// walks back in time if `reverse`.
FASTRNN_DEVICE int64_t step_of_walk(int64_t i, int64_t T, bool reverse) {
  const int direction = block_direction();
  return direction * T + (reverse != (direction % 2 == 1) ? T - 1 - i : i);
}

// f(map) for the batch tiles of this group, until f returns false.
template <class Tile, class F>
FASTRNN_DEVICE bool each_tile(int B, int H, const F& f) {
  for (int first = block_group() * Tile::rows; first < B; first += group_count() * Tile::rows)
    if (!f(TileIndexer<Tile>(B, H, first))) return false;
  return true;
}

// f(map, j) for every element that this thread owns, in all batch tiles.
template <class Tile, class F>
FASTRNN_DEVICE void each_owned(int B, int H, const F& f) {
  each_tile<Tile>(B, H, [&](const TileIndexer<Tile>& map) {
    for (int j = 0; j < Tile::elements; ++j)
      if (map.inside(j)) f(map, j);
    return true;
  });
}

}  // namespace fastrnn
