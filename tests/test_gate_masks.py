"""A recurrent mask for each gate: backend cpu gives what the reference gives, and the reference is tested by hand
in test_layer_norm_kinds.py."""

import pytest
import torch
from setups import agree, kept_of, needs_cpu_library, random_incoming, random_inputs

import fastrnn
from fastrnn.arguments import ScanInputs, ScanOutputs, Walk
from fastrnn.backends import cpu
from fastrnn.cell_table import spec_of
from fastrnn.reference import backward, forward

SIZES = (4, 5, 7)
pytestmark = needs_cpu_library


def masked(cell, features, dtype) -> ScanInputs:
    inputs = random_inputs(cell, features, sizes=SIZES, dtype=dtype)
    B, P = inputs.h0.shape
    keep = torch.rand(B, len(spec_of(cell).gates) * P, generator=torch.Generator().manual_seed(9)) < 0.6
    return inputs._replace(recurrent_mask=keep.to(dtype) / 0.6)


# A float32 product of 28 terms of order 1 is off by some 1e-6; a half type stores 8 or 11 bits of each step.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.1}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("cell", "features", "changes"), [
    ("lstm", (), {}),
    ("lstm", ("projection", "flags", "zone_h"), {"reverse": True}),
    ("lstm", ("layer_norm", "flags", "decay"), {}),
    ("gru", ("layer_norm",), {"ln_of": "separate"}),
    ("gru", ("layer_norm",), {"ln_of": "gates"}),
    ("gru", ("flags", "clip_norm"), {}),
    (fastrnn.cells.peephole_lstm.text, (), {}),
], ids=["lstm", "projection", "layer-norm", "gru-separate", "gru-gates", "gru", "own"])  # fmt: skip
def test_the_library_agrees_with_the_reference(cell, features, changes, dtype):
    inputs, walk = masked(cell, features, dtype), Walk(cell, backend="cpu", **{"reverse": False, **changes})
    want = forward(inputs, walk, True)
    outputs = cpu.forward(inputs, walk, True)
    incoming = random_incoming(inputs)
    gx = inputs.gx if walk.ln_of != "separate" else None
    wanted = backward(incoming, kept_of(want), inputs._replace(gx=gx), walk, True)
    # The same saved planes: what is compared is the backward alone.
    found = cpu.backward(incoming, kept_of(want), inputs._replace(gx=gx), walk, True)
    tolerance = dict(rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    for results, expected in ((outputs, want), (found, wanted)):
        there = {name: value for name, value in expected._asdict().items() if value is not None}
        agree({name: getattr(results, name) for name in there}, there, **tolerance)
    one_mask = cpu.forward(inputs._replace(recurrent_mask=inputs.recurrent_mask[:, : inputs.h0.shape[1]]), walk, True)
    assert isinstance(outputs, ScanOutputs) and not torch.allclose(one_mask.y, outputs.y)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_modules(kind):
    """All of a module's gradients, W_hh's among them, under one seed."""
    torch.manual_seed(0)
    settings = dict(recurrent_dropout=0.5, recurrent_dropout_per_gate=True, bidirectional=True, dtype=torch.float64)
    module, x = getattr(fastrnn, kind)(3, 5, **settings), torch.randn(4, 2, 3, dtype=torch.float64)
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(7)
        with fastrnn.backend(backend):
            y = module(x)[0]
        results.append((y, *torch.autograd.grad(y.square().sum(), module.parameters())))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_a_mask_of_another_width_is_refused():
    inputs = masked("gru", (), torch.float64)
    inputs = inputs._replace(recurrent_mask=inputs.recurrent_mask[:, :-1])
    with pytest.raises(RuntimeError, match="recurrent_mask must have shape"):
        cpu.forward(inputs, Walk("gru", False, "cpu"), True)
