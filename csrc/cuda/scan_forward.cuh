// All steps of one layer, forward; a CTA walks in one of its directions. Each step multiplies with this CTA's
// slice of W_hh, runs the cell on the units that the CTA owns, and publishes their h to the group; while that
// travels, it writes the outputs to memory and loads the next gx.
#pragma once

#include "spill.cuh"
#include "tile_indexer.cuh"
#include "params.cuh"
#include "product.cuh"

namespace fastrnn {

template <class Cell, class Storage, class Tile, template <class, class> class ExchangeOf>
class ScanForward {
  using Slice = typename Tile::Forward;
  using Exchange = ExchangeOf<Storage, Slice>;
  using Weights = Product<Storage, Slice>;
  using Bias = SharedSpill<Tile, float, Cell::gates * Tile::thread_units>;
  using Gx = Prefetched<Tile, Storage, Tile::elements * Cell::gates>;
  static constexpr int G = Cell::gates, E = Tile::elements;
  static constexpr bool has_c = Cell::states == 2;

 public:
  static constexpr int shared_bytes =
      Weights::shared_bytes + Exchange::shared_bytes + Bias::shared_bytes + Gx::shared_bytes;

  FASTRNN_DEVICE ScanForward(const ForwardParams<Storage>& p, const Cell& cell, char* shared)
      : p_(p),
        cell_(cell),
        exchange_(p.link, shared + Weights::shared_bytes),
        bias_(shared + Weights::shared_bytes + Exchange::shared_bytes),
        gx_(shared + Weights::shared_bytes + Exchange::shared_bytes + Bias::shared_bytes),
        weights_(shared, SliceOfW{p.w_hh + int64_t{block_direction()} * G * p.H * p.H, p.H,
                                  block_rank() * Tile::units}) {}

  FASTRNN_DEVICE void run() {
    if (!each_tile<Tile>(p_.B, p_.H, [&](const TileIndexer<Tile>& map) { return walk(map); }))
      fill_with_nan();
  }

 private:
  // A row of W_hh is a unit of a strip of 16; k is the column.
  struct SliceOfW {
    const Storage* w_hh;  // [G*H, H]
    int H, first_unit;

    FASTRNN_DEVICE Storage operator()(int strip, int unit, int k) const {
      int g = strip / Tile::strips, row = first_unit + strip % Tile::strips * 16 + unit;
      return row < H && k < H ? operand_of<Storage>(widen(w_hh[int64_t{g * H + row} * H + k])) : Storage{};
    }
  };

  // One element of the state, and the flags of its next step.
  struct Element {
    float h, c;  // h as rounded to storage
    int flags;
  };

  const ForwardParams<Storage>& p_;
  const Cell& cell_;
  Exchange exchange_;
  Bias bias_;
  Gx gx_;
  Weights weights_;
  Element element_[E];

  FASTRNN_DEVICE int64_t step(int64_t i) const { return step_of_walk(i, p_.T, p_.reverse); }

  FASTRNN_DEVICE void prefetch(const TileIndexer<Tile>& map, int j, int64_t i) {
    if (!map.inside(j) || i >= p_.T) return;
#pragma unroll
    for (int g = 0; g < G; ++g) gx_[j * G + g] = map.template at<G>(p_.gx, step(i), j, g);
    element_[j].flags = p_.flags == nullptr ? 0 : p_.flags[step(i) * p_.B + map.row(j)];
  }

  FASTRNN_DEVICE void publish(const TileIndexer<Tile>& map, int j) {
    ElementIndex<Tile> index(j);
    exchange_.publish(map.exchanged(j), index.row, map.unit(j), element_[j].h);
  }

