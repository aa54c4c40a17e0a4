"""A pointwise function as data: what a traced cell becomes, for backends that run it without Python.

A program takes planes (values of one shape, such as the gates of a step), runs instructions on them in order, and gives
some of the values as its results. Values are numbered: the inputs first, then the result of each instruction. The text
form, in which a program passes through an op's schema, is one line:

    13 | add 0 4 | mul 10 9 | const 0x1.8p+0 | out 13 15

that is the number of inputs, the instructions with the numbers of their operands, and the numbers of the results.
Constants are hexadecimal floats, so that no digit is lost. Comparisons and `and`, `or`, `not` give conditions, which
only these and the first operand of `where` read; every other value is a number in acc (`arguments.py`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ARITHMETIC = ("add", "sub", "mul", "div", "pow", "maximum", "minimum")
FUNCTIONS = (
    "neg", "abs", "sign", "exp", "expm1", "log", "log1p", "sqrt", "sigmoid", "tanh", "erf", "sin", "cos",
)  # fmt: skip
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
LOGIC = {"and": 2, "or": 2, "not": 1}
OPERANDS = {
    **dict.fromkeys(ARITHMETIC, 2), **dict.fromkeys(FUNCTIONS, 1), **dict.fromkeys(COMPARISONS, 2), **LOGIC, "where": 3,
}  # fmt: skip
"""The number of operands of each instruction; `const` has a number in their place."""
CONDITIONS = frozenset((*COMPARISONS, *LOGIC))

_RUN = {name: getattr(torch, name) for name in (*ARITHMETIC, *FUNCTIONS, *COMPARISONS, "where")} | {
    "and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not,
}  # fmt: skip


class Program(NamedTuple):
    """The instructions as tuples: `("add", 0, 4)`, `("const", 1.5)`."""

    inputs: int
    instructions: tuple[tuple, ...]
    results: tuple[int, ...]

    def text(self) -> str:
        lines = [" ".join((op, *map(_written, operands))) for op, *operands in self.instructions]
        return " | ".join((str(self.inputs), *lines, " ".join(("out", *map(str, self.results)))))


class CellPrograms(NamedTuple):
    """The step of a cell. The inputs and results of each are planes, in this order:

    forward: x (G), u (G, if recurrent), state_prev (S), parameters (Q), inputs (N) -> states (S), saved (K)
    total: saved (K), state_prev (S), dstate (S), parameters (Q), inputs (N) -> dstate (S)
    backward: as total -> dx (G), du (G, with distinct_dgh), dstate_prev (S), dparameters (Q), dinputs (N)

    They mean the same as those of a built-in cell in `equations.py`.
    """

    forward: Program
    total: Program
    backward: Program


def _written(operand: int | float) -> str:
    return str(operand) if isinstance(operand, int) else operand.hex()


def parse(text: str) -> Program:
    """The program of a text; the inverse of `Program.text`.

    Raises:
        ValueError: the text is no program.
    """
    begin, *lines, end = text.split(" | ")
    inputs, instructions = int(begin), []
    for number, line in enumerate(lines, inputs):
        op, *operands = line.split(" ")
        if op == "const" and len(operands) == 1:
            instructions.append((op, float.fromhex(operands[0])))
        elif OPERANDS.get(op) == len(operands) and all(0 <= int(operand) < number for operand in operands):
            instructions.append((op, *map(int, operands)))
        else:
            raise ValueError(f"no instruction of a program: {line!r}")
    word, *results = end.split(" ")
    count = inputs + len(instructions)
    if word != "out" or not all(0 <= int(result) < count for result in results):
        raise ValueError(f"a program should end in 'out' and the numbers of its results, got {end!r}")
    return Program(inputs, tuple(instructions), tuple(map(int, results)))


def run(program: Program, planes: Sequence[Tensor]) -> list[Tensor]:
    """The results for inputs of one dtype and of shapes that broadcast; each of the full shape, in its own memory."""
    if len(planes) != program.inputs:
        raise ValueError(f"a program of {program.inputs} planes got {len(planes)}")
    like = planes[0] if all(p.shape == planes[0].shape for p in planes) else torch.broadcast_tensors(*planes)[0]
    values, last_use = list(planes), _last_uses(program)
    for number, (op, *operands) in enumerate(program.instructions, program.inputs):
        values.append(like.new_full((), operands[0]) if op == "const" else _RUN[op](*(values[k] for k in operands)))
        for k in () if op == "const" else operands:
            if last_use[k] == number:
                values[k] = None  # frees its memory
    # An op may return no input's memory, no result twice, and no memory that elements share.
    taken, found = set(range(program.inputs)), []
    for k in program.results:
        copies = k in taken or values[k].shape != like.shape
        found.append(values[k].expand(like.shape).clone(memory_format=torch.contiguous_format) if copies else values[k])
        taken.add(k)
    return found


def _last_uses(program: Program) -> list[float]:
    """For each value the number of the last instruction that reads it; infinite for a result."""
    found = [-math.inf for _ in range(program.inputs + len(program.instructions))]
    for number, (op, *operands) in enumerate(program.instructions, program.inputs):
        for k in () if op == "const" else operands:
            found[k] = number
    for k in program.results:
        found[k] = math.inf
    return found
