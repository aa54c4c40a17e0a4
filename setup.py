"""Builds what pyproject.toml cannot describe: the package list, and csrc as libraries that PyTorch loads.

The libraries hold operators on PyTorch's stable ABI and no Python code: `torch.ops.load_library` loads them, so one
build serves every Python and every torch >= 2.10. No torch is needed to build: csrc/torch has the headers, and
the symbols are resolved when the library is loaded.

Environment (docs/install.md): FASTRNN_BUILD_CPU = 0 leaves out the C++ library; otherwise it is built, or the install
fails. FASTRNN_BUILD_CUDA = 1 builds csrc/cuda or fails, 0 leaves it out; unset, it is built where nvcc is found and
torch is a CUDA build. CXX, CXXFLAGS and LDFLAGS have their usual meaning.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"fastrnn needs setuptools >= 77 to build, got {setuptools.__version__}: pip install -U setuptools")

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
CPU, CUDA = "fastrnn._C", "fastrnn._C_cuda"
SOURCES = {CPU: "csrc/cpu/*.cpp", CUDA: "csrc/cuda/*.cu"}
# What a library names as needed. libtorch brings libtorch_cuda where there is one.
NEEDED = {CPU: ["torch_cpu"], CUDA: ["torch_cpu", "torch"]}
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
# No -ffast-math: NaN and inf must come through. No -march: csrc/cpu/vectors.h chooses at run time.
# -Wno-pass-failed: Clang reports each `omp simd` loop that it leaves scalar (docs/install.md).
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden"
    " -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd -Wno-pass-failed"
)
# sm_80 runs on every later 8.x too; its PTX serves what comes after Hopper.
NVCC_FLAGS = (
    "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA --threads 0"
    " -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_80,code=compute_80"
    " -gencode=arch=compute_90a,code=sm_90a"
)


def switch(name: str) -> str:
    """An environment variable that is 0, 1 or unset ("")."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"fastrnn: {name} must be 0, 1 or unset, got {value!r}")
    return value


def flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def find_cxx() -> list[str] | None:
    """The C++ compiler and what CXX adds to it; None without one."""
    command = flags("CXX") or next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    return command if command and shutil.which(command[0]) else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def no_cuda_torch() -> str | None:
    """Why CUDA kernels would have no torch to run with, going by the environment that pip installs into. pip hides it
    from the build by PYTHONPATH, which -E ignores; other front ends build in an environment that has no torch."""
    ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    line = [sys.executable, "-E", "-c", ask]
    found = find_spec("torch")
    origin = found.origin if found else subprocess.run(line, capture_output=True, text=True, cwd=os.sep).stdout.strip()
    version = Path(origin).parent / "version.py"
    if not origin or not version.is_file():
        return "there is no torch in the environment of the build"
    cuda = re.search(r"^cuda[^=]*= ['\"]", version.read_text(), re.MULTILINE)
    return None if cuda else "this torch is built without CUDA"


def why_not(name: str) -> str | None:
    """Why a library cannot be built here."""
    if sys.platform == "win32":
        return "the build knows only Linux and macOS"
    if find_cxx() is None:
        asked = os.environ.get("CXX")
        missing = f"there is no C++ compiler {asked!r}" if asked else "there is no C++ compiler (g++, c++ or clang++)"
        return f"{missing}: install one or set CXX"
    if name == CUDA and find_nvcc() is None:
        return "there is no nvcc: install the CUDA toolkit or set CUDA_HOME"
    return None


def libraries() -> list[Extension]:
    """The libraries that the environment asks for; prints why another one is left out."""
    cpu, cuda = switch("FASTRNN_BUILD_CPU"), switch("FASTRNN_BUILD_CUDA")
    left_out = {}
    if cpu == "0":
        left_out[CPU] = "FASTRNN_BUILD_CPU=0"
    if cuda == "0":
        left_out[CUDA] = "FASTRNN_BUILD_CUDA=0"
    elif cuda == "":
        left_out[CUDA] = left_out.get(CPU) or why_not(CUDA) or no_cuda_torch()
    for name, reason in left_out.items():
        if reason:
            print(f"fastrnn: leaving out {name}: {reason}", file=sys.stderr)
    headers = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*h"))]
    return [
        Extension(name, [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(SOURCES[name]))], depends=headers)
        for name in SOURCES
        if not left_out.get(name)
    ]


