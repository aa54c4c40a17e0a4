// All steps of one layer, backward; a CTA walks in one of its directions. Each step clips, runs the cell's
// backward on the units that this CTA owns, and publishes their gate gradients to the group; while those
// travel, it writes the norms to memory and loads the next step's operands; then the product with this CTA's
// columns of W_hh gives the gradient carried to the step before.
//
// With clipping by norm the factor is known only when every CTA of the group has sent its part of the norm.
// The cell's backward is linear in (dh, dc) together, so gate gradients travel unscaled, with the norms, and
// the receivers scale them.
#pragma once

#include "spill.cuh"
#include "tile_indexer.cuh"
#include "params.cuh"
#include "product.cuh"

namespace fastrnn {

template <class Cell, class Storage, class Tile, template <class, class> class ExchangeOf>
class ScanBackward {
  using Slice = typename Tile::Backward;
  using Exchange = ExchangeOf<Storage, Slice>;
  using Weights = Product<Storage, Slice>;
  static constexpr int G = Cell::gates, E = Tile::elements, states = Cell::states;
  static constexpr bool has_c = states == 2;
  static constexpr int sent = G + (Cell::distinct_dgh ? G : 0), planes = sent + states;
  // Per element: dgx, dgh where it differs, and what reaches the previous states past W_hh.
  using Unscaled = SharedSpill<Tile, float, E * planes>;
  // Prefetched per element, narrow: the saved planes, dy, and h_prev where the cell reads it; wide: dc and
  // c_prev.
  static constexpr int narrow_planes = Cell::saved + 1 + Cell::distinct_dgh, wide_planes = has_c ? 2 : 0;
  using Narrow = Prefetched<Tile, Storage, E * narrow_planes>;
  using Wide = Prefetched<Tile, float, E * wide_planes>;
  static constexpr int unscaled_at = Weights::shared_bytes + Exchange::shared_bytes;
  static constexpr int narrow_at = unscaled_at + Unscaled::shared_bytes,
                       wide_at = narrow_at + Narrow::shared_bytes;

 public:
  static constexpr int shared_bytes = wide_at + Wide::shared_bytes;

  FASTRNN_DEVICE ScanBackward(const BackwardParams<Storage>& p, const Cell& cell, char* shared)
      : p_(p),
        cell_(cell),
        exchange_(p.link, shared + Weights::shared_bytes),
        unscaled_(shared + unscaled_at),
        narrow_(shared + narrow_at),
        wide_(shared + wide_at),
        weights_(shared, ColumnsOfW{p.w_hh + int64_t{block_direction()} * G * p.H * p.H, p.H,
                                    block_rank() * Tile::units}) {}

  FASTRNN_DEVICE void run() {
    if (!each_tile<Tile>(p_.B, p_.H, [&](const TileIndexer<Tile>& map) { return walk(map); }))
      fill_with_nan();
  }

 private:
  // A column of W_hh is a unit of a strip of 16. The terms are its rows, gate by gate in blocks of Tile::K.
  struct ColumnsOfW {
    const Storage* w_hh;  // [G*H, H]
    int H, first_unit;

    FASTRNN_DEVICE Storage operator()(int strip, int unit, int k) const {
      int column = first_unit + strip * 16 + unit, g = k / Tile::K, row = k % Tile::K;
      return column < H && row < H ? operand_of<Storage>(widen(w_hh[int64_t{g * H + row} * H + column]))
                                   : Storage{};
    }
  };

  struct Element {
    float carry[states];  // dL/dh, dL/dc carried back from the step after this one
    int flags;            // of the next step
  };

  const BackwardParams<Storage>& p_;
  const Cell& cell_;
  Exchange exchange_;
  Unscaled unscaled_;
  Narrow narrow_;
  Wide wide_;
  Weights weights_;
  Element element_[E];

  FASTRNN_DEVICE int64_t step(int64_t i) const { return step_of_walk(i, p_.T, p_.reverse); }

