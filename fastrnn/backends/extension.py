"""csrc's libraries: how they are loaded."""

from functools import cache
from pathlib import Path

import torch

from . import install

LIBRARIES = {"cpu": ("_C",), "cuda": ("_C", "_C_cuda")}  # the schemas are in the first


def path(name: str) -> Path:
    """The file of a library, which a program that torch.export wrote needs where it runs; it needs no Python."""
    return Path(__file__).parents[1] / f"{name}.so"


@cache
def load(device: str) -> str | None:
    """Loads the libraries for a device type, once; None if their ops are there, otherwise the reason why not."""
    for name in LIBRARIES[device]:
        library = path(name)
        if not library.exists():
            return f"csrc's library {name} is not in {library.parent}; to build it: {install.command(name)}"
        try:
            torch.ops.load_library(library)
        except OSError as error:
            return f"csrc's library {name} does not load: {error}; to build it anew: {install.command(name)}"
    return None


def why_not(request, device: str, missing: str | None) -> str | None:
    """The common part of both backends' `why_not`; `missing` is the result of `load`."""
    if request.device != device:
        return f"its tensors are on {request.device}"
    if request.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it has no {request.dtype}"
    return missing
