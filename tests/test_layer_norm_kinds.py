"""The kinds of layer norm against a loop over the steps that autograd differentiates."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from setups import H, I, every_backend, initial, random
from torch import nn

import fastrnn

T, B = 4, 3
KINDS = {"LSTM": {}, "GRU": {}, "RNN": {}}


def norm(v, weight, bias, eps):
    return F.layer_norm(v, v.shape[-1:], weight, bias, eps)


def step(module, x, h, c):
    """One step of the first layer: the new h and c."""
    p, eps = dict(module.named_parameters()), module.layer_norm_eps
    gx = norm(x @ p["weight_ih_l0"].T, p["ln_ih_l0"], p["bias_ih_l0"], eps)
    gh = norm(h @ p["weight_hh_l0"].T, p["ln_hh_l0"], p["bias_hh_l0"], eps)
    if isinstance(module, fastrnn.RNN):
        return torch.tanh(gx + gh), None
    if isinstance(module, fastrnn.GRU):
        (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
        n, z = torch.tanh(xn + torch.sigmoid(xr + hr) * hn), torch.sigmoid(xz + hz)
        return n + z * (h - n), None
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    if module.layer_norm_cell is None:
        return o.sigmoid() * c.tanh(), c
    normal = norm(c, p["ln_c_l0"], p["ln_c_bias_l0"], eps)
    return o.sigmoid() * normal.tanh(), c


def loop(module, x, hx):
    """y and the last states."""
    h, c = hx if isinstance(hx, tuple) else (hx, None)
    h, c, ys = h[0], None if c is None else c[0], []
    for one in x:
        h, c = step(module, one, h, c)
        ys.append(h)
    return (torch.stack(ys), h) if c is None else (torch.stack(ys), h, c)


def built(kind, backend=None, **settings):
    torch.manual_seed(0)
    module = getattr(fastrnn, kind)(I, H, layer_norm=True, dtype=torch.float64, backend=backend, **settings)
    for name, p in module.named_parameters():
        if name.startswith("ln_"):
            nn.init.normal_(p, 0.0 if "bias" in name else 1.0, 0.5)
    return module


def tensors(result):
    """y and the last states of a module's result."""
    y, states = result
    return (y, *(s[0] for s in states)) if isinstance(states, tuple) else (y, states[0])


def agree(module):
    """Outputs and gradients are those of the loop."""
    x, hx = random(T, B, I), initial(module, B)
    leaves = [x, *(hx if isinstance(hx, tuple) else (hx,)), *module.parameters()]
    got, want = tensors(module(x, hx)), loop(module, x, hx)
    torch.testing.assert_close(got, want)
    weights = [torch.randn_like(w) for w in want]
    got, want = (torch.autograd.grad(out, leaves, weights) for out in (got, want))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
@every_backend
def test_any_eps(backend, kind):
    agree(built(kind, backend, layer_norm_eps=0.3))


@every_backend
def test_a_cell_state_without_norm(backend):
    module = built("LSTM", backend, layer_norm_cell=None, layer_norm_eps=1e-3)
    assert [n for n in module.state_dict() if n.startswith("ln_")] == ["ln_ih_l0", "ln_hh_l0"]
    agree(module)


@pytest.mark.parametrize("settings", [dict(layer_norm_eps=0.3), dict(layer_norm_cell=None)], ids=["eps", "no-cell"])
@every_backend
def test_every_way_to_run_a_kind(backend, settings):
    module = built("LSTM", backend, **settings)
    x, hx = random(T, B, I), initial(module, B)
    want = module(x, hx)
    params = dict(module.named_parameters())
    torch.testing.assert_close(fastrnn.functional.lstm(x, hx, params, backend=backend, **settings), want)
    cell = fastrnn.LSTMCell(I, H, layer_norm=True, dtype=torch.float64, backend=backend, **settings)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in params.items()})
    state = tuple(s[0] for s in hx)
    for one in x:
        state = cell(one, state)
    torch.testing.assert_close(state, tuple(s[0] for s in want[1]))
    assert next(iter(settings)) in repr(module) and next(iter(settings)) in repr(cell)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fastrnn.convert(module, keep_type=True)):
        torch.testing.assert_close(twin(x, hx), want)


def test_defaults_are_not_shown_and_go_back_to_torch():
    plain = fastrnn.LSTM(I, H)
    assert "norm" not in repr(plain) and "norm" not in repr(fastrnn.LSTMCell(I, H))
    assert type(fastrnn.convert(plain, to="torch")) is nn.LSTM
    with pytest.raises(ValueError, match="has no layer_norm:"):
        fastrnn.convert(built("LSTM", layer_norm_eps=0.3), to="torch")


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize(("settings", "reason"), [
    (dict(layer_norm_eps=0.0), "layer_norm_eps should be a positive"),
    (dict(layer_norm_eps="1"), "layer_norm_eps should be a positive"),
    (dict(layer_norm_eps=None), "layer_norm_eps should be a positive"),
    (dict(layer_norm_cell="outside"), "layer_norm_cell should be"),
    (dict(layer_norm_cell=False), "layer_norm_cell should be"),
])  # fmt: skip
def test_refusals(kind, settings, reason):
    with pytest.raises(ValueError, match=reason):
        getattr(fastrnn, kind)(I, H, layer_norm=True, **settings)


@pytest.mark.parametrize("kind", ["GRU", "RNN", "GRUCell"])
def test_only_an_lstm_has_a_cell_state_to_normalise(kind):
    with pytest.raises(ValueError, match="layer_norm_cell is for the LSTM"):
        getattr(fastrnn, kind)(I, H, layer_norm=True, layer_norm_cell=None)
