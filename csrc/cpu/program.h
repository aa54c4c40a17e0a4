// A user's cell: its text, as fastrnn/cells.py writes it, and the programs in it.
//
//   cell NAME                      forward, total and backward are the functions of fastrnn/equations.py, as
//   lists of gates i f ...                  instructions. Values are numbered: the inputs, then each
//   instruction's result. states h c ...                 The planes of the inputs and results, in order:
//   parameters p ...                 forward   x [gates], u [gates] if recurrent, state_prev, parameters,
//   inputs inputs n ...                               -> state, saved recurrent 1                      total
//   saved, state_prev, dstate, parameters, inputs saved 4                                    -> dstate
//   distinct_dgh 0                   backward  as total
//   forward 13 | add 0 4 | ...                 -> dgx, dgh if distinct_dgh, dstate_prev, dparameters, dinputs
//   total 11 | ... | out 3
//   backward 11 | ... | out 9 7
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "program_ops.h"

namespace fastrnn {

struct Instruction {
  const Operation* operation;  // null for a constant
  double constant;
  int operands[3];  // numbers of values; -1 where there is none
};

struct Program {
  int inputs = 0;
  std::vector<Instruction> instructions;
  std::vector<int> results;

  // The number of an instruction's result: of an earlier one, if it computes the same.
  int value_of(const Instruction& instruction);

  // The number of a constant.
  int constant(double value) { return value_of({nullptr, value, {-1, -1, -1}}); }

  // Appends the instructions of `other`, whose inputs are the values `given` of this program; returns the
  // numbers of its results.
  std::vector<int> append(const Program& other, const std::vector<int>& given);

  bool is_constant(int value, double of) const;
};

struct UserCell {
  std::string name;
  int64_t gates, states, parameters, inputs, saved;
  bool recurrent, distinct_dgh;
  Program forward, total, backward;

  // The planes that total and backward read.
  int64_t backward_inputs() const { return saved + 2 * states + parameters + inputs; }
  // total, then backward, as one program.
  Program total_and_backward() const;
};

// Raises std::runtime_error that names the line and the instruction, where the text is not that of a cell.
UserCell parse_cell(const std::string& text);

}  // namespace fastrnn
