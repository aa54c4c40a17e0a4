"""Fewer sequences than threads: these share the product of each step (csrc/cpu/team.h)."""

import pytest
import torch
from cpp_programs import WITHOUT_TORCH, compiled, printed

import fastrnn
from fastrnn.backends import cpu

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/team.h"
#include "cpu/threads.cpp"

static const int threads = 3;
static int missing = 0;  // threads that never come

extern "C" AOTITorchError torch_get_num_threads(uint32_t* count) { return *count = threads, 0; }
extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f, void* context) {
  std::vector<std::thread> helpers;
  for (int64_t k = begin + 1; k < end - missing; ++k) helpers.emplace_back([=] { f(k, k + 1, context); });
  f(begin, begin + 1, context);
  for (auto& helper : helpers) helper.join();
  return 0;
}

// Walks in which each step's parts need those of the step before.
int main(int, char** argv) {
  missing = std::atoi(argv[1]);
  const int64_t steps = 2000, parts = 5;
  fastrnn::Team team;
  for (int walk = 0; walk < 2; ++walk) {
    std::vector<int64_t> now(parts, 1), before(parts);
    team.lead([&] {
      for (int64_t step = 0; step < steps; ++step) {
        before.swap(now);
        team.share(parts, [&](int64_t k) { now[k] = before[k] + before[(k + 1) % parts] % 7 + 1; });
      }
    });
    std::vector<int64_t> expected(parts, 1), last(parts);
    for (int64_t step = 0; step < steps; ++step) {
      last.swap(expected);
      for (int64_t k = 0; k < parts; ++k) expected[k] = last[k] + last[(k + 1) % parts] % 7 + 1;
    }
    if (now != expected) return std::puts("wrong"), 1;
  }
  return std::puts("right"), 0;
}
"""


@pytest.mark.parametrize("missing", [0, 2])
def test_no_part_is_lost_or_done_twice(program, missing):
    assert printed(program, missing) == "right\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Compiled with ThreadSanitizer, which ends it with 66 after a race."""
    flags = ["-O1", "-g", "-pthread", "-fsanitize=thread", *WITHOUT_TORCH]
    return compiled(tmp_path_factory.mktemp("team"), PROGRAM, *flags)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def widths_of_states(module):
    h = module.proj_size or module.hidden_size
    return (h, module.hidden_size) if isinstance(module, fastrnn.LSTM) else (h,)


CASES = [
    ("LSTM", torch.float32, 1, 6, {}),
    ("LSTM", torch.bfloat16, 2, 5, {}),
    ("LSTM", torch.float32, 1, 700, {}),  # chunks of steps
    ("GRU", torch.float32, 1, 6, {"bidirectional": True, "num_layers": 2}),
    ("RNN", torch.float64, 2, 5, {}),
    ("RNN", torch.float64, 7, 5, {"bidirectional": True}),  # a matrix of 2 MB, which no core need read as a whole
    ("LSTM", torch.float32, 2, 5, {"proj_size": 160}),
    ("LSTM", torch.float32, 2, 5, {"layer_norm": True}),
    ("LSTM", torch.float32, 2, 5, {"num_layers": 2, "residual": True}),
    # Not the operation of whole networks: products and sums around the scan are torch's, so only what the scan gives is
    # compared.
    ("LSTM", torch.float32, 2, 5, {"layer_norm": True, "proj_size": 160}),
]


@pytest.mark.skipif(cpu.MISSING is not None, reason=f"the C++ library is missing: {cpu.MISSING}")
@pytest.mark.parametrize(("cell", "dtype", "batch", "steps", "options"), CASES)
def test_bits_do_not_depend_on_the_threads(threads, cell, dtype, batch, steps, options):
    """Of sizes that a team shares: 2^18 multiplications in a product, fewer sequences than threads."""
    torch.manual_seed(0)
    hidden_size = 512 if cell == "RNN" else 300
    module = getattr(fastrnn, cell)(8, hidden_size, backend="cpu", dtype=dtype, **options)
    x = torch.randn(steps, batch, 8, dtype=dtype)
    found = []
    for count in (1, 3):
        threads(count)
        own = x.clone().requires_grad_()
        shape = (module.num_layers * (1 + module.bidirectional), batch)
        states = [torch.zeros(*shape, width, dtype=dtype, requires_grad=True) for width in widths_of_states(module)]
        y, _ = module(own, tuple(states) if cell == "LSTM" else states[0])
        with torch.no_grad():
            found.append([y, module(x)[0]])
        of_network = [] if options.keys() >= {"layer_norm", "proj_size"} else [own, *module.parameters()]
        found[-1] += torch.autograd.grad(y.sum(), [*states, *of_network])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
