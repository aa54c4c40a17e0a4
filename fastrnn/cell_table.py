"""The cell table: the differences between recurrent cells, as data.

All code that is generic over cells (the scan, the launchers, the modules) reads its sizes from here. The equations of
the built-in cells are in `equations.py`, `kernels/cells.py` and `csrc/cells/`, under the same names.

A cell that a user wrote (`tracing.py`) has no name here. It is a text that says everything, its equations included, so
that it passes through an op's schema, a compiler and a file as it is. `spec_of` reads both.
"""

from dataclasses import dataclass
from functools import lru_cache

from .program import CellPrograms, parse


@dataclass(frozen=True)
class CellSpec:
    """One recurrent cell.

    Attributes:
        name: its key in `CELLS`; of a user's cell its own name, which is no key.
        gates: the gates, in the order of their H rows in the weights.
        states: the state tensors carried from step to step; the first is always `h`, the output.
        saved: the planes of width H that the forward keeps per step for the backward, at least one: the
            pre-activations, and for the GRU also `W_hn h + b_hn`, which its reset gate multiplies.
        distinct_dgh: whether the gradients of `gx` and `gh` differ (GRU), so that the backward returns both.
        parameters: the learnt planes `[H]` that the equations read.
        inputs: the planes that a call gives for every step, beside those of `gx`.
        recurrent: whether there is a W_hh. Without one there is no `gh`.
        program: the equations of a user's cell.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    distinct_dgh: bool = False
    parameters: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    recurrent: bool = True
    program: CellPrograms | None = None


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


TEXT = "cell "
"""The beginning of the text of a user's cell."""
_KEYS = (
    "cell", "gates", "states", "parameters", "inputs", "recurrent", "saved", "distinct_dgh", "forward", "total",
    "backward",
)  # fmt: skip
_read: dict[str, CellSpec] = {}
"""The texts that have been read, with what they say."""


def spec_of(cell: str) -> CellSpec:
    """What is known of a cell: by its name in `CELLS`, or from the text of a user's cell."""
    found = CELLS.get(cell)
    if found is None:
        found = _read.get(cell)
    return _from_text(cell) if found is None else found


def _from_text(cell: str) -> CellSpec:
    if not cell.startswith(TEXT):
        raise ValueError(f"unknown cell {cell!r}; known are {', '.join(CELLS)}, and the text of a user's cell")
    lines = [line.partition(" ") for line in cell.split("\n")]
    if tuple(key for key, _, _ in lines) != _KEYS:
        raise ValueError(f"the text of a cell should have the lines {', '.join(_KEYS)}")
    of = {key: value for key, _, value in lines}
    gates, states, parameters, inputs = (tuple(of[key].split()) for key in ("gates", "states", "parameters", "inputs"))
    recurrent, distinct_dgh, K = (int(of[key]) for key in ("recurrent", "distinct_dgh", "saved"))
    programs = CellPrograms(*(parse(of[key]) for key in CellPrograms._fields))
    G, S, beside = len(gates), len(states), len(parameters) + len(inputs)
    sizes = CellPrograms(
        forward=(G * (1 + recurrent) + S + beside, S + K),
        total=(K + 2 * S + beside, S),
        backward=(K + 2 * S + beside, G * (1 + distinct_dgh) + S + beside),
    )
    found = tuple((p.inputs, len(p.results)) for p in programs)
    if K < 1 or found != tuple(sizes):
        raise ValueError(f"the programs of cell {of['cell']} should have {sizes} inputs and results, got {found}")
    saved = tuple(f"saved_{k}" for k in range(K))
    _read[cell] = CellSpec(
        of["cell"], gates, states, saved, bool(distinct_dgh), parameters, inputs, bool(recurrent), programs
    )
    return _read[cell]


def text_of(found: CellSpec) -> str:
    """The text of a user's cell; the inverse of `spec_of`."""
    names = (" ".join(each) for each in (found.gates, found.states, found.parameters, found.inputs))
    numbers = (str(int(each)) for each in (found.recurrent, len(found.saved), found.distinct_dgh))
    values = (found.name, *names, *numbers, *(program.text() for program in found.program))
    return "\n".join(f"{key} {value}".rstrip() for key, value in zip(_KEYS, values, strict=True))


def layer_shapes(
    cell: str, width: int, H: int, P: int, bias: bool, layer_norm: bool | str, norm_c: bool = True, num_heads: int = 1
) -> dict[str, tuple[int, ...]]:
    """The parameters of one layer in one direction on input of `width`: torch.nn's in its order, then the extras',
    then those of the cell itself.

    P = 0 means no projection. `norm_c`: whether the layer norm is of the LSTM's c, too.
    """
    spec = spec_of(cell)
    rows = len(spec.gates) * H
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, width)}
    if spec.recurrent:
        heads = (num_heads, rows // num_heads, H // num_heads)
        shapes["weight_hh"] = heads if num_heads > 1 else (rows, P or H)
    if bias:
        shapes["bias_ih"] = (rows,)
        if spec.recurrent:
            shapes["bias_hh"] = (rows,)
    if P:
        shapes["weight_hr"] = (P, H)
    if layer_norm:
        if layer_norm not in ("sum", "gates"):
            shapes["ln_ih"] = (rows,)
        if spec.recurrent:
            shapes["ln_hh"] = (rows,)
        if cell == "lstm" and norm_c:
            shapes |= {"ln_c": (H,), "ln_c_bias": (H,)}
    return shapes | dict.fromkeys(spec.parameters, (H,))


def suffixes(num_layers: int, bidirectional: bool) -> list[list[str]]:
    """The endings of the parameters' names, per layer and direction: `l0`, `l0_reverse`, `l1`, ..."""
    ends = ("", "_reverse") if bidirectional else ("",)
    return [[f"l{layer}{end}" for end in ends] for layer in range(num_layers)]


@lru_cache
def network_shapes(
    cell: str,
    width: int,
    H: int,
    P: int,
    bias: bool,
    layer_norm: bool | str,
    num_layers: int,
    bidirectional: bool,
    norm_c: bool = True,
    num_heads: int = 1,
) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]:
    """Per layer and direction the names of the parameters and their shapes, in the order of `layer_shapes`."""
    found = []
    for layer, names in enumerate(suffixes(num_layers, bidirectional)):
        size = width if layer == 0 else (P or H) * len(names)
        shapes = layer_shapes(cell, size, H, P, bias, layer_norm, norm_c, num_heads)
        found += [tuple((f"{kind}_{name}", shape) for kind, shape in shapes.items()) for name in names]
    return tuple(found)


# Bits of `flags: uint8[T, B]`, one byte per step and sequence, for the direction in which the scan walks.
PAD = 1  # the step does not exist: the state is carried unchanged, the output is zero
RESET = 2  # the state before this step is zero, and no gradient crosses
START = 4  # the state before this step is the initial state
