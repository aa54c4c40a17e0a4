"""Triton functions from the text of a user's cell: source that is written to a folder, and imported from there.

Triton compiles what it reads from a file, so each cell has one in a cache folder. It is named by the cell and a hash of
its own content, and no file is imported that has other content than the text gives: a file of an older version, one cut
short, or one that someone changed is written anew. Processes do not disturb each other, because a file is written
elsewhere and then moved to its place.

FASTRNN_CACHE moves the folder; by default it is fastrnn/triton in the user's cache folder. Where that cannot be written
the files go to a temporary folder of the process.
"""

import hashlib
import importlib.util
import os
import re
import struct
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

from ..cell_table import CellSpec, spec_of
from ..program import Program

EXPRESSIONS = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}",
    "lt": "{} < {}", "le": "{} <= {}", "gt": "{} > {}", "ge": "{} >= {}", "eq": "{} == {}", "ne": "{} != {}",
    "and": "{} & {}", "or": "{} | {}", "not": "~{}", "where": "tl.where({}, {}, {})", "pow": "power({}, {})",
    "maximum": "maximum({}, {})", "minimum": "minimum({}, {})", "sign": "sign({})",
    "exp": "tl.exp({})", "expm1": "expm1({})", "log": "tl.log({})", "log1p": "log1p({})", "sqrt": "tl.sqrt({})",
    "sigmoid": "sigmoid({})", "tanh": "tanh({})", "erf": "tl.erf({})", "sin": "tl.sin({})", "cos": "tl.cos({})",
    "abs": "tl.abs({})",
}  # fmt: skip
"""The instructions of `fastrnn/program.py` in Triton."""
TILES_ONLY = ("pow",)
"""Instructions whose operands are tiles, constants too."""

HEADER = '''"""The cell {name} in Triton, written by fastrnn. A change here is lost: fastrnn writes the file anew.

gates: {gates}
states: {states}
parameters: {parameters}
inputs: {inputs}

The functions are those of fastrnn/kernels/cells.py. A value is named by what it comes from: x_ and u_ are W_ih x + b_ih
and W_hh h + b_hh, prev_ a state before the step, saved_ a plane kept by the forward, d_ the gradient of a state.
"""

import triton
import triton.language as tl

from fastrnn.kernels.functions import {functions}
'''
FUNCTIONS = ("expm1", "filled", "log1p", "maximum", "minimum", "only", "power", "sigmoid", "sign", "tanh")


def equations(cell: str) -> tuple:
    """The Triton functions forward, total and backward of a cell, built-in or a user's."""
    from ..kernels.cells import EQUATIONS

    return EQUATIONS.get(cell) or _from_source(cell)


@cache
def _from_source(cell: str) -> tuple:
    spec = spec_of(cell)
    module = load(spec.name, source(spec))
    return module.forward, module.total, module.backward


# ---------------------------------------------------------------------------------------------------------- source


def source(spec: CellSpec) -> str:
    """The file of a user's cell.

    Raises:
        ValueError: a name in the text is no name in Python. A text may come from a file that someone else wrote.
    """
    for name in (*spec.gates, *spec.states, *spec.parameters, *spec.inputs):
        if not name.isidentifier():
            raise ValueError(f"cell {spec.name}: {name!r} cannot be the name of a plane")
    K, Q, programs = len(spec.saved), len(spec.parameters), spec.program
    beside = _inputs("beside", "param", spec.parameters) + _inputs("beside", "input", spec.inputs, Q)
    prev, saved = _inputs("state_prev", "prev", spec.states), _inputs("saved", "saved", range(K))
    gx, gh = _inputs("gx", "x", spec.gates), _inputs("gh", "u", spec.gates) if spec.recurrent else []
    given = saved + prev + _inputs("dstate", "d", spec.states) + beside

    G, S = len(spec.gates), len(spec.states)
    inside = f"inside = beside[{len(beside)}:]"
    # Of what a forward gives, only h meets other units.
    forward = _function(
        "forward(gx, gh, state_prev, beside)", inside, programs.forward, gx + gh + prev + beside, (S, K), 1
    )
    total = _function("total(saved, state_prev, dstate, beside)", inside, programs.total, given, (S,), S)
    sizes = (G, G, S, len(beside)) if spec.distinct_dgh else (G, S, len(beside))
    backward = _function(
        "backward(saved, state_prev, dstate, beside)", inside, programs.backward, given, sizes, sum(sizes[:-1])
    )

    body = "\n\n".join((forward, total, backward))
    header = HEADER.format(
        name=readable(spec.name), gates=" ".join(spec.gates), states=" ".join(spec.states),
        parameters=" ".join(spec.parameters), inputs=" ".join(spec.inputs),
        functions=", ".join(FUNCTIONS),
    )  # fmt: skip
    return f"{header}\n\n{body}"


