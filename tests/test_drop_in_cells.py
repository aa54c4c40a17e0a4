"""Single-step cells in place of torch.nn's: numbers, operations, transforms, parameters."""

import pickle

import pytest
import torch
from setups import H, I, agree, every_choice, flat, random
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn

T, B = 5, 3

CELLS = {
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
    "RNNCell-tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "RNNCell-relu": ("RNNCell", {"nonlinearity": "relu"}),
}


def cell_pair(kind, backend, **settings):
    name, extra = CELLS[kind]
    theirs = getattr(nn, name)(I, H, dtype=torch.float64, **extra, **settings)
    ours = getattr(fastrnn, name)(I, H, dtype=torch.float64, **extra, **settings, backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@every_choice
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias, batched, backend):
    theirs, ours = cell_pair(kind, backend, bias=bias)
    shape = (B,) if batched else ()
    x, h, c = random(*shape, I), random(*shape, H, seed=1), random(*shape, H, seed=2)

    def found(cell, hx):
        out = cell(x, hx)
        values = flat(out)
        leaves = (x, *flat(hx), *cell.parameters())
        loss = sum((k + 1) * (v * torch.linspace(1, 2, H, dtype=v.dtype)).sum() for k, v in enumerate(values))
        return dict(enumerate((*values, *torch.autograd.grad(loss, leaves))))

    assert type(theirs(x)) is type(ours(x))
    for hx in (None, (h, c) if kind == "LSTMCell" else h):
        agree(found(theirs, hx), found(ours, hx))


@pytest.mark.parametrize("kind", CELLS)
def test_a_cells_step_is_torch_nns_operation_by_operation(kind):
    """torch's kernel for whole sequences first prepares the weights, which does not pay for a single step."""

    class Called(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.ops.append(str(function))
            return function(*args, **(kwargs or {}))

    def found(cell):
        x, h, c = (random(B, width, seed=k).float().detach() for k, width in enumerate((I, H, H)))
        with Called() as called:
            y = flat(cell(x, (h, c) if kind == "LSTMCell" else h))
            gradients = torch.autograd.grad(sum(v.sum() for v in y), list(cell.parameters()))
        return called.ops, (*y, *gradients)

    theirs, ours = cell_pair(kind, None)
    (expected_ops, expected), (ops, got) = found(theirs.float()), found(ours.float())
    assert ops == expected_ops
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_choice
@pytest.mark.parametrize("kind", CELLS)
def test_cells_under_transforms_and_compilation(kind, backend):
    theirs, ours = cell_pair(kind, backend)
    x, h, c = random(B, I), random(B, H, seed=1), random(B, H, seed=2)

    def gradient(cell):
        def loss(params, x, h, c):
            y = functional_call(cell, params, (x, (h, c) if kind == "LSTMCell" else h))
            return sum(v.square().sum() for v in flat(y))

        return torch.func.grad(loss, argnums=(0, 1, 2))

    def second(cell):
        params = dict(cell.named_parameters())
        first = gradient(cell)(params, x, h, c)
        penalty = sum(g.square().sum() for g in (*first[0].values(), *first[1:]))
        return dict(enumerate(torch.autograd.grad(penalty, (x, h, *cell.parameters()))))

    agree(second(theirs), second(ours))
    params = {name: p.detach() for name, p in theirs.named_parameters()}
    samples = x.detach(), h.detach(), c.detach()
    per_sample = torch.func.vmap(gradient(ours), in_dims=(None, 0, 0, 0))(params, *samples)
    each = [gradient(theirs)(params, *(s[b] for s in samples)) for b in range(B)]
    agree({n: torch.stack([e[0][n] for e in each]) for n in params}, per_sample[0])
    torch._dynamo.reset()  # it counts the compilations of a forward over all modules
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    hx = (h, c) if kind == "LSTMCell" else h
    agree(*(dict(enumerate(flat(cell(x, hx)))) for cell in (theirs, compiled)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_parameters_repr_and_positional_arguments(kind, bias):
    name, extra = CELLS[kind]
    args = (I, H, bias, *extra.values(), "cpu", torch.float64)
    torch.manual_seed(0)
    theirs = getattr(nn, name)(*args)
    torch.manual_seed(0)
    ours = getattr(fastrnn, name)(*args)
    expected, got = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert list(got) == list(expected) and all(torch.equal(got[k], expected[k]) for k in got)
    assert repr(ours) == repr(theirs)
    assert ours.bias_ih is None if not bias else ours.bias_ih.dtype == torch.float64
    assert torch.equal(pickle.loads(pickle.dumps(ours))(random(B, I))[0], ours(random(B, I))[0])
