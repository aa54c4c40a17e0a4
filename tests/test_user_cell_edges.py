"""The edges of a user's cell: functions beyond the usual ones, names that a call takes, and words of errors."""

import inspect

import pytest
import torch
from user_cells import lstm

import fastrnn
from fastrnn import checks, functional
from fastrnn.user_cells import TAKEN_INPUTS

H = 6
FUNCTIONS = {
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "asinh": torch.asinh,
    "acosh": lambda v: torch.acosh(1.5 + v * v),
    "atanh": lambda v: torch.atanh(0.9 * torch.tanh(v)),
    "logit": lambda v: torch.logit(0.1 + 0.8 * torch.sigmoid(v)),
    "logit within limits": lambda v: torch.logit(torch.sigmoid(v), 0.3),
    "prelu": lambda v: torch.nn.functional.prelu(v, torch.tensor([0.3])),
    "fmax": lambda v: torch.fmax(v, 0.5 * v),
    "fmin": lambda v: torch.fmin(v, torch.log(v + 0.1)),  # a NaN gives way
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_and_its_gradient_are_torch_s(name):
    function = FUNCTIONS[name]
    cell = fastrnn.cell(gates="n", recurrent=False)(lambda x, state: (function(x.n) + 0.0 * state.h,))
    x = torch.tensor([0.0, 1e-9, -1e-9, 0.3, -0.3, 2.5, -2.5], dtype=torch.float64)[None, :, None].requires_grad_()
    parameters = {"weight_ih_l0": torch.ones(1, 1, dtype=torch.float64)}
    double = lambda v: function(v).to(v.dtype)  # noqa: E731 - prelu's slope is float32
    if name == "prelu":
        double = lambda v: torch.where(v > 0, v, v * torch.tensor(0.3).item())  # noqa: E731
    want = double(x)
    y, _ = functional.recurrent(cell, x, None, parameters, "reference")
    # Of a logit near 0 both have the rounding of a difference; the others keep all digits.
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-15 if "logit" in name else 0)
    gradients = (torch.autograd.grad(value.sum(), x)[0] for value in (y, want))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15, equal_nan=True)


def test_no_input_has_the_name_of_an_argument_beside_it():
    beside = set()
    for function in (
        fastrnn.Recurrent.forward, fastrnn.Recurrent.step, functional.recurrent, functional.explain, checks.check,
        fastrnn.explain, fastrnn.tune,
    ):  # fmt: skip
        beside |= {
            name
            for name, one in inspect.signature(function).parameters.items()
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        }
    assert beside <= set(TAKEN_INPUTS)
    with pytest.raises(ValueError, match="inputs: 'state' is a name of the module itself"):
        fastrnn.cell(gates="n", inputs="state")(lambda x, u, state, inputs: (x.n + u.n + inputs.state,))


def test_words_of_errors():
    module, x = fastrnn.Recurrent(lstm, 2, H), torch.zeros(3, 1, 2)
    for wrong, error, reason in (
        (lambda: fastrnn.cell(gates=4)(lambda x, u, state: (x,)), TypeError, "gates should be names, .* got 4"),
        (lambda: fastrnn.Recurrent(lstm, 2, H, proj_size=2), ValueError, "LSTM, not a cell of your own"),
        (lambda: functional.recurrent(lambda x: x, x, None, {}), TypeError, "made by fastrnn.cell, got <function"),
        (lambda: module(x, (torch.zeros(1, 1, H), None)), TypeError, r"hx\[1\] should be a tensor, got NoneType"),
    ):
        with pytest.raises(error, match=reason):
            wrong()


def test_explain_gives_no_rank_to_a_backend_that_cannot_run_the_call():
    rows = fastrnn.explain(fastrnn.Recurrent(lstm, 2, H), torch.zeros(3, 1, 2)).rows
    ranks = {name: words.partition(":")[0] for name, _, words in rows}
    assert ranks["aten"] == ranks["cuda"] == "no"
    able = [ranks[name] for name, reason, _ in rows if reason == "yes" and ranks[name] != "no"]
    assert able == [str(k) for k in range(1, len(able) + 1)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exporters_are_refused_by_the_cell_s_name_with_what_can_be_done(tmp_path):
    """Not by the cell's text, and without the copy for torch.nn, which has no such cell."""
    module, x = fastrnn.Recurrent(lstm, 2, H).eval(), torch.zeros(3, 1, 2)
    for run, error, reason in (
        (lambda: torch.fx.symbolic_trace(torch.nn.Sequential(module)), TypeError, "fastrnn's lstm: use torch.export"),
        (lambda: torch.jit.script(module), TypeError, "fastrnn.Recurrent: use torch.export"),
        (
            lambda: torch.onnx.export(module, (x,), tmp_path / "a.onnx", dynamo=False),
            RuntimeError,
            "no operator for this lstm .* use dynamo=True",
        ),
        (lambda: module(x, None, 1), TypeError, "takes input and hx, and its options by name"),
    ):
        with pytest.raises(error, match=reason):
            run()


def test_a_cell_can_be_defined_where_tensors_have_no_values():
    with torch.device("meta"):
        cell = fastrnn.cell(gates="n")(lambda x, u, state: (torch.tanh(x.n + u.n) * torch.tensor(0.5),))
        assert fastrnn.Recurrent(cell, 2, H).weight_ih_l0.is_meta
    assert "0x1.0000000000000p-1" in cell.text
