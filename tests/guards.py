"""Tests that compile or emulate kernels for minutes, and whose outcome follows from sources and tools alone.

`guards.json` holds, for each such file, the digest of the sources and tools with which all its tests passed. While the
digest is the same, its tests are skipped, and the skip says so. `make guards` runs them all and writes the digests.
"""

import hashlib
import json
import shutil
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PASSED = Path(__file__).with_name("guards.json")

_SCAN = (
    *("arguments.py", "backends", "cell_table.py", "directions.py", "equations.py", "heads.py", "program.py"),
    "reference.py",
)
_BOTH = (*(f"fastrnn/{name}" for name in _SCAN), "tests/conftest.py", "tests/problems.py", "tests/setups.py")
_CUDA = (
    *("csrc/cells", "csrc/common", "csrc/cuda", "csrc/torch/include", "setup.py", "tests/emulator"),
    *("tests/emulated.py", "tests/cuda_problems.py"),
)
_TRITON = (
    *("kernels", *(f"fastrnn/{name}.py" for name in ("tiles", "lowering", "arcs", "adjoint", "building"))),
    "tests/scripts.py",
)
_TRACED = ("fastrnn/cells.py", "fastrnn/tracing.py", "fastrnn/user_cells.py")  # the cells that fastrnn ships
# From a module's call to the scan.
_MODULE = tuple(f"fastrnn/{name}.py" for name in ("functional", "modules", "ops", "recurrent", "scan", "stack"))
SOURCES = {
    "test_compile_only": (*_BOTH, *_TRITON, *_TRACED),
    "test_csrc_build": (*_CUDA, "pyproject.toml"),
    "test_csrc_persistent": (*_BOTH, *_CUDA, "fastrnn/ops.py"),
    "test_csrc_races": _CUDA,
    "test_grouped_programs": (*_BOTH, *_TRITON),
    "test_kernels": (*_BOTH, *_TRITON),
    "test_kernels_gemm": (*_BOTH, *_TRITON),
    "test_latency_kernels": ("bench/latency.cu", "bench/latency.py", "csrc/cells", "csrc/common", "csrc/cuda"),
    "test_launch": (*_BOTH, *_TRITON),
    "test_triton_decay": (*_BOTH, *_TRITON, *_MODULE, "tests/cell_texts.py"),
    "test_triton_heads": (
        *_BOTH,
        *_TRITON,
        *_MODULE,
        *(f"fastrnn/{name}.py" for name in ("backend_table", "evidence/agreement", "evidence/verification")),
        *("tests/cell_texts.py", "tests/test_heads.py"),
    ),
    "test_triton_kinds": (*_BOTH, *_TRITON, *_MODULE, "tests/cell_texts.py"),
    "test_triton_programs": (
        *_BOTH,
        *_TRITON,
        *_TRACED,
        *_MODULE,
        *("tests/cell_texts.py", "tests/test_compile_only.py", "tests/user_cells.py"),
    ),
}
"""What the tests of a file depend on, beside the file: files, and folders with all that they hold."""


@cache
def _tools() -> str:
    import torch
    import triton

    found = [torch.__version__.partition("+")[0], triton.__version__]
    for command in (["nvcc", "--version"], ["g++", "--version"]):
        path = shutil.which(command[0]) or shutil.which(command[0], path="/usr/local/cuda/bin")
        found.append(subprocess.check_output([path, *command[1:]], text=True) if path else "none")
    return "\n".join(found)


@cache
def digest(name: str) -> str:
    """The digest of a file's tests, their sources and the tools."""
    found = hashlib.sha256(_tools().encode())
    for source in sorted((f"tests/{name}.py", *SOURCES[name])):
        place = ROOT / source
        files = (
            sorted(path for path in place.rglob("*") if path.suffix not in (".pyc", ".so"))
            if place.is_dir()
            else [place]
        )
        for file in files:
            if file.is_file():
                found.update(f"\n{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def passed() -> dict[str, str]:
    """The digest with which each file passed."""
    return json.loads(PASSED.read_text(encoding="utf-8")) if PASSED.exists() else {}


def write(names: set[str]) -> None:
    """Notes that all tests of these files passed."""
    found = passed() | {name: digest(name) for name in names}
    PASSED.write_text(json.dumps(found, indent=4, sort_keys=True) + "\n", encoding="utf-8")
