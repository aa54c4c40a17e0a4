"""From a user's function to a program: the function runs once on planes that record what is done to them.

A `Plane` is a tensor without values. Each operation of PyTorch on it arrives, after autograd and composite functions,
in `_Recorder`, which writes the instructions of `lowering.py`. What a program cannot say is refused there, with the
line of the user's code that asked for it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .building import Builder
from .lowering import FILLED, LOWERINGS, UNCHANGED
from .program import Program

OWN_FILES = (Path(__file__).with_name(f"{name}.py") for name in ("tracing", "lowering", "arcs", "building"))
NOT_USER_CODE = (str(Path(torch.__file__).parent), *map(str, OWN_FILES))
PROPERTIES = {
    "shape": (Tensor.shape, Tensor.size, Tensor.dim, Tensor.ndim, Tensor.numel, Tensor.__len__, Tensor.ndimension),
    "the values": (
        Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__float__, Tensor.__int__,
        Tensor.__index__, Tensor.__contains__, Tensor.__iter__,
    ),
    "the gradient": (Tensor.data, Tensor.grad, Tensor.backward, Tensor.requires_grad_, Tensor.register_hook),
}  # fmt: skip
REFUSED = {
    one if callable(one) else one.__get__: what  # the latter of an attribute
    for what, some in PROPERTIES.items()
    for one in some
}
WHY = {
    "shape": "a cell is pointwise and knows no shapes",
    "the values": "a cell cannot branch on values, which do not exist when it is traced; torch.where chooses",
    "the gradient": "the gradient of a cell is derived",
}


STEPS = "a step is a comparison, (v > 0).to(v.dtype), and torch.sin and torch.cos repeat"
KEYWORDS = ("alpha", "value", "approximate")
"""The keyword arguments that functions of `lowering.py` take."""


class Plane(Tensor):
    """A value of the cell: of `dtype` bool where it is a condition."""

    value: int
    is_input: bool

    @staticmethod
    def __new__(cls, value: int, condition: bool = False, is_input: bool = False):
        dtype = torch.bool if condition else torch.float32
        plane = Tensor._make_wrapper_subclass(cls, (2, 3), dtype=dtype, device="cpu")
        plane.value, plane.is_input = value, is_input
        return plane

    def __repr__(self, **_):
        return f"Plane({self.value})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        what = REFUSED.get(func)
        if what is not None:
            name = getattr(func, "__name__", "")
            name = func.__self__.__name__ if name == "__get__" else name
            raise Refused(f"it asks for {what} of a plane ({name}); {WHY[what]}")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise Refused(f"{func} was called on a plane outside of the cell")


class Refused(Exception):
    """What a program cannot say; it becomes a ValueError with the cell's name and the line."""


