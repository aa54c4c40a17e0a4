"""The products over all T*B steps at once, around the scan: torch's, or a backend's own where that is faster."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import dispatch


def tracing() -> bool:
    """Under torch.compile, torch.export or a torch.func transform, where values cannot be looked at."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """x Wᵀ + b: `x [.., K]`, `weight [N, K]`, `bias [N]` or None -> `[.., N]`. Differentiable any number of times."""
    if x.dtype not in dispatch.BACKENDS[backend].products or tracing():
        return F.linear(x, weight, bias)
    return Linear.apply(x.flatten(0, -2), weight, bias, backend).unflatten(0, x.shape[:-1])


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
            dx = Linear.apply(dy, weight.t(), None, ctx.backend)
        if needed[1]:
            dweight = Linear.apply(dy.t(), x.t(), None, ctx.backend)
        if needed[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias, None
