"""Functions of PyTorch in the forms in which users call them in a cell: values and gradients on every backend."""

import pytest
import torch
import torch.nn.functional as F
from test_tracing import agree, pointwise
from user_cells import call

import fastrnn
from fastrnn.program import run

FUNCTIONS = {
    "arcs": lambda v: torch.atan(v) + v.arctan() * 2 + torch.atan(9 * v),
    "arcs of less than 1": lambda v: torch.asin(0.99 * torch.sin(v)) * v + torch.acos(0.9 * torch.sin(2 * v)),
    "atan2": lambda v: torch.atan2(v, v * v - 2) + torch.atan2(v - 0.7, -1.5 * v),
    "degrees": lambda v: torch.deg2rad(v) + torch.rad2deg(v) / 50 + torch.sinc(v),
    "logarithms": lambda v: (
        torch.xlogy(v * v, v * v + 0.3) + torch.special.xlog1py(v, v * v) + torch.logaddexp2(v, v * v)
    ),
    "signs": lambda v: torch.copysign(v * v + 1, v - 0.2) + torch.where(torch.signbit(v), v, 2 * v) + v.ldexp(v.sign()),
    "steps": lambda v: v * (v > 0.1).to(v.dtype) + v.sign() * v,
    "methods": lambda v: v.sinh() + v.cosh().rsqrt() + v.clip(-1, 1).square() + v.exp2() + v.tan().tanh() + v.asinh(),
    "in F": lambda v: F.tanhshrink(v) + F.softsign(v) + F.celu(v, 0.5) + F.leaky_relu(v, 0.3) + F.hardtanh(v, -2, 0.4),
    "in torch": lambda v: torch.selu(v) + torch.clamp(v, min=-v.abs(), max=v * v + 1) + torch.special.expit(v),
    "infinite": lambda v: torch.where(torch.isposinf(v) | torch.isneginf(v), 0.0, v),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_torch_s(name):
    cell = pointwise(FUNCTIONS[name])
    agree(cell)
    agree(cell, kinks=name != "atan2")


def slope(function, values):
    """The derivative of the function's program."""
    cell, zeros = pointwise(function), torch.zeros_like(values)
    saved = run(cell.spec.program.forward, [values, zeros, zeros])[1:]
    return run(cell.spec.program.backward, [*saved, zeros, torch.ones_like(values)])[0]


def test_a_step_has_no_slope():
    """torch has no gradient of heaviside at all, so there is no other truth."""
    values = torch.tensor([-1.0, 0.0, 2.0, float("nan")])
    step = lambda v: torch.heaviside(v, v + 0.5)  # noqa: E731
    cell, zeros = pointwise(step), torch.zeros(4)
    assert torch.equal(run(cell.spec.program.forward, [values, zeros, zeros])[0], step(values))
    assert slope(step, values).tolist() == [0.0, 1.0, 0.0, 0.0]  # of v + 0.5 at zero


def test_the_tangent_s_inverse_far_from_and_near_its_joints():
    x = torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30, 0.66, 2.414213562373095, -1.0], dtype=torch.float64)
    torch.testing.assert_close(slope(torch.atan, x), 1 / (1 + x * x), rtol=1e-14, atol=0)
    ends = torch.tensor([float("inf"), -float("inf"), float("nan")], dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)
    value = run(pointwise(torch.atan).spec.program.forward, [ends, zeros, zeros])[0]
    torch.testing.assert_close(value, torch.atan(ends), equal_nan=True)


@fastrnn.cell(gates="y x")
def angle(x, u, state):
    return (torch.atan2(x.y + u.y, x.x + u.x) + 0 * state.h,)


def test_the_angle_on_the_axes_and_at_the_origin():
    points = torch.tensor([[0.0, -1], [0, 0], [2, 0], [-2, 0], [1e-9, -3], [-1e-9, -3], [0, 4]], dtype=torch.float64)
    ys, xs = leaves = [one.clone().requires_grad_() for one in points.t()]
    want = torch.atan2(ys, xs)
    zeros = torch.zeros_like(want)
    got, *saved = run(angle.spec.program.forward, [ys, xs, zeros, zeros, zeros])
    torch.testing.assert_close(got, want, rtol=1e-15, atol=0)
    back = run(angle.spec.program.backward, [*saved, zeros, torch.ones_like(want)])
    for one, expected in zip(back, torch.autograd.grad(want.sum(), leaves), strict=False):
        torch.testing.assert_close(one, expected, rtol=1e-14, atol=1e-16)


@fastrnn.cell(gates="a b", states="h c")
def everything(x, u, state):
    """Of all functions of this file, each bounded so that a sequence of it is tame."""
    v = torch.tanh(x.a + u.a) + 0.1 * state.c
    total = sum(torch.tanh(function(v)) for function in FUNCTIONS.values())
    c = 0.5 * state.c + 0.1 * total
    return c * torch.sigmoid(x.b + u.b), c


def outcome(module, x):
    y, _ = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [*module.parameters()])]


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", torch.float64), ("triton", torch.float32)])
def test_all_of_them_in_one_cell(backend, dtype, device):
    """The function itself in float64, in a loop, is the truth. (torch's gradient of celu takes 1 / alpha as a float32,
    so alpha is one that this does not change.)"""
    if backend == "cpu":
        device = torch.device("cpu")
    torch.manual_seed(0)
    module = fastrnn.Recurrent(everything, 2, 3, device=device, dtype=dtype)
    x = torch.randn(3, 2, 2, device=device, dtype=dtype)
    module.backend = backend
    got = outcome(module, x)
    w_ih, w_hh, b_ih, b_hh = exact = [p.detach().double().requires_grad_() for p in module.parameters()]
    h, c, ys = *torch.zeros(2, 2, 3, dtype=torch.float64, device=device), []
    for step in x.double():
        h, c = call(everything, step @ w_ih.T + b_ih, h @ w_hh.T + b_hh, (h, c), None, None)
        ys.append(h)
    y = torch.stack(ys)
    want = [y, *torch.autograd.grad(y.square().sum(), exact)]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for one, expected in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=tolerance, atol=tolerance)
