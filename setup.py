"""Builds what pyproject.toml cannot describe: the package list, and csrc as libraries that PyTorch loads.

The libraries hold operators on PyTorch's stable ABI and no Python code: `torch.ops.load_library` loads them, so one
build serves every Python and every torch >= 2.10. The install works without them; what is missing is printed. An
editable install keeps a library that is newer than its sources: remove it to have it built with another compiler.

Environment: FASTRNN_BUILD_CUDA = 1 builds csrc/cuda or fails, 0 leaves it out, unset builds it where torch is a CUDA
build and nvcc is there. CXX: the C++ compiler.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"fastrnn needs setuptools >= 77 to build, got {setuptools.__version__}: pip install -U setuptools")

ROOT = Path(__file__).parent
CPU, CUDA = "fastrnn._C", "fastrnn._C_cuda"
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
# No -ffast-math: NaN and inf must come through. No -march: csrc/cpu/vectors.h chooses at run time.
CXX_FLAGS = (
    "-std=c++17 -O3 -shared -fPIC -fvisibility=hidden"
    " -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd"
)
# sm_80 runs on every later 8.x too; its PTX serves what comes after Hopper.
NVCC_FLAGS = (
    "-std=c++17 -O3 -shared -Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA --threads 0"
    " -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_80,code=compute_80"
    " -gencode=arch=compute_90a,code=sm_90a"
)


def find_torch():
    try:
        import torch
    except ImportError:
        return None
    return torch


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compiler(name: str) -> list[str]:
    """The compiler of one library, and its flags."""
    if name == CPU:
        return [*shlex.split(os.environ.get("CXX", "g++")), *CXX_FLAGS.split()]
    return [find_nvcc(), *NVCC_FLAGS.split()]


def libraries() -> list[Extension]:
    """What can be built here; prints why the rest cannot, and fails only where FASTRNN_BUILD_CUDA=1 demands it."""
    torch, wish = find_torch(), os.environ.get("FASTRNN_BUILD_CUDA", "")
    missing = {CPU: None, CUDA: None}
    if torch is None:
        missing = dict.fromkeys(missing, "torch cannot be imported: install it first, then use --no-build-isolation")
    else:
        if shutil.which(compiler(CPU)[0]) is None:
            missing[CPU] = f"there is no C++ compiler {compiler(CPU)[0]!r}: install one or set CXX"
        if find_nvcc() is None:
            missing[CUDA] = "there is no nvcc: install the CUDA toolkit or set CUDA_HOME"
        elif wish != "1" and torch.version.cuda is None:
            missing[CUDA] = "this torch is built without CUDA"
    if wish == "0":
        missing[CUDA] = "FASTRNN_BUILD_CUDA=0"
    if wish == "1" and missing[CUDA]:
        sys.exit(f"FASTRNN_BUILD_CUDA=1, but {missing[CUDA]}")
    for name, reason in missing.items():
        if reason:
            print(f"fastrnn: leaving out {name}: {reason}", file=sys.stderr)
    headers = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*h"))]
    sources = {CPU: "csrc/cpu/*.cpp", CUDA: "csrc/cuda/*.cu"}
    return [
        Extension(
            name,
            [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(sources[name]))],
            depends=headers,
            py_limited_api=True,
        )
        for name, reason in missing.items()
        if not reason
    ]


class BuildLibraries(build_ext):
    """One compiler call per library: torch's own builder would refuse nvcc beside a CPU torch."""

    def build_extension(self, ext):
        from setuptools.modified import newer_group  # here, so that an old setuptools is told so above

        out = self.get_ext_fullpath(ext.name)
        # An editable install asks for a new one each time, and then puts it here.
        known = ROOT / self.get_ext_filename(ext.name) if self.editable_mode else Path(out)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        if not (self.force or newer_group([*ext.sources, *ext.depends, __file__], known)):
            if known != Path(out):
                print(f"fastrnn: keeping {known}: newer than its sources", file=sys.stderr)
                shutil.copy2(known, out)
            return
        home = Path(find_torch().__file__).parent
        links = ["-ltorch_cpu", "-ltorch", "-lc10"]
        if ext.name == CUDA:  # needs libtorch at run time, and by it libtorch_cuda, whichever torch it is built with
            links = ["-Xlinker", "--no-as-needed", *links]
        line = [*compiler(ext.name), TARGET, f"-I{home / 'include'}", *ext.sources, "-o", out]
        line += [f"-L{home / 'lib'}", *links]
        print(shlex.join(line), flush=True)
        subprocess.run(line, check=True, cwd=ROOT)


setup(
    packages=["fastrnn", "fastrnn.backends", "fastrnn.kernels", "fastrnn.monitoring"],
    # A top-level `kernels` would shadow the package of that name on PyPI.
    package_dir={"fastrnn.kernels": "kernels"},
    package_data={"fastrnn": ["py.typed"]},
    ext_modules=libraries(),
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
