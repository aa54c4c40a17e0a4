"""The kinds of layer norm, decay and masks for each gate under half types, vmap, compile and export."""

import pytest
import torch
from setups import H, I, mostly_slow, needs_cpu_library

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


def setup(kind, dtype=torch.float32):
    torch.manual_seed(0)
    module = fastrnn.LSTM(I, H, **KINDS[kind], dtype=dtype, backend="cpu")
    call = {"decay": torch.rand(T, B, dtype=dtype)} if kind == "decay" else {}
    return module, torch.randn(T, B, I, dtype=dtype), call


def run(module, x, call):
    torch.manual_seed(5)
    return module(x, **call)[0]


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(kind, dtype):
    module, x, call = setup(kind, dtype)
    y = run(module, x, call)
    grads = torch.autograd.grad(y.float().square().sum(), module.parameters())
    assert y.dtype == dtype and all(g.dtype == dtype and g.isfinite().all() for g in grads)
    # The masks keep an element or not, in every dtype by the same numbers of the generator.
    if kind != "masks":
        wide = run(module.float(), x.float(), {k: v.float() for k, v in call.items()})
        torch.testing.assert_close(y.float(), wide, rtol=0.05, atol=0.05)


@every_kind
def test_vmap_of_the_gradient(kind):
    module, x, call = setup(kind)
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


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "masks"))
def test_compile_and_export(kind):
    module, x, call = setup(kind)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    want, found = run(module, x, call), run(compiled, x, call)
    torch.testing.assert_close(found, want)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), module.parameters()) for y in (found, want)), strict=True):
        torch.testing.assert_close(ours, theirs)
    module.eval()
    exported = torch.export.export(module, (x,), call).module()
    torch.testing.assert_close(run(exported, x, call), run(module, x, call))
