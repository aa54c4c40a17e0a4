"""Decay in the Triton scan, which has it in gemm mode, against the reference in float64."""

import pytest
import torch
from cell_texts import TEXTS

import fastrnn
from fastrnn.arguments import ScanInputs
from fastrnn.backends import triton as launcher
from problems import GEMM, HALF, WHOLE, Problem, check_against_reference

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned", "ieee")]


@pytest.mark.parametrize(
    ("cell", "extras", "reverse"),
    [("lstm", (), False), ("lstm", WHOLE, True), ("gru", Problem.ALL, False), ("rnn_tanh", ("flags", "norms"), True)],
    ids=["lstm", "lstm-all", "gru-masks", "rnn-flags"],
)
def test_it_is_the_reference_s(cell, extras, reverse, device):
    problem = Problem(cell, device, sizes=(3, 3, 5), reverse=reverse, extras=("decay", *extras))
    found = check_against_reference(problem, GEMM)
    assert sum(x is not None for x in found) > 6


@pytest.mark.parametrize("name", ["four", "ind", "memory"])
def test_users_cells_with_and_without_w_hh(name, device):
    check_against_reference(Problem(TEXTS[name], device, sizes=(3, 3, 5), extras=("decay", "flags", "norms")), GEMM)


def test_a_half_type(device):
    problem = Problem("gru", device, dtype=torch.bfloat16, sizes=(3, 3, 5), extras=("decay", "flags"))
    check_against_reference(problem, GEMM, None, HALF[torch.bfloat16])


def test_a_call_with_decay_takes_the_mode_that_has_it(device):
    module = fastrnn.LSTM(3, 5, bidirectional=True, device=device)
    x, decay = torch.randn(4, 2, 3, device=device), torch.rand(4, 2, 5, device=device, requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        module.backend = backend
        y, _ = module(x, decay=decay, lengths=torch.tensor([4, 2]))
        found.append([y, *torch.autograd.grad(y.square().sum(), [decay, *module.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    inputs = Problem("lstm", device, extras=("decay",))
    assert launcher.tile_of(inputs.of(ScanInputs), inputs.walk()).mode == "gemm"


@pytest.mark.parametrize("mode", ["local", "stepwise"])
def test_a_mode_without_decay_refuses_it(mode, device):
    problem = Problem("lstm", device, extras=("decay",))
    inputs = problem.of(ScanInputs)
    tile = launcher.choose_tile("lstm", inputs.h0, inputs.h0.shape[-1], inputs.h0.shape[-2], mode)
    with pytest.raises(RuntimeError, match=f"mode '{mode}' of the Triton scan has no decay"):
        launcher.forward(inputs, problem.walk(), True, tile)
