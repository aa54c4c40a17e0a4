"""A PackedSequence whose lengths are drawn from 1 to T: torch.nn runs it step by step, also the LSTM."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn

from .cases import DEVICE, Case
from .direct import Direct, Run
from .streams import YARDSTICK, _module


def _run(module: nn.Module, case, dtype) -> Run:
    """Forward; in training the gradients of the rows and of all parameters as well, from a gradient of the rows."""
    generator = torch.Generator().manual_seed(case.H)
    x = torch.randn(case.T, case.B, case.I, generator=generator).to(dtype)
    lengths = torch.randint(1, case.T + 1, (case.B,), generator=generator)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    gradient = torch.randn(len(packed.data), case.H, generator=generator).to(dtype)
    rows, train = packed.data.requires_grad_(case.mode == "train"), case.mode == "train"
    packed, leaves = PackedSequence(rows, *packed[1:]), [rows, *module.train(train).parameters()]

    def run(_):
        with torch.set_grad_enabled(train):
            y, state = module(packed)
        found = torch.autograd.grad(y.data, leaves, gradient) if train else ()
        return [y.data.detach(), *(one.detach() for one in tree_leaves(state)), *found]

    return run


def makers(case, truth: bool) -> dict[str, Callable[[], Run]]:
    def of(library, dtype=torch.float32, backend=None):
        def make() -> Run:
            module = _module(library, case, dtype)
            if backend:
                module.backend = backend
            return _run(module, case, dtype)

        return make

    if truth:
        return {YARDSTICK: of(nn, torch.float64)}
    return {YARDSTICK: of(nn), "fastrnn": of(fastrnn), "fastrnn:cpu": of(fastrnn, backend="cpu")}


CASES = [
    Case(cell, B, T, H, H, mode=mode, features=frozenset({"packed"}), suite="packed")
    for cell in ("lstm", "gru", "rnn_tanh")
    for B, T, H in ((32, 100, 128), (64, 50, 256))
    for mode in ("train", "infer")
    if DEVICE == "cpu"
]
# The gradients of the weights are float32 sums over some thousand rows.
SUITE = Direct(CASES, makers, (YARDSTICK,), 1e-4, session_seconds=75.0, case_seconds=1.5)