class BuildLibraries(build_ext):
    """Calls the compilers itself: torch's own builder would need torch, and refuse nvcc beside a CPU torch."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # no tag of a Python: none imports it

    def check(self):
        """Ends the install with one sentence where a library cannot be built."""
        for ext in self.extensions or []:
            if reason := why_not(ext.name):
                variable = "FASTRNN_BUILD_CPU" if ext.name == CPU else "FASTRNN_BUILD_CUDA"
                what = "fastrnn, slow, without its C++ library" if ext.name == CPU else "fastrnn without CUDA kernels"
                sys.exit(f"fastrnn: cannot build {ext.name}: {reason}; or install {what}, with {variable}=0")

    def run(self):
        self.check()
        if not (self.editable_mode or self.inplace):  # what an earlier build left there would be packed, too
            for stale in Path(self.build_lib, "fastrnn").glob("_C*.so"):
                stale.unlink()
        super().run()

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        known = ROOT / self.get_ext_filename(ext.name)
        # An editable install asks for a new library each time, and then puts it here.
        if self.editable_mode and not self.force and not newer_group([*ext.sources, *ext.depends, __file__], known):
            print(f"fastrnn: keeping {known}: newer than its sources", file=sys.stderr)
            shutil.copy2(known, out)
            return
        sources = list(ext.sources)
        if ext.name == CPU:
            # Among the flags may be a further source (.ci/wheels.sh).
            sources += [flag for flag in flags("CXXFLAGS") if flag.endswith(".cpp")]
            given = [flag for flag in flags("CXXFLAGS") if not flag.endswith(".cpp")]
            line = [*find_cxx(), *CXX_FLAGS.split(), *given]
        else:
            line = [find_nvcc(), *NVCC_FLAGS.split()]
        line += [TARGET, f"-I{ROOT / 'csrc/torch/include'}"]
        parts = compile_each(line, sources, Path(self.build_temp, "csrc")) if ext.name == CPU else sources
        with tempfile.TemporaryDirectory() as stubs:
            run([*line, *parts, "-o", str(out), *link_options(ext.name, stubs)])


def compile_each(line: list[str], sources: list[str], folder: Path) -> list[str]:
    """The object of each source, compiled side by side on all cores."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        made = str(folder / Path(source).with_suffix(".o").name)
        run([*line, "-c", source, "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # The largest take longest, so they come first; after an error, `map` begins none of those that wait.
        return list(pool.map(compile_one, sorted(sources, key=os.path.getsize, reverse=True)))


def link_options(name: str, stubs: str) -> list[str]:
    """How a library finds torch when it is loaded, without torch being here: empty libraries of the same names, in the
    folder `stubs`, are linked in its place, and the loader finds those that the process has loaded already."""
    ours = flags("LDFLAGS") if name == CPU else []
    if sys.platform == "darwin":
        return [*ours, "-dynamiclib", "-undefined", "dynamic_lookup"]
    source = Path(stubs, "empty.cpp")
    source.touch()
    for needed in NEEDED[name]:
        file = f"lib{needed}.so"
        run([*find_cxx(), "-shared", "-nostdlib", str(source), f"-Wl,-soname,{file}", "-o", str(Path(stubs, file))])
    return [*ours, "-shared", f"-L{stubs}", "-Xlinker", "--no-as-needed", *(f"-l{needed}" for needed in NEEDED[name])]


def run(line: list[str]) -> None:
    print(shlex.join(line), flush=True)
    code = subprocess.run(line, cwd=ROOT).returncode
    if code:
        sys.exit(f"fastrnn: {line[0]} ended with exit code {code}; what it said is above, and docs/install.md may help")


class Wheel(bdist_wheel):
    """Its libraries are for a platform, and for every Python."""

    def run(self):
        self.get_finalized_command("build_ext").check()  # before anything is copied and told
        super().run()

    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def long_description() -> str:
    """README.md with its relative links made absolute, for the package index."""
    project, package = (ROOT / name for name in ("pyproject.toml", "fastrnn/__init__.py"))
    source = re.search(r'^Source = "(.*)"', project.read_text(), re.MULTILINE)[1]
    version = re.search(r'^__version__ = "(.*)"', package.read_text(), re.MULTILINE)[1]

    def absolute(link):
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['text']}]({source}/{kind}/v{version}/{link['path']})"

    relative = r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<path>[^)]+)\)"
    return re.sub(relative, absolute, (ROOT / "README.md").read_text())


setup(
    packages=[*find_packages(include=["fastrnn", "fastrnn.*"]), "fastrnn.kernels"],
    # A top-level `kernels` would shadow the package of that name on PyPI.
    package_dir={"fastrnn.kernels": "kernels"},
    package_data={"fastrnn": ["py.typed", "evidence/shipped/*.json"]},
    ext_modules=libraries(),
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
