"""Random calls for the persistent CUDA kernels: what these take, against the reference in the same type."""

import torch

from fastrnn import ops
from fastrnn.arguments import IncomingGradients, Kept, ScanInputs, as_tensors
from fastrnn.backends import cuda
from problems import Problem as AnyProblem
from problems import check as check_values

# Against the reference in the same type, over few steps. Sums in another order: some roundings fall to the other side
# of a tie, and one such flip of h passes through the gates. TF32 keeps 10 bits of each factor.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-9}
# The largest H by cluster, in the half types and in TF32.
BY_CLUSTER = {"lstm": (640, 256), "gru": (768, 512)} | dict.fromkeys(
    ("rnn_tanh", "rnn_relu", "rnn_leaky_relu", "rnn_elu"), (768, 768)
)


class Problem(AnyProblem):
    """A problem whose outputs are those of the raw ops: tensors, which are empty where an output does not exist."""

    ALL = ("flags", "clip_norm", "clip_value", "norms")

    def __init__(self, cell, dtype, T=3, B=5, H=40, reverse=False, extras=(), seed=0):
        super().__init__(cell, "cpu", dtype, (T, B, H), reverse, extras, seed=seed)

    def walk(self):
        return super().walk()._replace(backend="cuda")

    def forward(self, backend, save=True):
        if backend is cuda:  # by the raw op, which splits directions
            return ops.scan_forward(*self.of(ScanInputs), *self.walk(), save)
        return as_tensors(super().forward(backend, save=save), self.gx)

    def backward(self, backend, y, c, _h_n, _c_n, saved):
        c = None if self.c0 is None else c
        if backend is cuda:
            incoming, kept = self.of(IncomingGradients), Kept(y, c, saved)
            inputs = self.of(ScanInputs)._replace(gx=None)
            return ops.scan_backward(*incoming, *kept, *inputs, *self.walk(), self.norms)
        return as_tensors(super().backward(backend, y, c, saved), self.gx)


def check(got, want, tolerance):
    """Every output has the wanted dtype, and is within `tolerance` of the largest element of the wanted one."""
    assert [x.dtype for x in got] == [x.dtype for x in want]
    check_values(got, want, tolerance)


def extras_of(dtype):
    """All that the kernels take in that type."""
    return tuple(name for name in Problem.ALL if dtype != torch.float16 or name != "clip_norm")


def exact_problem(dtype, B, H, reverse=False):
    """A problem in which every sum stays a small integer, exact in each type, so that one wrong index shows.

    W_hh is the sum of three signed permutations.
    """
    problem, rng = Problem("rnn_relu", dtype, B=B, H=H, reverse=reverse), torch.Generator().manual_seed(3)
    for name in ("gx", "h0", "b_hh", "dy", "dh_n"):
        shape = getattr(problem, name).shape
        setattr(problem, name, torch.randint(-2, 3, shape, generator=rng).to(dtype))
    w = torch.zeros(H, H)
    for _ in range(3):
        w[torch.arange(H), torch.randperm(H, generator=rng)] += torch.randint(0, 2, (H,), generator=rng) * 2.0 - 1
    problem.w_hh = w.to(dtype)
    return problem


def all_outputs(problem):
    outputs = problem.forward(cuda)
    return outputs + problem.backward(cuda, *outputs)


def each_alone(problems, run=all_outputs):
    each = zip(*map(run, problems), strict=True)
    return [torch.stack(found) if found[0].dim() > 1 else found[0] for found in each]
