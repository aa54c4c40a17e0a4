"""From the forward program of a cell its whole step: the derived backward, and the choice of what is saved.

The derivative is taken in reverse, instruction by instruction. At the new states it is cut in two: `total` is the
gradient of each new state with the paths between them added, and `backward` starts from these. What the two read of
the forward pass comes from the saved planes, the states before the step, the parameters and the inputs; the saved
planes are a minimum cut of the values between the gates and what is read, the one nearest to the gates.
"""

import math
from collections import defaultdict, deque
from functools import cache

from .building import Builder
from .cell_table import CellSpec
from .program import CellPrograms, Program

ZERO = 0.0


def _gradients(b: Builder, op: str, values: list[int], y: int, g: int) -> tuple[int | None, ...]:
    """The gradients of the operands of one instruction with result y, whose gradient is g. None is zero.

    The subgradients are torch's: half for each of two equal operands of maximum, 0 for abs at 0.
    """
    emit, (x, *rest) = b.emit, values
    other = rest[0] if rest else None

    def chosen(least: str):
        half = emit("mul", g, 0.5)
        return tuple(
            emit("where", emit("eq", x, other), half, emit("where", emit(least, p, q), ZERO, g))
            for p, q in ((x, other), (other, x))
        )

    def power():
        number = b.number(other)
        if number is not None:
            return (emit("mul", g, emit("mul", other, emit("pow", x, number - 1))) if number else None), None
        lower = emit("mul", other, emit("pow", x, emit("sub", other, 1.0)))
        of_x = emit("mul", g, emit("where", emit("eq", other, ZERO), ZERO, lower))
        zero = emit("and", emit("eq", x, ZERO), emit("ge", other, ZERO))
        return of_x, emit("mul", g, emit("where", zero, ZERO, emit("mul", y, emit("log", x))))

    def quotient():
        of_x = emit("div", g, other)
        return of_x, emit("neg", emit("mul", of_x, y))

    rules = {
        "add": lambda: (g, g),
        "sub": lambda: (g, emit("neg", g)),
        "mul": lambda: (emit("mul", g, other), emit("mul", g, x)),
        "div": quotient,
        "pow": power,
        "maximum": lambda: chosen("lt"),
        "minimum": lambda: chosen("gt"),
        "neg": lambda: (emit("neg", g),),
        "abs": lambda: (emit("mul", g, emit("sign", x)),),
        "exp": lambda: (emit("mul", g, y),),
        "expm1": lambda: (emit("mul", g, emit("add", y, 1.0)),),
        "log": lambda: (emit("div", g, x),),
        "log1p": lambda: (emit("div", g, emit("add", x, 1.0)),),
        "sqrt": lambda: (emit("div", g, emit("mul", y, 2.0)),),
        "sigmoid": lambda: (emit("mul", emit("mul", g, y), emit("sub", 1.0, y)),),
        "tanh": lambda: (emit("mul", g, emit("sub", 1.0, emit("mul", y, y))),),
        "erf": lambda: (
            emit("mul", g, emit("mul", 2 / math.sqrt(math.pi), emit("exp", emit("neg", emit("mul", x, x))))),
        ),
        "sin": lambda: (emit("mul", g, emit("cos", x)),),
        "cos": lambda: (emit("neg", emit("mul", g, emit("sin", x))),),
        "where": lambda: (None, emit("where", x, g, ZERO), emit("where", x, ZERO, g)),
    }
    return rules[op]() if op in rules else tuple(None for _ in values)  # sign and conditions have none


def _backpropagate(b: Builder, last: int, seeds: dict[int, int], replaced=lambda value, g: g) -> dict[int, int]:
    """The gradient of every value up to `last` from those of some, `seeds`.

    `replaced(value, g)`: what is used in place of a value's gradient, or in place of None where it has none.
    """
    found = dict(seeds)
    for value in range(last, -1, -1):
        g = replaced(value, found.get(value))
        if g is None or b.number(value) is not None:
            continue
        found[value] = g
        op, *operands = b.operation(value)
        if op == "input":
            continue
        for operand, gradient in zip(operands, _gradients(b, op, operands, value, g), strict=True):
            if gradient is not None and b.number(operand) is None:
                found[operand] = b.emit("add", found[operand], gradient) if operand in found else gradient
    return found


def _reads_only_the_sum(b: Builder, x: int, u: int, results: list[int]) -> bool:
    """Whether the results depend on the inputs x and u by x + u alone, as far as sums and constant factors show it."""
    slopes = {x: 1.0, u: -1.0}  # of each value along the direction (1, -1) of (x, u)
    for value in range(b.inputs, max(results) + 1):
        op, *operands = b.operation(value)
        of = [] if op == "const" else [slopes.get(k, 0.0) for k in operands]
        if not any(of):
            continue
        if op in ("add", "sub"):
            slopes[value] = of[0] + of[1] if op == "add" else of[0] - of[1]
        elif op == "neg":
            slopes[value] = -of[0]
        elif op == "mul" and 0.0 in of and (factor := b.number(operands[of.index(0.0)])) is not None:
            slopes[value] = sum(of) * factor
        elif op == "div" and of[1] == 0 and (divisor := b.number(operands[1])) is not None:
            slopes[value] = of[0] / divisor
        else:
            return False
    return not any(slopes.get(value, 0.0) for value in results)


