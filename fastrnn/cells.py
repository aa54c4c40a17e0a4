"""The cell table: what tells one recurrent cell from another, as data.

Everything that is generic over cells (the scan, the launchers, the modules) reads its sizes from here; the equations
themselves stand in `reference.py`, `kernels/cells.py` and `csrc/cells/`, under the same names.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class CellSpec:
    """One recurrent cell.

    Attributes:
        name: the key in `CELLS`.
        gates: the gates, in the order of their H rows in the weights.
        states: the state tensors carried from step to step; the first is always `h`, the output.
        saved: the planes of width H that the forward keeps per step for the backward: the pre-activations, and for
            the GRU also `W_hn h + b_hn`, which its reset gate multiplies.
        split: whether the gradients of `gx` and `gh` differ (GRU), so that the backward returns both.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    split: bool = False


def _rnn(nonlinearity: str) -> CellSpec:
    return CellSpec(name=f"rnn_{nonlinearity}", gates=(nonlinearity,), states=("h",), saved=("pre",))


NONLINEARITIES = ("tanh", "relu", "leaky_relu", "elu")

CELLS: dict[str, CellSpec] = {
    spec.name: spec
    for spec in (
        CellSpec("lstm", gates=("i", "f", "g", "o"), states=("h", "c"), saved=("i", "f", "g", "o")),
        CellSpec("gru", gates=("r", "z", "n"), states=("h",), saved=("r", "z", "n", "gh_n"), split=True),
        *map(_rnn, NONLINEARITIES),
    )
}

# Bits of `flags: uint8[T, B]`, one byte per step and sequence, for the direction in which the scan walks.
PAD = 1  # the step does not exist: the state is carried unchanged, the output is zero
RESET = 2  # the state before this step is zero, and no gradient crosses
START = 4  # the state before this step is the initial state
