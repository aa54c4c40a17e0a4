"""Builds a program instruction by instruction: equal ones once, constants computed, the trivial ones left out."""

import torch

from .program import CONDITIONS, FUNCTIONS, LOGIC, Program, run

COMMUTATIVE = frozenset(("add", "mul", "maximum", "minimum", "eq", "ne", "and", "or"))
FOLDED = frozenset(("add", "sub", "mul", "div", "pow", "maximum", "minimum", *FUNCTIONS))


class Builder:
    """A program that grows. A value is its number, as in a program's text; a float among operands is a constant.

    A condition among numbers counts as 0 or 1, a number among conditions as whether it is not 0.
    """

    def __init__(self, inputs: int):
        self.inputs = inputs
        self.instructions: list[tuple] = []
        self._numbers: dict[tuple, int] = {}

    def _new(self, *instruction) -> int:
        key = instruction
        if instruction[0] == "const":  # 0.0 == -0.0, and nan != nan
            key = ("const", instruction[1].hex())
        if key not in self._numbers:
            self._numbers[key] = self.inputs + len(self.instructions)
            self.instructions.append(instruction)
        return self._numbers[key]

    def const(self, number: float) -> int:
        return self._new("const", float(number))

    def operation(self, value: int) -> tuple:
        """The instruction that gives a value; `("input",)` for an input."""
        return ("input",) if value < self.inputs else self.instructions[value - self.inputs]

    def number(self, value: int) -> float | None:
        """The number that a value is, if it is constant."""
        op, *operands = self.operation(value)
        return operands[0] if op == "const" else None

    def is_condition(self, value: int) -> bool:
        return self.operation(value)[0] in CONDITIONS

    def emit(self, op: str, *operands: int | float) -> int:
        """The value of an instruction, perhaps of an earlier or a simpler one."""
        values = [self.const(x) if isinstance(x, float) else x for x in operands]
        for k, value in enumerate(values):
            wants_condition = op in LOGIC or (op == "where" and k == 0)
            if wants_condition != self.is_condition(value):
                values[k] = self.emit("ne", value, 0.0) if wants_condition else self.emit("where", value, 1.0, 0.0)
        simpler = self._simpler(op, *values)
        if simpler is not None:
            return simpler
        return self._new(op, *(sorted(values) if op in COMMUTATIVE else values))

    def _simpler(self, op: str, *values: int) -> int | None:
        numbers = [self.number(value) for value in values]
        if op in FOLDED and None not in numbers:
            like = [torch.tensor(number, dtype=torch.float64) for number in numbers]
            program = Program(len(like), ((op, *range(len(like))),), (len(like),))
            return self.const(run(program, like)[0].item())
        if op in ("add", "mul") and numbers[0] is not None:
            values, numbers = values[::-1], numbers[::-1]
        first, last = values[0], numbers[-1]
        inner, *inside = self.operation(values[-1])
        if (op in ("add", "sub") and last == 0) or (op in ("mul", "div", "pow") and last == 1):
            return first
        if op in ("mul", "div") and last == -1:
            return self.emit("neg", first)
        if op == "sub" and numbers[0] == 0:
            return self.emit("neg", values[1])
        if op == "neg" and inner == "neg":
            return inside[0]
        if op in ("add", "sub") and inner == "neg":
            return self.emit("sub" if op == "add" else "add", first, inside[0])
        if op == "add" and self.operation(first)[0] == "neg":
            return self.emit("sub", values[1], self.operation(first)[1])
        if op == "pow":
            return self._power(first, last)
        if op == "where" and values[1] == values[2]:
            return values[1]
        return None

    def _power(self, x: int, exponent: float | None) -> int | None:
        """x to a power that a cheaper instruction gives, with the gradient that torch gives pow."""
        if exponent == 2:
            return self.emit("mul", x, x)
        if exponent == 3:
            return self.emit("mul", self.emit("mul", x, x), x)
        if exponent == -1:
            return self.emit("div", 1.0, x)
        return self.emit("sqrt", x) if exponent == 0.5 else None

    def append(self, program: Program, planes: list[int]) -> list[int]:
        """Runs a program on values of this one; all its values, those of its inputs first."""
        values = list(planes)
        for op, *operands in program.instructions:
            values.append(self.const(operands[0]) if op == "const" else self.emit(op, *(values[k] for k in operands)))
        return values

    def program(self, results: list[int], given: dict[int, int] | None = None, inputs: int | None = None) -> Program:
        """The program of these results, with the instructions that they need and no others.

        `given`: values that are inputs of that program, with their places; those of this one, unless told otherwise.
        """
        given = {k: k for k in range(self.inputs)} if given is None else given
        inputs = self.inputs if inputs is None else inputs
        needed: set[int] = set()
        left = list(results)
        while left:
            value = left.pop()
            if value in needed or value in given:
                continue
            op, *operands = self.operation(value)
            if op == "input":
                raise LookupError(f"input {value} is needed, but not given")
            needed.add(value)
            left += () if op == "const" else operands
        places, instructions = dict(given), []
        for value in sorted(needed):
            op, *operands = self.operation(value)
            places[value] = inputs + len(instructions)
            instructions.append((op, *operands) if op == "const" else (op, *(places[k] for k in operands)))
        return Program(inputs, tuple(instructions), tuple(places[value] for value in results))
