"""Short calls: few sequences, few steps, small networks."""

from .cases import DEVICE, Case
from .contestants import THROUGHPUT

SIZES = ((1, 1, 64), (1, 20, 32), (4, 5, 64), (16, 20, 64))  # B, T, H; I = H
CASES = [
    Case(cell, B, T, H, H, mode=mode, suite="short")
    for cell in ("lstm", "gru", "rnn_tanh")
    for B, T, H in SIZES
    for mode in ("train", "infer")
    if DEVICE == "cpu"
]
CONTESTANTS = tuple(row for row in THROUGHPUT if row.name in ("torch.nn", "fastrnn", "fastrnn:cpu"))
