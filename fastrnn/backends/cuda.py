"""csrc's persistent CUDA kernels: NVIDIA GPUs, when the library is built.

One launch for all steps, W_hh on the chip; `why_not_these` says which calls it cannot take. The environment's
FASTRNN_CUDA_MODE "cluster" or "grid" leaves thread blocks that way only to exchange h.
"""

import os
from functools import cache

import torch
from torch import Tensor

from ..arguments import (
    IncomingGradients,
    Kept,
    ScanGradients,
    ScanInputs,
    ScanOutputs,
    Walk,
    contiguous,
    empty_gradients,
    empty_outputs,
)
from ..cells import CELLS
from ..equations import row_norm
from . import extension

# A CUDA library beside a torch without CUDA cannot be loaded.
MISSING = extension.load("cuda") if torch.version.cuda else "this torch is built without CUDA"
OPS = torch.ops.fastrnn_c
# The modes, and the ways to exchange that each leaves to the persistent kernels' launcher.
MODES = ("all", "cluster", "grid")


def why_not(request) -> str | None:
    return extension.why_not(request, "cuda", MISSING)


def why_not_these(inputs: ScanInputs, walk: Walk, B: int) -> str | None:
    """Why the kernels cannot take a scan over B sequences."""
    w_hh = inputs.w_hh
    for name in ("w_hr", "ln_hh", "ln_c_weight", "recurrent_mask", "zone_h", "zone_c"):
        if getattr(inputs, name) is not None:
            return f"the persistent kernels have no {name}"
    if w_hh.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the persistent kernels have no {w_hh.dtype}"
    if w_hh.dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision != "tf32":
        return "their float32 products are TF32, and torch.backends.cudnn.rnn.fp32_precision is not tf32"
    if w_hh.dtype == torch.float16 and inputs.clip_norm is not None:
        return "gradients travel before they are clipped by norm, and may overflow float16"
    if B == 0:
        return "the batch is empty"
    if B * len(CELLS[walk.cell].saved) * w_hh.shape[-1] >= 2**31:
        return "a step of the batch is too large for 32-bit offsets"
    if _group(walk.cell, w_hh) == 0:
        by = "" if _ways() == "all" else f" by {_ways()}"
        return f"W_hh {list(w_hh.shape)} in {w_hh.dtype} does not fit the chip{by}"
    return None


def _check(inputs: ScanInputs, walk: Walk, B: int):
    reason = why_not_these(inputs, walk, B)
    if reason is not None:
        raise RuntimeError(f"backend 'cuda' cannot run this call: {reason}")


def takes_directions(inputs: ScanInputs, walk: Walk) -> bool:
    return True


def _ways() -> str:
    """The ways to exchange among which the launcher may choose."""
    mode = os.environ.get("FASTRNN_CUDA_MODE", "all")
    if mode not in MODES:
        raise ValueError(f"FASTRNN_CUDA_MODE: unknown mode {mode!r}; known are {', '.join(MODES)}")
    return mode


def _group(cell: str, w_hh: Tensor) -> int:
    """How many thread blocks share the W_hh of a direction; 0 where the device cannot run the kernels, or cannot hold a
    group of each direction at once where they exchange through global memory."""
    return OPS.persistent_group(cell, w_hh, _ways())


@cache
def _trouble() -> Tensor:
    """One word in the host's memory that a kernel sets when a wait ran past its bound."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=torch.cuda.is_available())


def _check_earlier_calls() -> Tensor:
    trouble = _trouble()
    if trouble.item():
        trouble.zero_()
        raise RuntimeError(
            "a persistent kernel of an earlier fastrnn call waited in vain for its other thread blocks; that call's "
            "outputs are NaN. Other backends do not wait so"
        )
    return trouble


def forward(inputs: ScanInputs, walk: Walk, save: bool) -> ScanOutputs:
    _check(inputs, walk, inputs.h0.shape[-2])
    i = contiguous(inputs)
    found = empty_outputs(i, walk, save)
    OPS.persistent_forward(
        walk.cell, i.gx, i.w_hh, i.b_hh, i.h0, i.c0, i.flags, walk.reverse, _ways(), found.y, found.h_n, found.c_n,
        found.c, found.saved, _check_earlier_calls(),
    )  # fmt: skip
    return found


def backward(incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, norms: bool) -> ScanGradients:
    if incoming.dsaved is not None:
        raise NotImplementedError("the cuda backend does not take dsaved; the reference does")
    *D, T, B, _ = kept.y.shape
    _check(inputs, walk, B)
    d, k, i = contiguous(incoming), contiguous(kept), contiguous(inputs)
    clip_norm = None if i.clip_norm is None else i.clip_norm.to(k.saved.device, torch.float32)
    found = empty_gradients(k, i, walk, norms=False)
    parts = None
    if norms:
        shape = (*D, 2, len(CELLS[walk.cell].states), T, B, _group(walk.cell, i.w_hh))
        parts = k.saved.new_empty(shape, dtype=torch.float32)
    OPS.persistent_backward(
        walk.cell, d.dy, d.dc, d.dh_n, d.dc_n, k.saved, k.y, k.c, i.h0, i.c0, i.w_hh, i.flags, clip_norm,
        walk.clip_value, walk.reverse, _ways(), found.dgx, found.dgh, found.dh0, found.dc0, parts,
        _check_earlier_calls(),
    )  # fmt: skip
    return found._replace(norms=row_norm(parts) if norms else None)
