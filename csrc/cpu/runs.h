// The rows of a block that are computed together.
#pragma once

#include <utility>
#include <vector>

#include "vectors.h"

namespace fastrnn {

using Runs = std::vector<std::pair<int64_t, int64_t>>;  // rows of a block, each run [begin, end)

template <class Row>
void walk_runs(const Runs& runs, const Row& row) {
  for (auto [begin, end] : runs) walk_rows(row, begin, end);
}

}  // namespace fastrnn
