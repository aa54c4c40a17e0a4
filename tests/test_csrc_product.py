"""The product of csrc's scan at every width of vectors, compiled here by itself."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastrnn.backends import cpu

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "g++")
needs_csrc = pytest.mark.skipif(cpu.MISSING is not None, reason=f"csrc: {cpu.MISSING}")

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
