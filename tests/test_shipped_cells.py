"""The cells of fastrnn.cells against loops that are written here from the papers, in float64: outputs and gradients."""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastrnn
from fastrnn import cells

T, B, I, H = 6, 3, 2, 4


def peephole_lstm(a, s, p, k):
    (_, c), (a_i, a_f, a_g, a_o) = s, a
    i = 1 / (1 + torch.exp(-(a_i + p["p_i"] * c)))
    f = 1 / (1 + torch.exp(-(a_f + p["p_f"] * c)))
    c = f * c + i * torch.tanh(a_g)
    o = 1 / (1 + torch.exp(-(a_o + p["p_o"] * c)))
    return o * torch.tanh(c), c


def coupled_lstm(a, s, p, k):
    f, g, o = a
    f = f.sigmoid()
    c = torch.lerp(g.tanh(), s[1], f)
    return o.sigmoid() * c.tanh(), c


def leaky_rnn(a, s, p, k):
    drive = a[0] + k["noise"]
    v = s[1] + p["alpha"] * (drive - s[1])  # Euler's step, a = dt / tau
    return v.clamp(min=0), v


def li_gru(a, s, p, k):
    z = a[0].sigmoid()
    return (z * s[0] + (1 - z) * F.relu(a[1]),)


def ind_rnn(a, s, p, k):
    return (F.relu(a[0] + p["w"] * s[0]),)


def janet(a, s, p, k):
    f, g = a
    return (f.sigmoid() * s[0] + g.tanh() / (1 + torch.exp(f - 1)),)  # 1 - sigmoid(f - 1)


def min_gru(a, s, p, k):
    return (torch.lerp(s[0], a[1], a[0].sigmoid()),)


def min_lstm(a, s, p, k):
    f, i, n = a
    ratio = 1 / (1 + i.sigmoid() / f.sigmoid())
    return (ratio * s[0] + (1 - ratio) * n,)


def slstm(a, s, p, k):
    """Without a stabiliser: exp(i) and sigmoid(f) as they are in the paper's eq. 8 to 10. m is not compared."""
    (_, c, n, m), (i, f, z, o) = s, a
    c = f.sigmoid() * c + i.exp() * z.tanh()
    n = f.sigmoid() * n + i.exp()
    return o.sigmoid() * c / n, c, n, m


def ea_lstm(a, s, p, k):
    f, g, o = a
    c = f.sigmoid() * s[1] + k["static"].sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


LOOPS = {f.__name__: f for f in (
    peephole_lstm, coupled_lstm, leaky_rnn, li_gru, ind_rnn, janet, min_gru, min_lstm, slstm, ea_lstm,
)}  # fmt: skip
STABILISED = "slstm"


def test_every_shipped_cell_has_a_loop_and_a_paper():
    shipped = {name for name in cells.__all__ if name != "leaky"}
    assert shipped == set(LOOPS) and all(isinstance(getattr(cells, n), type(cells.janet)) for n in shipped)
    for name in shipped - {"leaky_rnn"}:
        text = inspect.getdoc(getattr(cells, name))
        assert any(str(year) in text for year in range(1990, 2026)) and "'" in text, name
    assert "2016" in cells.leaky.__doc__


