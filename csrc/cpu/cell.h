// What a scan asks of a cell: a step of some rows forward, the total gradients of its states, and backward.
//
// The scans call a cell once for a step of many rows, through an interface, so that they are compiled once
// for all cells. Two kinds implement it: those of csrc/cells, whose equations are compiled
// (built_in_cell.cpp), and those of users, whose equations are read from a text (program_cell.cpp). All that
// a cell is given has the type of the arithmetic, float or double: the scans convert from and to half types.
#pragma once

#include <memory>
#include <string>

#include "cell_rows.h"
#include "runs.h"

namespace fastrnn {

// c: the states beyond h, a plane each. Rows that a cell does not have may be null.
template <class A>
struct ForwardStep {
  int64_t H;
  RowView<const A> gx;              // [B, gates * H]
  RowView<const A> gh;              // [B, gates * H]
  RowView<const A> h_prev, c_prev;  // [B, H], [B, (states - 1) * H]
  RowView<const A> parameters;      // [1, parameters * H], for all rows
  RowView<const A> inputs;          // [B, inputs * H]
  Affine<A> ln_c;
  RowView<A> h, c;   // [B, H], [B, (states - 1) * H]; c is the same memory as c_prev
  RowView<A> saved;  // [B, saved * H]
};

template <class A>
struct BackwardStep {
  int64_t H;
  RowView<const A> saved;
  RowView<const A> h_prev, c_prev;
  RowView<const A> parameters;
  RowView<const A> inputs;
  Affine<A> ln_c;
  RowView<const A> dh, dc;        // the gradients of the new states
  RowView<A> total_h, total_c;    // the same, with the paths inside the step; total_h: see `adds_to_dh`
  NormOfState<A> norm;            // with a layer norm of c: from `total` to `backward`
  RowView<A> dgx, dgh;            // [B, gates * H]; dgh only where it differs from dgx
  RowView<A> dh_past_w, dc_prev;  // dh_past_w: of h_prev, without the path through W_hh
  RowView<A> dcell;               // [B, (parameters + inputs) * H]
  RowView<double> dln_c_weight, dln_c_bias;  // [B, H], sums over the steps
};

// The planes of a cell, [B, H] each, and what its functions do.
struct CellTraits {
  int64_t gates = 0, states = 0, saved = 0;
  int64_t parameters = 0, inputs = 0;
  bool recurrent = true;
  bool distinct_dgh = false;  // whether dgx and dgh differ
  // Whether the backward reads h_prev, and whether it gives it a gradient that does not pass through W_hh.
  bool reads_h_prev = false, gives_h_prev = false;
  bool adds_to_dh = false;    // whether `total` changes dh
  bool joins = false;         // whether `backward` can do the work of `total`, too, unless c has a layer norm
  bool always_saves = false;  // whether `saved` has to exist
  bool built_in = false;      // which has projections, and a layer norm of c
};

template <class A>
class Cell : public CellTraits {
 public:
  // What one thread needs for its calls.
  struct Memory {
    virtual ~Memory() = default;
  };

  virtual ~Cell() = default;
  virtual std::unique_ptr<Memory> memory() const { return nullptr; }
  virtual void forward(const Runs& runs, const ForwardStep<A>& step, Memory* memory) const = 0;
  virtual void total(const Runs& runs, const BackwardStep<A>& step, Memory* memory) const = 0;
  // dh and dc of the step: the totals, unless `joined`.
  virtual void backward(const Runs& runs, const BackwardStep<A>& step, bool joined, Memory* memory) const = 0;
};

// The cell of csrc/cells with this name. Raises std::runtime_error for another name.
template <class A>
const Cell<A>& built_in_cell(const std::string& name);

// The user's cell with this text, which is parsed once.
template <class A>
std::shared_ptr<const Cell<A>> program_cell(const std::string& text);

}  // namespace fastrnn
