"""Options of the single-step cells that torch.nn lacks: a step is one of the layer with the same settings."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from setups import DOUBLE, H, I, agree, every_backend, flat, random

import fastrnn

B = 3
CASES = {
    "LSTM-heads": ("LSTM", {"num_heads": 5}),
    "LSTM-activations": ("LSTM", {"activation": F.silu, "gate_activation": "hardsigmoid"}),
    "LSTM-heads-norm": ("LSTM", {"num_heads": 5, "layer_norm": True}),
    "GRU-heads": ("GRU", {"num_heads": 5, "bias": False}),
    "GRU-activations": ("GRU", {"activation": "softsign", "num_heads": 5}),
    "RNN-function": ("RNN", {"nonlinearity": F.silu, "num_heads": 5}),
    "RNN-leak": ("RNN", {"nonlinearity": "relu", "leak": 0.25}),
    "RNN-learnt-leak": ("RNN", {"leak": 0.25, "learn_leak": True, "num_heads": 5}),
}
every_case = pytest.mark.parametrize("case", CASES)


def built(case, backend=None):
    """A cell and the layer with its weights, both in float64."""
    kind, settings = CASES[case]
    torch.manual_seed(0)
    cell = getattr(fastrnn, f"{kind}Cell")(I, H, dtype=torch.float64, backend=backend, **settings)
    layer = getattr(fastrnn, kind)(I, H, dtype=torch.float64, backend=backend, **settings)
    with torch.no_grad():
        for name, p in cell.named_parameters():
            if name == "leaks":
                p.copy_(torch.linspace(0.1, 0.9, H))
            layer.get_parameter("leak_l0" if name == "leaks" else f"{name}_l0").copy_(p)
    return cell, layer


def gradients(state, leaves):
    weights = [torch.linspace(0.5, 1.5, s.numel(), dtype=s.dtype).reshape(s.shape) for s in state]
    return torch.autograd.grad(state, leaves, weights)


@every_backend
@every_case
def test_a_step_is_the_layers(case, backend):
    cell, layer = built(case, backend)
    x = random(B, I)
    hx = tuple(random(B, H, seed=k) for k in (2, 3))
    hx = hx if CASES[case][0] == "LSTM" else hx[0]
    assert len(list(cell.parameters())) == len(list(layer.parameters()))
    for given in (None, hx):
        state = flat(cell(x, given))
        one = None if given is None else tuple(h[None] for h in flat(given))
        final = layer(x[None], one if one is None or len(one) > 1 else one[0])[1]
        want = tuple(s[0] for s in flat(final))
        agree(state, want)
        leaves = (x, *flat(given))
        agree(gradients(state, (*leaves, *cell.parameters())), gradients(want, (*leaves, *layer.parameters())))
    agree(flat(cell(x[0])), [s[0] for s in flat(cell(x))])


def test_the_loop_of_a_leaky_cell():
    """By the equations: neither the layer nor its backends."""
    cell, _ = built("RNN-leak")
    x, h = random(B, I), random(B, H, seed=2)
    new = F.relu(F.linear(x, cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh))
    torch.testing.assert_close(cell(x, h), 0.75 * h + 0.25 * new, **DOUBLE)


@every_case
def test_copies_repr_and_state(case):
    cell, _ = built(case)
    x = random(B, I)
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        agree(flat(twin(x)), flat(cell(x)))
        assert repr(twin) == repr(cell)
    for name, value in CASES[case][1].items():
        assert f"{name}={getattr(value, '__name__', value)}" in repr(cell)
    assert not list(cell.children())
    kind, settings = CASES[case]
    other = getattr(fastrnn, f"{kind}Cell")(I, H, dtype=torch.float64, **settings)
    other.load_state_dict(cell.state_dict(), strict=True)
    agree(flat(other(x)), flat(cell(x)))
    kept = fastrnn.convert(copy.deepcopy(cell), keep_type=True)
    assert isinstance(kept, getattr(torch.nn, f"{kind}Cell"))
    agree(flat(kept(x)), flat(cell(x)))
    with pytest.raises(ValueError, match=rf"torch.nn.{kind}Cell has no"):
        fastrnn.convert(cell, to="torch")


@pytest.mark.parametrize("case", ["LSTM-heads", "GRU-activations", "RNN-learnt-leak"])
def test_transforms_and_compilation(case):
    cell, _ = built(case)
    x, params = random(B, I, requires_grad=False), dict(cell.named_parameters())

    def loss(params, x):
        return sum(s.square().sum() for s in flat(torch.func.functional_call(cell, params, (x,))))

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    each = [torch.func.grad(loss)(params, one) for one in x]
    agree(found, {name: torch.stack([one[name] for one in each]) for name in params})
    if case == "RNN-learnt-leak":
        agree(flat(torch.compile(cell, fullgraph=True, backend="aot_eager")(x)), flat(cell(x)))


def test_first_values():
    torch.manual_seed(0)
    cell = fastrnn.RNNCell(I, 64, num_heads=16, leak=0.25, learn_leak=True)
    assert torch.equal(cell.leaks, torch.full((64,), 0.25))
    assert cell.weight_ih.abs().max() <= 1 / 8 < cell.weight_hh.abs().max() <= 1 / 2
    fastrnn.init.orthogonal_(cell)
    torch.testing.assert_close(cell.weight_hh @ cell.weight_hh.mT, torch.eye(4).expand(16, 4, 4))
    fastrnn.init.chrono_(fastrnn.LSTMCell(I, H, activation="relu"), 10)


def test_refusals():
    with pytest.raises(ValueError, match="divisible by num_heads, got 5 and 2"):
        fastrnn.GRUCell(I, H, num_heads=2)
    with pytest.raises(TypeError, match="num_heads should be of type int"):
        fastrnn.GRUCell(I, H, num_heads=1.0)
    with pytest.raises(ValueError, match="Unknown gate_activation 'step'"):
        fastrnn.LSTMCell(I, H, gate_activation="step")
    with pytest.raises(ValueError, match="Unknown activation 3"):
        fastrnn.GRUCell(I, H, activation=3)
    with pytest.raises(ValueError, match=r"layer_norm is for the LSTMCell with torch\.nn's activations"):
        fastrnn.LSTMCell(I, H, activation="relu", layer_norm=True)
    with pytest.raises(ValueError, match=r"leak should be a number in range \(0, 1\], got 2"):
        fastrnn.RNNCell(I, H, leak=2)
    with pytest.raises(ValueError, match="learn_leak needs a first value"):
        fastrnn.RNNCell(I, H, learn_leak=True)
    with pytest.raises(TypeError, match="leak"):
        fastrnn.GRUCell(I, H, leak=0.5)
    heads, leaky = (
        (fastrnn.GRUCell(I, H, num_heads=5), "heads"),
        (fastrnn.RNNCell(I, H, leak=0.5), "torch has no leaky"),
    )
    for cell, lacking in (heads, leaky):
        cell.backend = "aten"
        with pytest.raises(RuntimeError, match=f"cannot run this call: .*{lacking}"):
            cell(torch.zeros(B, I))