def made(name, **settings):
    torch.manual_seed(3)
    module = fastrnn.Recurrent(getattr(cells, name), I, H, dtype=torch.float64, backend="reference", **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def loop(module, step, x, states, given, lengths):
    """y, states of one layer that walks forward."""
    params, cell = {n.removesuffix("_l0"): p for n, p in module.named_parameters()}, module.cell
    ys = []
    for t in range(T):
        a = x[t] @ params["weight_ih"].t() + params["bias_ih"]
        if cell.recurrent:
            a = a + states[0] @ params["weight_hh"].t() + params["bias_hh"]
        k = {n: v[t] if v.dim() == 3 else v for n, v in given.items()}
        new = step(a.chunk(len(cell.gates), -1), states, params, k)
        runs = (t < lengths)[:, None]
        states = [torch.where(runs, n, s) for n, s in zip(new, states, strict=True)]
        ys.append(torch.where(runs, states[0], 0.0))
    return torch.stack(ys), states


@pytest.mark.parametrize("name", LOOPS)
def test_outputs_and_gradients_are_those_of_the_loop(name):
    module = made(name)
    cell = module.cell
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, lengths = randn(T, B, I), torch.tensor([T, 2, 5])
    given = {n: randn(B, H) if n == "static" else randn(T, B, H) for n in cell.inputs}
    if name == STABILISED:  # c and n are scaled by exp(-m) there, so that only the zero state is the same
        hx, states = None, [torch.zeros(B, H, dtype=torch.float64) for _ in cell.states]
    else:
        states = [randn(B, H) for _ in cell.states]
        hx = tuple(s[None] for s in states)
        hx = hx if len(hx) > 1 else hx[0]
    y, final = module(x, hx, lengths=lengths, **given)
    want_y, want = loop(module, LOOPS[name], x, states, given, lengths)
    final = final if isinstance(final, tuple) else (final,)
    torch.testing.assert_close(y, want_y)
    compared = [(y, want_y)]
    if name != STABILISED:
        compared += [(f[0], s) for f, s in zip(final, want, strict=True)]
    else:
        torch.testing.assert_close(final[1][0] / final[2][0], want[1] / want[2])
    weights = [torch.randn_like(w) for _, w in compared]
    leaves = {"x": x, **dict(module.named_parameters()), **given}
    if name != STABILISED:
        leaves |= {f"{n}0": s for n, s in zip(cell.states, states, strict=True)}
    got, expected = (
        torch.autograd.grad([pair[k] for pair in compared], list(leaves.values()), weights) for k in range(2)
    )
    for leaf, a, b in zip(leaves, got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=leaf: f"{n}: {m}")


@pytest.mark.parametrize("name", LOOPS)
def test_a_stack_of_a_shipped_cell_trains_and_is_pickled(name):
    module = made(name, num_layers=2, bidirectional=True).float()
    given = {n: torch.randn(B, H) for n in module.cell.inputs}
    module(torch.randn(T, B, I), **given)[0].square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in module.parameters())
    twin = pickle.loads(pickle.dumps(module))
    assert twin.cell is getattr(cells, name) is copy.deepcopy(module).cell


def test_the_stabiliser_holds_large_and_small_gates():
    """exp(i) overflows float32 above 88 and underflows below -103; the ratio c / n is fine."""
    module = fastrnn.Recurrent(cells.slstm, 1, 1, bias=False, backend="reference")
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_ih_l0.copy_(torch.tensor([[1.0], [0.0], [0.5], [0.0]]))
    for scale in (300.0, -300.0):
        x = torch.full((4, 1, 1), scale, requires_grad=True)
        y, _ = module(x)
        assert y.isfinite().all()
        torch.testing.assert_close(y, torch.full_like(y, 0.5 * math.copysign(1, scale)))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.isfinite().all()


def test_the_leaky_network_has_variants():
    x, noise = torch.randn(T, B, I), torch.randn(T, B, H)
    fixed = fastrnn.Recurrent(cells.leaky(0.1, learnable=False, noise=False, activation=torch.tanh), I, H)
    assert "alpha_l0" not in fixed.state_dict()
    learnt = fastrnn.Recurrent(cells.leaky(0.1, activation=torch.tanh), I, H)
    learnt.load_state_dict({**fixed.state_dict(), "alpha_l0": learnt.alpha_l0})
    assert bool((learnt.alpha_l0 == 0.1).all())
    torch.testing.assert_close(fixed(x)[0], learnt(x, noise=torch.zeros(B, H))[0])
    assert not torch.allclose(fixed(x)[0], learnt(x, noise=noise)[0])
    noisy = fastrnn.Recurrent(cells.leaky(0.1, learnable=False, activation=torch.tanh), I, H)
    noisy.load_state_dict(fixed.state_dict())
    torch.testing.assert_close(noisy(x, noise=noise)[0], learnt(x, noise=noise)[0])
