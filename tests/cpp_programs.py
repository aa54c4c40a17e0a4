"""Small C++ programs that include files of csrc, compiled by themselves."""

import shutil
import subprocess
from pathlib import Path

import pytest
from emulated import CXX, ROOT

INCLUDES = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/torch/include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000")
WITHOUT_TORCH = ("-Wl,--unresolved-symbols=ignore-all",)  # the program never calls what is missing


def compiled(folder, text, *flags) -> Path:
    """The program of this text, or its library where `flags` say -shared. The flags may name further sources."""
    if shutil.which(CXX) is None:
        pytest.skip(f"needs a C++ compiler, and there is no {CXX}")
    source, target = folder / "program.cpp", folder / "program"
    source.write_text(text)
    command = [CXX, "-std=c++17", *INCLUDES, str(source), *map(str, flags), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def with_torch():
    """The flags of a program that calls torch."""
    import torch

    home = Path(torch.__file__).parent / "lib"
    return f"-L{home}", f"-Wl,-rpath,{home}", "-ltorch_cpu", "-ltorch", "-lc10"


def printed(program, *arguments) -> str:
    """What the program prints, until it ends without an error."""
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