class _Recorder(TorchDispatchMode):
    """Writes what is done to planes as instructions of a builder."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to hide this from it, which takes seconds

    def __init__(self, builder: Builder):
        super().__init__()
        self.builder = builder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").partition(".")[0]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refused(f"{name} draws random numbers; a cell is deterministic, and takes them as an input")
        flat = (x for one in (*args, *kwargs.values()) for x in (one if isinstance(one, (tuple, list)) else (one,)))
        planes = [x for x in flat if isinstance(x, Plane)]
        if not planes:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            raise Refused(
                f"{name} runs without gradients, in torch.no_grad or in the forward of an autograd.Function: a program "
                "has no gradient but its own"
            )
        in_place = func._schema.is_mutable
        if in_place:
            name = name.removesuffix("_")
            target = args[0]
            if not isinstance(target, Plane) or target.is_input or "out" in kwargs:
                raise Refused(
                    f"{name}_ changes what the cell was given in place; the states before the step stay as they are"
                )
        value = self._value(name, args, kwargs, planes)
        if in_place:
            target.value = value
            return target
        plane = Plane(value, self.builder.is_condition(value))
        return (plane, args[0]) if name == "log_sigmoid_forward" else plane

    def _value(self, name: str, args, kwargs, planes: Sequence[Plane]) -> int:
        b, first = self.builder, planes[0]
        if name in UNCHANGED:
            return first.value
        if name in FILLED:
            return b.const(FILLED[name])
        if name in ("full_like", "new_full"):
            return b.const(float(args[-1] if len(args) > 1 else kwargs["fill_value"]))
        if name in ("_to_copy", "to"):
            return self._converted(first, kwargs.get("dtype"))
        if name == "add" and all(p.dtype == torch.bool for p in planes) and len(planes) == 2:
            name = "logical_or"
        lowering = LOWERINGS.get(name)
        if lowering is None:
            raise Refused(_why_unknown(name))
        unknown = [k for k, v in kwargs.items() if k not in KEYWORDS and v is not None]
        if "rounding_mode" in unknown:
            raise Refused(f"{name} with rounding_mode={kwargs['rounding_mode']!r} rounds; {STEPS}")
        if unknown:
            raise Refused(f"{name} with {unknown[0]}={kwargs[unknown[0]]!r} is not among the operations of a cell")
        found = lowering(b, *map(self._operand, args), **{k: self._operand(v) for k, v in kwargs.items()})
        return b.const(found) if isinstance(found, float) else found

    def _operand(self, x):
        """A plane as its value, a number as a float."""
        if isinstance(x, Plane):
            return x.value
        if isinstance(x, Tensor):
            if x.numel() != 1:
                raise Refused(f"a tensor of shape {list(x.shape)} is no constant; make it a parameter or an input")
            if x.requires_grad:
                raise Refused("a tensor that requires grad is no constant; make it a parameter")
            x = x.item()
        return float(x) if isinstance(x, (bool, int, float)) else x

    def _converted(self, plane: Plane, dtype: torch.dtype | None) -> int:
        if dtype == torch.bool:
            return self.builder.emit("ne", plane.value, 0.0)
        if dtype in (None, torch.float32):
            return self.builder.emit("add", plane.value, 0.0)  # a condition becomes a number
        raise Refused(f"a conversion to {dtype}: the arithmetic of a cell has one dtype, that of its input or float32")


REDUCTIONS = (
    "sum", "mean", "max", "min", "amax", "amin", "prod", "norm", "linalg_vector_norm", "var", "std", "softmax",
    "_softmax", "_log_softmax", "logsumexp", "cumsum", "cumprod", "any", "all", "argmax", "argmin", "native_layer_norm",
    "var_mean", "native_batch_norm", "native_group_norm", "median", "sort", "topk", "_fused_rms_norm",
)  # fmt: skip
PRODUCTS = ("mm", "matmul", "addmm", "bmm", "linear", "dot", "convolution", "einsum", "mv", "outer")
SHAPES = (
    "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "select", "slice", "cat", "stack", "expand", "transpose",
    "permute", "t", "split", "chunk", "unbind", "repeat", "flip", "roll", "index", "gather", "split_with_sizes",
    "glu",
)  # fmt: skip
ROUNDINGS = ("floor", "ceil", "round", "trunc", "frac", "remainder", "fmod", "floor_divide")


def _why_unknown(name: str) -> str:
    if name in REDUCTIONS:
        return f"{name} reduces over a dimension; a cell is pointwise, and sees no other unit and no other sequence"
    if name in PRODUCTS:
        return f"{name} is a product; the products of a cell are W_ih x and W_hh h, outside of it"
    if name in SHAPES:
        return f"{name} changes a shape; a cell is pointwise and knows no shapes"
    if name in ROUNDINGS:
        return f"{name} rounds, which a program does not know, and its steps have no gradient; {STEPS}"
    if name in ("detach", "detach_"):
        return f"{name} cuts the gradient, which a program does not know"
    if name in ("_local_scalar_dense", "is_nonzero"):
        return f"it asks for the values of a plane ({name}); {WHY['the values']}"
    return f"the operation {name} is not among those that a cell can be made of: {', '.join(sorted(LOWERINGS))}"


def _line(function: Callable, traceback) -> str:
    """`file:line` of the innermost line of the user's code in a traceback."""
    code = getattr(function, "__code__", None)
    found = "in C" if code is None else f"{code.co_filename}:{code.co_firstlineno}"
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith(NOT_USER_CODE):
            found = f"{file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def trace(name: str, function: Callable, arguments: Callable[[Callable], tuple], inputs: int, states: int) -> Program:
    """The program of a function of planes.

    Args:
        name: of the cell, for messages.
        arguments: makes the function's arguments, of `inputs` planes, each by one call of its own argument.
        states: the number of planes that the function returns.

    Raises:
        ValueError: the function does what a program cannot say, or not the same twice.
        TypeError: it does not return a tuple of `states` planes.
    """
    first, second = (_traced(name, function, arguments, inputs, states) for _ in range(2))
    if first.text() != second.text():  # not the programs: a NaN is not equal to itself
        raise ValueError(f"cell {name}: its function is not the same when it runs twice; a cell is deterministic")
    return first


def _traced(name: str, function: Callable, arguments, inputs: int, states: int) -> Program:
    builder, places = Builder(inputs), iter(range(inputs))
    given = arguments(lambda: Plane(next(places), is_input=True))
    try:
        # On the CPU a constant has a value, also where the model is made on device meta.
        with torch.enable_grad(), torch.device("cpu"), _Recorder(builder):
            results = function(*given)
    except Exception as error:
        where = _line(function, error.__traceback__)
        if isinstance(error, Refused):
            raise ValueError(f"cell {name}: {error} ({where})") from None
        planes = "; ".join(f"{type(one).__name__} has {', '.join(one._fields)}" for one in given)
        raise ValueError(
            f"cell {name}: its function failed: {type(error).__name__}: {error} ({where}). {planes}"
        ) from error
    where = _line(function, None)
    if not isinstance(results, (tuple, list)):
        kind = type(results).__name__
        raise TypeError(
            f"cell {name} should return a tuple of its new states, also of one (`return h,`), got {kind} ({where})"
        )
    if len(results) != states:
        raise ValueError(f"cell {name} should return {states} new states, got {len(results)} ({where})")
    if not all(isinstance(result, Plane) for result in results):
        kinds = ", ".join(type(result).__name__ for result in results)
        raise TypeError(f"cell {name} should return planes, computed from its arguments, got {kinds} ({where})")
    values = [builder.emit("where", r.value, 1.0, 0.0) if builder.is_condition(r.value) else r.value for r in results]
    return builder.program(values)
