"""The PyTorch reference as a backend: everything, everywhere."""

from .. import reference
from ..reference import LayerNorm, Masks, accumulate_dtype


def why_not(request) -> str | None:
    return None


def _layer_norm(weight, bias):
    if weight is None:
        return None
    acc = accumulate_dtype(weight.dtype)
    return LayerNorm(weight.to(acc).contiguous(), bias.to(acc).contiguous())


def scan_forward(
    gx, w_hh, b_hh, h0, c0, w_hr, ln_hh, ln_c_weight, ln_c_bias,
    flags, recurrent_mask, zone_h, zone_c, cell, reverse, save, step=reference.Step,
):  # fmt: skip
    return reference.scan_forward(
        gx, w_hh, b_hh, h0, c0, w_hr, ln_hh, _layer_norm(ln_c_weight, ln_c_bias),
        Masks(flags, recurrent_mask, zone_h, zone_c), reverse, save, step(cell),
    )  # fmt: skip


def scan_backward(
    dy, dc, dh_n, dc_n, dsaved, saved, y, c, h0, c0, w_hh, w_hr, ln_hh, ln_c_weight, ln_c_bias,
    flags, recurrent_mask, zone_h, zone_c, clip_norm, clip_value, cell, reverse, norms, step=reference.Step,
):  # fmt: skip
    return reference.scan_backward(
        dy, dc, dh_n, dc_n, dsaved, saved, y, c, h0, c0, w_hh, w_hr, ln_hh,
        _layer_norm(ln_c_weight, ln_c_bias), Masks(flags, recurrent_mask, zone_h, zone_c),
        clip_norm, clip_value, cell, reverse, norms, step(cell),
    )  # fmt: skip