  // All steps of one batch tile; false if a wait gave up. Elements outside of the batch and H stay zero.
  FASTRNN_DEVICE bool walk(const TileIndexer<Tile>& tile) {
    TileIndexer<Tile> map = tile;
#pragma unroll
    for (int k = 0; k < Tile::thread_units; ++k)
#pragma unroll
      for (int g = 0; g < G; ++g)
        bias_[k * G + g] = map.unit(k) < p_.H && p_.b_hh != nullptr
                               ? widen(p_.b_hh[(block_direction() * G + g) * p_.H + map.unit(k)])
                               : 0.0f;
#pragma unroll
    for (int j = 0; j < E; ++j) {
      element_[j].h = map.inside(j) ? widen(map.at(p_.h0, block_direction(), j)) : 0.0f;
      element_[j].c = has_c && map.inside(j) ? map.at(p_.c0, block_direction(), j) : 0.0f;
      publish(map, j);
      prefetch(map, j, 0);
    }
    exchange_.arrive(exchanged_elements<Tile>() * int(sizeof(Storage)));
    if (!exchange_.wait()) return false;
    for (int64_t i = 0; i < p_.T; ++i) {
      map = tile.without_kept_addresses();
      weights_.run(exchange_);
      sync_block();
      float saved[E][Cell::saved];
#pragma unroll
      for (int j = 0; j < E; ++j) {
        if (map.inside(j)) run_cell(j, saved[j]);
        publish(map, j);
      }
      exchange_.arrive(exchanged_elements<Tile>() * int(sizeof(Storage)));
#pragma unroll
      for (int j = 0; j < E; ++j) {
        if (map.inside(j)) write_outputs(map, j, step(i), saved[j]);
        prefetch(map, j, i + 1);
      }
      if (!exchange_.wait()) return false;
    }
#pragma unroll
    for (int j = 0; j < E; ++j) {
      if (!map.inside(j)) continue;
      map.at(p_.h_n, block_direction(), j) = rounded<Storage>(element_[j].h);
      if constexpr (has_c) map.at(p_.c_n, block_direction(), j) = element_[j].c;
    }
    return true;
  }

  // Runs the cell on one element, in the order reset, W_hh, gates, cell; at padding the state is carried.
  FASTRNN_DEVICE void run_cell(int j, float (&saved)[Cell::saved]) {
    Element& e = element_[j];
    ElementIndex<Tile> index(j);
    const bool is_reset = e.flags & reset;
    float gx[G], gh[G], prev[Cell::states], state[Cell::states];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      gx[g] = widen(gx_[j * G + g]);
      const int strip = g * Tile::strips + index.unit / 16;
      gh[g] = bias_[j % Tile::thread_units * G + g] +
              (is_reset ? 0.0f : weights_.sum(strip, index.row, index.unit % 16));
    }
    prev[0] = is_reset ? 0.0f : e.h;
    if constexpr (has_c) prev[1] = is_reset ? 0.0f : e.c;
    cell_.forward(gx, gh, prev, state, saved);
    if (e.flags & pad) return;
    e.h = widen(rounded<Storage>(state[0]));
    if constexpr (has_c) e.c = state[1];
  }

  FASTRNN_DEVICE void write_outputs(const TileIndexer<Tile>& map, int j, int64_t t,
                                    const float (&saved)[Cell::saved]) const {
    const Element& e = element_[j];
    const bool is_padding = e.flags & pad;
    map.at(p_.y, t, j) = rounded<Storage>(is_padding ? 0.0f : e.h);
    if constexpr (has_c)
      if (p_.c != nullptr) map.at(p_.c, t, j) = is_padding ? 0.0f : e.c;
    if (p_.saved == nullptr) return;
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k)
      map.template at<Cell::saved>(p_.saved, t, j, k) = rounded<Storage>(is_padding ? 0.0f : saved[k]);
  }

  // All outputs that this CTA owns become NaN.
  FASTRNN_DEVICE void fill_with_nan() const {
    each_owned<Tile>(p_.B, p_.H, [&](const TileIndexer<Tile>& map, int j) {
      map.at(p_.h_n, block_direction(), j) = not_a_number<Storage>();
      if constexpr (has_c) map.at(p_.c_n, block_direction(), j) = not_a_number<float>();
      for (int64_t i = 0; i < p_.T; ++i) map.at(p_.y, step(i), j) = not_a_number<Storage>();
    });
  }
};

}  // namespace fastrnn
