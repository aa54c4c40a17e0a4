"""csrc compiles: headers without CUDA and with it, the CUDA library for every architecture; and what setup.py chooses.

Without a GPU this can be known of the CUDA code: it compiles, links, keeps its values in registers, and what is in its
machine code.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[1]
HEADERS = sorted(path.relative_to(ROOT / "csrc") for path in ROOT.glob("csrc/cells/*.cuh"))
HEADERS += [Path("common/storage.cuh")]
CXX = os.environ.get("CXX", "g++")
NVCC = shutil.which("nvcc")

needs_cxx = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler {CXX}")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")

KERNEL = """
using namespace fastrnn;
template <class Cell>
__global__ void step(const float* x, float* y) {
  float gx[Cell::gates], gh[Cell::gates], prev[Cell::states], state[Cell::states], saved[Cell::saved];
  for (int k = 0; k < Cell::gates; ++k) gx[k] = x[k], gh[k] = x[k + 8];
  for (int k = 0; k < Cell::states; ++k) prev[k] = x[k + 16];
  Cell::forward(gx, gh, prev, state, saved);
  for (int k = 0; k < Cell::states; ++k) y[k] = state[k];
  for (int k = 0; k < Cell::saved; ++k) y[k + 8] = saved[k];
}
template __global__ void step<LSTM>(const float*, float*);
template __global__ void step<GRU>(const float*, float*);
template __global__ void step<RNN<Elu>>(const float*, float*);
"""


def includes(names):
    return "".join(f'#include "{name}"\n' for name in names)


def compile_text(command, text, source):
    source.write_text(text)
    done = subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@needs_cxx
@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_each_header_compiles_alone_and_without_cuda(header, tmp_path):
    strict = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    compile_text([*strict, "-fsyntax-only"], includes([header]), tmp_path / "header.cpp")
    used = compile_text([*strict, "-M"], includes([header]), tmp_path / "header.cpp")
    assert not re.search(r"cuda|/torch/", used.replace(str(ROOT), "")), used


def assert_no_spills(report, kernels):
    """`report`: the output of ptxas -v about at least that many kernels."""
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= kernels, report
    assert all(pair == ("0", "0") for pair in spills), report


@needs_nvcc
@pytest.mark.parametrize("arch", ("80", "90a"))
def test_headers_compile_under_nvcc(arch, tmp_path):
    flags = ["-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v", "-cubin", "-o"]
    command = [NVCC, *flags, str(tmp_path / "step.cubin")]
    report = compile_text(command, includes(HEADERS) + KERNEL, tmp_path / "step.cu")
    assert_no_spills(report, kernels=3)


def build(target, **environment):
    """`setup.py build_ext` into `target`, without the CPU library."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(target), "--build-temp", str(target)]
    environment = os.environ | {"FASTRNN_BUILD_CPU": "0"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory):
    """The CUDA library, and the output of ptxas: about two minutes of one core."""
    target = tmp_path_factory.mktemp("library")
    home = str(Path(NVCC).parents[1])
    done = build(target, FASTRNN_BUILD_CUDA="1", NVCC_APPEND_FLAGS="-Xptxas=-v", CUDA_HOME=home)
    assert done.returncode == 0, done.stderr
    (library,) = target.glob("fastrnn/_C_cuda*.so")
    return library, done.stdout + done.stderr


@pytest.mark.slow
@needs_nvcc
def test_cuda_library_builds_without_spills(cuda_library):
    """2 architectures x forward and backward x 84 instances of the sequence kernels."""
    assert_no_spills(cuda_library[1], kernels=2 * 2 * 84)


@pytest.mark.slow
@needs_nvcc
def test_cuda_library_brings_torchs(cuda_library):
    """The library needs libtorch, and so libtorch_cuda if there is one, even when built with a torch without CUDA."""
    assert b"\0libtorch.so\0" in cuda_library[0].read_bytes()


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")


def sequence_kernels(library, arch):
    """name -> [(address, instruction, operands)] of the persistent kernels."""
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.check_output([cuobjdump, "-sass", "-arch", arch, library], text=True)
    kernels = (part.partition("\n") for part in text.split("Function : ")[1:])
    return {
        name: [(int(at, 16), op, rest) for at, op, rest in INSTRUCTION.findall(code)]
        for name, _, code in kernels
        if "walk_sequence" in name
    }


