// All steps of one layer, forward; a CTA walks in one of its directions. Of each step: the product with this
// CTA's slice of W_hh, the cell on the units that it owns, their h to the group, and, while that travels, the
// outputs to memory and the next gx from it.
#pragma once

#include "drawer.cuh"
#include "map.cuh"
#include "params.cuh"
#include "product.cuh"

namespace fastrnn {

template <class Cell, class S, class Tile, template <class, class> class ExchangeOf>
class ScanForward {
  using Slice = typename Tile::Forward;
  using Exchange = ExchangeOf<S, Slice>;
  using Weights = Product<S, Slice>;
  using Bias = Drawer<Tile, float, Cell::gates * Tile::beside>;
  using Gx = Ahead<Tile, S, Tile::elements * Cell::gates>;
  static constexpr int G = Cell::gates, E = Tile::elements;
  static constexpr bool has_c = Cell::states == 2;

 public:
  static constexpr int shared_bytes =
      Weights::shared_bytes + Exchange::shared_bytes + Bias::shared_bytes + Gx::shared_bytes;

  FASTRNN_DEVICE ScanForward(const ForwardParams<S>& p, const Cell& cell, char* shared)
      : p_(p),
        cell_(cell),
        exchange_(p.link, shared + Weights::shared_bytes),
        bias_(shared + Weights::shared_bytes + Exchange::shared_bytes),
        gx_(shared + Weights::shared_bytes + Exchange::shared_bytes + Bias::shared_bytes),
        weights_(shared, SliceOfW{p.w_hh + int64_t{block_direction()} * G * p.H * p.H, p.H,
                                  block_rank() * Tile::units}) {}

  FASTRNN_DEVICE void run() {
    if (!each_tile<Tile>(p_.B, p_.H, [&](const Map<Tile>& map) { return walk(map); })) poison();
  }

 private:
  // Row of W_hh: unit of a strip of 16; column k.
  struct SliceOfW {
    const S* w_hh;  // [G*H, H]
    int H, first_unit;

    FASTRNN_DEVICE S operator()(int strip, int unit, int k) const {
      int g = strip / Tile::strips, row = first_unit + strip % Tile::strips * 16 + unit;
      return row < H && k < H ? operand_of<S>(widen(w_hh[int64_t{g * H + row} * H + k])) : S{};
    }
  };

  // One element of the state, and the flags of its next step.
  struct Element {
    float h, c;  // h as rounded to storage
    int flags;
  };

  const ForwardParams<S>& p_;
  const Cell& cell_;
  Exchange exchange_;
  Bias bias_;
  Gx gx_;
  Weights weights_;
  Element element_[E];

  FASTRNN_DEVICE int64_t step(int64_t i) const { return step_of_walk(i, p_.T, p_.reverse); }

  FASTRNN_DEVICE void read_ahead(const Map<Tile>& map, int j, int64_t i) {
    if (!map.inside(j) || i >= p_.T) return;
#pragma unroll
    for (int g = 0; g < G; ++g) gx_[j * G + g] = map.template at<G>(p_.gx, step(i), j, g);
    element_[j].flags = p_.flags == nullptr ? 0 : p_.flags[step(i) * p_.B + map.row(j)];
  }

  FASTRNN_DEVICE void publish(const Map<Tile>& map, int j) {
    Place<Tile> place(j);
    exchange_.publish(map.exchanged(j), place.row, map.unit(j), element_[j].h);
  }

  // All steps of one batch tile; false where the group fell apart. Elements outside of the batch and of H
  // stay zero.
  FASTRNN_DEVICE bool walk(const Map<Tile>& tile) {
    Map<Tile> map = tile;
#pragma unroll
    for (int k = 0; k < Tile::beside; ++k)
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
      read_ahead(map, j, 0);
    }
    exchange_.arrive(exchanged_elements<Tile>() * int(sizeof(S)));
    if (!exchange_.wait()) return false;
    for (int64_t i = 0; i < p_.T; ++i) {
      map = tile.afresh();
      weights_.run(exchange_);
      sync_block();
      float saved[E][Cell::saved];
#pragma unroll
      for (int j = 0; j < E; ++j) {
        if (map.inside(j)) advance(j, saved[j]);
        publish(map, j);
      }
      exchange_.arrive(exchanged_elements<Tile>() * int(sizeof(S)));
#pragma unroll
      for (int j = 0; j < E; ++j) {
        if (map.inside(j)) write(map, j, step(i), saved[j]);
        read_ahead(map, j, i + 1);
      }
      if (!exchange_.wait()) return false;
    }
#pragma unroll
    for (int j = 0; j < E; ++j) {
      if (!map.inside(j)) continue;
      map.at(p_.h_n, block_direction(), j) = rounded<S>(element_[j].h);
      if constexpr (has_c) map.at(p_.c_n, block_direction(), j) = element_[j].c;
    }
    return true;
  }

  // The cell on one element. The order within a step: reset, W_hh, gates, cell, carry where there is no step.
  FASTRNN_DEVICE void advance(int j, float (&saved)[Cell::saved]) {
    Element& e = element_[j];
    Place<Tile> place(j);
    const bool fresh = e.flags & reset;
    float gx[G], gh[G], prev[Cell::states], state[Cell::states];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      gx[g] = widen(gx_[j * G + g]);
      const int strip = g * Tile::strips + place.unit / 16;
      gh[g] =
          bias_[j % Tile::beside * G + g] + (fresh ? 0.0f : weights_.sum(strip, place.row, place.unit % 16));
    }
    prev[0] = fresh ? 0.0f : e.h;
    if constexpr (has_c) prev[1] = fresh ? 0.0f : e.c;
    cell_.forward(gx, gh, prev, state, saved);
    if (e.flags & pad) return;
    e.h = widen(rounded<S>(state[0]));
    if constexpr (has_c) e.c = state[1];
  }

  FASTRNN_DEVICE void write(const Map<Tile>& map, int j, int64_t t, const float (&saved)[Cell::saved]) const {
    const Element& e = element_[j];
    const bool hidden = e.flags & pad;
    map.at(p_.y, t, j) = rounded<S>(hidden ? 0.0f : e.h);
    if constexpr (has_c)
      if (p_.c != nullptr) map.at(p_.c, t, j) = hidden ? 0.0f : e.c;
    if (p_.saved == nullptr) return;
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k)
      map.template at<Cell::saved>(p_.saved, t, j, k) = rounded<S>(saved[k]);
  }

  // What this CTA owns becomes NaN.
  FASTRNN_DEVICE void poison() const {
    each_owned<Tile>(p_.B, p_.H, [&](const Map<Tile>& map, int j) {
      map.at(p_.h_n, block_direction(), j) = not_a_number<S>();
      if constexpr (has_c) map.at(p_.c_n, block_direction(), j) = not_a_number<float>();
      for (int64_t i = 0; i < p_.T; ++i) map.at(p_.y, step(i), j) = not_a_number<S>();
    });
  }
};

}  // namespace fastrnn
