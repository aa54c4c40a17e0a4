"""The raw tap against autograd on a hand-written unrolled network, in float64, and over the whole range of float32."""

import pytest
import torch

import fastrnn

T, B, I, H = 9, 3, 4, 5
# float64 on both sides, a few hundred operations in another order: about 1e-13; three digits of room.
RTOL = 1e-10
CELLS = ("lstm", "gru", "tanh", "relu", "leaky_relu", "elu")


def build(cell, **options):
    torch.manual_seed(0)
    if cell in ("lstm", "gru"):
        return getattr(fastrnn, cell.upper())(I, H, dtype=torch.float64, **options)
    return fastrnn.RNN(I, H, nonlinearity=cell, dtype=torch.float64, **options)


def step(cell, gx, gh, state):
    """One step by the book; `gx`, `gh` with their biases."""
    h = state[0]
    if cell == "lstm":
        i, f, g, o = (gx + gh).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return ((1 - z) * n + z * h,)
    nonlinearities = {"tanh": torch.tanh, "relu": torch.relu, "elu": torch.nn.functional.elu}
    return (nonlinearities.get(cell, torch.nn.functional.leaky_relu)(gx + gh),)


def unrolled(cell, module, x, suffix="l0", reverse=False):
    """The outputs, and a function that reads `[2, S, T, B]` norms off the retained gradients after a backward.

    Every state goes on to the next step through a clone, whose gradient is what is carried back.
    """
    w_ih, w_hh, b_ih, b_hh = (
        getattr(module, f"{kind}_{suffix}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    carry = (x.new_zeros(x.shape[1], H),) * (2 if cell == "lstm" else 1)
    states, carries = {}, {}
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        states[t] = step(cell, x[t] @ w_ih.t() + b_ih, carry[0] @ w_hh.t() + b_hh, carry)
        carries[t] = carry = tuple(s.clone() for s in states[t])
        for tensor in (*states[t], *carry):
            tensor.retain_grad()

    def norms():
        def row(tensors):
            zero = torch.zeros(x.shape[1], dtype=x.dtype)
            return torch.stack([zero if s.grad is None else s.grad.norm(dim=-1) for s in tensors])

        total, carried = (torch.stack([row(d[t]) for t in range(len(x))], 1) for d in (states, carries))
        return torch.stack([total, carried])

    return torch.stack([states[t][0] for t in range(len(x))]), norms


def tap_for(module, T=T, B=B, dtype=torch.float64):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    return torch.zeros(rows, 2, 2 if isinstance(module, fastrnn.LSTM) else 1, T, B, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("every_step", [False, True], ids=["last", "every"])
@pytest.mark.parametrize("cell", CELLS)
def test_total_and_carried_are_what_autograd_says(cell, every_step):
    module, x, weight = build(cell), torch.randn(T, B, I).double(), torch.randn(T, B, H).double()
    weight = weight if every_step else weight * (torch.arange(T) == T - 1).view(T, 1, 1)
    expected_y, norms = unrolled(cell, module, x)
    (expected_y * weight).sum().backward()
    tap = tap_for(module)
    y, _ = module(x, tap=tap)
    (y * weight).sum().backward()
    torch.testing.assert_close(y, expected_y, rtol=RTOL, atol=0)
    torch.testing.assert_close(tap.grad[0], norms(), rtol=RTOL, atol=0)


@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh"])
def test_both_directions_are_indexed_by_the_input_step(cell):
    module, x = build(cell, bidirectional=True), torch.randn(T, B, I).double()
    weight = torch.randn(T, B, 2 * H).double()
    forward, forward_norms = unrolled(cell, module, x)
    reverse, reverse_norms = unrolled(cell, module, x, "l0_reverse", reverse=True)
    (torch.cat((forward, reverse), -1) * weight).sum().backward()
    tap = tap_for(module)
    (module(x, tap=tap)[0] * weight).sum().backward()
    torch.testing.assert_close(tap.grad, torch.stack([forward_norms(), reverse_norms()]), rtol=RTOL, atol=0)


def test_what_arrives_through_the_final_states_counts_as_carried():
    module, x = build("lstm"), torch.randn(T, B, I).double()
    tap = tap_for(module)
    _, (h_n, c_n) = module(x, tap=tap)
    dh, dc = torch.randn_like(h_n), torch.randn_like(c_n)
    torch.autograd.backward((h_n, c_n), (dh, dc))
    torch.testing.assert_close(tap.grad[0, 1, :, -1], torch.stack([dh[0].norm(dim=-1), dc[0].norm(dim=-1)]))


def test_padding_is_exactly_zero():
    lengths = torch.tensor([T, 4, 0])
    module, tap = build("lstm"), tap_for(build("lstm"))
    module(torch.randn(T, B, I).double(), lengths=lengths, tap=tap)[0].sum().backward()
    padded = torch.arange(T)[:, None] >= lengths
    assert (tap.grad[..., padded] == 0).all()
    assert (tap.grad[:, 0, :, ~padded] > 0).all()


@pytest.mark.parametrize("exponent", [-30, 0, 30])
@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh"])
def test_the_whole_range_of_float32_is_reported(cell, exponent):
    """A loss scaled by 1e-30 (whose square is zero) or 1e+30 (infinite) scales the norms by the same factor."""
    module, x = build(cell).float(), torch.randn(T, B, I)
    norms = []
    for scale in (1.0, 10.0**exponent):
        tap = tap_for(module, dtype=torch.float32)
        y, _ = module(x, tap=tap)
        y.backward(torch.full_like(y, scale))
        norms.append(tap.grad.double() / scale)
    # float32 arithmetic rounds at 6e-8 a step, over T steps and H terms; no power of two, so digits differ.
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)
    assert (norms[1][0, 0] > 0).all()
