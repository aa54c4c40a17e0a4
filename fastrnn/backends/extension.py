"""csrc's libraries: how they are loaded."""

from functools import cache
from pathlib import Path

import torch

LIBRARIES = {"cpu": ("_C",), "cuda": ("_C", "_C_cuda")}  # the schemas are in the first


@cache
def load(device: str) -> str | None:
    """Loads the libraries for a device type, once; None if their ops are there, otherwise the reason why not."""
    for name in LIBRARIES[device]:
        package = Path(__file__).parents[1]
        found = sorted(package.glob(f"{name}.*so"))
        if not found:
            return f"csrc's library {name} is not in {package}: install it with torch and a compiler there (see README)"
        try:
            torch.ops.load_library(found[0])
        except OSError as error:
            return f"csrc's library {name} does not load: {error}"
    return None


def why_not(request, device: str, missing: str | None) -> str | None:
    """The common part of both backends' `why_not`; `missing` is the result of `load`."""
    if request.device != device:
        return f"its tensors are on {request.device}"
    if request.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it has no {request.dtype}"
    return missing
