// Launches the sequence kernels. persistent.cuh defines this; scan_lstm.cu, scan_gru.cu and scan_rnn.cu
// instantiate it, so that they compile in parallel.
#pragma once

#include "../common/tensors.h"
#include "params.cuh"

namespace fastrnn {

// The ways to exchange among which the launcher chooses: see buckets.cuh.
enum class Ways { all, cluster, grid };

// Forward and backward of a cell over one storage type. The caller sets only `timeout_flag` in the params'
// link.
template <class Cell, class Storage>
struct Persistent {
  // CTAs of a group; 0 if the device cannot run the kernels, or not all directions at once.
  static int group_size(int64_t H, int64_t directions, Ways ways, int device);
  static void forward(const Cell& cell, const ForwardParams<Storage>& p, Ways ways, const Frame& frame);
  static void backward(const Cell& cell, const BackwardParams<Storage>& p, Ways ways, const Frame& frame);
};

}  // namespace fastrnn
