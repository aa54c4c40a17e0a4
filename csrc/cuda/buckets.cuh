// The table of kernels: one per cell, storage type, bucket of H and way to exchange.
#pragma once

#include "../cells/gru.cuh"
#include "../cells/lstm.cuh"
#include "any_rnn.cuh"
#include "scan_backward.cuh"
#include "scan_forward.cuh"

namespace fastrnn {

// Calls f(integral_constant<K>) for the buckets K >= H, smallest first, until f returns true; returns whether
// one did.
template <int K, int... more, class F>
bool with_bucket_of(int64_t H, const F& f) {
  if (H <= K && f(std::integral_constant<int, K>{})) return true;
  if constexpr (sizeof...(more) > 0) return with_bucket_of<more...>(H, f);
  return false;
}
template <class F>
bool with_bucket(int64_t H, const F& f) {
  return with_bucket_of<256, 512, 640, 768, 1024, 1280>(H, f);
}

// One kernel, forward and backward, and whether its needs fit into the shared memory of a CTA.
template <class Cell_, class Storage_, int K, template <class, class> class Exchange, int rows, int units,
          int shared_limit>
struct Instance {
  using Cell = Cell_;
  using Storage = Storage_;
  using Tile = fastrnn::Tile<Cell::gates, int(sizeof(Storage)), K, rows, units>;
  using Forward = ScanForward<Cell, Storage, Tile, Exchange>;
  using Backward = ScanBackward<Cell, Storage, Tile, Exchange>;
  static constexpr bool fits =
      Tile::whole && Forward::shared_bytes <= shared_limit && Backward::shared_bytes <= shared_limit;
};

// The ways to exchange, in the order of preference. A cluster's batch tile is the smallest that the tensor
// cores allow, since its CTAs agree cheaply; through global memory, more rows share the cost of agreeing.
template <class Cell, class Storage, int K>
struct ByCluster : Instance<Cell, Storage, K, ClusterExchange, 8, (K > 512 ? 48 : 32), shared_limit_sm90> {
  static constexpr int architecture = 90;
  static constexpr bool cluster = true, exists = ByCluster::fits && K <= 16 * ByCluster::Tile::units;
};

// As many units as fit, so that groups are small. If not even 16 fit, fewer rows leave room for weights.
template <class Cell, class Storage, int K, int shared_limit>
struct GridOf {
  template <int rows, int units>
  using Of = Instance<Cell, Storage, K, GridExchange, rows, units, shared_limit>;
  using Small = std::conditional_t<Of<16, 16>::fits, Of<16, 16>, Of<8, 16>>;
  using Best = std::conditional_t<Of<16, 32>::fits, Of<16, 32>, Small>;
};

template <class Cell, class Storage, int K>
struct ByGrid : GridOf<Cell, Storage, K, shared_limit_sm80>::Best {
  static constexpr int architecture = 80;
  static constexpr bool cluster = false, exists = ByGrid::fits;
};
// With more shared memory, only where that gives smaller groups or larger batch tiles.
template <class Cell, class Storage, int K>
struct ByWideGrid : GridOf<Cell, Storage, K, shared_limit_sm90>::Best {
  static constexpr int architecture = 90;
  static constexpr bool cluster = false;
  using Less = ByGrid<Cell, Storage, K>;
  static constexpr int size = ByWideGrid::Tile::rows * ByWideGrid::Tile::units;
  static constexpr bool exists =
      ByWideGrid::fits && (!Less::exists || size > Less::Tile::rows * Less::Tile::units);
};

}  // namespace fastrnn
