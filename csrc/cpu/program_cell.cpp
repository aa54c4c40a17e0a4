// A user's cell as the scans take it: the plans of its programs, which are made once for a text and a dtype.
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "cell.h"
#include "program_plan.h"

namespace fastrnn {
namespace {

template <class A>
class ProgramCell final : public Cell<A> {
 public:
  using Memory = typename Cell<A>::Memory;

  explicit ProgramCell(const std::string& text) : cell_(parse_cell(text)) {
    this->gates = cell_.gates, this->states = cell_.states, this->saved = cell_.saved;
    this->parameters = cell_.parameters, this->inputs = cell_.inputs;
    this->recurrent = cell_.recurrent, this->distinct_dgh = cell_.distinct_dgh;
    this->reads_h_prev = total_plan_.reads(1) || backward_plan_.reads(1) || joined_plan_.reads(1);
    this->gives_h_prev = gives_h_prev_;
    this->adds_to_dh = adds_to_dh_;
    this->joins = true;
  }

  std::unique_ptr<Memory> memory() const override { return std::make_unique<PlanMemory>(); }

  void forward(const Runs& runs, const ForwardStep<A>& step, Memory* memory) const override {
    const bool saves = step.saved.data != nullptr;
    const Planes groups[] = {step.gx,     step.gh, step.h_prev, step.c_prev, step.parameters,
                             step.inputs, step.h,  step.c,      step.saved};
    run(runs, saves ? forward_plan_ : forward_without_saved_, step.H, groups, of(memory).forward);
  }

  void total(const Runs& runs, const BackwardStep<A>& step, Memory* memory) const override {
    const Planes groups[] = {step.saved,      step.h_prev, step.c_prev,  step.dh,     step.dc,
                             step.parameters, step.inputs, step.total_h, step.total_c};
    run(runs, total_plan_, step.H, groups, of(memory).total);
  }

  void backward(const Runs& runs, const BackwardStep<A>& step, bool joined, Memory* memory) const override {
    const bool own_dh = joined || !adds_to_dh_;
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
    run(runs, joined ? joined_plan_ : backward_plan_, step.H, groups, of(memory).backward);
  }

 private:
  using Groups = std::vector<PlaneGroup>;
  static constexpr bool is_double = std::is_same_v<A, double>;

  struct PlanMemory final : Memory {
    Plan::Memory forward, total, backward;
  };

  static PlanMemory& of(Memory* memory) { return *static_cast<PlanMemory*>(memory); }

  Plan plan_forward(bool saves) const {
    const int c_prev = 3;
    Groups given = {
        {cell_.gates}, {cell_.recurrent ? cell_.gates : 0}, {1}, {cell_.states - 1}, {cell_.parameters},
        {cell_.inputs}};
    Groups found = {{1}, {cell_.states - 1, true, c_prev}, {cell_.saved, saves}};
    return {cell_.forward, is_double, given, found};
  }

  Groups backward_inputs() const {
    return {{cell_.saved},      {1},           {cell_.states - 1}, {1}, {cell_.states - 1},
            {cell_.parameters}, {cell_.inputs}};
  }

  Groups total_results() const { return {{1, adds_to_dh_}, {cell_.states - 1}}; }

  Groups backward_results() const {
    return {{cell_.gates},
            {cell_.distinct_dgh ? cell_.gates : 0},
            {1, gives_h_prev_},
            {cell_.states - 1},
            {cell_.parameters + cell_.inputs}};
  }

  static void run(const Runs& runs, const Plan& plan, int64_t H, const Planes* groups, Plan::Memory& memory) {
    for (auto [begin, end] : runs) plan.run(begin, end, H, groups, memory);
  }

  const UserCell cell_;
  const bool gives_h_prev_ =
      !cell_.backward.is_constant(cell_.backward.results[cell_.gates * (cell_.distinct_dgh ? 2 : 1)], 0);
  const bool adds_to_dh_ = cell_.total.results[0] != cell_.saved + cell_.states;
  const Plan forward_plan_ = plan_forward(true), forward_without_saved_ = plan_forward(false);
  const Plan total_plan_{cell_.total, is_double, backward_inputs(), total_results()};
  const Plan backward_plan_{cell_.backward, is_double, backward_inputs(), backward_results()};
  // total and backward in one, where nothing between them needs the totals: it computes what they share only
  // once.
  const Plan joined_plan_{cell_.total_and_backward(), is_double, backward_inputs(), backward_results()};
};

}  // namespace

template <class A>
std::shared_ptr<const Cell<A>> program_cell(const std::string& text) {
  constexpr size_t most = 1000;  // a program that makes more texts than this makes them without end
  static std::mutex mutex;
  static auto& known = *new std::unordered_map<std::string, std::shared_ptr<const Cell<A>>>();
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(text);
  if (found != known.end()) return found->second;
  auto made = std::make_shared<const ProgramCell<A>>(text);
  if (known.size() >= most) known.clear();
  known.emplace(text, made);
  return made;
}

template std::shared_ptr<const Cell<float>> program_cell<float>(const std::string&);
template std::shared_ptr<const Cell<double>> program_cell<double>(const std::string&);

}  // namespace fastrnn
