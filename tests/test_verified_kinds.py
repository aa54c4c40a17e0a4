"""The check before a kernel's first use builds the layer norms and masks that the call's features name."""

import pytest
import torch
from setups import needs_cpu_library

from fastrnn.arguments import Walk
from fastrnn.backends import cpu
from fastrnn.dispatch import Request
from fastrnn.evidence import verification
from fastrnn.tuning.job import Job, build


@pytest.mark.parametrize(("features", "walk", "masks", "options"), [
    (("layer_norm", "layer_norm_gates", "layer_norm_carried"), dict(ln_of="gates", ln_c_carried=True), 0,
     dict(layer_norm="gates", layer_norm_cell="carried")),
    (("layer_norm", "layer_norm_sum"), dict(ln_of="sum"), 0, dict(layer_norm="sum")),
    (("recurrent_dropout", "recurrent_dropout_per_gate"), {}, 4, dict(recurrent_dropout_per_gate=True)),
], ids=lambda value: value[-1] if isinstance(value, tuple) else None)  # fmt: skip
@needs_cpu_library
def test_features(features, walk, masks, options):
    request = Request("lstm", "cpu", torch.float32, 5, features=frozenset(features), batch=2)
    inputs, found = verification.problem(request, 2, False, torch.device("cpu"))
    assert found == Walk("lstm", False, "reference", **walk)
    assert (0 if inputs.recurrent_mask is None else inputs.recurrent_mask.shape[-1] // 5) == masks
    assert verification.check(cpu, request, 2, torch.device("cpu")) is None
    module = build(Job("cpu", "lstm", "float32", 5, 3, 2, True, 1, features=features))
    assert {name: getattr(module, name) for name in options} == options
