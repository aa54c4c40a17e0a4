"""Plain calls of the sizes that networks on a CPU have, in float32 and bfloat16: what the goals are about."""

import torch

from .cases import DEVICE, Case

SIZES = ((16, 64, 128), (64, 50, 256), (256, 20, 512))  # B, T, H; I = H
# torch.nn takes seconds for longer calls where a processor has no instructions for bfloat16.
HALF_SIZES = ((16, 64, 128), (32, 20, 256))
CASES = [
    Case(cell, B, T, H, H, dtype=dtype, mode=mode, suite="grid")
    for dtype, cells, sizes in (
        (torch.float32, ("lstm", "gru", "rnn_tanh"), SIZES),
        (torch.bfloat16, ("lstm", "gru"), HALF_SIZES),
    )
    for cell in cells
    for B, T, H in sizes
    for mode in ("train", "infer")
    if DEVICE == "cpu"
]
