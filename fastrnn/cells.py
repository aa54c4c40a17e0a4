"""The cell table: the differences between recurrent cells, as data.

All code that is generic over cells (the scan, the launchers, the modules) reads its sizes from here. The equations
are in `equations.py`, `kernels/cells.py` and `csrc/cells/`, under the same names.
"""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class CellSpec:
    """One recurrent cell.

    Attributes:
        name: its key in `CELLS`.
        gates: the gates, in the order of their H rows in the weights.
        states: the state tensors carried from step to step; the first is always `h`, the output.
        saved: the planes of width H that the forward keeps per step for the backward: the pre-activations, and for
            the GRU also `W_hn h + b_hn`, which its reset gate multiplies.
        distinct_dgh: whether the gradients of `gx` and `gh` differ (GRU), so that the backward returns both.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    distinct_dgh: bool = False


def _rnn(nonlinearity: str) -> CellSpec:
    return CellSpec(name=f"rnn_{nonlinearity}", gates=(nonlinearity,), states=("h",), saved=("pre",))


NONLINEARITIES = ("tanh", "relu", "leaky_relu", "elu")

CELLS: dict[str, CellSpec] = {
    spec.name: spec
    for spec in (
        CellSpec("lstm", gates=("i", "f", "g", "o"), states=("h", "c"), saved=("i", "f", "g", "o")),
        CellSpec("gru", gates=("r", "z", "n"), states=("h",), saved=("r", "z", "n", "gh_n"), distinct_dgh=True),
        *map(_rnn, NONLINEARITIES),
    )
}


def layer_shapes(cell: str, width: int, H: int, P: int, bias: bool, layer_norm: bool) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer in one direction on input of `width`: torch.nn's in its order, then the extras'.

    P = 0 stands for no projection.
    """
    spec = CELLS[cell]
    rows = len(spec.gates) * H
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, width), "weight_hh": (rows, P or H)}
    if bias:
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
    if P:
        shapes["weight_hr"] = (P, H)
    if layer_norm:
        shapes |= {"ln_ih": (rows,), "ln_hh": (rows,)}
        if "c" in spec.states:
            shapes |= {"ln_c": (H,), "ln_c_bias": (H,)}
    return shapes


def suffixes(num_layers: int, bidirectional: bool) -> list[list[str]]:
    """The endings of the parameters' names, per layer and direction: `l0`, `l0_reverse`, `l1`, ..."""
    ends = ("", "_reverse") if bidirectional else ("",)
    return [[f"l{layer}{end}" for end in ends] for layer in range(num_layers)]


@lru_cache
def network_shapes(
    cell: str, width: int, H: int, P: int, bias: bool, layer_norm: bool, num_layers: int, bidirectional: bool
) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]:
    """Per layer and direction the names of the parameters and their shapes, in the order of `layer_shapes`."""
    found = []
    for layer, names in enumerate(suffixes(num_layers, bidirectional)):
        shapes = layer_shapes(cell, width if layer == 0 else (P or H) * len(names), H, P, bias, layer_norm)
        found += [tuple((f"{kind}_{name}", shape) for kind, shape in shapes.items()) for name in names]
    return tuple(found)


# Bits of `flags: uint8[T, B]`, one byte per step and sequence, for the direction in which the scan walks.
PAD = 1  # the step does not exist: the state is carried unchanged, the output is zero
RESET = 2  # the state before this step is zero, and no gradient crosses
START = 4  # the state before this step is the initial state
