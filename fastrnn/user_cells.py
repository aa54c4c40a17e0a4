"""`cell`: the decorator that makes a recurrent cell of a pointwise function."""

import functools
import inspect
import keyword
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from .adjoint import derive
from .cell_table import CellSpec, spec_of, text_of
from .tracing import trace

TAKEN_PARAMETERS = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh", "ln_ih", "ln_hh", "ln_c", "ln_c_bias")
TAKEN_INPUTS = (
    "self", "module", "input", "x", "hx", "state", "params", "cell", "backend", "batch_first", "lengths", "reset_mask",
    "decay", "tap", "return_cells", "return_layers", "watch", "num_layers", "bidirectional", "training", "dropout",
    "residual", "locked_dropout", "recurrent_dropout", "recurrent_dropout_per_gate", "zoneout", "weight_dropout",
    "clip_state_grad_norm", "clip_state_grad_value", "layer_norm", "layer_norm_eps", "layer_norm_cell", "minutes",
)  # fmt: skip
"""The arguments of the functions that take the inputs as keyword arguments, too."""


class Cell:
    """A recurrent cell, made by `fastrnn.cell`. Called, it runs its function.

    Attributes:
        name: of its function.
        function: the user's.
        gates, states, parameters, inputs: the names of its planes.
        initial: the first values of the parameters that were given one.
        recurrent: whether it has a W_hh.
        text: all of it but the function and the first values, in the form that every backend reads.
    """

    def __init__(self, function: Callable, gates, states, parameters, inputs, recurrent: bool):
        functools.update_wrapper(self, function)
        self.function, self.name = function, getattr(function, "__name__", type(function).__name__)
        self.gates, self.states = _names("gates", gates), _names("states", states)
        self.initial = _first_values(parameters)
        self.parameters = _names("parameters", parameters, TAKEN_PARAMETERS)
        self.inputs, self.recurrent = _names("inputs", inputs, TAKEN_INPUTS), recurrent
        for kind, names in (("gates", self.gates), ("states", self.states)):
            if not names:
                raise ValueError(f"cell {self.name}: {kind} should name at least one")
        if not isinstance(recurrent, bool):
            raise TypeError(f"recurrent should be of type bool, got {type(recurrent).__name__}")
        self.text = self._text()

    def _arguments(self) -> list[tuple[str, tuple[str, ...]]]:
        """The names of the function's arguments, and of the planes of each."""
        u = [("u", self.gates)] if self.recurrent else []
        beside = [(name, planes) for name, planes in (("p", self.parameters), ("inputs", self.inputs)) if planes]
        return [("x", self.gates), *u, ("state", self.states), *beside]

    def _text(self) -> str:
        arguments = self._arguments()
        self._check_signature([name for name, _ in arguments])
        kinds = [namedtuple(name, planes) for name, planes in arguments]

        def given(plane: Callable) -> tuple:
            return tuple(kind(*(plane() for _ in kind._fields)) for kind in kinds)

        G, S = len(self.gates), len(self.states)
        program = trace(self.name, self.function, given, sum(len(planes) for _, planes in arguments), S)
        self._check_use(program)
        programs, K, distinct_dgh = derive(program, G, S, self.recurrent)
        saved = tuple(f"saved_{k}" for k in range(K))
        return text_of(
            CellSpec(
                self.name, self.gates, self.states, saved, distinct_dgh, self.parameters, self.inputs, self.recurrent,
                programs,
            )
        )  # fmt: skip

    def _check_signature(self, names: list[str]) -> None:
        try:
            inspect.signature(self.function).bind(*names)
        except TypeError:
            raise TypeError(
                f"cell {self.name}: its function should take the arguments ({', '.join(names)}), by position, but it "
                f"is {self.name}{inspect.signature(self.function)}"
            ) from None

    def _check_use(self, program) -> None:
        """Every gate, parameter and input is read; otherwise a name is wrong."""
        read = {k for op, *operands in program.instructions if op != "const" for k in operands} | set(program.results)
        G = len(self.gates)
        of_gates = [k in read or (self.recurrent and k + G in read) for k in range(G)]
        first = program.inputs - len(self.parameters) - len(self.inputs)
        of_others = [k in read for k in range(first, program.inputs)]
        names = [f"gate {n}" for n in self.gates]
        names += [f"parameter {n}" for n in self.parameters] + [f"input {n}" for n in self.inputs]
        unread = [name for name, used in zip(names, of_gates + of_others, strict=True) if not used]
        if self.recurrent and not any(k in read for k in range(G, 2 * G)):
            unread.append("u (with recurrent=False there is none)")
        if unread:
            raise ValueError(f"cell {self.name}: its new states do not depend on {', '.join(unread)}")

    @property
    def spec(self) -> CellSpec:
        """Its row, as a built-in cell has one in `cell_table.CELLS`."""
        return spec_of(self.text)

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __repr__(self) -> str:
        parts = [f"gates={' '.join(self.gates)!r}", f"states={' '.join(self.states)!r}"]
        parts += [f"{kind}={' '.join(names)!r}" for kind in ("parameters", "inputs") if (names := getattr(self, kind))]
        return f"cell {self.name}({', '.join(parts)}{'' if self.recurrent else ', recurrent=False'})"

    def __reduce__(self):
        """By reference, as Python pickles a function: to the cell where its module has it, else to its function."""
        module = sys.modules.get(self.__module__)
        if getattr(module, self.name, None) is self:
            return self.name
        parameters = {name: self.initial.get(name) for name in self.parameters}
        return Cell, (self.function, self.gates, self.states, parameters, self.inputs, self.recurrent)

    def __deepcopy__(self, memo):
        return self


