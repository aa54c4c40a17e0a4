// Which kernels there are: one per cell, storage type, bucket of H and way to exchange. Data: a new size is a
// row.
#pragma once

#include "../cells/gru.cuh"
#include "../cells/lstm.cuh"
#include "any_rnn.cuh"
#include "scan_backward.cuh"
#include "scan_forward.cuh"

namespace fastrnn {

// Whether f(integral_constant<K>) took one of the buckets K that hold H; the smallest is asked first.
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

// One instance, forward and backward, and whether a CTA can hold what it needs.
template <class Cell_, class S_, int K, template <class, class> class Exchange, int rows, int units,
          int shared_limit>
struct Instance {
  using Cell = Cell_;
  using S = S_;
  using Tile = fastrnn::Tile<Cell::gates, int(sizeof(S)), K, rows, units>;
  using Forward = ScanForward<Cell, S, Tile, Exchange>;
  using Backward = ScanBackward<Cell, S, Tile, Exchange>;
  static constexpr bool fits =
      Tile::whole && Forward::shared_bytes <= shared_limit && Backward::shared_bytes <= shared_limit;
};

// The ways to exchange, in the order of preference. A cluster's batch tile is as small as the tensor cores
// take, since its agreement is cheap; through global memory more rows share the price of one.
template <class Cell, class S, int K>
struct ByCluster : Instance<Cell, S, K, ClusterExchange, 8, (K > 512 ? 48 : 32), shared_limit_sm90> {
  static constexpr int architecture = 90;
  static constexpr bool cluster = true, exists = ByCluster::fits && K <= 16 * ByCluster::Tile::units;
};

// As many units as fit, so that groups are small.
template <class Cell, class S, int K, int shared_limit>
constexpr int units_by_grid = Instance<Cell, S, K, GridExchange, 16, 32, shared_limit>::fits ? 32 : 16;
template <class Cell, class S, int K, int shared_limit>
using Grid = Instance<Cell, S, K, GridExchange, 16, units_by_grid<Cell, S, K, shared_limit>, shared_limit>;

template <class Cell, class S, int K>
struct ByGrid : Grid<Cell, S, K, shared_limit_sm80> {
  static constexpr int architecture = 80;
  static constexpr bool cluster = false, exists = ByGrid::fits;
};
// More shared memory, where that makes for smaller groups.
template <class Cell, class S, int K>
struct ByWideGrid : Grid<Cell, S, K, shared_limit_sm90> {
  static constexpr int architecture = 90;
  static constexpr bool cluster = false;
  static constexpr bool exists =
      ByWideGrid::fits &&
      (ByWideGrid::Tile::units > ByGrid<Cell, S, K>::Tile::units || !ByGrid<Cell, S, K>::exists);
};

}  // namespace fastrnn
