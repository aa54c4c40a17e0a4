"""A W_hh in eight heads beside the dense one with the same blocks and zeros elsewhere, on backend `cpu`."""

from collections.abc import Callable

import torch
from torch import Tensor

import fastrnn

from .cases import DEVICE, Bound, Case
from .contestants import Contestant
from .problem import Model, Outcome, Problem

HEADS, GATES = 8, 4
DENSE = "dense"


def _in_heads(whole: Tensor) -> Tensor:
    """The blocks `[N, G*K, K]` of a dense W_hh `[G*H, H]`."""
    K = whole.shape[1] // HEADS
    blocks = whole.unflatten(-1, (HEADS, K)).unflatten(0, (GATES, HEADS, K))
    return blocks.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2).flatten(1, 2)


def _with_zeros(whole: Tensor) -> Tensor:
    """A dense W_hh `[G*H, H]` with zeros outside of the blocks."""
    K = whole.shape[1] // HEADS
    head = torch.arange(HEADS, device=whole.device).repeat_interleave(K)
    return whole * (head[:, None] == head).repeat(GATES, 1)


def _lstm(form: Callable[[Tensor], Tensor], backend: str) -> Callable[[Problem], Model]:
    def build(problem: Problem) -> Model:
        def run(x: Tensor) -> Outcome:
            params = {**problem.parameters, "weight_hh_l0": form(problem.parameters["weight_hh_l0"])}
            y, states = fastrnn.functional.lstm(x, None, params, backend=backend, training=True)
            return Outcome((y, *states))

        return Model(run)

    return build


reference = _lstm(_with_zeros, "reference")
CONTESTANTS = (
    Contestant(DENSE, _lstm(_with_zeros, "cpu"), yardstick=True),
    Contestant("heads", _lstm(_in_heads, "cpu")),
)
CASES = [
    Case("lstm", 32, 100, 64, 512, suite="heads", num_heads=HEADS, bounds=(Bound("heads", 0.4),))
    for _ in range(DEVICE == "cpu")
]