  FASTRNN_DEVICE void prefetch(const TileIndexer<Tile>& map, int j, int64_t i) {
    if (!map.inside(j) || i < 0) return;
    const int64_t t = step(i);
    const int flags = p_.flags == nullptr ? 0 : p_.flags[t * p_.B + map.row(j)];
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k)
      prefetched_narrow(j, k) = map.template at<Cell::saved>(p_.saved, t, j, k);
    prefetched_narrow(j, Cell::saved) = p_.dy == nullptr ? Storage{} : map.at(p_.dy, t, j);
    const bool begins = i == 0 || (flags & start);
    const int64_t before = begins ? block_direction() : step(i - 1);
    if constexpr (Cell::distinct_dgh)
      prefetched_narrow(j, Cell::saved + 1) = map.at(begins ? p_.h0 : p_.y, before, j);
    if constexpr (has_c) {
      prefetched_wide(j, 0) = p_.dc == nullptr ? 0.0f : map.at(p_.dc, t, j);
      prefetched_wide(j, 1) = map.at(begins ? p_.c0 : p_.c, before, j);
    }
    element_[j].flags = flags;
  }

  // All steps of one batch tile; false if a wait gave up.
  FASTRNN_DEVICE bool walk(const TileIndexer<Tile>& tile) {
    TileIndexer<Tile> map = tile;
#pragma unroll
    for (int j = 0; j < E; ++j) {
      Element& e = element_[j];
      e.carry[0] = map.inside(j) && p_.dh_n != nullptr ? widen(map.at(p_.dh_n, block_direction(), j)) : 0.0f;
      if constexpr (has_c)
        e.carry[1] = map.inside(j) && p_.dc_n != nullptr ? map.at(p_.dc_n, block_direction(), j) : 0.0f;
      prefetch(map, j, p_.T - 1);
    }
    for (int64_t i = p_.T - 1; i >= 0; --i) {
      map = tile.without_kept_addresses();
      int flags[E];
      float total[E][states];
#pragma unroll
      for (int first = 0; first < E; first += Tile::thread_units) {
        float clipped[Tile::thread_units][states];
#pragma unroll
        for (int k = 0; k < Tile::thread_units; ++k) {
          flags[first + k] = element_[first + k].flags;
          backward_of_cell(map, first + k, total[first + k], clipped[k]);
        }
        if (p_.clip_norm != nullptr) publish_norm(ElementIndex<Tile>(first), clipped);
      }
      const int norm_bytes = p_.clip_norm == nullptr ? 0 : group_size() * Tile::rows * int(sizeof(float));
      exchange_.arrive(G * exchanged_elements<Tile>() * int(sizeof(Storage)) + norm_bytes);
#pragma unroll
      for (int j = 0; j < E; ++j) {
        prefetch(map, j, i - 1);
        if (p_.norms != nullptr && j % Tile::thread_units == 0) write_norms(map, j, step(i), flags, total);
      }
      if (!exchange_.wait()) return false;
      float scale[E / Tile::thread_units];
#pragma unroll
      for (int j = 0; j < E; j += Tile::thread_units)
        scale[j / Tile::thread_units] =
            p_.clip_norm == nullptr ? 1.0f : clip_scale(ElementIndex<Tile>(j).row);
      weights_.run(exchange_);
      sync_block();
#pragma unroll
      for (int j = 0; j < E; ++j)
        if (map.inside(j)) finish_step(map, j, step(i), flags[j], scale[j / Tile::thread_units]);
    }
#pragma unroll
    for (int j = 0; j < E; ++j) {
      if (!map.inside(j)) continue;
      map.at(p_.dh0, block_direction(), j) = rounded<Storage>(element_[j].carry[0]);
      if constexpr (has_c) map.at(p_.dc0, block_direction(), j) = element_[j].carry[1];
    }
    return true;
  }

  FASTRNN_DEVICE float& unscaled(int j, int k) const { return unscaled_[j * planes + k]; }