def _inputs(argument: str, prefix: str, names, begin: int = 0) -> list[tuple[str, str]]:
    """For each input its name in the source, which no other value has, and the element of an argument that it is."""
    return [(f"{prefix}_{name}", f"{argument}[{k}]") for k, name in enumerate(names, begin)]


def _function(
    signature: str, inside: str, program: Program, inputs: list[tuple[str, str]], sizes: tuple[int, ...], cleared: int
) -> str:
    """A function that returns tuples of `sizes` results; of a backward without its own dgh, dgx twice.

    The first results, as many as are `cleared`, are zero where H has no such element.
    """
    names, constants = [name for name, _ in inputs], set()
    read = {k for op, *operands in program.instructions if op != "const" for k in operands} | set(program.results)
    lines = [inside, *(f"{name} = {element}" for k, (name, element) in enumerate(inputs) if k in read)]
    like = inputs[min(read & set(range(len(inputs))), default=0)][1]

    def as_tile(k: int) -> str:
        return f"filled({like}, {names[k]})" if k in constants else names[k]

    for number, (op, *operands) in enumerate(program.instructions, program.inputs):
        if op == "const":
            constants.add(number)
            names.append(_number(*operands))
            continue
        # Triton takes a number for one of the operands, but not for all of them.
        tiles_only = op in TILES_ONLY or constants.issuperset(operands)
        written_operands = (as_tile(k) if tiles_only else names[k] for k in operands)
        lines.append(f"t{number} = {EXPRESSIONS[op].format(*written_operands)}")
        names.append(f"t{number}")

    found = [as_tile(k) for k in program.results]
    found[:cleared] = [f"only(inside, {name})" for name in found[:cleared]]
    results, begin = [], 0
    for size in sizes:
        results.append(f"({', '.join(found[begin : begin + size])},)" if size else "()")
        begin += size
    if len(sizes) == 3:
        results.insert(1, results[0])
    lines.append("return " + ", ".join(results))
    return "\n    ".join(("@triton.jit\ndef " + signature + ":", *lines)) + "\n"


def _number(value: float) -> str:
    """A constant, rounded to float32: Triton would make a float64 of one that float32 does not have."""
    try:
        value = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        value = float("inf") if value > 0 else float("-inf")
    return repr(value) if value - value == 0 else f'float("{value}")'


# ------------------------------------------------------------------------------------------------------------ files


def folder() -> Path:
    """The folder that is tried first."""
    given = os.environ.get("FASTRNN_CACHE")
    if given:
        return Path(given)
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(user) / "fastrnn" / "triton"


@cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """Of this process, removed at its end."""
    return tempfile.TemporaryDirectory(prefix="fastrnn-")


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write(path: Path, content: bytes):
    """Writes a file in one move, so that no reader sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def readable(name: str) -> str:
    """The name of a cell without what has a meaning in a path or a source."""
    return re.sub(r"\W", "_", name)


def file_name(name: str, text: str) -> str:
    return f"{readable(name)}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"


def written(name: str, text: str) -> Path:
    """The file that has this source, in the cache folder or a temporary one."""
    content, file = text.encode(), file_name(name, text)
    path = folder() / file
    if _content(path) == content:
        return path
    try:
        _write(path, content)
    except OSError as reason:
        if os.environ.get("FASTRNN_CACHE"):
            warnings.warn(f"FASTRNN_CACHE: {reason}; the source of {name} goes to a temporary folder", stacklevel=2)
        path = Path(_temporary_folder().name) / file
        _write(path, content)
    return path


def load(name: str, text: str) -> ModuleType:
    """The module of a source. What is run is the text itself; Triton reads it again from the file."""
    path = written(name, text)
    module_name = f"fastrnn_cell_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module
