"""A user's function as programs: against the function itself and autograd, the saved planes, and what is refused."""

import random
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import sigmoid, tanh

import fastrnn
from fastrnn.adjoint import saved_backward
from fastrnn.cell_table import spec_of, text_of
from fastrnn.program import Program, parse, run

KINKS = [-6.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0]
SHAPE = (3, len(KINKS) + 4)


def planes_of(names, seed, kinks=False):
    """A leaf for each name, random; with kinks, most elements are where functions have theirs."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(len(names), *SHAPE, generator=generator, dtype=torch.float64)
    if kinks:
        found[..., : len(KINKS)] = torch.tensor(KINKS, dtype=torch.float64)
    return [x.clone().requires_grad_() for x in found]


def step(cell, seed=0, kinks=False):
    """The arguments of a cell's function, and all planes in the order of its programs."""
    kinds = cell._arguments()
    planes = [planes_of(names, seed + k, kinks) for k, (_, names) in enumerate(kinds)]
    given = [namedtuple(name, names)(*some) for (name, names), some in zip(kinds, planes, strict=True)]
    return given, [x for some in planes for x in some]


def agree(cell, kinks=False, seed=0):
    """The programs of a cell give what its function gives, and autograd's gradients of it."""
    spec = cell.spec
    given, planes = step(cell, seed, kinks)
    want = cell(*given)
    G, S, K = len(spec.gates), len(spec.states), len(spec.saved)
    first = G * (1 + spec.recurrent)  # of the states
    results = run(spec.program.forward, planes)
    for got, one in zip(results[:S], want, strict=True):
        torch.testing.assert_close(got, one.expand(SHAPE))
    dstate = [torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(9 + s)) for s in range(S)]
    loss = sum((d * s).sum() for d, s in zip(dstate, want, strict=True))
    expected = torch.autograd.grad(loss, planes, allow_unused=True)
    before, beside = (*results[S:], *planes[first : first + S]), planes[first + S :]
    total = run(spec.program.total, (*before, *dstate, *beside))
    got = run(spec.program.backward, (*before, *total, *beside))
    keep = [k for k in range(len(planes)) if spec.distinct_dgh or not spec.recurrent or not G <= k < 2 * G]
    assert len(got) == len(keep) and K >= 1
    for k, gradient in zip(keep, got, strict=True):
        one = torch.zeros(SHAPE, dtype=torch.float64) if expected[k] is None else expected[k]
        torch.testing.assert_close(gradient, one, msg=lambda m, k=k: f"plane {k}: {m}")
    if spec.recurrent and not spec.distinct_dgh:
        for k in range(G):
            torch.testing.assert_close(expected[k], expected[G + k])


def pointwise(function):
    """A cell of one gate: h' = function(x + u) + h / 2."""

    def one(x, u, state):
        return (function(x.n + u.n) + 0.5 * state.h,)

    return fastrnn.cell(gates="n")(one)


