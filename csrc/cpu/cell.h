// What a scan asks of a cell: a step of some rows forward, the total gradients of its states, and backward.
//
// A cell of the scans is an object with these functions and the numbers of its planes. BuiltInCell knows its
// equations when it is compiled; ProgramCell (program_cell.h) reads them from a text.
#pragma once

#include "cell_rows.h"
#include "runs.h"

namespace fastrnn {

// c: the states beyond h, a plane each. Rows that a cell does not have may be null.
template <class Storage>
struct ForwardStep {
  using A = typename Arithmetic<Storage>::type;
  int64_t H;
  RowView<const Storage> gx;        // [B, gates * H]
  RowView<const A> gh;              // [B, gates * H]
  RowView<const A> h_prev, c_prev;  // [B, H], [B, (states - 1) * H]
  RowView<const A> parameters;      // [1, parameters * H], for all rows
  RowView<const Storage> inputs;    // [B, inputs * H]
  Affine<A> ln_c;
  RowView<A> h, c;         // [B, H], [B, (states - 1) * H]; c is the same memory as c_prev
  RowView<Storage> saved;  // [B, saved * H]
};

template <class Storage>
struct BackwardStep {
  using A = typename Arithmetic<Storage>::type;
  int64_t H;
  RowView<const Storage> saved;
  RowView<const A> h_prev, c_prev;
  RowView<const A> parameters;
  RowView<const Storage> inputs;
  Affine<A> ln_c;
  RowView<const A> dh, dc;        // the gradients of the new states
  RowView<A> total_h, total_c;    // the same, with the paths inside the step; total_h: see `adds_to_dh`
  RowView<A> c_hat;               // [B, H], c normalised; only with a layer norm of c
  RowView<A> dgx, dgh;            // [B, gates * H]; dgh only where it differs from dgx
  RowView<A> dh_past_w, dc_prev;  // dh_past_w: of h_prev, without the path through W_hh
  RowView<Storage> dcell;         // [B, (parameters + inputs) * H]
  RowView<double> dln_c_weight, dln_c_bias;  // [B, H], sums over the steps
};

template <class Cell, class S>
struct BuiltInCell {
  using Storage = S;
  using A = typename Arithmetic<S>::type;

  static constexpr int64_t gates = Cell::gates, states = Cell::states, saved = Cell::saved;
  static constexpr int64_t parameters = 0, inputs = 0;
  static constexpr bool recurrent = true, distinct_dgh = Cell::distinct_dgh;
  // Whether the backward reads h_prev, and gives it a gradient that does not pass through W_hh: only the GRU.
  static constexpr bool reads_h_prev = distinct_dgh, gives_h_prev = distinct_dgh;
  static constexpr bool adds_to_dh = false;  // whether `total` changes dh
  // Whether `backward` can do the work of `total`, too, unless c has a layer norm.
  static constexpr bool joins = states == 2;
  static constexpr bool always_saves = true;  // whether `saved` has to exist
  static constexpr bool built_in = true;      // which has projections, and a layer norm of c

  struct Memory {};  // of one thread

  void forward(const Runs& runs, const ForwardStep<S>& step, Memory&) const {
    // A cell with a c reads no h, which a projection makes narrower than H.
    const RowView<const A>& h_prev = states == 2 ? step.c_prev : step.h_prev;
    walk<ForwardRow>(runs, step.H, step.ln_c, step.gx, step.gh, h_prev, step.c_prev, step.ln_c, step.h,
                     step.c, step.saved);
  }

  void total(const Runs& runs, const BackwardStep<S>& step, Memory&) const {
    if constexpr (states == 2)
      walk<TotalRow>(runs, step.H, step.ln_c, step.saved, step.c_prev, step.dh, step.dc, step.ln_c,
                     step.c_hat, step.total_c);
  }

  void backward(const Runs& runs, const BackwardStep<S>& step, bool joined, Memory&) const {
    const RowView<const A>& h_prev = reads_h_prev ? step.h_prev : step.dh;
    if constexpr (joins) {
      if (joined)
        return walk_runs(runs, BackwardRow<Cell, S, A, false, true>{step.H, step.saved, h_prev, step.c_prev,
                                                                    step.dh, step.dc, step.ln_c, step.dgx,
                                                                    step.dgh, step.dh_past_w, step.dc_prev});
    }
    walk<BackwardOfTotal>(runs, step.H, step.ln_c, step.saved, h_prev, step.c_prev, step.dh,
                          read_only(step.total_c), step.ln_c, step.dgx, step.dgh, step.dh_past_w,
                          step.dc_prev);
    if constexpr (states == 2) {
      if (step.ln_c.weight != nullptr)
        walk_runs(runs, CellNormGradients<Cell, S, A>{step.H, step.saved, read_only(step.c_hat), step.dh,
                                                      read_only(step.total_c), step.ln_c, step.dln_c_weight,
                                                      step.dln_c_bias});
    }
  }

 private:
  template <class C, class Memory, class Number, bool layer_norm>
  using BackwardOfTotal = BackwardRow<C, Memory, Number, layer_norm, false>;

  static RowView<const A> read_only(const RowView<A>& rows) { return {rows.data, rows.stride}; }

  // Row<Cell, Storage, A, whether c has a layer norm>{H, fields...} over the runs.
  template <template <class, class, class, bool> class Row, class... Fields>
  static void walk(const Runs& runs, int64_t H, const Affine<A>& ln_c, const Fields&... fields) {
    if constexpr (states == 2) {
      if (ln_c.weight != nullptr) return walk_runs(runs, Row<Cell, S, A, true>{H, fields...});
    }
    walk_runs(runs, Row<Cell, S, A, false>{H, fields...});
  }
};

}  // namespace fastrnn
