"""csrc's libraries: how they are loaded, and their fused step in place of `reference.Step`."""

from functools import cache
from pathlib import Path

import torch

LIBRARIES = {"cpu": ("_C",), "cuda": ("_C", "_C_cuda")}  # the schemas stand in the first


@cache
def load(device: str) -> str | None:
    """Loads the libraries for a device type, once; None when their ops are there, else the reason why not."""
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
    """The common part of both backends' `why_not`; `missing` is what `load` said."""
    if request.device != device:
        return f"its tensors are on {request.device}"
    if request.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it has no {request.dtype}"
    return missing


def rows(tensor):
    """Rows in one piece, which those of an expanded gradient or a transposed state are not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pair(states):
    """(h, c), with None for the c that a cell does not have."""
    return rows(states[0]), rows(states[1]) if len(states) == 2 else None


def _previous(state_prev):
    """As `_pair`. The LSTM reads no h_prev, and a projected one is narrower than the op expects: c stands in for it."""
    return _pair(state_prev if len(state_prev) == 1 else (state_prev[1], state_prev[1]))


class Step:
    """`reference.Step` in C++ or CUDA C++, by the device of its tensors."""

    def __init__(self, cell: str):
        self.cell = cell

    def forward(self, gx, gh, state_prev, ln_c=None):
        h, c, saved = torch.ops.fastrnn_c.cell_forward(
            self.cell, gx, gh, *_previous(state_prev), *(ln_c or (None, None))
        )
        return (h,) if len(state_prev) == 1 else (h, c), saved

    def total(self, saved, state_prev, dstate, ln_c=None):
        if len(dstate) == 1:
            return dstate
        dh, dc = _pair(dstate)
        total = torch.ops.fastrnn_c.cell_total(self.cell, saved, rows(state_prev[1]), dh, dc, *(ln_c or (None, None)))
        return dh, total

    def backward(self, saved, state_prev, dstate, ln_c=None):
        dgx, dgh, dh_prev, dc_prev = torch.ops.fastrnn_c.cell_backward(
            self.cell, saved, *_previous(state_prev), *_pair(dstate), *(ln_c or (None, None))
        )
        dstate_prev = (dh_prev if dh_prev.numel() else None, dc_prev)[: len(dstate)]
        return dgx, dgh if dgh.numel() else dgx, dstate_prev

    @staticmethod
    def row_norm(x):
        return torch.ops.fastrnn_c.row_norm(rows(x))
