// All steps of one layer, backward; a CTA walks in one of its directions. Of each step: clipping and the cell
// on the units that this CTA owns, their gate gradients to the group, and, while those travel, the norms to
// memory and the next step's operands from it; then the product with this CTA's columns of W_hh gives what is
// carried to the step before.
//
// Under clipping by norm the factor is known only when all of the group have told their part of the norm. The
// cell's backward is linear in (dh, dc) together, so gate gradients travel unscaled with the norms, and the
// receivers scale.
#pragma once

#include "drawer.cuh"
#include "map.cuh"
#include "params.cuh"
#include "product.cuh"

namespace fastrnn {

template <class Cell, class S, class Tile, template <class, class> class ExchangeOf>
class ScanBackward {
  using Slice = typename Tile::Backward;
  using Exchange = ExchangeOf<S, Slice>;
  using Weights = Product<S, Slice>;
  static constexpr int G = Cell::gates, E = Tile::elements, states = Cell::states;
  static constexpr bool has_c = states == 2;
  static constexpr int sent = G + (Cell::distinct_dgh ? G : 0), unscaled = sent + states;
  // Per element: dgx, dgh where it differs, and what reaches the states before the step without W_hh.
  using Unscaled = Drawer<Tile, float, E * unscaled>;
  // Read ahead per element: the saved planes, dy, and h_prev where the cell reads it; dc and c_prev.
  static constexpr int halves = Cell::saved + 1 + Cell::distinct_dgh, fulls = has_c ? 2 : 0;
  using Half = Ahead<Tile, S, E * halves>;
  using Full = Ahead<Tile, float, E * fulls>;
  static constexpr int unscaled_at = Weights::shared_bytes + Exchange::shared_bytes;
  static constexpr int half_at = unscaled_at + Unscaled::shared_bytes, full_at = half_at + Half::shared_bytes;

 public:
  static constexpr int shared_bytes = full_at + Full::shared_bytes;

  FASTRNN_DEVICE ScanBackward(const BackwardParams<S>& p, const Cell& cell, char* shared)
      : p_(p),
        cell_(cell),
        exchange_(p.link, shared + Weights::shared_bytes),
        unscaled_(shared + unscaled_at),
        half_(shared + half_at),
        full_(shared + full_at),
        weights_(shared, ColumnsOfW{p.w_hh + int64_t{block_direction()} * G * p.H * p.H, p.H,
                                    block_rank() * Tile::units}) {}

  FASTRNN_DEVICE void run() {
    if (!each_tile<Tile>(p_.B, p_.H, [&](const Map<Tile>& map) { return walk(map); })) poison();
  }

 private:
  // Column of W_hh: unit of a strip of 16; its rows, gate by gate in blocks of Tile::K, are the terms.
  struct ColumnsOfW {
    const S* w_hh;  // [G*H, H]
    int H, first_unit;

    FASTRNN_DEVICE S operator()(int strip, int unit, int k) const {
      int column = first_unit + strip * 16 + unit, g = k / Tile::K, row = k % Tile::K;
      return column < H && row < H ? operand_of<S>(widen(w_hh[int64_t{g * H + row} * H + column])) : S{};
    }
  };

  struct Element {
    float carry[states];  // dL/dh, dL/dc that come from the step after this one
    int flags;            // of its next step
  };

  const BackwardParams<S>& p_;
  const Cell& cell_;
  Exchange exchange_;
  Unscaled unscaled_;
  Half half_;
  Full full_;
  Weights weights_;
  Element element_[E];

  FASTRNN_DEVICE int64_t step(int64_t i) const { return step_of_walk(i, p_.T, p_.reverse); }

  FASTRNN_DEVICE void read_ahead(const Map<Tile>& map, int j, int64_t i) {
    if (!map.inside(j) || i < 0) return;
    const int64_t t = step(i);
    const int flags = p_.flags == nullptr ? 0 : p_.flags[t * p_.B + map.row(j)];
#pragma unroll
    for (int k = 0; k < Cell::saved; ++k) half(j, k) = map.template at<Cell::saved>(p_.saved, t, j, k);
    half(j, Cell::saved) = p_.dy == nullptr ? S{} : map.at(p_.dy, t, j);
    const bool begins = i == 0 || (flags & start);
    const int64_t before = begins ? block_direction() : step(i - 1);
    if constexpr (Cell::distinct_dgh) half(j, Cell::saved + 1) = map.at(begins ? p_.h0 : p_.y, before, j);
    if constexpr (has_c) {
      full(j, 0) = p_.dc == nullptr ? 0.0f : map.at(p_.dc, t, j);
      full(j, 1) = map.at(begins ? p_.c0 : p_.c, before, j);
    }
    element_[j].flags = flags;
  }

