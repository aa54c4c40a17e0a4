"""csrc's C++ scan: CPU, every feature, when the library is built."""

import torch

from ..reference import accumulate_dtype
from . import extension

MISSING = extension.load("cpu")


def why_not(request) -> str | None:
    return extension.why_not(request, "cpu", MISSING)


def scan_forward(
    gx, w_hh, b_hh, h0, c0, w_hr, ln_hh, ln_c_weight, ln_c_bias,
    flags, recurrent_mask, zone_h, zone_c, cell, reverse, save,
):  # fmt: skip
    """See `ops.scan_forward`."""
    return torch.ops.fastrnn_c.scan_forward(
        cell, extension.rows(gx), w_hh, b_hh, h0, c0, w_hr, ln_hh, ln_c_weight, ln_c_bias,
        flags, recurrent_mask, zone_h, zone_c, reverse, save,
    )  # fmt: skip


def scan_backward(
    dy, dc, dh_n, dc_n, dsaved, saved, y, c, h0, c0, w_hh, w_hr, ln_hh, ln_c_weight, ln_c_bias,
    flags, recurrent_mask, zone_h, zone_c, clip_norm, clip_value, cell, reverse, norms,
):  # fmt: skip
    """See `ops.scan_backward`. `dsaved`, which only double backward brings, is for the reference."""
    if dsaved is not None:
        raise NotImplementedError("the cpu backend does not take dsaved; the reference does")
    if clip_norm is not None:
        clip_norm = clip_norm.to(accumulate_dtype(saved.dtype))
    return torch.ops.fastrnn_c.scan_backward(
        cell, dy, dc, dh_n, dc_n, extension.rows(saved), y, c, h0, c0, w_hh, w_hr, ln_hh,
        ln_c_weight, ln_c_bias, flags, recurrent_mask, zone_h, zone_c, clip_norm, clip_value, reverse, norms,
    )  # fmt: skip