def _smallest_cut(b: Builder, sources: list[int], sinks: list[int], may_save) -> list[int]:
    """The fewest values, each of which `may_save`, that every path from the sources to the sinks passes; of several
    such sets the one nearest to the sources. (Edmonds and Karp's maximum flow, each value an edge of capacity 1.)"""
    capacity: dict = defaultdict(dict)

    def edge(begin, end, size: float):
        capacity[begin][end] = size
        capacity[end].setdefault(begin, 0)

    for value in range(b.inputs + len(b.instructions)):
        edge((value, "in"), (value, "out"), 1 if may_save(value) else math.inf)
        op, *operands = b.operation(value)
        for operand in () if op in ("const", "input") else operands:
            edge((operand, "out"), (value, "in"), math.inf)
    for source in sources:
        edge("source", (source, "in"), math.inf)
    for sink in sinks:
        edge((sink, "out"), "sink", math.inf)
    while True:
        came, queue = {"source": None}, deque(["source"])
        while queue:
            node = queue.popleft()
            for after, size in capacity[node].items():
                if size > 0 and after not in came:
                    came[after] = node
                    queue.append(after)
        if "sink" not in came:
            return [k for k in range(b.inputs + len(b.instructions)) if (k, "in") in came and (k, "out") not in came]
        node = "sink"
        while (before := came[node]) is not None:
            capacity[before][node] -= 1
            capacity[node][before] += 1
            node = before


def derive(forward: Program, G: int, S: int, recurrent: bool) -> tuple[CellPrograms, int, bool]:
    """The programs of a cell from the one that gives its new states; the number of saved planes; `distinct_dgh`.

    forward: x (G), u (G, if recurrent), state_prev (S), parameters (Q), inputs (N) -> states (S)
    """
    n, gates = forward.inputs, G * (1 + recurrent)
    b = Builder(n + 2 * S)  # then the gradients of the states, and the totals
    dstates, totals = range(n, n + S), range(n + S, n + 2 * S)
    values = b.append(forward, list(range(n)))
    states = [values[k] for k in forward.results]
    last = b.inputs + len(b.instructions) - 1
    whole: dict[int, int] = {}  # by state: the gradient of each new state, with the paths between them

    def with_paths(value: int, g: int | None) -> int | None:
        own = [s for s in range(S) if states[s] == value]
        whole.update({s: dstates[s] for s in own})
        if own and g is not None:
            whole[own[0]] = b.emit("add", dstates[own[0]], g)
        return _sum(b, [whole[s] for s in own]) if own else g

    def given_totals(value: int, g: int | None) -> int | None:
        own = [totals[s] for s in range(S) if states[s] == value]
        return _sum(b, own) if own else g

    _backpropagate(b, last, {}, with_paths)
    found = _backpropagate(b, last, {}, given_totals)
    distinct = recurrent and not all(_reads_only_the_sum(b, k, G + k, states) for k in range(G))
    of_total = [whole[s] for s in range(S)]
    of_backward = [found[k] if k in found else b.const(0.0) for k in range(n) if distinct or not G <= k < gates]

    after_gradients = set(range(n, n + 2 * S))
    for value in range(b.inputs, b.inputs + len(b.instructions)):
        op, *operands = b.operation(value)
        if op != "const" and not after_gradients.isdisjoint(operands):
            after_gradients.add(value)

    def may_save(value: int) -> bool:
        return value not in after_gradients and not b.is_condition(value)

    saved = _smallest_cut(b, list(range(gates)), of_total + of_backward, may_save) or [0]  # one at least
    K = len(saved)
    places = {value: k for k, value in enumerate((*saved, *range(gates, gates + S)))}
    beside = {value: K + 2 * S + k for k, value in enumerate(range(gates + S, n))}

    def reading(gradients: range, results: list[int]) -> Program:
        given = places | beside | {value: K + S + s for s, value in enumerate(gradients)}
        return b.program(results, given, K + 2 * S + len(beside))

    programs = CellPrograms(
        b.program(states + saved, {k: k for k in range(n)}, n), reading(dstates, of_total), reading(totals, of_backward)
    )
    return programs, K, distinct


def _sum(b: Builder, values: list[int]) -> int:
    total = values[0]
    for value in values[1:]:
        total = b.emit("add", total, value)
    return total


@cache
def saved_backward(spec: CellSpec) -> Program:
    """The gradients that the saved planes pass on, for second derivatives.

    saved (K), state_prev (S), dsaved (K), parameters (Q), inputs (N) -> the results of `CellPrograms.backward`
    """
    forward, S, K = spec.program.forward, len(spec.states), len(spec.saved)
    n, G = forward.inputs, len(spec.gates)
    gates = G * (1 + spec.recurrent)
    b = Builder(n + K)
    values = b.append(forward, list(range(n)))
    saved, last = [values[k] for k in forward.results[S:]], b.inputs + len(b.instructions) - 1
    beside = len(spec.parameters) + len(spec.inputs)
    given = {value: k for k, value in enumerate(saved)}
    given |= {gates + s: K + s for s in range(S)} | {n + k: K + S + k for k in range(K)}
    given |= {gates + S + k: 2 * K + S + k for k in range(beside)}

    def program_of(planes: list[int]) -> Program:
        found = _backpropagate(b, last, {saved[k]: n + k for k in planes})
        wanted = [k for k in range(n) if spec.distinct_dgh or not G <= k < gates]
        return b.program([found[k] if k in found else b.const(0.0) for k in wanted], given, 2 * K + S + beside)

    def passes_on(plane: int) -> bool:
        # What the backward reads for a comparison only need not have a derivative that it reads, too. It is zero.
        try:
            program_of([plane])
        except LookupError:
            return False
        return True

    return program_of([k for k in range(K) if passes_on(k)])
