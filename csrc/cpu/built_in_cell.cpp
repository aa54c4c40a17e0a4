// The cells of csrc/cells for the scans.
#include "../common/switches.h"
#include "cell.h"

namespace fastrnn {
namespace {

template <class Equations, class A>
class BuiltInCell final : public Cell<A> {
 public:
  using Memory = typename Cell<A>::Memory;

  static constexpr bool has_c = Equations::states > 1;

  BuiltInCell() {
    this->gates = Equations::gates, this->states = Equations::states, this->saved = Equations::saved;
    this->distinct_dgh = Equations::distinct_dgh;
    this->reads_h_prev = this->gives_h_prev = Equations::distinct_dgh;  // only the GRU
    this->joins = has_c;
    this->always_saves = this->built_in = true;
  }

  void forward(const Runs& runs, const ForwardStep<A>& step, Memory*) const override {
    // A cell with a c reads no h, which a projection makes narrower than H.
    const RowView<const A>& h_prev = has_c ? step.c_prev : step.h_prev;
    walk<ForwardRow>(runs, step.H, step.ln_c, step.gx, step.gh, h_prev, step.c_prev, step.ln_c, step.h,
                     step.c, step.saved);
  }

  void total(const Runs& runs, const BackwardStep<A>& step, Memory*) const override {
    if constexpr (has_c)
      walk<TotalRow>(runs, step.H, step.ln_c, step.saved, step.c_prev, step.dh, step.dc, step.ln_c,
                     step.c_hat, step.total_c);
  }

  void backward(const Runs& runs, const BackwardStep<A>& step, bool joined, Memory*) const override {
    const RowView<const A>& h_prev = Equations::distinct_dgh ? step.h_prev : step.dh;
    if constexpr (has_c) {
      if (joined)
        return walk_runs(runs, BackwardRow<Equations, A, false, true>{
                                   step.H, step.saved, h_prev, step.c_prev, step.dh, step.dc, step.ln_c,
                                   step.dgx, step.dgh, step.dh_past_w, step.dc_prev});
    }
    walk<BackwardOfTotal>(runs, step.H, step.ln_c, step.saved, h_prev, step.c_prev, step.dh,
                          read_only(step.total_c), step.ln_c, step.dgx, step.dgh, step.dh_past_w,
                          step.dc_prev);
    if constexpr (has_c) {
      if (step.ln_c.weight != nullptr)
        walk_runs(runs, CellNormGradients<Equations, A>{step.H, step.saved, read_only(step.c_hat), step.dh,
                                                        read_only(step.total_c), step.ln_c, step.dln_c_weight,
                                                        step.dln_c_bias});
    }
  }

 private:
  template <class C, class Number, bool layer_norm>
  using BackwardOfTotal = BackwardRow<C, Number, layer_norm, false>;

  static RowView<const A> read_only(const RowView<A>& rows) { return {rows.data, rows.stride}; }

  // Row<Equations, A, whether c has a layer norm>{H, fields...} over the runs.
  template <template <class, class, bool> class Row, class... Fields>
  static void walk(const Runs& runs, int64_t H, const Affine<A>& ln_c, const Fields&... fields) {
    if constexpr (has_c) {
      if (ln_c.weight != nullptr) return walk_runs(runs, Row<Equations, A, true>{H, fields...});
    }
    walk_runs(runs, Row<Equations, A, false>{H, fields...});
  }
};

}  // namespace

template <class A>
const Cell<A>& built_in_cell(const std::string& name) {
  return *with_cell(name, [](auto equations) -> const Cell<A>* {
    static const BuiltInCell<decltype(equations), A> cell;
    return &cell;
  });
}

template const Cell<float>& built_in_cell<float>(const std::string&);
template const Cell<double>& built_in_cell<double>(const std::string&);

}  // namespace fastrnn
