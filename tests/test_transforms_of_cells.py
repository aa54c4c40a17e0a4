"""What transforms programs reaches the single-step cells as it reaches the modules, at the smallest sizes, too."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_leaves

import fastrnn

KINDS = ("LSTMCell", "GRUCell", "RNNCell")
SIZES = [(1, 1, 1), (3, 4, 5)]  # B, I, H
EXTRAS = [{}, {"layer_norm": True}]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
with_extras = pytest.mark.parametrize("extras", EXTRAS, ids=["plain", "layer_norm"])
with_and_without_gradients = pytest.mark.parametrize("gradients", [True, False])
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # float64 keeps 16 digits


def cell(kind, sizes, **extras):
    torch.manual_seed(0)
    B, I, H = sizes
    module, x, h = getattr(fastrnn, kind)(I, H, dtype=torch.float64, **extras), torch.randn(B, I), torch.randn(B, H)
    x, h = x.double(), h.double()
    return module, x, (h, h.clone()) if kind == "LSTMCell" else h


def first(result):
    return tree_leaves(result)[0]


def close(got, want):
    torch.testing.assert_close(got, want, **CLOSE)


@with_extras
@with_and_without_gradients
@every_size
@every_kind
def test_vmap(kind, sizes, gradients, extras):
    module, x, hx = cell(kind, sizes, **extras)
    xs = torch.stack([x, 2 * x])
    with torch.set_grad_enabled(gradients):
        close(first(vmap(lambda x: module(x, hx))(xs)), torch.stack([first(module(x, hx)) for x in xs]))
        close(first(vmap(module)(x)), torch.stack([first(module(row)) for row in x]))


@with_extras
@every_size
@every_kind
def test_functional_gradients(kind, sizes, extras):
    module, x, hx = cell(kind, sizes, **extras)
    params = dict(module.named_parameters())

    def loss(params, x):
        return first(functional_call(module, params, (x, hx))).square().sum()

    want = torch.autograd.grad(loss(params, x), list(params.values()))
    close(list(grad(loss)(params, x).values()), list(want))
    each = vmap(grad(loss), in_dims=(None, 0))(params, torch.stack([x, 2 * x]))
    close([g[0] for g in each.values()], list(want))


@every_size
@every_kind
def test_forward_mode_of_a_plain_cell(kind, sizes):
    module, x, hx = cell(kind, sizes)
    value, tangent = jvp(lambda x: first(module(x, hx)), (x,), (torch.ones_like(x),))
    close(value, first(module(x, hx)))
    step = 1e-6
    difference = (first(module(x + step, hx)) - first(module(x - step, hx))) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=0, atol=1e-8)  # the difference's own error, and 1e-16 / step


# A layer norm takes seconds to compile: at the smallest sizes without gradients, at the others with them.
@pytest.mark.parametrize(
    "extras, sizes, gradients",
    [
        *(({}, sizes, gradients) for sizes in SIZES for gradients in (True, False)),
        *(({"layer_norm": True}, sizes, sizes != SIZES[0]) for sizes in SIZES),
    ],
    ids=str,
)
@every_kind
def test_compile(kind, sizes, gradients, extras):
    torch._dynamo.reset()
    module, x, hx = cell(kind, sizes, **extras)
    # Without gradients the graph is as dynamo leaves it: what AOTAutograd would make of it is PyTorch's alone.
    backend = "aot_eager" if gradients else "eager"
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    with torch.set_grad_enabled(gradients):
        for k in (1, 2, 3):
            given = x.repeat(k, 1), tuple(s.repeat(k, 1) for s in hx) if isinstance(hx, tuple) else hx.repeat(k, 1)
            got, want = first(compiled(*given)), first(module(*given))
            close(got, want)
            if gradients:
                found = [torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in (got, want)]
                close(*map(list, found))


@with_extras
@with_and_without_gradients
@every_size
@every_kind
def test_export(kind, sizes, gradients, extras):
    module, x, hx = cell(kind, sizes, **extras)
    batch = {0: Dim.AUTO}
    states = (batch, batch) if isinstance(hx, tuple) else batch
    with torch.set_grad_enabled(gradients):
        program = export(module, (x, hx), dynamic_shapes=(batch, states)).module()
    with torch.no_grad():
        close(first(program(x, hx)), first(module(x, hx)))
        if sizes[0] > 1:  # of a batch of one torch.export makes a constant
            twice = x.repeat(2, 1), tuple(s.repeat(2, 1) for s in hx) if isinstance(hx, tuple) else hx.repeat(2, 1)
            close(first(program(*twice)), first(module(*twice)))


@every_kind
def test_torch_nns_cells_are_what_a_plain_one_is_held_to(kind):
    module, x, hx = cell(kind, (3, 4, 5))
    torchs = getattr(nn, kind)(4, 5, dtype=torch.float64)
    torchs.load_state_dict(module.state_dict())
    close(first(vmap(lambda x: module(x, hx))(x[None])), first(torchs(x, hx))[None])
