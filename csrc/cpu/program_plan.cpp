#include "program_plan.h"

#include <algorithm>

namespace fastrnn {

// Chooses where each value of a program is, and writes the steps.
class PlanBuilder {
 public:
  PlanBuilder(Plan& plan, const Program& program, bool is_double, const std::vector<PlaneGroup>& inputs,
              const std::vector<PlaneGroup>& results)
      : plan_(plan),
        program_(program),
        is_double_(is_double),
        values_(program.inputs + program.instructions.size()) {
    add_inputs(inputs);
    add_results(results, inputs);
    find_uses();
    place_results();
    place_constants();
    for (int k = 0; k < instruction_count(); ++k) emit(k);
    emit_late_results();
  }

 private:
  static constexpr int nowhere = -1;

  struct Value {
    bool needed = false;
    int last_use = -1;  // the position of the last instruction that reads it; `end()` for a late result
    int slot = nowhere;
    bool in_register = false;
    int group = -1;  // of an input
    int64_t plane = 0;
  };
  struct Result {
    int value, slot;
    int overwrites;  // the input with the same addresses, or -1
    bool late;       // written at the end
    bool in_place;   // the instruction writes it itself
  };

  int instruction_count() const { return static_cast<int>(program_.instructions.size()); }
  int end() const { return instruction_count(); }
  bool is_input(int value) const { return value < program_.inputs; }
  const Instruction& instruction_of(int value) const {
    return program_.instructions[value - program_.inputs];
  }
  bool is_constant(int value) const { return !is_input(value) && instruction_of(value).operation == nullptr; }

  int add_plane(int group, int64_t plane) {
    plan_.planes_.push_back({group, plane});
    return static_cast<int>(plan_.planes_.size()) - 1;
  }

  void add_inputs(const std::vector<PlaneGroup>& groups) {
    int value = 0;
    for (size_t g = 0; g < groups.size(); ++g)
      for (int64_t k = 0; k < groups[g].count; ++k, ++value) {
        values_[value].group = static_cast<int>(g), values_[value].plane = k;
      }
  }

  void add_results(const std::vector<PlaneGroup>& groups, const std::vector<PlaneGroup>& inputs) {
    size_t next = 0;
    for (size_t g = 0; g < groups.size(); ++g)
      for (int64_t k = 0; k < groups[g].count; ++k) {
        int value = program_.results[next++], overwrites = -1;
        if (!groups[g].wanted) continue;
        if (groups[g].same_memory >= 0) {
          overwrites = static_cast<int>(k);
          for (int before = 0; before < groups[g].same_memory; ++before)
            overwrites += static_cast<int>(inputs[before].count);
        }
        if (value == overwrites) continue;  // it is there already
        results_.push_back(
            {value, add_plane(static_cast<int>(inputs.size() + g), k), overwrites, false, false});
      }
  }

  void find_uses() {
    for (const Result& result : results_) values_[result.value].needed = true;
    for (int k = instruction_count() - 1; k >= 0; --k) {
      if (!values_[program_.inputs + k].needed) continue;
      for (int operand : program_.instructions[k].operands)
        if (operand >= 0) {
          values_[operand].needed = true;
          values_[operand].last_use = std::max(values_[operand].last_use, k);
        }
    }
  }

  // A result goes to memory when it is computed, unless an input at the same addresses is still to be read.
  void place_results() {
    for (Result& result : results_)
      if (is_input(result.value) || is_constant(result.value)) delay(result);
    for (Result& result : results_) {
      if (result.late) continue;
      int position = result.value - program_.inputs;
      if (result.overwrites >= 0 && values_[result.overwrites].last_use > position) {
        delay(result);
      } else if (values_[result.value].slot == nowhere) {
        values_[result.value].slot = result.slot;
        result.in_place = true;
      }
    }
    for (int k = 0; k < program_.inputs; ++k) {
      Value& input = values_[k];
      if (input.needed) input.slot = add_plane(input.group, input.plane);
    }
  }

  void delay(Result& result) {
    result.late = true;
    values_[result.value].last_use = end();
  }

  // Registers are numbered after the planes, of which there must be no more from here on.
  void place_constants() {
    first_register_ = static_cast<int>(plan_.planes_.size());
    for (int k = 0; k < instruction_count(); ++k) {
      int value = program_.inputs + k;
      if (!values_[value].needed || !is_constant(value)) continue;
      values_[value].slot = new_register();
      plan_.constants_.push_back(program_.instructions[k].constant);
    }
  }

  int new_register() { return first_register_ + plan_.registers_++; }

  void take_register(Value& value) {
    if (free_.empty()) {
      value.slot = new_register();
    } else {
      value.slot = free_.back();
      free_.pop_back();
    }
    value.in_register = true;
  }