def time_loop(code):
    """The first and last address of the smallest loop that contains all tensor-core products."""
    products = [at for at, op, _ in code if op.startswith("HMMA")]
    jumps = [(int(to, 16), at) for at, op, rest in code if op == "BRA" for to in re.findall(r"0x([0-9a-f]+)", rest)]
    loops = [(to, at) for to, at in jumps if to <= products[0] and at >= products[-1]]
    return min(loops, key=lambda loop: loop[1] - loop[0])


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
def test_machine_code_of_the_sequence_kernels(cuda_library, arch):
    """Tensor cores, no local memory, the instructions of the exchange, and W_hh read before the time loop."""
    seen = 0
    for name, code in sequence_kernels(cuda_library[0], arch).items():
        cluster, needs_sm90 = "ByCluster" in name, "ByCluster" in name or "ByWideGrid" in name
        found = {op.split(".")[0] for _, op, _ in code}
        if needs_sm90 and arch == "sm_80":
            assert len(code) < 50, f"{name} has a body"
            continue
        seen += 1
        assert "HMMA" in found and not found & {"LDL", "STL"}, name
        assert ("UCGABAR_ARV" in found) == ("STAS" in found) == cluster, name
        if not cluster:  # what other CTAs wrote is read past the level-1 cache
            assert any(op.startswith("LDG.E.128.STRONG.GPU") for _, op, _ in code), name
        first, last = time_loop(code)
        # CTAs of a cluster run a fence only where they first meet: later it would wait for y, c and saved, too.
        if cluster:
            assert sum(op == "MEMBAR.ALL.GPU" for _, op, _ in code) == 1, name
            # The data that peers wait for is sent before outputs and norms are written to memory.
            sent = next(at for at, op, _ in code if op.startswith("SYNCS.ARRIVE"))
            assert not any(op.startswith("STG") for at, op, _ in code if at < sent), name
        read = [at for at, op, _ in code if op.startswith("LDG") and "STRONG" not in op]
        # A step reads for each of 2 elements at most 4 planes, dy, dc, c_prev and a flag, and the bound of the norm;
        # for sm_80 no more than 10 were seen. W_hh alone would be 8 times its fragments.
        assert sum(first <= at <= last for at in read) <= {"sm_80": 10, "sm_90a": 2 * 8 + 1}[arch], name
        assert sum(at < first for at in read) >= 16, name
    assert seen == {"sm_80": 98, "sm_90a": 168}[arch]


def test_setup_refuses_cuda_without_nvcc(tmp_path):
    done = build(tmp_path, FASTRNN_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "fastrnn: cannot build fastrnn._C_cuda: there is no nvcc" in done.stderr


def test_setup_says_what_it_leaves_out(tmp_path):
    done = build(tmp_path, FASTRNN_BUILD_CPU="", FASTRNN_BUILD_CUDA="", CUDA_HOME=str(tmp_path), CXX="false")
    assert "leaving out fastrnn._C_cuda: there is no nvcc" in done.stderr
    done = build(tmp_path, FASTRNN_BUILD_CUDA="")
    assert "leaving out fastrnn._C: FASTRNN_BUILD_CPU=0" in done.stderr
    assert "leaving out fastrnn._C_cuda: FASTRNN_BUILD_CPU=0" in done.stderr and done.returncode == 0


def test_an_editable_install_builds_only_what_is_older_than_its_sources(tmp_path):
    for folder in ("csrc", "fastrnn", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    there = tmp_path / "fastrnn/_C.so"
    there.write_text("built before")
    environment = os.environ | {"FASTRNN_BUILD_CUDA": "0", "CXX": "false"}  # a compiler that fails

    def install():
        command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_editable('out')"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = install()
    assert done.returncode == 0, done.stderr
    assert there.read_text() == "built before" and f"keeping {there}" in done.stdout + done.stderr
    os.utime(tmp_path / "csrc/cpu/scan.h", (there.stat().st_mtime + 1,) * 2)
    done = install()
    assert done.returncode != 0 and "false ended with exit code 1" in done.stderr
