"""The layer norms of other libraries: a step of each, from the files that docs/migrating.md names, against ours."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from setups import random

import fastrnn

T, B, I, H = 4, 2, 3, 5
PAGE = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text()
ORDER_IGFO = (0, 2, 1, 3)  # the rows of our i f g o among their i g f o


def from_page(name):
    """The function of the page that makes our state dict."""
    names = {"torch": torch}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(next(block for block in blocks if f"def {name}(" in block).split("\n\n\nfastrnn.")[0], names)
    return names[name]


def norm(v, weight, bias, eps):
    return F.layer_norm(v, v.shape[-1:], weight, bias, eps)


def drawn(*sizes, seed):
    return random(*sizes, seed=seed).detach()


def run(step, x, *states):
    ys = []
    for one in x:
        states = step(one, *states)
        ys.append(states[0])
    return torch.stack(ys)


def ours(kind, state, x, **settings):
    module = getattr(fastrnn, kind)(x.shape[-1], H, dtype=x.dtype, **settings)
    module.load_state_dict(state, strict=True)
    return module(x)[0]


def lstm(gates, c, normalise=lambda c: c, order=range(4), forget=0.0):
    i, f, g, o = (gates.chunk(4, -1)[k] for k in order)
    c = normalise(torch.sigmoid(f + forget) * c + torch.sigmoid(i) * torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(c), c


def zeros():
    return torch.zeros(B, H, dtype=torch.float64), torch.zeros(B, H, dtype=torch.float64)


def test_torchaudio():
    state = {
        "x2g.weight": drawn(4 * H, I, seed=1), "p2g.weight": drawn(4 * H, H, seed=2),
        "g_norm.weight": drawn(4 * H, seed=3), "g_norm.bias": drawn(4 * H, seed=4),
        "c_norm.weight": drawn(H, seed=5), "c_norm.bias": drawn(H, seed=6),
    }  # fmt: skip
    x2g, p2g, gamma, beta, c_gamma, c_beta = state.values()

    def step(x, h, c):
        gates = norm(x @ x2g.T + h @ p2g.T, gamma, beta, 1e-3)
        return lstm(gates, c, lambda c: norm(c, c_gamma, c_beta, 1e-3))

    x, settings = drawn(T, B, I, seed=7), dict(layer_norm="sum", layer_norm_cell="carried", layer_norm_eps=1e-3)
    got = ours("LSTM", from_page("from_torchaudio")(state), x, **settings)
    torch.testing.assert_close(got, run(step, x, *zeros()))


def test_dreamer():
    kernel, bias = drawn(I + H, 3 * H, seed=1), drawn(3 * H, seed=2)
    gamma, beta = drawn(3 * H, seed=3), drawn(3 * H, seed=4)

    def step(x, h):
        reset, candidate, update = norm(torch.cat([x, h], -1) @ kernel + bias, gamma, beta, 1e-3).chunk(3, -1)
        candidate, update = torch.tanh(torch.sigmoid(reset) * candidate), torch.sigmoid(update - 1)
        return (update * candidate + (1 - update) * h,)

    x = drawn(T, B, I, seed=5)
    state = from_page("from_dreamer")(kernel, bias, gamma, beta, I)
    got = ours("GRU", state, F.pad(x, (0, 1), value=1.0), layer_norm="sum", layer_norm_eps=1e-3)
    torch.testing.assert_close(got, run(step, x, zeros()[0]))


@pytest.mark.parametrize(("library", "cell", "eps"), [
    ("TF-Addons", "carried", 1e-3), ("NeMo", "carried", 1e-5), ("Haste", "inside", 1e-5),
])  # fmt: skip
def test_norms_of_both_products(library, cell, eps):
    """TF-Addons has one bias more, NeMo and Haste other orders of the gates, which the names of weights tell."""
    w_ih, w_hh = drawn(4 * H, I, seed=1), drawn(4 * H, H, seed=2)
    of_x, of_h, of_c = ([drawn(n, seed=k), drawn(n, seed=k + 1)] for n, k in ((4 * H, 3), (4 * H, 5), (H, 7)))

    def step(x, h, c):
        gates = norm(x @ w_ih.T, *of_x, eps) + norm(h @ w_hh.T, *of_h, eps)
        if cell == "carried":
            return lstm(gates, c, lambda c: norm(c, *of_c, eps))
        h, c = lstm(gates, c)
        return torch.sigmoid(gates.chunk(4, -1)[3]) * torch.tanh(norm(c, *of_c, eps)), c

    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "ln_ih", "ln_hh", "ln_c", "ln_c_bias"]
    values = [w_ih, w_hh, of_x[1], of_h[1], of_x[0], of_h[0], *of_c]
    state = {f"{name}_l0": value for name, value in zip(names, values, strict=True)}
    x = drawn(T, B, I, seed=9)
    got = ours("LSTM", state, x, layer_norm=True, layer_norm_cell=cell, layer_norm_eps=eps)
    torch.testing.assert_close(got, run(step, x, *zeros()))


def test_tf_contrib():
    kernel = drawn(I + H, 4 * H, seed=1)
    gammas, betas, c_gamma, c_beta = (drawn(n, seed=k) for k, n in enumerate((4 * H, 4 * H, H, H), 2))

    def step(x, h, c):
        each = zip(*(v.chunk(4, -1) for v in (torch.cat([x, h], -1) @ kernel, gammas, betas)), strict=True)
        gates = torch.cat([norm(v, weight, bias, 1e-12) for v, weight, bias in each], -1)
        return lstm(gates, c, lambda c: norm(c, c_gamma, c_beta, 1e-12), ORDER_IGFO, forget=1.0)

    w, gamma, bias = (
        torch.cat([rows.chunk(4)[k] for k in ORDER_IGFO])
        for rows in (kernel.T, gammas, betas + torch.tensor([0.0, 0, 1, 0]).repeat_interleave(H))
    )
    state = {
        "weight_ih_l0": w[:, :I], "weight_hh_l0": w[:, I:], "bias_ih_l0": bias, "bias_hh_l0": torch.zeros_like(bias),
        "ln_hh_l0": gamma, "ln_c_l0": c_gamma, "ln_c_bias_l0": c_beta,
    }  # fmt: skip
    x, settings = drawn(T, B, I, seed=7), dict(layer_norm="gates", layer_norm_cell="carried", layer_norm_eps=1e-12)
    torch.testing.assert_close(ours("LSTM", state, x, **settings), run(step, x, *zeros()))


def test_haiku():
    w, b = drawn(I + H, 4 * H, seed=1), drawn(4 * H, seed=2)
    x = drawn(T, B, I, seed=3)
    want = run(lambda x, h, c: lstm(torch.cat([x, h], -1) @ w + b, c, order=ORDER_IGFO, forget=1.0), x, *zeros())
    torch.testing.assert_close(ours("LSTM", from_page("from_haiku")(w, b, I), x), want)
