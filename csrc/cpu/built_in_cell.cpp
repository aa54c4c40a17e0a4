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
    if constexpr (has_c) {
      if (step.ln_c.weight != nullptr)
        return with_norm(step.ln_c, [&](auto carried) {
          walk_runs(runs, NormedForwardRow<Equations, A, carried>{step.H, step.gx, step.gh, step.c_prev,
                                                                  step.ln_c, step.h, step.c, step.saved});
        });
    }
    // A cell with a c reads no h, which a projection makes narrower than H.
    const RowView<const A>& h_prev = has_c ? step.c_prev : step.h_prev;
    walk_runs(runs, ForwardRow<Equations, A>{step.H, step.gx, step.gh, h_prev, step.c_prev, step.h, step.c,
                                             step.saved});
  }

  void total(const Runs& runs, const BackwardStep<A>& step, Memory*) const override {
    if constexpr (has_c) {
      if (step.ln_c.weight == nullptr)
        return walk_runs(
            runs, TotalRow<Equations, A>{step.H, step.saved, step.c_prev, step.dh, step.dc, step.total_c});
      with_norm(step.ln_c, [&](auto carried) {
        walk_runs(runs, NormedTotalRow<Equations, A, carried>{step.H, step.saved, step.c_prev, step.dh,
                                                              step.dc, step.ln_c, step.norm, step.total_c});
      });
    }
  }

  void backward(const Runs& runs, const BackwardStep<A>& step, bool joined, Memory*) const override {
    const RowView<const A>& h_prev = Equations::distinct_dgh ? step.h_prev : step.dh;
    if constexpr (has_c) {
      if (step.ln_c.weight != nullptr)
        return with_norm(step.ln_c, [&](auto carried) {
          walk_runs(runs, NormedBackwardRow<Equations, A, carried>{
                              step.H, step.saved, step.c_prev, step.dh, read_only(step.total_c), step.ln_c,
                              step.norm, step.dgx, step.dc_prev, step.dln_c_weight, step.dln_c_bias});
        });
      if (joined)
        return walk_runs(
            runs, BackwardRow<Equations, A, true>{step.H, step.saved, h_prev, step.c_prev, step.dh, step.dc,
                                                  step.dgx, step.dgh, step.dh_past_w, step.dc_prev});
    }
    walk_runs(runs, BackwardRow<Equations, A>{step.H, step.saved, h_prev, step.c_prev, step.dh,
                                              read_only(step.total_c), step.dgx, step.dgh, step.dh_past_w,
                                              step.dc_prev});
  }

 private:
  static RowView<const A> read_only(const RowView<A>& rows) { return {rows.data, rows.stride}; }

  // f(whether the normalised c is carried), as a constant.
  template <class F>
  static void with_norm(const Affine<A>& ln_c, const F& f) {
    ln_c.carried ? f(std::true_type{}) : f(std::false_type{});
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
