"""`linear`, and csrc's product behind it: what torch gives, in any layout and from any number of threads."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrnn.backends import cpu
from fastrnn.linear import linear

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "g++")
needs_csrc = pytest.mark.skipif(cpu.MISSING is not None, reason=f"csrc: {cpu.MISSING}")
SIZES = (0, 1, 3, 17, 63, 65, 130)


def operands(M, K, N, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype) for shape in ((M, K), (N, K), (N,)))


@needs_csrc
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_the_product_is_torchs(dtype, bias):
    for M in SIZES:
        for K in SIZES:
            for N in SIZES[1:]:
                x, weight, b = operands(M, K, N, dtype)
                b = b if bias else None
                want = F.linear(x.double(), weight.double(), None if b is None else b.double())
                # Sums of up to 130 terms of order one, of size about 11 and up to 60.
                got = cpu.linear(x, weight, b)
                assert got.dtype == dtype and got.is_contiguous()
                torch.testing.assert_close(got.double(), want, rtol=0, atol=64 * torch.finfo(dtype).eps * 4)


@needs_csrc
def test_errors_are_at_most_twice_torchs():
    """In float32 against float64, over sums as long as a weight's gradient has."""
    x, weight, _ = operands(64, 3000, 64, torch.float32)
    exact = F.linear(x.double(), weight.double())
    error, torchs = ((y - exact).abs().max() for y in (cpu.linear(x, weight, None), F.linear(x, weight)))
    assert error <= 2 * torchs


@needs_csrc
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_from_any_layout_and_any_number_of_threads(dtype):
    x, weight, bias = operands(333, 300, 130, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = cpu.linear(x, weight, bias)
        torch.set_num_threads(2)
        assert torch.equal(cpu.linear(x, weight, bias), expected)
    finally:
        torch.set_num_threads(threads)
    wide = x.new_zeros(333, 600)
    wide[:, ::2] = x
    layouts = (x.t().contiguous().t(), weight), (wide[:, ::2], weight.t().contiguous().t())
    for layout in layouts:
        assert torch.equal(cpu.linear(*layout, bias), expected)
    for begin, end in ((0, 1), (1, 4), (4, 133)):
        assert torch.equal(cpu.linear(x[begin:end], weight, bias), expected[begin:end])
    alike = x[:1].expand(3, 300)
    assert torch.equal(cpu.linear(alike, weight, bias), expected[:1].expand(3, 130))


@needs_csrc
def test_first_and_second_derivatives(monkeypatch):
    monkeypatch.setattr("fastrnn.linear.LEAST_ROWS", 1)
    leaves = tuple(t.requires_grad_() for t in operands(3, 4, 5, torch.float64))

    def run(x, weight, bias):
        return linear(x.unsqueeze(0), weight, bias, "cpu")

    assert "Linear" in run(*leaves).grad_fn.next_functions[0][0].name() or not cpu.PRODUCTS
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@needs_csrc
def test_shapes_are_known_without_numbers():
    torch.library.opcheck(torch.ops.fastrnn_c.linear.default, operands(3, 4, 5, torch.float32))
    with FakeTensorMode():
        assert cpu.linear(torch.empty(3, 4), torch.empty(5, 4), None).shape == (3, 5)


def test_torchs_own_where_there_is_no_better_one():
    for backend, rows, dtype in (
        ("reference", 300, torch.float64),
        ("cpu", 3, torch.float64),
        ("cpu", 300, torch.bfloat16),
    ):
        x, weight, bias = (t.requires_grad_() for t in operands(rows, 4, 5, dtype))
        y = linear(x, weight, bias, backend)
        assert torch.equal(y, F.linear(x, weight, bias)) and y.grad_fn.name() == "AddmmBackward0"


@needs_csrc
def test_bad_arguments_are_named():
    x, weight, bias = operands(3, 4, 5, torch.float32)
    for message, arguments in (
        (r"weight must have shape \[5, 4\], got \[5, 3\]", (x, weight[:, 1:], bias)),
        (r"bias must have shape \[5\], got \[4\]", (x, weight, bias[1:])),
        ("weight must be Float, got Double", (x, weight.double(), bias)),
        ("x must be Float, got BFloat16", (x.bfloat16(), weight.bfloat16(), None)),
        (r"x must have shape \[M, K\]", (x[0], weight, bias)),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu.linear(*arguments)


EVERY_WIDTH = """
#include "cpu/product.h"
#include <cmath>
#include <cstdio>
#include <vector>
using namespace fastrnn;

// Rows [0, R) at once and one by one, by the given walk: the same bits, and right within float32's rounding.
template <class Walk>
int wrong(const Walk& walk, int64_t R, int64_t K, int64_t N) {
  std::vector<float> x(R * K), w(K * N), together(R * padded<float>(N)), apart(together.size());
  for (size_t j = 0; j < x.size(); ++j) x[j] = std::sin(j + 1.0);
  for (size_t j = 0; j < w.size(); ++j) w[j] = std::cos(3.0 * j);
  Packed<float> packed(w.data(), K, N, N, 1, nullptr);
  Rows<const float> in{x.data(), K};
  walk(Multiply<float>{packed, in, 1, {together.data(), padded<float>(N)}}, 0, R);
  for (int64_t r = 0; r < R; ++r) walk(Multiply<float>{packed, in, 1, {apart.data(), padded<float>(N)}}, r, r + 1);
  int count = 0;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += double(x[r * K + k]) * w[k * N + n];
      float got = together[r * padded<float>(N) + n];
      count += got != apart[r * padded<float>(N) + n] || !(std::abs(got - sum) < 1e-4);
    }
  return count;
}

int main() {
  Vectors widest = widest_vectors();
  int count = wrong(walk_baseline<Multiply<float>>, 13, 200, 70);
  if (widest >= Vectors::avx2) count += wrong(walk_avx2<Multiply<float>>, 13, 200, 70);
  if (widest >= Vectors::avx512) count += wrong(walk_avx512<Multiply<float>>, 13, 200, 70);
  std::printf("%d", count);
}
"""


@needs_csrc
@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler {CXX}")
def test_every_width_of_vectors_is_right_and_rows_keep_their_bits(tmp_path):
    """Those narrower than this machine's widest too, which the library would not choose here."""
    torch_home = Path(torch.__file__).parent
    (tmp_path / "widths.cpp").write_text(EVERY_WIDTH)
    flags = ["-std=c++17", "-O2", "-ffp-contract=fast", "-fopenmp-simd", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    libraries = [f"-L{torch_home / 'lib'}", f"-Wl,-rpath,{torch_home / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    paths = [f"-I{ROOT / 'csrc'}", f"-I{torch_home / 'include'}"]
    command = [CXX, *flags, *paths, str(tmp_path / "widths.cpp"), "-o", str(tmp_path / "widths"), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([tmp_path / "widths"], capture_output=True, text=True).stdout == "0"