  void release(Value& value) {
    if (value.in_register) free_.push_back(value.slot);
    value.in_register = false;
  }

  void step(Loop loop, int out, int x, int y, int z) { plan_.steps_.push_back({loop, out, x, y, z}); }
  void step(Loop loop, int out, int x) { step(loop, out, x, x, x); }

  void emit(int k) {
    const Instruction& instruction = program_.instructions[k];
    int value = program_.inputs + k;
    Value& result = values_[value];
    if (!result.needed || instruction.operation == nullptr) return;
    int operands[3], count = instruction.operation->operands;
    for (int i = 0; i < count; ++i) operands[i] = values_[instruction.operands[i]].slot;
    for (int i = count; i < 3; ++i) operands[i] = operands[0];
    for (int i = 0; i < count; ++i)
      if (values_[instruction.operands[i]].last_use == k) release(values_[instruction.operands[i]]);
    if (result.slot == nowhere) take_register(result);
    Loop loop = is_double_ ? instruction.operation->float64 : instruction.operation->float32;
    step(loop, result.slot, operands[0], operands[1], operands[2]);
    for (const Result& out : results_)
      if (out.value == value && !out.late && !out.in_place) write(out);
    if (result.last_use <= k) release(result);
  }

  void write(const Result& out) { step(copy_loop(is_double_), out.slot, values_[out.value].slot); }

  // Inputs that are results themselves leave their memory first: another result may overwrite it.
  void emit_late_results() {
    for (const Result& out : results_) {
      Value& value = values_[out.value];
      if (!out.late || !is_input(out.value) || value.in_register) continue;
      const int from = value.slot;
      take_register(value);
      step(copy_loop(is_double_), value.slot, from);
    }
    for (const Result& out : results_)
      if (out.late) write(out);
  }

  Plan& plan_;
  const Program& program_;
  const bool is_double_;
  std::vector<Value> values_;
  std::vector<Result> results_;
  std::vector<int> free_;
  int first_register_ = 0;
};

Plan::Plan(const Program& program, bool is_double, const std::vector<PlaneGroup>& inputs,
           const std::vector<PlaneGroup>& results)
    : is_double_(is_double), input_groups_(static_cast<int>(inputs.size())) {
  PlanBuilder(*this, program, is_double, inputs, results);
  constexpr int64_t cache = 1 << 14, least = 64, most = 256;  // bytes of all registers; elements of a block
  int64_t size = is_double_ ? sizeof(double) : sizeof(float);
  int64_t fitting = cache / (size * std::max(registers_, 1));
  block_ = std::clamp(fitting / least * least, least, most);
}

bool Plan::reads(int group) const {
  return std::any_of(planes_.begin(), planes_.end(), [&](const Slot& slot) { return slot.group == group; });
}

void Plan::prepare(Memory& memory) const {
  int64_t size = is_double_ ? sizeof(double) : sizeof(float);
  int64_t stride =
      block_ * size + 64;  // not a power of two: a cache has few places for addresses that far apart
  memory.registers = std::make_unique<Aligned<char>>(registers_ * stride);
  memory.slots.assign(planes_.size(), nullptr);
  for (int k = 0; k < registers_; ++k) memory.slots.push_back(memory.registers->data() + k * stride);
  for (size_t k = 0; k < constants_.size(); ++k) {
    char* to = memory.slots[planes_.size() + k];
    if (is_double_)
      std::fill_n(reinterpret_cast<double*>(to), block_, constants_[k]);
    else
      std::fill_n(reinterpret_cast<float*>(to), block_, static_cast<float>(constants_[k]));
  }
}

void Plan::run(int64_t begin, int64_t end, int64_t H, const Planes* groups, Memory& memory) const {
  if (memory.registers == nullptr) prepare(memory);
  char** slots = memory.slots.data();
  // Blocks of nearly the same length, in whole vectors.
  constexpr int64_t whole = 16;
  int64_t blocks = std::max<int64_t>((H + block_ - 1) / block_, 1);
  int64_t length = (H + blocks * whole - 1) / (blocks * whole) * whole;
  for (int64_t b = begin; b < end; ++b)
    for (int64_t first = 0; first < H; first += length) {
      int64_t n = std::min(length, H - first);
      for (size_t s = 0; s < planes_.size(); ++s) {
        const Planes& group = groups[planes_[s].group];
        slots[s] = group.data + b * group.stride + (planes_[s].plane * H + first) * group.size;
      }
      for (const Step& step : steps_)
        step.loop(slots[step.out], slots[step.x], slots[step.y], slots[step.z], n);
    }
}

}  // namespace fastrnn
