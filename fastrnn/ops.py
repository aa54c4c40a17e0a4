"""The raw `torch.library` ops: one layer, forward and backward, with fakes and without autograd.

    scan_forward(*ScanInputs, *Walk, save) -> ScanOutputs
    scan_backward(*IncomingGradients, *Kept, *ScanInputs without gx, *Walk, norms) -> ScanGradients

`arguments.py` names and describes their arguments and results; `scan.py` makes them differentiable. An empty
tensor stands for a result that does not exist, since a schema has no optional ones. With a leading dimension D,
direction d walks back where d is odd, or even if `reverse`; a backend that takes one direction at a time gets them one
by one.
"""

import sys

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from . import dispatch
from .arguments import (
    IncomingGradients,
    Kept,
    ScanGradients,
    ScanInputs,
    ScanOutputs,
    Walk,
    as_tensors,
    empty_gradients,
    empty_outputs,
    has_directions,
    schema,
    split,
)
from .directions import each_direction
from .linear import tracing

LIBRARY = torch.library.Library("fastrnn", "DEF")


class _Undifferentiated(Function):
    """Runs an op that has no gradient, and raises when its gradient is asked for."""

    @staticmethod
    def forward(ctx, op, keys, *args):
        ctx.op = op
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys, *args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.op} has no gradient by itself: what torch.export wrote, and vmap inside of "
            "torch.compile, can be run and not trained; train the module"
        )


def refuse_gradient(library: torch.library.Library, name: str, op) -> None:
    """Makes an op raise when its gradient is asked for."""

    def run_and_refuse(keys, *args):
        keys = keys & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return _Undifferentiated.apply(op, keys, *args)
        return op.redispatch(keys, *args)

    library.impl(name, run_and_refuse, "Autograd", with_keyset=True)


def _op(name: str, op_schema: str, kernel, fake):
    """Registers `kernel` and `fake` as a raw op.

    `torch.library.custom_op` does the same, but imports the compiler at the first call, which takes a second or two, to
    disable it in the kernel. Here it is disabled only once it has been imported.
    """
    hidden = torch._disable_dynamo(kernel)
    LIBRARY.define(name + op_schema, tags=torch.Tag.pt2_compliant_tag)
    op = getattr(torch.ops.fastrnn, name).default

    def run(*args):
        return (hidden if "torch._dynamo" in sys.modules else kernel)(*args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    refuse_gradient(LIBRARY, name, op)
    torch.library.register_fake(f"fastrnn::{name}", fake, lib=LIBRARY)

    def call(*args):
        return run(*args) if _is_unobserved(args) else op(*args)

    return op, call


_PLAIN = frozenset({Tensor, Parameter, type(None), bool, float, int, str})


def _is_unobserved(args: tuple) -> bool:
    """Whether an op's own dispatch would change nothing: no transform, mode, profiler or class of tensors sees it.

    Then its kernel is called as a function, because the dispatch takes a tenth of a short call.
    """
    return (
        not tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._autograd._profiler_enabled()
        and _PLAIN.issuperset(map(type, args))
        and not next(arg for arg in args if arg is not None).is_meta
    )


def _run_forward(*flat):
    inputs, walk, save = split(flat, ScanInputs, Walk)
    forward = dispatch.launcher(walk.backend).forward
    if has_directions(inputs.gx) and not dispatch.takes_directions(walk.backend, inputs, walk):

        def one(inputs, reverse):
            return forward(inputs, walk._replace(reverse=reverse), save)

        return as_tensors(each_direction(one, len(inputs.gx), walk.reverse, inputs), inputs.gx)
    return as_tensors(forward(inputs, walk, save), inputs.gx)


def fake_forward(*flat):
    inputs, walk, save = split(flat, ScanInputs, Walk)
    return as_tensors(empty_outputs(inputs, walk, save), inputs.gx)


def _run_backward(*flat):
    incoming, kept, inputs, walk, norms = split(flat, IncomingGradients, Kept, ScanInputs, Walk)
    backward = dispatch.launcher(walk.backend).backward
    if has_directions(kept.y) and not dispatch.takes_directions(walk.backend, inputs, walk):

        def one(incoming, kept, inputs, reverse):
            return backward(incoming, kept, inputs, walk._replace(reverse=reverse), norms)

        return as_tensors(each_direction(one, len(kept.y), walk.reverse, incoming, kept, inputs), kept.saved)
    return as_tensors(backward(incoming, kept, inputs, walk, norms), kept.saved)


def _fake_backward(*flat):
    _, kept, inputs, walk, norms = split(flat, IncomingGradients, Kept, ScanInputs, Walk)
    return as_tensors(empty_gradients(kept, inputs, walk, norms), kept.saved)


scan_forward, call_forward = _op(
    "scan_forward", schema(ScanInputs, Walk, results=ScanOutputs, save=bool), _run_forward, fake_forward
)
scan_backward, call_backward = _op(
    "scan_backward",
    schema(IncomingGradients, Kept, ScanInputs, Walk, results=ScanGradients, norms=bool),
    _run_backward,
    _fake_backward,
)
