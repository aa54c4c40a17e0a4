// A user's cell as the scans take it: the plans of its programs, which are made once for a text and a dtype.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "cell.h"
#include "program_plan.h"

namespace fastrnn {

template <class S>
struct ProgramCell {
  using Storage = S;
  using A = typename Arithmetic<S>::type;

  const UserCell cell;
  const int64_t gates = cell.gates, states = cell.states, saved = cell.saved;
  const int64_t parameters = cell.parameters, inputs = cell.inputs;
  const bool recurrent = cell.recurrent, distinct_dgh = cell.distinct_dgh;
  const bool gives_h_prev =
      !cell.backward.is_constant(cell.backward.results[gates * (distinct_dgh ? 2 : 1)], 0);
  const bool adds_to_dh = cell.total.results[0] != saved + states;
  static constexpr bool joins = true, always_saves = false, built_in = false;

 private:
  const PlanTypes types = PlanTypes::of<S>();
  const Plan forward_plan = plan_forward(true), forward_without_saved = plan_forward(false);
  const Plan total_plan{cell.total, types, backward_inputs(), total_results()};
  const Plan backward_plan{cell.backward, types, backward_inputs(), backward_results()};
  // total and backward in one, where nothing between them needs the totals: it computes what they share only
  // once.
  const Plan joined_plan{cell.total_and_backward(), types, backward_inputs(), backward_results()};

 public:
  const bool reads_h_prev = total_plan.reads(1) || backward_plan.reads(1) || joined_plan.reads(1);

  struct Memory {
    Plan::Memory forward, total, backward;
  };

  explicit ProgramCell(const std::string& text) : cell(parse_cell(text)) {}

  // The cell of a text: parsed once.
  static std::shared_ptr<const ProgramCell> of(const std::string& text) {
    constexpr size_t most = 1000;  // a program that makes more texts than this makes them without end
    static std::mutex mutex;
    static auto& known = *new std::unordered_map<std::string, std::shared_ptr<const ProgramCell>>();
    std::lock_guard<std::mutex> lock(mutex);
    auto found = known.find(text);
    if (found != known.end()) return found->second;
    auto made = std::make_shared<const ProgramCell>(text);
    if (known.size() >= most) known.clear();
    known.emplace(text, made);
    return made;
  }

  void forward(const Runs& runs, const ForwardStep<S>& step, Memory& memory) const {
    const bool saves = step.saved.data != nullptr;
    const Planes groups[] = {step.gx,     step.gh, step.h_prev, step.c_prev, step.parameters,
                             step.inputs, step.h,  step.c,      step.saved};
    run(runs, saves ? forward_plan : forward_without_saved, step.H, groups, memory.forward);
  }

  void total(const Runs& runs, const BackwardStep<S>& step, Memory& memory) const {
    const Planes groups[] = {step.saved,      step.h_prev, step.c_prev,  step.dh,     step.dc,
                             step.parameters, step.inputs, step.total_h, step.total_c};
    run(runs, total_plan, step.H, groups, memory.total);
  }

  // dh and dc: the totals, unless `joined`.
  void backward(const Runs& runs, const BackwardStep<S>& step, bool joined, Memory& memory) const {
    const bool own_dh = joined || !adds_to_dh;
    const Planes groups[] = {step.saved,
                             step.h_prev,
                             step.c_prev,
                             own_dh ? Planes(step.dh) : Planes(step.total_h),
                             joined ? Planes(step.dc) : Planes(step.total_c),
                             step.parameters,
                             step.inputs,
                             step.dgx,
                             step.dgh,
                             step.dh_past_w,
                             step.dc_prev,
                             step.dcell};
    run(runs, joined ? joined_plan : backward_plan, step.H, groups, memory.backward);
  }

 private:
  using Groups = std::vector<PlaneGroup>;
  static constexpr bool stored = true;

  Plan plan_forward(bool saves) const {
    const int c_prev = 3;
    Groups given = {{gates, stored},       {recurrent ? gates : 0, !stored},
                    {1, !stored},          {states - 1, !stored},
                    {parameters, !stored}, {inputs, stored}};
    Groups found = {{1, !stored}, {states - 1, !stored, true, c_prev}, {saved, stored, saves}};
    return {cell.forward, types, given, found};
  }

  Groups backward_inputs() const {
    return {{saved, stored},       {1, !stored},          {states - 1, !stored}, {1, !stored},
            {states - 1, !stored}, {parameters, !stored}, {inputs, stored}};
  }

  Groups total_results() const { return {{1, !stored, adds_to_dh}, {states - 1, !stored}}; }

  Groups backward_results() const {
    return {{gates, !stored},
            {distinct_dgh ? gates : 0, !stored},
            {1, !stored, gives_h_prev},
            {states - 1, !stored},
            {parameters + inputs, stored}};
  }

  static void run(const Runs& runs, const Plan& plan, int64_t H, const Planes* groups, Plan::Memory& memory) {
    for (auto [begin, end] : runs) plan.run(begin, end, H, groups, memory);
  }
};

}  // namespace fastrnn
