// Where a thread keeps values that it does not need all the time.
#pragma once

#include "tile.cuh"

namespace fastrnn {

// `count` values of each thread in shared memory, for what is not used during the product, when the weights
// need the registers. Every store waits for its value; the wait for the group hides that.
template <class Tile, class T, int count>
class SharedSpill {
 public:
  static constexpr int shared_bytes = count * Tile::threads * int(sizeof(T));

  FASTRNN_DEVICE explicit SharedSpill(char* shared) : own_(reinterpret_cast<T*>(shared) + thread_index()) {}
  FASTRNN_DEVICE T& operator[](int k) const { return own_[k * Tile::threads]; }

 private:
  T* own_;
};

// The same interface over registers.
template <class T, int count>
class Registers {
 public:
  static constexpr int shared_bytes = 0;

  FASTRNN_DEVICE explicit Registers(char*) {}
  FASTRNN_DEVICE T& operator[](int k) { return own_[k]; }

 private:
  T own_[count > 0 ? count : 1];
};

// The operands of the next step, loaded before the wait for the group.
template <class Tile, class T, int count>
using Prefetched = std::conditional_t<(Tile::rows > 8), SharedSpill<Tile, T, count>, Registers<T, count>>;

}  // namespace fastrnn