  FASTRNN_DEVICE Storage& prefetched_narrow(int j, int k) { return narrow_[j * narrow_planes + k]; }
  FASTRNN_DEVICE float& prefetched_wide(int j, int k) { return wide_[j * wide_planes + k]; }

  FASTRNN_DEVICE float clamped(float x) const {  // NaN stays NaN
    return x > p_.clip_value ? p_.clip_value : x < -p_.clip_value ? -p_.clip_value : x;
  }

  // Computes and publishes one element's gate gradients, and returns its state gradients before and after
  // clipping by value. Every lane calls it.
  FASTRNN_DEVICE void backward_of_cell(const TileIndexer<Tile>& map, int j, float (&total)[states],
                                       float (&clipped)[states]) {
    const Element& e = element_[j];
    ElementIndex<Tile> index(j);
#pragma unroll
    for (int s = 0; s < states; ++s) total[s] = clipped[s] = 0;
    float dgx[G] = {}, dgh[G] = {}, past[states] = {};
    if (map.inside(j) && !(e.flags & pad)) {
      const bool is_reset = e.flags & reset;
      float saved[Cell::saved], prev[states];
#pragma unroll
      for (int k = 0; k < Cell::saved; ++k) saved[k] = widen(prefetched_narrow(j, k));
      prev[0] = 0.0f;  // only the GRU reads it
      if constexpr (Cell::distinct_dgh)
        prev[0] = is_reset ? 0.0f : widen(prefetched_narrow(j, Cell::saved + 1));
      if constexpr (has_c) prev[1] = is_reset ? 0.0f : prefetched_wide(j, 1);
      total[0] = e.carry[0] + widen(prefetched_narrow(j, Cell::saved));
      if constexpr (has_c) total[1] = e.carry[1] + prefetched_wide(j, 0);
      const bool clamps = p_.clip_value < no_bound;
#pragma unroll
      for (int s = 0; s < states; ++s) clipped[s] = clamps ? clamped(total[s]) : total[s];
      if constexpr (has_c) {
        clipped[1] = cell_.total(saved, prev, clipped);
        total[1] = clamps ? cell_.total(saved, prev, total) : clipped[1];
      }
      if constexpr (Cell::distinct_dgh) {
        cell_.backward(saved, prev, clipped, dgx, dgh, past);
      } else {
        cell_.backward(saved, prev, clipped, dgx, past);
#pragma unroll
        for (int g = 0; g < G; ++g) dgh[g] = dgx[g];
      }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      exchange_.publish(map.exchanged(j), index.row, g * Tile::K + map.unit(j), dgh[g]);
      unscaled(j, g) = dgx[g];
      if constexpr (Cell::distinct_dgh) unscaled(j, G + g) = dgh[g];
    }
#pragma unroll
    for (int s = 0; s < states; ++s) unscaled(j, sent + s) = past[s];
  }

  // Publishes the norm of the row of `index`, which is the row's first unit in this CTA. Every lane calls it.
  FASTRNN_DEVICE void publish_norm(const ElementIndex<Tile>& index,
                                   const float (&clipped)[Tile::thread_units][states]) {
    const float norm = row_norm(clipped);
    if (index.exists && index.unit == 0) exchange_.publish_norm(index.row, norm);
  }

  // Writes the norms of step t of the row of element j, which is the row's first unit in this CTA, while the
  // gate gradients travel. Every lane calls it.
  FASTRNN_DEVICE void write_norms(const TileIndexer<Tile>& map, int j, int64_t t, const int (&flags)[E],
                                  const float (&total)[E][states]) const {
#pragma unroll
    for (int s = 0; s < states; ++s) {
      float all_units[Tile::thread_units][1], carried_units[Tile::thread_units][1];
#pragma unroll
      for (int k = 0; k < Tile::thread_units; ++k) {
        all_units[k][0] = total[j + k][s];
        carried_units[k][0] = flags[j + k] & pad ? 0.0f : element_[j + k].carry[s];
      }
      const float norm = row_norm(all_units), carried = row_norm(carried_units);
      if (!map.inside(j) || ElementIndex<Tile>(j).unit != 0) continue;
      norm_at(0, s, t, map.row(j)) = norm;
      norm_at(1, s, t, map.row(j)) = carried;
    }
  }

