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


# --------------------------------------------------------------------------------------------------- closed forms


def linear(alpha, dtype=torch.float64):
    """A ReLU network that stays positive is linear: h_t = alpha h_{t-1} + x_t."""
    module = fastrnn.RNN(H, H, nonlinearity="relu", bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight_hh_l0.copy_(alpha * torch.eye(H, dtype=dtype))
        module.weight_ih_l0.copy_(torch.eye(H))
    return module


def tapped(module, x, loss):
    tap = tap_for(module, len(x), x.shape[1], x.dtype)
    loss(*module(x, tap=tap)).backward()
    return tap.grad[0, :, :, :, 0].double()  # [2, S, T] of the first sample


@pytest.mark.parametrize("alpha", [0.5, 0.9, 1.0, 1.4])
def test_a_linear_network_by_the_last_step(alpha):
    """dL/dh_t = alpha^(T-1-t) dL/dh_{T-1}: all of it carried, but for the last step, where nothing is."""
    total, carried = tapped(linear(alpha), torch.rand(T, B, H).double() + 0.1, lambda y, h: y[-1].sum())[:, 0]
    expected = H**0.5 * alpha ** torch.arange(T - 1, -1, -1).double()
    torch.testing.assert_close(total, expected, rtol=RTOL, atol=0)
    torch.testing.assert_close(carried[:-1], expected[:-1], rtol=RTOL, atol=0)
    assert carried[-1] == 0


@pytest.mark.parametrize("alpha", [0.5, 0.9, 1.0, 1.4])
def test_a_linear_network_by_every_step(alpha):
    """dL/dh_t = (1 + alpha + .. + alpha^(T-1-t)) dL/dy; carried is alpha times the next total."""
    total, carried = tapped(linear(alpha), torch.rand(T, B, H).double() + 0.1, lambda y, h: y.sum())[:, 0]
    sums = torch.stack([sum(alpha**k for k in range(T - t)) * torch.ones(()).double() for t in range(T)])
    torch.testing.assert_close(total, H**0.5 * sums, rtol=RTOL, atol=0)
    torch.testing.assert_close(carried[:-1], alpha * total[1:], rtol=RTOL, atol=0)


def gate_bias(module, gate, value):
    """Closes everything but one bias: W_hh = 0 and the gate hears no input."""
    k = {"lstm": "ifgo", "gru": "rzn"}[module._cell].index(gate)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_ih_l0[k * H : (k + 1) * H] = 0
        module.bias_ih_l0[k * H : (k + 1) * H] = value
        module.bias_hh_l0[k * H : (k + 1) * H] = 0


@pytest.mark.parametrize("bias", [-2.0, 0.0, 1.0, 4.0])
def test_an_lstm_without_w_hh_keeps_the_forget_gate_of_c(bias):
    """dL/dc_{t-1} = sigmoid(b_f) dL/dc_t, and nothing goes through h."""
    module = build("lstm")
    gate_bias(module, "f", bias)
    (total_h, total_c), (carried_h, carried_c) = tapped(
        module, torch.randn(T, B, I).double(), lambda y, state: state[1].sum()
    )
    kept = torch.sigmoid(torch.tensor(bias).double())
    expected = H**0.5 * kept ** torch.arange(T - 1, -1, -1)
    torch.testing.assert_close(total_c, expected, rtol=RTOL, atol=0)
    torch.testing.assert_close(carried_c, expected, rtol=RTOL, atol=0)  # at the last step it came from c_n
    assert (total_h == 0).all() and (carried_h == 0).all()


@pytest.mark.parametrize("bias", [-2.0, 0.0, 1.0, 4.0])
def test_a_gru_without_w_hh_keeps_the_update_gate_of_h(bias):
    """dL/dh_{t-1} = sigmoid(b_z) dL/dh_t: r and z do not depend on h, and r multiplies b_hn alone."""
    module = build("gru")
    gate_bias(module, "z", bias)
    total, carried = tapped(module, torch.randn(T, B, I).double(), lambda y, h: y[-1].sum())[:, 0]
    kept = torch.sigmoid(torch.tensor(bias).double())
    torch.testing.assert_close(total, H**0.5 * kept ** torch.arange(T - 1, -1, -1), rtol=RTOL, atol=0)
    torch.testing.assert_close(carried[:-1], total[:-1], rtol=RTOL, atol=0)


@pytest.mark.parametrize("first", [1e-30, 1e30])
def test_a_linear_network_across_the_range_of_float32(first):
    """From 1 at the last step to 1e-30 or 1e+30 at the first, whose squares float32 does not know."""
    steps = 31
    alpha = first ** (1 / (steps - 1))
    x = 1e-6 * (torch.rand(steps, B, H) + 0.1)  # the forward grows as fast as the backward
    total, carried = tapped(linear(alpha, torch.float32), x, lambda y, h: y[-1].sum() / H**0.5)[:, 0]
    expected = torch.tensor(alpha).double() ** torch.arange(steps - 1, -1, -1)
    # alpha rounded to float32, 6e-8, to the 30th power; as much again for 30 roundings
    torch.testing.assert_close(total, expected, rtol=4e-6, atol=0)
    torch.testing.assert_close(carried[:-1], expected[:-1], rtol=4e-6, atol=0)
