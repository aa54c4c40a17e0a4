"""The kinds of layer norm, and recurrent masks for each gate, in the Triton scan against the reference in float64."""

import pytest
import torch
from cell_texts import TEXTS

import fastrnn
from fastrnn.arguments import ScanInputs
from fastrnn.backends import triton as launcher
from problems import GEMM, HALF, WHOLE, Problem, check_against_reference

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned", "ieee")]
SIZES = (3, 3, 5)
CARRIED = dict(ln_c_carried=True)


@pytest.mark.parametrize(("cell", "extras", "kinds"), [
    ("lstm", (), dict(ln_of="sum", ln_eps=0.3)),
    ("lstm", ("flags",), CARRIED),
    ("lstm", WHOLE, dict(ln_of="sum", **CARRIED)),
    ("lstm", (*Problem.ALL, "decay"), dict(ln_of="gates", reverse=True, **CARRIED)),
    ("gru", Problem.ALL, dict(ln_of="sum", reverse=True)),
    ("gru", ("decay", "norms"), dict(ln_of="gates")),
    ("rnn_tanh", ("flags", "clip_value"), dict(ln_of="gates")),
], ids=["sum", "carried", "all", "all-gates", "gru-sum", "gru-gates", "rnn"])  # fmt: skip
def test_kinds_of_layer_norm(cell, extras, kinds, device):
    check_against_reference(Problem(cell, device, sizes=SIZES, extras=("layer_norm", *extras), **kinds), GEMM)


@pytest.mark.parametrize(("cell", "extras", "kinds"), [
    ("lstm", (), {}),
    ("lstm", WHOLE, CARRIED),
    ("gru", (*Problem.ALL, "layer_norm", "decay"), dict(ln_of="gates")),
    (TEXTS["four"], ("flags", "norms", "layer_norm"), dict(ln_of="sum")),
], ids=["lstm", "lstm-all", "gru-all", "own"])  # fmt: skip
def test_a_mask_for_each_gate(cell, extras, kinds, device):
    extras = ("gate_masks", *(extra for extra in extras if extra != "recurrent_mask"))
    problem = Problem(cell, device, sizes=SIZES, extras=extras, **kinds)
    check_against_reference(problem, GEMM)


def test_a_half_type(device):
    dtype = torch.bfloat16
    extras = ("layer_norm", "gate_masks", "flags")
    problem = Problem("lstm", device, dtype=dtype, sizes=SIZES, extras=extras, ln_of="gates", ln_c_carried=True)
    check_against_reference(problem, GEMM, None, HALF[dtype])


@pytest.mark.parametrize("settings", [
    dict(layer_norm="sum", layer_norm_cell="carried", proj_size=2),
    dict(recurrent_dropout=0.5, recurrent_dropout_per_gate=True, bidirectional=True),
], ids=["sum", "masks"])  # fmt: skip
def test_modules(settings, device):
    """All of a module's gradients, under one seed."""
    torch.manual_seed(0)
    module = fastrnn.LSTM(3, 5, device=device, **settings)
    x, found = torch.randn(3, 2, 3, device=device, requires_grad=True), []
    for backend in ("triton", "reference"):
        torch.manual_seed(7)
        module.backend = backend
        y, (h, c) = module(x, lengths=torch.tensor([3, 2]))
        loss = y.square().sum() + h.sum() + c.square().sum()
        found.append([y, *torch.autograd.grad(loss, [x, *module.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["local", "stepwise"])
def test_other_modes_refuse_masks_for_each_gate(mode, device):
    problem = Problem("lstm", device, sizes=SIZES, extras=("gate_masks",))
    inputs = problem.of(ScanInputs)
    assert launcher.tile_of(inputs, problem.walk()).mode == "gemm"
    tile = launcher.choose_tile("lstm", inputs.h0, inputs.h0.shape[-1], inputs.h0.shape[-2], mode)
    with pytest.raises(RuntimeError, match=f"mode '{mode}' of the Triton scan has no recurrent masks for each gate"):
        launcher.forward(inputs, problem.walk(), True, tile)
