// Where the elements of a thread lie in memory, and the batch tiles of its group.
#pragma once

#include "tile.cuh"

namespace fastrnn {

// Where this thread's elements lie. A tensor [T, B, planes, H] is addressed by the step, in 64 bits, and by
// the place within the step, in 32: few registers, and the launcher sees to it that B * planes * H fits.
template <class Tile>
class Map {
 public:
  // first: row of the batch tile
  FASTRNN_DEVICE Map(int B, int H, int first)
      : B_(B), H_(H), first_(first), unit_(block_rank() * Tile::units + Place<Tile>(0).unit) {}

  // A copy from which no address is carried from one step to the next: registers are for weights.
  FASTRNN_DEVICE Map afresh() const {
    Map copy = *this;
    forget(copy.first_), forget(copy.unit_);
    return copy;
  }

  // Whether the j-th element is one of the batch and of H.
  FASTRNN_DEVICE bool inside(int j) const { return Place<Tile>(j).exists && row(j) < B_ && unit(j) < H_; }
  // Whether it has a column among those that the group exchanges; the units of the last CTA may go beyond.
  FASTRNN_DEVICE bool exchanged(int j) const {
    return Place<Tile>(j).exists && (Tile::K % Tile::units == 0 || unit(j) < Tile::K);
  }
  FASTRNN_DEVICE int row(int j) const { return first_ + Place<Tile>(j).row; }
  FASTRNN_DEVICE int unit(int j) const { return unit_ + j % Tile::beside * Tile::width; }

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

// Where step i of a walk over T steps lies, among those of all directions: they take turns in walking back,
// beginning with the first if `reverse`.
FASTRNN_DEVICE int64_t step_of_walk(int64_t i, int64_t T, bool reverse) {
  const int direction = block_direction();
  return direction * T + (reverse != (direction % 2 == 1) ? T - 1 - i : i);
}

// f(map) for the batch tiles of this group, until one returns false.
template <class Tile, class F>
FASTRNN_DEVICE bool each_tile(int B, int H, const F& f) {
  for (int first = block_group() * Tile::rows; first < B; first += group_count() * Tile::rows)
    if (!f(Map<Tile>(B, H, first))) return false;
  return true;
}

// f(map, j) for every element that this thread owns, in all batch tiles.
template <class Tile, class F>
FASTRNN_DEVICE void each_owned(int B, int H, const F& f) {
  each_tile<Tile>(B, H, [&](const Map<Tile>& map) {
    for (int j = 0; j < Tile::elements; ++j)
      if (map.inside(j)) f(map, j);
    return true;
  });
}

}  // namespace fastrnn
