"""torch.nn's half LSTM as something to compare with, also on a CPU where torch.nn fails at it."""

import copy

import torch
from torch import nn

HALVES = (torch.bfloat16, torch.float16)


def supported(half):
    """Whether oneDNN has an LSTM in a half type on this processor: in float16 only one that does not train."""
    if not torch.backends.mkldnn.is_available():
        return False
    if half == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported() and not torch.is_grad_enabled()


def under_autocast(torchs, half, source, hx=None):
    """torch.nn's result under autocast; where oneDNN has no half LSTM, that of the same LSTM made half.

    torch hands the float32 LSTM to oneDNN and autocast makes it half, so that it fails; the half one it runs itself.
    """
    by_onednn = torch.backends.mkldnn.is_available() and not getattr(torchs, "proj_size", 0) and torch.is_tensor(source)
    if isinstance(torchs, nn.LSTM) and by_onednn and not supported(half):
        hx = None if hx is None else [state.to(half) for state in hx]
        return copy.deepcopy(torchs).to(half)(source.to(half), hx)
    with torch.autocast("cpu", dtype=half):
        return torchs(source, hx)