def cell(
    *,
    gates: str | Sequence[str],
    states: str | Sequence[str] = "h",
    parameters: str | Sequence[str] | Mapping[str, float | None] = (),
    inputs: str | Sequence[str] = (),
    recurrent: bool = True,
) -> Callable[[Callable], Cell]:
    """Makes a recurrent cell of a function: a decorator.

        @fastrnn.cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
        def peephole(x, u, state, p):
            i = sigmoid(x.i + u.i + p.p_i * state.c)
            f = sigmoid(x.f + u.f + p.p_f * state.c)
            c = f * state.c + i * tanh(x.g + u.g)
            return sigmoid(x.o + u.o + p.p_o * c) * tanh(c), c

        fastrnn.Recurrent(peephole, 64, 128)

    The function gets, by position, named tuples of planes `[B, H]`: x, W_ih x_t + b_ih, a plane for each gate; u,
    W_hh h + b_hh, likewise, unless `recurrent` is False; state, the states before the step; p, the parameters, if there
    are any; inputs, if there are any. It returns a tuple of the new states, also of one; the first is h.
    It is pointwise and deterministic PyTorch. Numbers from outside are constants of the cell. It is traced once, here.

    Args:
        gates, states, parameters, inputs: names, in a string with blanks between or in a sequence.
        states: the first one is what W_hh multiplies, and the output.
        parameters: learnt, one value for each hidden unit. A dictionary also gives the first values,
            `{"alpha": 0.2}`; without one (None) they start as the weights do.
        inputs: planes that a call gives as keyword arguments, beside the input.
        recurrent: whether there is a W_hh.

    Raises:
        ValueError, TypeError: the function does what cannot be expressed (a reduction over the hidden units, a product,
            a shape, a branch on values, randomness, an unknown operation), or a name is no name. The message names the
            operation and the line.
    """

    def make(function: Callable) -> Cell:
        if not callable(function):
            raise TypeError(f"a cell is made of a function, got {function!r}")
        return Cell(function, gates, states, parameters, inputs, recurrent)

    return make


def _names(kind: str, given, taken: Sequence[str] = ()) -> tuple[str, ...]:
    if not isinstance(given, Iterable):
        raise TypeError(f"{kind} should be names, in a string or in a sequence, got {given!r}")
    names = tuple(given.split()) if isinstance(given, str) else tuple(given)
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(
                f"{kind} should be names, each a Python identifier without a leading underscore; got {name!r}"
            )
        if name in taken:
            raise ValueError(f"{kind}: {name!r} is a name of the module itself; choose another")
    if len(set(names)) < len(names):
        raise ValueError(f"{kind} should be different names, got {' '.join(names)}")
    return names


def _first_values(parameters) -> dict[str, float]:
    if not isinstance(parameters, Mapping):
        return {}
    for name, value in parameters.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise TypeError(f"parameters: the first value of {name} should be a number or None, got {value!r}")
    return {name: float(value) for name, value in parameters.items() if value is not None}