  // The norm of this lane's row over the units of this CTA. The squares of all float32 fit double.
  template <int count>
  FASTRNN_DEVICE static float row_norm(const float (&x)[Tile::thread_units][count]) {
    double squares = 0;
#pragma unroll
    for (int k = 0; k < Tile::thread_units * count; ++k)
      squares += static_cast<double>(x[k / count][k % count]) * x[k / count][k % count];
    return static_cast<float>(std::sqrt(row_sum<Tile>(squares)));
  }

  FASTRNN_DEVICE float& norm_at(int kind, int state, int64_t t, int b) const {
    const int64_t plane =
        block_direction() * (2 * states - 1) + kind * states + state;  // t counts over D * T
    return p_.norms[((plane * p_.T + t) * p_.B + b) * group_size() + block_rank()];
  }

  // The factor of clipping by norm of this lane's row, from the partial norms of all peers.
  FASTRNN_DEVICE float clip_scale(int row) const {
    double squares = 0;
    if (row < Tile::rows)
#pragma unroll 1
      for (int peer = thread_index() % Tile::row_lanes; peer < group_size(); peer += Tile::row_lanes) {
        double part = exchange_.norm(peer, row);
        squares += part * part;
      }
    const float norm = static_cast<float>(std::sqrt(row_sum<Tile>(squares))), most = *p_.clip_norm;
    return norm != norm ? norm : norm > most ? most / norm : 1.0f;
  }

  // Writes the gate gradients of step t, and computes what is carried to the step before.
  FASTRNN_DEVICE void finish_step(const TileIndexer<Tile>& map, int j, int64_t t, int flags, float scale) {
    Element& e = element_[j];
    ElementIndex<Tile> index(j);
    const bool is_padding = flags & pad, is_reset = flags & reset;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      map.template at<G>(p_.dgx, t, j, g) = rounded<Storage>(is_padding ? 0.0f : scale * unscaled(j, g));
      if constexpr (Cell::distinct_dgh)
        map.template at<G>(p_.dgh, t, j, g) =
            rounded<Storage>(is_padding ? 0.0f : scale * unscaled(j, G + g));
    }
    if (is_padding) return;
    const float product = weights_.sum(index.unit / 16, index.row, index.unit % 16);
    e.carry[0] = is_reset ? 0.0f : scale * (product + unscaled(j, sent));
    if constexpr (has_c) e.carry[1] = is_reset ? 0.0f : scale * unscaled(j, sent + 1);
  }

  // All outputs that this CTA owns become NaN.
  FASTRNN_DEVICE void fill_with_nan() const {
    each_owned<Tile>(p_.B, p_.H, [&](const TileIndexer<Tile>& map, int j) {
      map.at(p_.dh0, block_direction(), j) = not_a_number<Storage>();
      if constexpr (has_c) map.at(p_.dc0, block_direction(), j) = not_a_number<float>();
      for (int64_t i = 0; i < p_.T; ++i) {
        for (int g = 0; g < G; ++g) {
          map.template at<G>(p_.dgx, step(i), j, g) = not_a_number<Storage>();
          if constexpr (Cell::distinct_dgh)
            map.template at<G>(p_.dgh, step(i), j, g) = not_a_number<Storage>();
        }
        if (p_.norms == nullptr || ElementIndex<Tile>(j).unit != 0) continue;
        for (int s = 0; s < states; ++s)
          norm_at(0, s, step(i), map.row(j)) = norm_at(1, s, step(i), map.row(j)) = not_a_number<float>();
      }
    });
  }
};

}  // namespace fastrnn
