"""The LSTM as a user's cell, beside the built-in one on the same backend and beside the loops that it replaces."""

import torch
from torch import sigmoid, tanh

import fastrnn

from .cases import DEVICE, Bound, Case
from .contestants import Contestant, fused, loop
from .problem import Model, Outcome, Problem
from .rivals import compiled_loop

BACKEND = "cpu"
BUILT_IN = f"fastrnn:{BACKEND}"


@fastrnn.cell(gates="i f g o", states="h c")
def lstm(x, u, state):
    i, f = sigmoid(x.i + u.i), sigmoid(x.f + u.f)
    c = f * state.c + i * tanh(x.g + u.g)
    return sigmoid(x.o + u.o) * tanh(c), c


def built_in(problem: Problem) -> Model:
    return fused(problem, BACKEND)._replace(takes="")


def own_cell(problem: Problem) -> Model:
    """The cell of this file with the problem's parameters."""
    case = problem.case
    module = fastrnn.Recurrent(lstm, case.I, case.H, backend=BACKEND, device="meta").train(case.mode == "train")
    for name, parameter in problem.parameters.items():
        setattr(module, name, parameter)

    def run(x: torch.Tensor) -> Outcome:
        y, states = module(x)
        return Outcome((y, *states))

    return Model(run)


CONTESTANTS = (
    Contestant(BUILT_IN, built_in, yardstick=True),
    Contestant("own cell", own_cell),
    Contestant("loop", loop("ops"), brief=True),
    Contestant("compiled loop", compiled_loop("inductor"), brief=True),
)
CASES = [
    Case("lstm", 32, 100, H, H, suite="cells", bounds=(Bound("own cell", 1.25),)) for H in (128, 256) if DEVICE == "cpu"
]
