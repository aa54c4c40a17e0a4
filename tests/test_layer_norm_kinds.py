"""The kinds of layer norm against a loop over the steps that autograd differentiates."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from setups import H, I, every_backend, initial, loss_of, needs_cpu_library, random
from torch import nn

import fastrnn
from fastrnn.backend_table import FEATURES
from fastrnn.backends import triton
from fastrnn.dispatch import BACKENDS, MODES, Request

T, B = 4, 3
KINDS = {"LSTM": {}, "GRU": {}, "RNN": {}}


def norm(v, weight, bias, eps):
    return F.layer_norm(v, v.shape[-1:], weight, bias, eps)


def step(module, x, h, c):
    """One step of the first layer: the new h and c."""
    p, eps = dict(module.named_parameters()), module.layer_norm_eps
    gx, gh = x @ p["weight_ih_l0"].T, h @ p["weight_hh_l0"].T
    if module.layer_norm is True:
        gx, gh = norm(gx, p["ln_ih_l0"], p["bias_ih_l0"], eps), norm(gh, p["ln_hh_l0"], p["bias_hh_l0"], eps)
    else:
        weight, bias = p["ln_hh_l0"], p["bias_ih_l0"] + p["bias_hh_l0"]
        parts = 1 if module.layer_norm == "sum" else len(weight) // H
        each = zip(*(v.chunk(parts, -1) for v in (gx + gh, weight, bias)), strict=True)
        gx, gh = torch.zeros_like(gx), torch.cat([norm(v, w, b, eps) for v, w, b in each], -1)
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
    return o.sigmoid() * normal.tanh(), normal if module.layer_norm_cell == "carried" else c


def loop(module, x, hx):
    """y and the last states."""
    h, c = hx if isinstance(hx, tuple) else (hx, None)
    h, c, ys = h[0], None if c is None else c[0], []
    for one in x:
        h, c = step(module, one, h, c)
        ys.append(h)
    return (torch.stack(ys), h) if c is None else (torch.stack(ys), h, c)


def built(kind, backend=None, layer_norm=True, **settings):
    torch.manual_seed(0)
    module = getattr(fastrnn, kind)(I, H, layer_norm=layer_norm, dtype=torch.float64, backend=backend, **settings)
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


@every_backend
def test_a_carried_norm_of_c(backend):
    agree(built("LSTM", backend, layer_norm_cell="carried", layer_norm_eps=1e-3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_norm", ["sum", "gates"])
@every_backend
def test_a_norm_of_the_sum(backend, layer_norm, kind):
    module = built(kind, backend, layer_norm, layer_norm_eps=1e-3)
    assert next(n for n in module.state_dict() if n.startswith("ln_")) == "ln_hh_l0"
    agree(module)


@pytest.mark.parametrize(("layer_norm", "cell"), [("sum", "carried"), ("gates", None)])
@every_backend
def test_kinds_together(backend, layer_norm, cell):
    agree(built("LSTM", backend, layer_norm, layer_norm_cell=cell))


OTHERS = [dict(layer_norm="sum", layer_norm_cell="carried"), dict(layer_norm="gates", layer_norm_cell="carried")]


@pytest.mark.parametrize("settings", OTHERS, ids=["sum", "gates"])
def test_second_derivatives(settings):
    module = built("LSTM", "reference", **settings)
    x, hx = random(2, 2, I), initial(module, 2)
    names = [n for n, _ in module.named_parameters()]

    def run(x, h, c, *weights):
        y, states = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x, (h, c)))
        return y, *states

    leaves = (x, *hx, *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("settings", OTHERS, ids=["sum", "gates"])
@pytest.mark.parametrize("extras", [
    dict(zoneout=0.3), dict(zoneout=0.3, proj_size=3), dict(clip_state_grad_norm=0.5, proj_size=3),
    dict(clip_state_grad_value=0.05), dict(bidirectional=True, num_layers=2),
], ids=["zoneout", "zoneout-projection", "clip-projection", "clip-value", "network"])  # fmt: skip
@needs_cpu_library
def test_backends_agree_with_other_options(extras, settings):
    x, lengths, found = random(T, B, I), torch.tensor([4, 2, 0]), []
    reset_mask = torch.zeros(T, B, dtype=torch.bool)
    reset_mask[2, 0] = True
    for backend in ("reference", "cpu"):
        module = built("LSTM", backend, **settings, **extras).eval()
        tap_rows = module.num_layers * (1 + module.bidirectional)
        tap = torch.zeros(tap_rows, 2, 2, T, B, dtype=torch.float64, requires_grad=True)
        y, states = module(x, lengths=lengths, reset_mask=reset_mask, tap=tap)
        loss = (y * torch.arange(1.0, y.numel() + 1).view_as(y)).sum() + sum(s.pow(2).sum() for s in states)
        found.append([y, *states, *torch.autograd.grad(loss, [x, tap, *module.parameters()])])
    torch.testing.assert_close(*found)
    assert all(bool(g.isfinite().all()) for g in found[0])


@pytest.mark.parametrize("settings", OTHERS, ids=["sum", "gates"])
def test_the_zoned_and_projected_are_derivatives(settings):
    module = built("LSTM", "reference", zoneout=0.3, proj_size=3, **settings).eval()
    x, lengths = random(3, 2, I), torch.tensor([3, 2])
    names = [n for n, _ in module.named_parameters()]

    def run(x, *weights):
        given = dict(zip(names, weights, strict=True))
        y, states = torch.func.functional_call(module, given, (x,), {"lengths": lengths})
        return y, *states

    leaves = (x, *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_mask_for_each_gate(kind, layer_norm):
    module = getattr(fastrnn, kind)(
        I, H, layer_norm=layer_norm, recurrent_dropout=0.5, recurrent_dropout_per_gate=True, dtype=torch.float64,
        backend="reference",
    )  # fmt: skip
    assert "recurrent_dropout_per_gate=True" in repr(module)
    gates, x, h = len(module.bias_hh_l0) // H, random(T, B, I), random(1, B, H, seed=2)
    hx = (h, random(1, B, H, seed=3)) if kind == "LSTM" else h
    names = [n for n, _ in module.named_parameters()]

    def run(x, h, *weights):
        torch.manual_seed(5)
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(module, given, (x, (h, hx[1]) if kind == "LSTM" else h))[0]

    leaves = (x, h, *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x[:2].detach().requires_grad_(), *leaves[1:]), fast_mode=True)
    if not layer_norm:  # the first step by hand
        torch.manual_seed(5)
        masks = F.dropout(torch.ones(B, gates * H, dtype=torch.float64), 0.5)
        assert not torch.equal(masks[:, :H], masks[:, H : 2 * H])
        each = zip(masks.chunk(gates, -1), module.weight_hh_l0.chunk(gates), strict=True)
        gh = torch.cat([(h[0] * mask) @ w.T for mask, w in each], -1) + module.bias_hh_l0
        gx = x[0] @ module.weight_ih_l0.T + module.bias_ih_l0
        if kind == "LSTM":
            i, f, g, o = (gx + gh).chunk(4, -1)
            want = o.sigmoid() * (f.sigmoid() * hx[1][0] + i.sigmoid() * g.tanh()).tanh()
        else:
            (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
            n, z = torch.tanh(xn + torch.sigmoid(xr + hr) * hn), torch.sigmoid(xz + hz)
            want = n + z * (h[0] - n)
        torch.testing.assert_close(run(*leaves)[0], want)


@pytest.mark.skipif(not triton.INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("features", [
    ("layer_norm", "layer_norm_sum"), ("layer_norm", "layer_norm_gates", "layer_norm_carried"),
    ("recurrent_dropout", "recurrent_dropout_per_gate"), ("decay",),
], ids=lambda features: features[-1])  # fmt: skip
def test_which_backends_take_them(features):
    request = Request("lstm", "cuda", torch.float32, 8, features=frozenset(features), batch=2)
    assert {*features} <= {*FEATURES}
    assert BACKENDS["triton"].reason(request) is None and MODES["triton:gemm"].reason(request) is None
    for mode in ("local", "stepwise"):
        assert MODES[f"triton:{mode}"].reason(request).startswith("it has no ")
    assert features[0] in BACKENDS["cuda"].reason(request) or "built" in BACKENDS["cuda"].reason(request)


@pytest.mark.parametrize(
    "settings",
    [dict(layer_norm_eps=0.3), dict(layer_norm_cell=None), *OTHERS],
    ids=["eps", "no-cell", "sum", "gates"],
)
@every_backend
def test_every_way_to_run_a_kind(backend, settings):
    module = built("LSTM", backend, **settings)
    x, hx = random(T, B, I), initial(module, B)
    want = module(x, hx)
    params = dict(module.named_parameters())
    torch.testing.assert_close(fastrnn.functional.lstm(x, hx, params, backend=backend, **settings), want)
    cell = fastrnn.LSTMCell(I, H, **{"layer_norm": True, **settings}, dtype=torch.float64, backend=backend)
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
    (dict(layer_norm="all"), "layer_norm should be"),
])  # fmt: skip
def test_refusals(kind, settings, reason):
    with pytest.raises(ValueError, match=reason):
        getattr(fastrnn, kind)(I, H, **{"layer_norm": True, **settings})


@pytest.mark.parametrize("build", [
    lambda **settings: fastrnn.Recurrent(fastrnn.cells.peephole_lstm, I, H, **settings),
    lambda **settings: fastrnn.RNN(I, H, leak=0.3, learn_leak=True, **settings),
    lambda **settings: fastrnn.GRU(I, H, activation="softsign", **settings),
], ids=["peephole", "leak", "activation"])  # fmt: skip
@needs_cpu_library
def test_a_sum_in_other_cells(build):
    x, found = random(T, B, I), []
    lengths = torch.tensor([4, 2, 0])
    for backend in ("reference", "cpu"):
        torch.manual_seed(0)
        module = build(layer_norm="gates", bidirectional=True, dtype=torch.float64, backend=backend)
        y = module(x, lengths=lengths)[0]
        found.append([y, *torch.autograd.grad(loss_of([y]), [x, *module.parameters()])])
    torch.testing.assert_close(*found)


def test_the_sum_needs_both_products():
    with pytest.raises(ValueError, match="layer_norm='sum' is of W_ih x \\+ W_hh h, and min_gru has no W_hh"):
        fastrnn.Recurrent(fastrnn.cells.min_gru, I, H, layer_norm="sum")
    with pytest.raises(TypeError, match="layer_norm should be of type bool"):
        fastrnn.LSTM(I, H, layer_norm=1)


@pytest.mark.parametrize("kind", ["GRU", "RNN", "GRUCell"])
def test_only_an_lstm_has_a_cell_state_to_normalise(kind):
    with pytest.raises(ValueError, match="layer_norm_cell is for the LSTM"):
        getattr(fastrnn, kind)(I, H, layer_norm=True, layer_norm_cell=None)
