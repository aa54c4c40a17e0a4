// A program made ready to run over planes in memory: its values get registers, which are blocks of a row, and
// every instruction is one loop over a block. Blocks are long enough that choosing the loop costs little, and
// short enough that the registers stay in the nearest cache.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "panels.h"
#include "program.h"
#include "row_ops.h"

namespace fastrnn {

// Planes that lie side by side, [B, count * H]; strides and sizes are in bytes.
struct Planes {
  char* data;
  int64_t stride, size;

  template <class T>
  Planes(const RowView<T>& rows)
      : data(reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(rows.data))),
        stride(rows.stride * int64_t(sizeof(T))),
        size(sizeof(T)) {}
};

// What a plan has to know of planes beforehand.
struct PlaneGroup {
  int64_t count;
  bool wanted = true;    // of results: whether anything reads them
  int same_memory = -1;  // of results: the group of inputs that has the same addresses
};

class Plan {
 public:
  // What one thread needs to run a plan: the registers, and the address of each slot.
  struct Memory {
    std::unique_ptr<Aligned<char>> registers;
    std::vector<char*> slots;
  };

  // The planes are of double or of float.
  Plan(const Program& program, bool is_double, const std::vector<PlaneGroup>& inputs,
       const std::vector<PlaneGroup>& results);

  // Whether it reads any plane of this group of inputs.
  bool reads(int group) const;

  // Rows from begin to end. `groups`: those of the inputs, then those of the results.
  void run(int64_t begin, int64_t end, int64_t H, const Planes* groups, Memory& memory) const;

 private:
  friend class PlanBuilder;

  struct Step {
    Loop loop;
    int out, x, y, z;  // slots
  };
  struct Slot {
    int group;
    int64_t plane;
  };

  void prepare(Memory& memory) const;

  bool is_double_;
  std::vector<Step> steps_;
  // Slots are numbered: planes in memory, then registers, the first of which hold the constants.
  std::vector<Slot> planes_;
  std::vector<double> constants_;
  int registers_ = 0;
  int64_t block_;  // elements
  int input_groups_;
};

}  // namespace fastrnn