  // All steps of one batch tile; false where the group fell apart.
  FASTRNN_DEVICE bool walk(const Map<Tile>& tile) {
    Map<Tile> map = tile;
#pragma unroll
    for (int j = 0; j < E; ++j) {
      Element& e = element_[j];
      e.carry[0] = map.inside(j) && p_.dh_n != nullptr ? widen(map.at(p_.dh_n, block_direction(), j)) : 0.0f;
      if constexpr (has_c)
        e.carry[1] = map.inside(j) && p_.dc_n != nullptr ? map.at(p_.dc_n, block_direction(), j) : 0.0f;
      read_ahead(map, j, p_.T - 1);
    }
    for (int64_t i = p_.T - 1; i >= 0; --i) {
      map = tile.afresh();
      int flags[E];
      float total[E][states];
#pragma unroll
      for (int first = 0; first < E; first += Tile::beside) {
        float clipped[Tile::beside][states];
#pragma unroll
        for (int k = 0; k < Tile::beside; ++k) {
          flags[first + k] = element_[first + k].flags;
          through_cell(map, first + k, total[first + k], clipped[k]);
        }
        if (p_.clip_norm != nullptr) publish_norm(Place<Tile>(first), clipped);
      }
      const int norm_bytes = p_.clip_norm == nullptr ? 0 : group_size() * Tile::rows * int(sizeof(float));
      exchange_.arrive(G * exchanged_elements<Tile>() * int(sizeof(S)) + norm_bytes);
#pragma unroll
      for (int j = 0; j < E; ++j) {
        read_ahead(map, j, i - 1);
        if (p_.norms != nullptr && j % Tile::beside == 0) tell_norms(map, j, step(i), flags, total);
      }
      if (!exchange_.wait()) return false;
      float scale[E / Tile::beside];
#pragma unroll
      for (int j = 0; j < E; j += Tile::beside)
        scale[j / Tile::beside] = p_.clip_norm == nullptr ? 1.0f : clip_scale(Place<Tile>(j).row);
      weights_.run(exchange_);
      sync_block();
#pragma unroll
      for (int j = 0; j < E; ++j)
        if (map.inside(j)) carry_on(map, j, step(i), flags[j], scale[j / Tile::beside]);
    }
#pragma unroll
    for (int j = 0; j < E; ++j) {
      if (!map.inside(j)) continue;
      map.at(p_.dh0, block_direction(), j) = rounded<S>(element_[j].carry[0]);
      if constexpr (has_c) map.at(p_.dc0, block_direction(), j) = element_[j].carry[1];
    }
    return true;
  }

  FASTRNN_DEVICE float& kept(int j, int k) const { return unscaled_[j * unscaled + k]; }

  FASTRNN_DEVICE S& half(int j, int k) { return half_[j * halves + k]; }
  FASTRNN_DEVICE float& full(int j, int k) { return full_[j * fulls + k]; }

  FASTRNN_DEVICE float clamped(float x) const {  // NaN stays NaN
    return x > p_.clip_value ? p_.clip_value : x < -p_.clip_value ? -p_.clip_value : x;
  }

  // One element's gate gradients, and its state gradients before and after clipping by value. Every lane
  // takes part.
  FASTRNN_DEVICE void through_cell(const Map<Tile>& map, int j, float (&total)[states],
                                   float (&clipped)[states]) {
    const Element& e = element_[j];
    Place<Tile> place(j);
#pragma unroll
    for (int s = 0; s < states; ++s) total[s] = clipped[s] = 0;
    float dgx[G] = {}, dgh[G] = {}, past[states] = {};
    if (map.inside(j) && !(e.flags & pad)) {
      const bool fresh = e.flags & reset;
      float saved[Cell::saved], prev[states];
#pragma unroll
      for (int k = 0; k < Cell::saved; ++k) saved[k] = widen(half(j, k));
      prev[0] = 0.0f;  // of all cells only the GRU reads it
      if constexpr (Cell::distinct_dgh) prev[0] = fresh ? 0.0f : widen(half(j, Cell::saved + 1));
      if constexpr (has_c) prev[1] = fresh ? 0.0f : full(j, 1);
      total[0] = e.carry[0] + widen(half(j, Cell::saved));
      if constexpr (has_c) total[1] = e.carry[1] + full(j, 0);
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
      exchange_.publish(map.exchanged(j), place.row, g * Tile::K + map.unit(j), dgh[g]);
      kept(j, g) = dgx[g];
      if constexpr (Cell::distinct_dgh) kept(j, G + g) = dgh[g];
    }
#pragma unroll
    for (int s = 0; s < states; ++s) kept(j, sent + s) = past[s];
  }

