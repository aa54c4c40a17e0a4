"""csrc's CUDA kernels: NVIDIA GPUs, every feature, when the library is built.

Two ways to run. Step by step: the reference scan over the fused CUDA step and cuBLAS, for every feature. Persistent:
one launch for all steps, W_hh on the chip; `why_step` says which calls it cannot take. It has never run on a GPU, so it
is used only where the environment's FASTRNN_CUDA_MODE is "persistent", or "cluster" or "grid": the same with thread
blocks that exchange h in that way only.
"""

import os
from functools import cache, partial

import torch
from torch import Tensor

from ..cells import CELLS
from ..directions import each_direction
from . import extension
from . import reference as launcher

# A CUDA library beside a torch without CUDA cannot be loaded.
MISSING = extension.load("cuda") if torch.version.cuda else "this torch is built without CUDA"
OPS = torch.ops.fastrnn_c
# The modes, and the ways to exchange that each leaves to the persistent kernels' launcher.
MODES = {"step": None, "persistent": "all", "cluster": "cluster", "grid": "grid"}


def why_not(request) -> str | None:
    return extension.why_not(request, "cuda", MISSING)


_step_forward = partial(launcher.scan_forward, step=extension.Step)
_step_backward = partial(launcher.scan_backward, step=extension.Step)


def why_step(cell: str, w_hh: Tensor, rows: int, clip_norm: Tensor | None = None, **beyond) -> str | None:
    """Why a scan over `rows` sequences runs step by step; None where one launch of the persistent kernels takes it.

    `beyond`: the arguments of the scan that only the step path knows, by name; those that are None do not matter.
    """
    if _ways() is None:
        return "FASTRNN_CUDA_MODE is step"
    for name, value in beyond.items():
        if value is not None:
            return f"the persistent kernels have no {name}"
    if w_hh.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the persistent kernels have no {w_hh.dtype}"
    if w_hh.dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision != "tf32":
        return "their float32 products are TF32, and torch.backends.cudnn.rnn.fp32_precision is not tf32"
    if w_hh.dtype == torch.float16 and clip_norm is not None:
        return "gradients travel before they are clipped by norm, and may overflow float16"
    if rows == 0:
        return "the batch is empty"
    if rows * len(CELLS[cell].saved) * w_hh.shape[-1] >= 2**31:
        return "a step of the batch is too large for 32-bit offsets"
    if _group(cell, w_hh) == 0:
        by = "" if _ways() == "all" else f" by {_ways()}"
        return f"W_hh {list(w_hh.shape)} in {w_hh.dtype} does not fit the chip{by}"
    return None


def _ways() -> str | None:
    """The ways to exchange among which the launcher may choose; None step by step."""
    mode = os.environ.get("FASTRNN_CUDA_MODE", "step")
    if mode not in MODES:
        raise ValueError(f"FASTRNN_CUDA_MODE: unknown mode {mode!r}; known are {', '.join(MODES)}")
    return MODES[mode]


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
            "outputs are NaN. FASTRNN_CUDA_MODE=step avoids such waits"
        )
    return trouble


def _contiguous(*tensors: Tensor | None):
    return tuple(None if x is None else x.contiguous() for x in tensors)


def scan_forward(
    gx, w_hh, b_hh, h0, c0, w_hr, ln_hh, ln_c_weight, ln_c_bias,
    flags, recurrent_mask, zone_h, zone_c, cell, reverse, save,
):  # fmt: skip
    """See `ops.scan_forward`."""
    tensors = gx, w_hh, b_hh, h0, c0, w_hr, ln_hh, ln_c_weight, ln_c_bias, flags, recurrent_mask, zone_h, zone_c
    *D, T, B, _ = gx.shape
    if why_step(
        cell, w_hh, B, w_hr=w_hr, ln_hh=ln_hh, ln_c_weight=ln_c_weight,
        recurrent_mask=recurrent_mask, zone_h=zone_h, zone_c=zone_c,
    ):  # fmt: skip
        if D:
            return each_direction(scan_forward, tensors, cell, reverse, save)
        return _step_forward(*tensors, cell, reverse, save)
    gx, w_hh, b_hh, h0, c0, flags = _contiguous(gx, w_hh, b_hh, h0, c0, flags)
    H, has_c = w_hh.shape[-1], c0 is not None
    y, h_n = gx.new_empty(*D, T, B, H), torch.empty_like(h0)
    c_n = torch.empty_like(c0) if has_c else gx.new_empty(0, dtype=torch.float32)
    c = c_n.new_empty((*D, T, B, H) if has_c and save else 0)
    saved = gx.new_empty((*D, T, B, len(CELLS[cell].saved) * H) if save else 0)
    OPS.persistent_forward(
        cell, gx, w_hh, b_hh, h0, c0, flags, reverse, _ways(), y, h_n, c_n if has_c else None,
        c if has_c and save else None, saved if save else None, _check_earlier_calls(),
    )  # fmt: skip
    return y, c, h_n, c_n, saved


def scan_backward(
    dy, dc, dh_n, dc_n, dsaved, saved, y, c, h0, c0, w_hh, w_hr, ln_hh, ln_c_weight, ln_c_bias,
    flags, recurrent_mask, zone_h, zone_c, clip_norm, clip_value, cell, reverse, norms,
):  # fmt: skip
    """See `ops.scan_backward`."""
    tensors = (
        dy, dc, dh_n, dc_n, dsaved, saved, y, c, h0, c0, w_hh, w_hr, ln_hh, ln_c_weight, ln_c_bias,
        flags, recurrent_mask, zone_h, zone_c, clip_norm, clip_value,
    )  # fmt: skip
    (*D, T, B, _), spec, has_c = y.shape, CELLS[cell], c0 is not None
    if why_step(
        cell, w_hh, B, clip_norm, w_hr=w_hr, ln_hh=ln_hh, ln_c_weight=ln_c_weight,
        recurrent_mask=recurrent_mask, zone_h=zone_h, zone_c=zone_c, dsaved=dsaved,
    ):  # fmt: skip
        if D:
            return each_direction(scan_backward, tensors, cell, reverse, norms)
        return _step_backward(*tensors, cell, reverse, norms)
    dy, dc, dh_n, dc_n, saved, y, c, h0, c0, w_hh, flags = _contiguous(
        dy, dc, dh_n, dc_n, saved, y, c, h0, c0, w_hh, flags
    )
    if clip_norm is not None:
        clip_norm = clip_norm.to(saved.device, torch.float32)
    dgx = saved.new_empty(*D, T, B, w_hh.shape[-2])
    dgh = saved.new_empty(dgx.shape if spec.split else 0)
    dh0 = torch.empty_like(h0)
    dc0 = torch.empty_like(c0) if has_c else saved.new_empty(0, dtype=torch.float32)
    parts = dc0.new_empty((*D, 2, len(spec.states), T, B, _group(cell, w_hh)) if norms else 0)
    OPS.persistent_backward(
        cell, dy, dc if has_c else None, dh_n, dc_n if has_c else None, saved, y, c, h0, c0, w_hh, flags,
        clip_norm, clip_value, reverse, _ways(), dgx, dgh if spec.split else None, dh0, dc0 if has_c else None,
        parts if norms else None, _check_earlier_calls(),
    )  # fmt: skip
    report = extension.Step.row_norm(parts.flatten(0, -2)).view(parts.shape[:-1]) if norms else parts
    of_projection_and_norms = (saved.new_empty(0, dtype=d) for d in (saved.dtype, *[torch.float32] * 4))
    return dgx, dgh, dh0, dc0, *of_projection_and_norms, report
