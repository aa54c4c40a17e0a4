"""The kinds of layer norm, decay and masks for each gate under half types, vmap, compile and export."""

import pytest
import torch
from setups import H, I, needs_cpu_library

import fastrnn

T, B = 4, 3
pytestmark = needs_cpu_library
KINDS = {
    "sum": dict(layer_norm="sum"),
    "gates-carried": dict(layer_norm="gates", layer_norm_cell="carried"),
    "decay": {},
    "masks": dict(recurrent_dropout=0.5, recurrent_dropout_per_gate=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
NETWORKS = {"LSTM-cpu": ("LSTM", "cpu"), "GRU-cpu": ("GRU", "cpu"), "RNN-reference": ("RNN", "reference")}
every_network = pytest.mark.parametrize("network", NETWORKS)


def setup(kind, network, dtype=torch.float32):
    torch.manual_seed(0)
    (name, backend), settings = NETWORKS[network], dict(KINDS[kind])
    if name != "LSTM":
        settings.pop("layer_norm_cell", None)  # they have no c
    module = getattr(fastrnn, name)(I, H, **settings, dtype=dtype, backend=backend)
    call = {"decay": torch.rand(T, B, dtype=dtype)} if kind == "decay" else {}
    return module, torch.randn(T, B, I, dtype=dtype), call


def run(module, x, call):
    torch.manual_seed(5)
    return module(x, **call)[0]


@every_kind
@every_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(kind, network, dtype):
    module, x, call = setup(kind, network, dtype)
    y = run(module, x, call)
    grads = torch.autograd.grad(y.float().square().sum(), module.parameters())
    assert y.dtype == dtype and all(g.dtype == dtype and g.isfinite().all() for g in grads)
    # The masks keep an element or not, in every dtype by the same numbers of the generator.
    if kind != "masks":
        wide = run(module.float(), x.float(), {k: v.float() for k, v in call.items()})
        torch.testing.assert_close(y.float(), wide, rtol=0.05, atol=0.05)


@every_kind
@every_network
def test_vmap_of_the_gradient(kind, network):
    module, x, call = setup(kind, network)
    if kind == "masks":
        module.eval()
    params = dict(module.named_parameters())

    def loss(params, x):
        return torch.func.functional_call(module, params, (x,), call)[0].square().sum()

    several = torch.stack([x, 2 * x])
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, several)
    for k, one in enumerate(several):
        want = torch.func.grad(loss)(params, one)
        torch.testing.assert_close({n: g[k] for n, g in found.items()}, want)


# Each kind, and each network.
EACH = [("sum", "GRU-cpu"), ("gates-carried", "LSTM-cpu"), ("decay", "RNN-reference"), ("masks", "LSTM-cpu")]


@pytest.mark.parametrize(("kind", "network"), [
    pytest.param(*each, marks=() if each == ("masks", "LSTM-cpu") else pytest.mark.slow) for each in EACH
])  # fmt: skip
def test_compile_and_export(kind, network):
    module, x, call = setup(kind, network)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    want, found = run(module, x, call), run(compiled, x, call)
    torch.testing.assert_close(found, want)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), module.parameters()) for y in (found, want)), strict=True):
        torch.testing.assert_close(ours, theirs)
    module.eval()
    exported = torch.export.export(module, (x,), call).module()
    torch.testing.assert_close(run(exported, x, call), run(module, x, call))
