"""The products over all T*B steps at once, around the scan: PyTorch's own, on a CPU through oneDNN or MKL; on AMD's
processors that of the C++ library."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _is_tracing
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.nn import Parameter

from .aten import HALVES_WITHOUT_ONEDNN
from .backends import extension

LEAST_WORK = 1 << 22  # multiplications; with fewer, the overhead of oneDNN's product is larger than its gain
LONGEST_SUM = 256
"""The most terms that oneDNN sums one after the other. For longer sums MKL rounds less, and is no slower than oneDNN in
parts, each of which has to be copied and waits for all threads."""
ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""Whether oneDNN is an alternative to MKL, which F.linear takes for float32. MKL's fastest products run on Intel's
processors only; oneDNN's run on all."""

PANEL = 32
"""The C++ library's product takes weights whose number of rows is a multiple of this (csrc/cpu/panels.h)."""

MOST_ROWS_IN_PLACE = 32
"""The most rows of a product that reads the weights in place; for more rows it pays to pack them (csrc/cpu/dots.h)."""


@cache
def has_own() -> bool:
    """Whether the C++ library's product is the fastest: measured on AMD's processors with AVX2."""
    return ONEDNN and extension.load("cpu") is None and torch.ops.fastrnn_c.prefers_linear()


def transformed() -> bool:
    """Under a torch.func transform."""
    return peek_interpreter_stack() is not None


def recorded() -> bool:
    """Under torch.jit.trace, which writes down the operations of one call; values can be looked at, with a warning."""
    return not is_compiling() and _is_tracing()  # torch.compile cannot follow the question


def tracing() -> bool:
    """Under torch.compile, torch.export, torch.jit.trace or a torch.func transform, which do not see values."""
    return is_compiling() or transformed() or _is_tracing()


def in_forward_mode() -> bool:
    """Within a dual level of autograd, or under torch.func.jvp and the transforms that use it."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if is_compiling() or not transformed():
        return False
    return any(level.key() == TransformType.Jvp for level in retrieve_all_functorch_interpreters())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: `x [.., K]`, `weight [N, K]`, `bias [N]` or None -> `[.., N]`. Differentiable any number of times."""
    if x.device.type == "cpu" and x.dtype in HALVES_WITHOUT_ONEDNN:
        # torch's own product takes several times as long as that of float32 there.
        wide = (None if one is None else one.float() for one in (x, weight, bias))
        return linear(*wide).to(x.dtype)
    *steps, size = x.shape
    # `tracing` comes first: comparing a size would specialise a compiled graph on it.
    if tracing() or in_forward_mode() or not (ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu"):
        return F.linear(x, weight, bias)
    if x.numel() * len(weight) < LEAST_WORK or not (size <= LONGEST_SUM or _is_own(x, weight)):
        return F.linear(x, weight, bias)
    return Linear.apply(x.reshape(-1, size), weight, bias).reshape(*steps, len(weight))


def _dense(weight: Tensor) -> Tensor:
    """The weight, it or its transpose contiguous: in other layouts oneDNN's product takes a hundred times longer."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _is_own(x: Tensor, weight: Tensor) -> bool:
    """Whether the C++ library's product takes these, which have to be tensors with values."""
    plain = type(x) in (Tensor, Parameter) and type(weight) in (Tensor, Parameter)
    return plain and len(weight) % PANEL == 0 and has_own()


class Linear(Function):
    """`linear` of a float32 matrix by the C++ library or oneDNN; its gradients are such products themselves."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        if _is_own(x, weight):
            return torch.ops.fastrnn_c.linear(x, weight, bias)
        # The op that torch.compile uses for linear layers on a CPU; "none": no function of the result.
        return torch.ops.mkldnn._linear_pointwise(x, _dense(weight), bias, "none", [], "")

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needed, dx, dweight, dbias = ctx.needs_input_grad, None, None, None
        if needed[0]:
            dx = linear(dy, weight.t())
        if needed[1]:
            dweight = linear(dy.t(), x.t())
        if needed[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias
