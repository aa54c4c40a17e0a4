"""The products over all T*B steps at once, around the scan: torch's, or a backend's own where that is faster."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import dispatch

LEAST_ROWS = 64  # with fewer, arranging the weight for a backend's own product takes longer than the product saves


def tracing() -> bool:
    """Under torch.compile, torch.export or a torch.func transform, where values cannot be looked at."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """x Wᵀ + b: `x [.., K]`, `weight [N, K]`, `bias [N]` or None -> `[.., N]`. Differentiable any number of times."""
    *steps, size = x.shape
    # Tracing first: to compare a size would tie a compiled graph to it.
    if tracing() or x.dtype not in dispatch.BACKENDS[backend].products or x.numel() < LEAST_ROWS * size:
        return F.linear(x, weight, bias)
    return Linear.apply(x.flatten(0, -2), weight, bias, backend).unflatten(0, steps)


class Linear(Function):
    """`linear` of a matrix on the backend's own product; its gradients are such products themselves."""

    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        return dispatch.kernels(backend).linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needed, dx, dweight, dbias = ctx.needs_input_grad, None, None, None
        if needed[0]:
            dx = linear(dy, weight.t(), None, ctx.backend)
        if needed[1]:
            dweight = linear(dy.t(), x.t(), None, ctx.backend)
        if needed[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias, None
