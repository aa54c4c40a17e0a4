"""csrc's C++ scan: CPU, every feature, when the library is built."""

import torch

from ..arguments import IncomingGradients, Kept, ScanGradients, ScanInputs, ScanOutputs, Walk
from . import extension

MISSING = extension.load("cpu")


def why_not(request) -> str | None:
    return extension.why_not(request, "cpu", MISSING)


def forward(inputs: ScanInputs, walk: Walk, save: bool) -> ScanOutputs:
    i = inputs
    found = torch.ops.fastrnn_c.scan_forward(
        walk.cell, extension.last_dim_contiguous(i.gx), i.w_hh, i.b_hh, i.h0, i.c0, i.w_hr, i.ln_hh, i.ln_c_weight,
        i.ln_c_bias, i.flags, i.recurrent_mask, i.zone_h, i.zone_c, walk.reverse, save,
    )  # fmt: skip
    return ScanOutputs(*(x if x.dim() > 1 else None for x in found))


def backward(incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, norms: bool) -> ScanGradients:
    """`dsaved`, which only double backward brings, is for the reference."""
    if incoming.dsaved is not None:
        raise NotImplementedError("the cpu backend does not take dsaved; the reference does")
    i, saved = inputs, extension.last_dim_contiguous(kept.saved)
    found = torch.ops.fastrnn_c.scan_backward(
        walk.cell, *incoming[:4], saved, kept.y, kept.c, i.h0, i.c0, i.w_hh, i.w_hr, i.ln_hh, i.ln_c_weight,
        i.ln_c_bias, i.flags, i.recurrent_mask, i.zone_h, i.zone_c, i.clip_norm, walk.clip_value, walk.reverse, norms,
    )  # fmt: skip
    return ScanGradients(*(x if x.dim() > 1 else None for x in found))