  // The norm of the row of `place`, the first of its units here, to the group. Every lane takes part.
  FASTRNN_DEVICE void publish_norm(const Place<Tile>& place, const float (&clipped)[Tile::beside][states]) {
    const float norm = row_norm(clipped);
    if (place.exists && place.unit == 0) exchange_.publish_norm(place.row, norm);
  }

  // The norms of step t of the row of element j, the first of its units here, to memory, while the gate
  // gradients travel. Every lane takes part in the sums.
  FASTRNN_DEVICE void tell_norms(const Map<Tile>& map, int j, int64_t t, const int (&flags)[E],
                                 const float (&total)[E][states]) const {
#pragma unroll
    for (int s = 0; s < states; ++s) {
      float whole[Tile::beside][1], part[Tile::beside][1];
#pragma unroll
      for (int k = 0; k < Tile::beside; ++k) {
        whole[k][0] = total[j + k][s];
        part[k][0] = flags[j + k] & pad ? 0.0f : element_[j + k].carry[s];
      }
      const float norm = row_norm(whole), carried = row_norm(part);
      if (!map.inside(j) || Place<Tile>(j).unit != 0) continue;
      report(0, s, t, map.row(j)) = norm;
      report(1, s, t, map.row(j)) = carried;
    }
  }

  // Of the row of this lane, over the units of this CTA. The squares of all float32 fit double.
  template <int count>
  FASTRNN_DEVICE static float row_norm(const float (&x)[Tile::beside][count]) {
    double squares = 0;
#pragma unroll
    for (int k = 0; k < Tile::beside * count; ++k)
      squares += static_cast<double>(x[k / count][k % count]) * x[k / count][k % count];
    return static_cast<float>(std::sqrt(row_sum<Tile>(squares)));
  }

  FASTRNN_DEVICE float& report(int kind, int state, int64_t t, int b) const {
    const int64_t plane = block_direction() * (2 * states - 1) + kind * states + state;  // t counts D * T
    return p_.norms[((plane * p_.T + t) * p_.B + b) * group_size() + block_rank()];
  }

  // The factor of clipping by norm of this lane's row, from the parts of all peers.
  FASTRNN_DEVICE float clip_scale(int row) const {
    double squares = 0;
    if (row < Tile::rows)
#pragma unroll 1
      for (int peer = thread_index() % Tile::width; peer < group_size(); peer += Tile::width) {
        double part = exchange_.norm(peer, row);
        squares += part * part;
      }
    const float norm = static_cast<float>(std::sqrt(row_sum<Tile>(squares))), bound = *p_.clip_norm;
    return norm != norm ? norm : norm > bound ? bound / norm : 1.0f;
  }

  // The gate gradients of step t to memory, and what arrives at the step before.
  FASTRNN_DEVICE void carry_on(const Map<Tile>& map, int j, int64_t t, int flags, float scale) {
    Element& e = element_[j];
    Place<Tile> place(j);
    const bool hidden = flags & pad, fresh = flags & reset;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      map.template at<G>(p_.dgx, t, j, g) = rounded<S>(hidden ? 0.0f : scale * kept(j, g));
      if constexpr (Cell::distinct_dgh)
        map.template at<G>(p_.dgh, t, j, g) = rounded<S>(hidden ? 0.0f : scale * kept(j, G + g));
    }
    if (hidden) return;
    const float product = weights_.sum(place.unit / 16, place.row, place.unit % 16);
    e.carry[0] = fresh ? 0.0f : scale * (product + kept(j, sent));
    if constexpr (has_c) e.carry[1] = fresh ? 0.0f : scale * kept(j, sent + 1);
  }

  // What this CTA owns becomes NaN.
  FASTRNN_DEVICE void poison() const {
    each_owned<Tile>(p_.B, p_.H, [&](const Map<Tile>& map, int j) {
      map.at(p_.dh0, block_direction(), j) = not_a_number<S>();
      if constexpr (has_c) map.at(p_.dc0, block_direction(), j) = not_a_number<float>();
      for (int64_t i = 0; i < p_.T; ++i) {
        for (int g = 0; g < G; ++g) {
          map.template at<G>(p_.dgx, step(i), j, g) = not_a_number<S>();
          if constexpr (Cell::distinct_dgh) map.template at<G>(p_.dgh, step(i), j, g) = not_a_number<S>();
        }
        if (p_.norms == nullptr || Place<Tile>(j).unit != 0) continue;
        for (int s = 0; s < states; ++s)
          report(0, s, step(i), map.row(j)) = report(1, s, step(i), map.row(j)) = not_a_number<float>();
      }
    });
  }
};

}  // namespace fastrnn
