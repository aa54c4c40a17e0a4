// Where a thread keeps what it does not need all the time.
#pragma once

#include "tile.cuh"

namespace fastrnn {

// `count` values of each thread in shared memory: for what lies idle during the product, when registers are
// for weights. Every store waits for its value, which the agreement of a group through global memory hides.
template <class Tile, class T, int count>
class Drawer {
 public:
  static constexpr int shared_bytes = count * Tile::threads * int(sizeof(T));

  FASTRNN_DEVICE explicit Drawer(char* shared) : own_(reinterpret_cast<T*>(shared) + thread_index()) {}
  FASTRNN_DEVICE T& operator[](int k) const { return own_[k * Tile::threads]; }

 private:
  T* own_;
};

// The same in registers.
template <class T, int count>
class Registers {
 public:
  static constexpr int shared_bytes = 0;

  FASTRNN_DEVICE explicit Registers(char*) {}
  FASTRNN_DEVICE T& operator[](int k) { return own_[k]; }

 private:
  T own_[count > 0 ? count : 1];
};

// What a step reads ahead of the agreement.
template <class Tile, class T, int count>
using Ahead = std::conditional_t<(Tile::rows > 8), Drawer<Tile, T, count>, Registers<T, count>>;

}  // namespace fastrnn
