"""csrc's persistent CUDA kernels: NVIDIA GPUs, when the library is built.

One launch runs all steps, with W_hh on the chip. Thread blocks exchange h in one of two ways; FASTRNN_CUDA_MODE =
"cluster" or "grid" in the environment allows only that one. The kernels have never run on a GPU, so they are used only
when asked for. `why_not` knows what they cannot do; what only the tensors of a call show raises RuntimeError there.
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
from ..cell_table import CELLS, spec_of
from ..equations import row_norm
from . import extension

# A CUDA library beside a torch without CUDA cannot be loaded.
MISSING = extension.load("cuda") if torch.version.cuda else "this torch is built without CUDA"
OPS = torch.ops.fastrnn_c
WAYS = ("all", "cluster", "grid")
UNSUPPORTED = ("layer_norm", "projection", "zoneout", "recurrent_dropout", "decay", "heads")
"""Features of a call that change a step in a way that the kernels do not know."""
SUPPORTED_INPUTS = ("gx", "w_hh", "h0", "c0", "b_hh", "flags", "clip_norm")


def why_not(request) -> str | None:
    unsupported = [name for name in UNSUPPORTED if name in request.features]
    if request.cell not in CELLS:
        return f"its kernels are written by hand for the built-in cells, and {spec_of(request.cell).name} is a user's"
    return (
        extension.why_not(request, "cuda", MISSING)
        or (f"its kernels have no {', '.join(unsupported)}" if unsupported else None)
        or _why_not_dtype(request.dtype)
        or _why_not_size(request.cell, request.hidden_size, request.batch)
    )


def _why_not_dtype(dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "its kernels accumulate in float32, which is too coarse for float64"
    if dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision != "tf32":
        return "its float32 products are TF32, and torch.backends.cudnn.rnn.fp32_precision is not tf32"
    return None


def _why_not_size(cell: str, hidden_size: int, batch: int) -> str | None:
    if batch * len(spec_of(cell).saved) * hidden_size >= 2**31:
        return "a step of the batch is too large for its 32-bit offsets"
    return None


def why_not_tensors(inputs: ScanInputs, walk: Walk) -> str | None:
    """Why the kernels cannot run a scan of these tensors, which `why_not` could not see."""
    if walk.cell not in CELLS:
        return "its kernels are written by hand for the built-in cells"
    unsupported = [n for n, x in inputs._asdict().items() if x is not None and n not in SUPPORTED_INPUTS]
    unsupported += ["heads"] if inputs.w_hh.dim() > inputs.h0.dim() else []
    if unsupported:
        return f"its kernels have no {', '.join(unsupported)}"
    dtype, (B, H) = inputs.w_hh.dtype, inputs.h0.shape[-2:]
    if reason := _why_not_dtype(dtype) or _why_not_size(walk.cell, H, B):
        return reason
    if dtype == torch.float16 and inputs.clip_norm is not None:
        return "gradients are exchanged before they are clipped by norm, and may overflow float16"
    if _group_size(walk.cell, inputs.w_hh) == 0:
        by = "" if _ways() == "all" else f" by {_ways()}"
        return f"W_hh {list(inputs.w_hh.shape)} in {dtype} does not fit the chip{by}"
    return None


def _check(inputs: ScanInputs, walk: Walk):
    reason = why_not_tensors(inputs, walk)
    if reason is not None:
        raise RuntimeError(f"backend 'cuda' cannot run this call: {reason}")


def takes_directions(inputs: ScanInputs, walk: Walk) -> bool:
    """Whether a group of thread blocks for each direction fits on the chip at once."""
    return _group_size(walk.cell, inputs.w_hh) > 0


def _ways() -> str:
    """The ways to exchange among which the launcher may choose."""
    ways = os.environ.get("FASTRNN_CUDA_MODE") or "all"
    if ways not in WAYS:
        raise ValueError(f"FASTRNN_CUDA_MODE: unknown mode {ways!r}; known are {', '.join(WAYS)}")
    return ways


def _group_size(cell: str, w_hh: Tensor) -> int:
    """How many thread blocks share the W_hh of a direction; 0 where the device cannot run the kernels, or cannot hold a
    group of each direction at once where they exchange through global memory."""
    return OPS.persistent_group(w_hh, cell, _ways())


@cache
def _timeout_flag() -> Tensor:
    """One word in the host's memory that a kernel sets when a wait ran past its bound."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=torch.cuda.is_available())


def _check_earlier_calls() -> Tensor:
    timeout_flag = _timeout_flag()
    if timeout_flag.item():
        timeout_flag.zero_()
        raise RuntimeError(
            "a persistent kernel of an earlier fastrnn call waited in vain for its other thread blocks; that call's "
            "outputs are NaN. backend='triton' runs the same calls"
        )
    return timeout_flag


def forward(inputs: ScanInputs, walk: Walk, save: bool) -> ScanOutputs:
    _check(inputs, walk)
    i = contiguous(inputs)
    found = empty_outputs(i, walk, save)
    if found.h_n.numel():
        OPS.persistent_forward(
            i.gx, i.w_hh, i.h0, i.c0, i.b_hh, i.flags, walk.cell, walk.reverse, _ways(), *found, _check_earlier_calls()
        )
    return found


def backward(incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, norms: bool) -> ScanGradients:
    if incoming.dsaved is not None:
        raise NotImplementedError("the cuda backend does not take dsaved; the reference does")
    _check(inputs, walk)
    d, k, i = contiguous(incoming), contiguous(kept), contiguous(inputs)
    clip_norm = None if i.clip_norm is None else i.clip_norm.to(k.saved.device, torch.float32)
    found = empty_gradients(k, i, walk, norms=False)
    partial_norms = None  # of the units of each thread block
    if norms:
        *D, T, B, _ = k.y.shape
        shape = (*D, 2, len(spec_of(walk.cell).states), T, B, _group_size(walk.cell, i.w_hh))
        partial_norms = k.saved.new_empty(shape, dtype=torch.float32)
    if found.dh0.numel():
        OPS.persistent_backward(
            d.dy, d.dc, d.dh_n, d.dc_n, *k, i.w_hh, i.h0, i.c0, i.flags, clip_norm, walk.cell, walk.reverse,
            walk.clip_value, _ways(), found.dgx, found.dgh, found.dh0, found.dc0, partial_norms, _check_earlier_calls(),
        )  # fmt: skip
    return found._replace(norms=row_norm(partial_norms) if norms else None)
