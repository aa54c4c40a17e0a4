// The products with W_hh: one matrix, or one for each head, as in fastrnn/heads.py.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "product.h"
#include "runs.h"
#include "team.h"

namespace fastrnn {

template <class Storage>
void multiply(const Runs& runs, const Packed<Storage>& matrix, RowView<const typename Packed<Storage>::A> in,
              RowView<typename Packed<Storage>::A> out) {
  for (auto [begin, end] : runs) multiply_rows_of(matrix, in, 1, out, false, begin, end);
}

// W_hh as one direction of the scan multiplies with it. Each of N heads has K = H / N units of h and of every
// gate; in a row of gates, head n has the columns from g * H + n * K on, for each gate g.
template <class Storage>
struct Recurrence {
  using A = typename Arithmetic<Storage>::type;

  std::vector<std::unique_ptr<Packed<Storage>>> heads;  // one where W_hh is dense, none without a W_hh
  int64_t gates = 0, units = 0;                         // of each head
  // Of a dense W_hh whose columns a team shares: the team, and the columns in its parts, in place of the
  // head.
  std::unique_ptr<Team> team;
  std::vector<std::unique_ptr<Packed<Storage>>> parts;
  int64_t width = 0;  // columns of a part

  // A dense matrix, for products of B rows in each of T steps; the other arguments as of Packed.
  static Recurrence dense(const Matrix<Storage>& matrix, bool once, const A* bias, bool exact, int64_t T,
                          int64_t B) {
    Recurrence found;
    const int64_t size = pairs_for<Storage>(exact) != PairProducts::none ? sizeof(Storage) : sizeof(A);
    if (once || !Team::helps(T, B, B * matrix.K * matrix.N, matrix.K * matrix.N * size)) {
      found.heads.push_back(std::make_unique<Packed<Storage>>(matrix, once, bias, exact));
      return found;
    }
    constexpr int64_t most_parts = 32;
    found.team = std::make_unique<Team>();
    found.width = padded<A>((matrix.N + most_parts - 1) / most_parts);
    found.parts.resize((matrix.N + found.width - 1) / found.width);
    share(found.parts.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t n = k * found.width;
        const Matrix<Storage> part{matrix.data + n * matrix.n_stride, matrix.K,
                                   std::min(found.width, matrix.N - n), matrix.k_stride, matrix.n_stride};
        found.parts[k] = std::make_unique<Packed<Storage>>(part, false, bias ? bias + n : nullptr, exact);
      }
    });
    return found;
  }

  bool in_heads() const { return heads.size() > 1; }
  // The columns of the memory that a product in heads needs: of the gates of a head, and of its units.
  int64_t gates_of_head() const { return in_heads() ? gates * units : 0; }
  int64_t units_of_head() const { return in_heads() ? units : 0; }

  // out [rows, gates * H] = W_hh h.
  void times(const Runs& runs, RowView<const A> h, RowView<A> of_gates, RowView<A> out) const {
    if (!in_heads()) return times_dense(runs, h, out);
    for (size_t n = 0; n < heads.size(); ++n) {
      multiply(runs, *heads[n], {h.data + n * units, h.stride}, of_gates);
      each_gate(runs, n, [&](int64_t r, int64_t of_head, int64_t of_all) {
        std::copy_n(of_gates[r] + of_head, units, out[r] + of_all);
      });
    }
  }

  // out [rows, H] = the transpose of W_hh times dgh.
  void times_transposed(const Runs& runs, RowView<const A> dgh, RowView<A> of_gates, RowView<A> of_units,
                        RowView<A> out) const {
    if (!in_heads()) return times_dense(runs, dgh, out);
    for (size_t n = 0; n < heads.size(); ++n) {
      each_gate(runs, n, [&](int64_t r, int64_t of_head, int64_t of_all) {
        std::copy_n(dgh[r] + of_all, units, of_gates[r] + of_head);
      });
      multiply(runs, *heads[n], {of_gates.data, of_gates.stride}, of_units);
      for (auto [begin, end] : runs)
        for (int64_t r = begin; r < end; ++r) std::copy_n(of_units[r], units, out[r] + n * units);
    }
  }

 private:
  void times_dense(const Runs& runs, RowView<const A> in, RowView<A> out) const {
    if (!team) return multiply(runs, *heads[0], in, out);
    team->share(parts.size(),
                [&](int64_t k) { multiply(runs, *parts[k], in, {out.data + k * width, out.stride}); });
  }

  // f(row, first column in the head, first column in all heads) for each gate of head n.
  template <class F>
  void each_gate(const Runs& runs, int64_t n, const F& f) const {
    const int64_t H = heads.size() * units;
    for (auto [begin, end] : runs)
      for (int64_t r = begin; r < end; ++r)
        for (int64_t g = 0; g < gates; ++g) f(r, g * units, g * H + n * units);
  }
};

}  // namespace fastrnn
