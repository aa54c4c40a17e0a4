// Launches the sequence kernels. The definitions are instantiated in scan_lstm.cu, scan_gru.cu and
// scan_rnn.cu, so that they compile side by side.
#pragma once

#include "../common/tensors.h"
#include "params.cuh"

namespace fastrnn {

// Which ways to exchange the launcher chooses from: see buckets.cuh.
enum class Ways { all, cluster, grid };

// Forward and backward of a cell over one storage type. link of the params is the launcher's, but for
// `timeout_flag`.
template <class Cell, class Storage>
struct Persistent {
  // CTAs of a group, 0 where the device cannot run the kernels, or not all directions at once.
  static int group_size(int64_t H, int64_t directions, Ways ways, int device);
  static void forward(const Cell& cell, const ForwardParams<Storage>& p, Ways ways, const Frame& frame);
  static void backward(const Cell& cell, const BackwardParams<Storage>& p, Ways ways, const Frame& frame);
};

}  // namespace fastrnn
