"""The raw ops under torch.library's own checks: schema, fake tensors, aliasing."""

import pytest
import torch
from setups import MASKS, H, every_backend, kept_of, needs_cpu_library, random_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrnn.arguments import IncomingGradients, ScanInputs, ScanOutputs, Walk
from fastrnn.cell_table import CELLS
from fastrnn.scan import scan

T, B = 4, 3


OP_CASES = [
    *((cell, (), torch.float32) for cell in ("lstm", "gru", "rnn_tanh")),  # a nonlinearity changes no shape
    *((cell, (*MASKS, "clip_norm"), torch.float64) for cell in ("lstm", "gru", "rnn_tanh")),
    ("lstm", ("layer_norm", "projection", "flags", "clip_norm"), torch.float32),
    ("gru", ("layer_norm",), torch.float32),
    ("lstm", ("projection",), torch.bfloat16),
    ("gru", ("flags",), torch.bfloat16),
]


@every_backend
@pytest.mark.parametrize(
    "cell, features, dtype", OP_CASES, ids=lambda v: "-".join(v) if isinstance(v, tuple) else str(v)
)
def test_opcheck_of_the_raw_ops(cell, features, dtype, backend):
    """Schema, fake tensors with static and dynamic shapes, aliasing: torch.library's own examination."""
    # The ops have no autograd of their own (scan.py has it), so the gradient part of the examination is left out.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    bias, clipped = "layer_norm" not in features, "clip_norm" in features
    inputs = random_inputs(cell, features, sizes=(T, B, H), dtype=dtype, bias=bias)
    walk = Walk(cell, False, backend, clip_value=0.5 if clipped else None)
    for save, dynamic in ((True, True), (False, not features)):
        checks = (*tests, "test_aot_dispatch_dynamic") if dynamic else tests
        torch.library.opcheck(torch.ops.fastrnn.scan_forward.default, (*inputs, *walk, save), test_utils=checks)
    kept = kept_of(ScanOutputs(*torch.ops.fastrnn.scan_forward(*inputs, *walk, True)))
    incoming = IncomingGradients(dy=torch.ones_like(kept.y))
    if clipped and kept.c is not None:
        incoming = incoming._replace(dc=torch.ones_like(kept.c))
    arguments = (*incoming, *kept, *inputs._replace(gx=None), *walk, clipped)
    torch.library.opcheck(
        torch.ops.fastrnn.scan_backward.default, arguments, test_utils=(*tests, "test_aot_dispatch_dynamic")
    )


@needs_cpu_library
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layer_norm_takes_no_pass_over_the_gates_beside_the_scan(cell):
    """The backward of the scan calls the same ops on tensors as large as the gates, with layer norm and without."""
    steps, G = 300, len(CELLS[cell].gates)

    class Large(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if any(torch.is_tensor(x) and x.numel() >= steps * B * G * H for x in (*args, *tree_leaves(found))):
                self.ops.append(str(function))
            return found

    def ops(norm):
        features = ("layer_norm",) if norm else ()
        inputs = random_inputs(cell, features, sizes=(steps, B, H), bias=False)
        leaves = ScanInputs(*(x if x is None else x.requires_grad_() for x in inputs))
        y = scan(leaves, Walk(cell, False, "cpu")).y
        with Large() as large:
            y.sum().backward()
        return large.ops

    plain, normed = ops(False), ops(True)
    assert plain.count("fastrnn.scan_backward.default") == 1
    assert normed == plain