FUNCTIONS = {
    **{n: getattr(torch, n) for n in ("neg", "exp", "expm1", "sin", "cos", "tan", "erf", "erfc", "exp2", "square")},
    **{n: getattr(torch, n) for n in ("sigmoid", "tanh", "relu", "abs", "sign", "selu", "celu")},
    **{
        n: getattr(F, n)
        for n in (
            "silu", "mish", "softplus", "elu", "gelu", "hardsigmoid", "hardtanh", "hardswish", "relu6", "leaky_relu",
            "logsigmoid", "softsign", "tanhshrink", "hardshrink", "softshrink",
        )
    },
    "log": lambda v: torch.log(v.abs() + 1),
    "log1p": lambda v: torch.log1p(v * v),
    "log2": lambda v: torch.log2(v * v + 1),
    "log10": lambda v: torch.log10(v * v + 1),
    "sqrt": lambda v: torch.sqrt(v * v + 0.1),
    "rsqrt": lambda v: torch.rsqrt(v * v + 0.1),
    "reciprocal": lambda v: torch.reciprocal(v * v + 1),
    "pow": lambda v: v**2 + v**3 - (v * v + 1) ** -0.7 + (v * v + 1) ** 0.5 + 2**v + (v * v + 1) ** v,
    "pow at zero": lambda v: v**4 + v**0 + v**1,
    "clamp": lambda v: v.clamp(-1, 1) * v.clamp(min=-0.5) + v.clamp(max=0.5),
    "threshold": lambda v: F.threshold(v, 0.5, -2.0),
    "maximum": lambda v: torch.maximum(v, v * v) - torch.minimum(v, 0.5 * v),
    "where": lambda v: torch.where((v > 0) & ~(v >= 3) | (v == -1), v * v, -v),
    "masked_fill": lambda v: v.masked_fill(v < 0, 0.25),
    "comparisons": lambda v: v * (v != 0) + (v <= 1).float() - 2 * torch.logical_xor(v > 0, v < 3),
    "lerp": lambda v: torch.lerp(v, v * v, 0.3) + torch.lerp(v, v + 1, torch.sigmoid(v)),
    "addcmul": lambda v: torch.addcmul(v, v, v + 1, value=0.5) + torch.addcdiv(v, v, v * v + 1, value=2),
    "hypot": lambda v: torch.hypot(v, v * v + 1) + torch.logaddexp(v, -v),
    "rsub": lambda v: 1 - v + torch.rsub(v, 2, alpha=3) + torch.add(v, v, alpha=2) - torch.sub(v, 1, alpha=2),
    "in place": lambda v: (v * 2).add_(1).mul_(v).sigmoid_(),
    "constants": lambda v: v * torch.tensor(0.3) + torch.zeros_like(v) + torch.full_like(v, 2) * torch.ones_like(v),
    "gelu tanh": lambda v: F.gelu(v, approximate="tanh"),
    "softplus beta": lambda v: F.softplus(v, beta=2, threshold=5) + F.elu(v, alpha=0.5),
    "finite": lambda v: torch.where(torch.isfinite(v) & ~torch.isnan(v) & ~torch.isinf(v), v, 0.0),
    "module": torch.nn.Hardsigmoid(),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_and_its_gradient_are_torch_s_also_at_the_kinks(name):
    cell = pointwise(FUNCTIONS[name])
    agree(cell)
    agree(cell, kinks=True)
    assert not cell.spec.distinct_dgh and len(cell.spec.saved) == 1


@pytest.mark.parametrize("name", ["elu", "softplus", "logsigmoid", "mish", "gelu", "silu", "selu"])
def test_a_gradient_stays_finite_where_a_branch_would_overflow(name):
    cell = pointwise(FUNCTIONS[name])
    for value in (-1e4, 1e4, 200.0, -200.0):
        planes = [torch.full((1,), x, dtype=torch.float64) for x in (value, 0.0, 0.0)]
        results = run(cell.spec.program.forward, planes)
        found = run(cell.spec.program.backward, (results[1], planes[2], torch.ones(1, dtype=torch.float64)))
        assert all(bool(x.isfinite()) for x in (*results, *found))


@pytest.mark.parametrize("name", ["maximum", "relu", "clamp", "hardtanh", "leaky_relu", "sigmoid"])
def test_nan_spreads_as_in_torch(name):
    nan = torch.full((1,), float("nan"))
    cell = pointwise(FUNCTIONS[name])
    (got, _), want = run(cell.spec.program.forward, (nan, nan, torch.zeros(1))), FUNCTIONS[name](nan)
    assert bool(got.isnan()) == bool(want.isnan())


def lstm(x, u, state):
    c = sigmoid(x.f + u.f) * state.c + sigmoid(x.i + u.i) * tanh(x.g + u.g)
    return sigmoid(x.o + u.o) * tanh(c), c


def gru(x, u, state):
    r, z = sigmoid(x.r + u.r), sigmoid(x.z + u.z)
    n = tanh(x.n + r * u.n)
    return (n + z * (state.h - n),)


def three_states(x, u, state, p, inputs):
    a = tanh(x.a + u.a + inputs.k) * p.q + state.m
    b = torch.maximum(a * state.c, state.h)
    return b / (1 + a * a), a, b * sigmoid(a)


def multiplicative(x, u, state):
    return (sigmoid(x.n * u.n) * state.h,)


def linear(x, state, p):
    return (x.n + p.w * state.h,)


def given_back(x, u, state):
    return tanh(x.n + u.n), state.h, state.c * state.c, x.n + u.n


def twice(x, u, state):
    v = tanh(x.n + u.n)
    return v, v


CELLS = {  # and the number of saved planes, distinct_dgh
    "lstm": (lstm, dict(gates="i f g o", states="h c"), 4, False),
    "gru": (gru, dict(gates="r z n"), 4, True),
    "three_states": (three_states, dict(gates="a", states="h m c", parameters="q", inputs="k"), 1, False),
    "multiplicative": (multiplicative, dict(gates="n"), 2, True),
    "linear": (linear, dict(gates="n", parameters="w", recurrent=False), 1, False),
    "given_back": (given_back, dict(gates="n", states="h c d e"), 1, False),
    "twice": (twice, dict(gates="n", states="h c"), 1, False),
    "slstm": (fastrnn.cells.slstm.function, dict(gates="i f z o", states="h c n m"), 4, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_a_step_and_its_gradient_are_the_function_s(name):
    function, settings, saved, distinct = CELLS[name]
    cell = fastrnn.cell(**settings)(function)
    for seed in range(3):
        agree(cell, seed=seed)
    assert (len(cell.spec.saved), cell.spec.distinct_dgh) == (saved, distinct)


def test_a_bias_is_folded_only_where_the_sum_is_all_that_is_read():
    """Whether x and u are read by their sum is seen through constants, signs and further terms, not by gradients."""

    def scaled(x, u, state):
        return (tanh(3 * (-x.n) + state.h - 2 * u.n - u.n),)

    def compared(x, u, state):
        return (torch.where(x.n > 0, state.h, torch.where(u.n > 0, 1.0, 2.0)),)

    def doubled(x, u, state):
        return (tanh(x.n + 2 * u.n),)

    found = [fastrnn.cell(gates="n")(f).spec.distinct_dgh for f in (scaled, compared, doubled)]
    assert found == [False, True, True]


@pytest.mark.parametrize("name", CELLS)
def test_the_saved_planes_pass_a_gradient_on(name):
    """`saved_backward`, which second derivatives use, is autograd's of the forward program."""
    function, settings, _, _ = CELLS[name]
    spec = fastrnn.cell(**settings)(function).spec
    G, S, K = len(spec.gates), len(spec.states), len(spec.saved)
    _, planes = step(fastrnn.cell(**settings)(function))
    saved = run(spec.program.forward, planes)[S:]
    dsaved = [torch.randn(SHAPE, dtype=torch.float64) for _ in saved]
    want = torch.autograd.grad(saved, planes, dsaved, allow_unused=True)
    first = G * (1 + spec.recurrent)
    got = run(saved_backward(spec), (*saved, *planes[first : first + S], *dsaved, *planes[first + S :]))
    keep = [k for k in range(len(planes)) if spec.distinct_dgh or not spec.recurrent or not G <= k < 2 * G]
    for k, gradient in zip(keep, got, strict=True):
        torch.testing.assert_close(gradient, torch.zeros(SHAPE).double() if want[k] is None else want[k])
    assert K == len(saved)


def test_constants_may_be_infinite_or_no_number():
    def limited(x, u, state):
        missing = torch.full_like(x.n, float("nan"))
        return (torch.where(state.h < float("inf"), x.n + u.n, missing),)

    agree(fastrnn.cell(gates="n")(limited))


def test_a_text_says_everything():
    for cell in (fastrnn.cells.peephole_lstm, fastrnn.cells.leaky_rnn, fastrnn.cells.min_gru):
        assert text_of(cell.spec) == cell.text and text_of(spec_of(text_of(cell.spec))) == cell.text
        for program in cell.spec.program:
            assert parse(program.text()) == program
    constants = Program(1, (("const", float("-inf")), ("const", 0.1), ("add", 0, 2)), (3, 1))
    assert parse(constants.text()) == constants


@pytest.mark.parametrize(
    "text", ["1 | add 0 1 | out 1", "1 | foo 0 | out 1", "1 | neg 0", "1 | out 2", "1 | add 0 | out 1", "x"]
)
def test_what_is_no_program_is_refused(text):
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize("text", ["", "peephole", "cell x", "cell x\ngates a"])
def test_what_is_no_cell_is_refused(text):
    with pytest.raises(ValueError, match=r"unknown cell|should have the lines"):
        spec_of(text)


# ------------------------------------------------------------------------------------------------------------ refusals

OUTSIDE = torch.nn.Parameter(torch.ones(()))


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g


def _no_grad(x):
    with torch.no_grad():
        return x * 2


def _branch(x):
    return x if x > 0 else -x


REFUSED = {
    "sum": (lambda x: x - x.sum(), "reduces"),
    "softmax": (lambda x: torch.softmax(x, -1), "reduces"),
    "mean": (lambda x: x - x.mean(-1, keepdim=True), "reduces"),
    "layer norm": (lambda x: F.layer_norm(x, (3,)), "reduces|shape"),
    "matmul": (lambda x: x @ torch.ones(3, 3), "product"),
    "linear": (lambda x: F.linear(x, torch.ones(3, 3)), "product"),
    "shape": (lambda x: x / x.shape[-1], "asks for shape"),
    "size": (lambda x: x / x.size(0), "asks for shape"),
    "len": (lambda x: x / len(x), "asks for shape"),
    "view": (lambda x: x.view(-1), "shape"),
    "index": (lambda x: x[0], "shape"),
    "cat": (lambda x: torch.cat([x, x]), "shape"),
    "branch": (_branch, "asks for the values"),
    "item": (lambda x: x * x.item(), "asks for the values"),
    "numpy": (lambda x: x.numpy(), "asks for the values"),
    "rand_like": (lambda x: x + torch.rand_like(x), "random"),
    "randn": (lambda x: x + torch.randn(()), "random"),
    "dropout": (lambda x: F.dropout(x, 0.5), "random"),
    "python's random": (lambda x: x + random.random(), "not the same when it runs twice"),
    "floor": (lambda x: x.floor(), "floor rounds.* a step is a comparison"),
    "remainder": (lambda x: x % 2, "remainder rounds"),
    "rounding": (lambda x: torch.div(x, 2, rounding_mode="floor"), "div with rounding_mode='floor' rounds"),
    "detach": (lambda x: x.detach(), "cuts the gradient"),
    "no_grad": (_no_grad, "without gradients"),
    "double": (lambda x: x.double(), "torch.float64"),
    "in place": (lambda x: x.mul_(2), "in place"),
    "out": (lambda x: torch.add(x, 1, out=x), "in place|out"),
    "a tensor": (lambda x: x * torch.ones(3), "no constant"),
    "a parameter": (lambda x: x * OUTSIDE, "requires grad"),
    "autograd.Function": (Own.apply, "autograd.Function"),
    "an error": (lambda x: x.nothing, "nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_cannot_say_is_refused_with_its_line(name):
    function, reason = REFUSED[name]

    def broken(x, u, state):
        y = function(x.n)
        return (y + u.n,)

    with pytest.raises(ValueError, match=f"(?s)cell broken.*({reason}).*") as caught:
        fastrnn.cell(gates="n")(broken)
    if "twice" not in reason:
        assert f"{__file__}:" in str(caught.value)


def test_wrong_results_names_and_signatures_are_refused():
    def cell(function, **settings):
        return fastrnn.cell(**{"gates": "n", **settings})(function)

    for function, error, reason in (
        (lambda x, u, state: x.n + u.n, TypeError, "tuple of its new states, also of one"),
        (lambda x, u, state: (x.n + u.n, x.n), ValueError, "1 new states, got 2"),
        (lambda x, u, state: (0.0,), TypeError, "planes"),
        (lambda x, u, state: (x.m,), ValueError, "x has n"),
        (lambda x, state: (x.n,), TypeError, r"\(x, u, state\)"),
        (lambda x, u, state: (x.n + state.h,), ValueError, "do not depend on u .with recurrent=False"),
        (lambda x, u, state: (state.h,), ValueError, "do not depend on gate n"),
    ):
        with pytest.raises(error, match=reason):
            cell(function)
    good = lambda x, u, state, *more: (x.n + u.n,)  # noqa: E731
    for settings, error, reason in (
        (dict(gates="n n"), ValueError, "different names"),
        (dict(gates=""), ValueError, "at least one"),
        (dict(states=()), ValueError, "at least one"),
        (dict(gates="1"), ValueError, "identifier"),
        (dict(gates="_n"), ValueError, "identifier"),
        (dict(gates="class"), ValueError, "identifier"),
        (dict(parameters="weight_hh"), ValueError, "name of the module"),
        (dict(inputs="lengths"), ValueError, "name of the module"),
        (dict(parameters={"a": "1"}), TypeError, "first value of a"),
        (dict(parameters="a"), ValueError, "do not depend on parameter a"),
        (dict(inputs="a"), ValueError, "do not depend on input a"),
        (dict(recurrent=1), TypeError, "recurrent"),
    ):
        with pytest.raises(error, match=reason):
            cell(good, **settings)
    with pytest.raises(TypeError, match="function"):
        fastrnn.cell(gates="n")(3)
