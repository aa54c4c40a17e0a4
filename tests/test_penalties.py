"""Penalties against their definitions, and the adaptive bound against its own history."""

import math

import pytest
import torch

import fastrnn
from fastrnn import GradientMonitor, penalties

T, B, I, H = 7, 3, 4, 5
# float64 on both sides, a few hundred operations in another order: about 1e-13; three digits of room.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def test_activation_is_the_mean_square():
    y, lengths = torch.randn(T, B, H), torch.tensor([T, 2, 0])
    torch.testing.assert_close(penalties.activation(y), y.square().mean())
    real = torch.cat([y[:, 0], y[:2, 1]])
    torch.testing.assert_close(penalties.activation(y, lengths), real.square().mean())
    assert penalties.activation(y, torch.zeros(B, dtype=torch.long)) == 0


def test_temporal_activation_is_the_mean_square_of_real_differences():
    y, lengths = torch.randn(T, B, H), torch.tensor([T, 3, 1])
    torch.testing.assert_close(penalties.temporal_activation(y), y.diff(dim=0).square().mean())
    real = torch.cat([y[:, 0].diff(dim=0), y[:3, 1].diff(dim=0)])
    torch.testing.assert_close(penalties.temporal_activation(y, lengths), real.square().mean())
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[0, 2] = resets[4, 0] = True  # nothing goes into step 0; one pair of sequence 0 goes
    real = torch.cat([y[:4, 0].diff(dim=0), y[4:, 0].diff(dim=0), y[:3, 1].diff(dim=0)])
    torch.testing.assert_close(penalties.temporal_activation(y, lengths, resets), real.square().mean())


def test_batch_first_is_the_same_of_the_transposed():
    y, lengths = torch.randn(T, B, H), torch.tensor([T, 3, 1])
    resets = torch.rand(T, B) < 0.3
    swapped = y.transpose(0, 1)
    for n in (None, lengths):
        first, last = penalties.activation(swapped, n, batch_first=True), penalties.activation(y, n)
        torch.testing.assert_close(first, last)  # the same numbers, summed in another order
        for mask in (None, resets):
            first = penalties.temporal_activation(swapped, n, None if mask is None else mask.t(), batch_first=True)
            torch.testing.assert_close(first, penalties.temporal_activation(y, n, mask))


def test_a_single_step_has_no_differences():
    y = torch.randn(1, B, H, requires_grad=True)
    for penalty in (
        penalties.temporal_activation(y),
        penalties.temporal_activation(y, torch.ones(B, dtype=torch.long)),
        penalties.temporal_activation(y, reset_mask=torch.zeros(1, B, dtype=torch.bool)),
    ):
        assert penalty == 0 and (torch.autograd.grad(penalty, y)[0] == 0).all()


# ---------------------------------------------------------------------------------------------------------- omega


def build(cell, **settings):
    torch.manual_seed(0)
    if cell in ("lstm", "gru"):
        return getattr(fastrnn, cell.upper())(I, H, dtype=torch.float64, **settings)
    return fastrnn.RNN(I, H, nonlinearity=cell, dtype=torch.float64, **settings)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_omega_of_a_linear_network(alpha):
    module = fastrnn.RNN(4, 4, nonlinearity="relu", bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight_hh_l0.copy_(alpha * torch.eye(4))
        module.weight_ih_l0.copy_(torch.eye(4))
    value = penalties.omega(module, torch.rand(T, B, 4).double(), lambda y: y[-1].sum())
    torch.testing.assert_close(value, torch.tensor((T - 1) * (alpha - 1) ** 2).double(), **EXACT)
    value.backward()
    # Of alpha I by its entries: d/dW of (|W' d| / |d| - 1)², with d along (1, 1, 1, 1).
    expected = torch.full((4, 4), (T - 1) * 2 * (alpha - 1) / 4).double()
    torch.testing.assert_close(module.weight_hh_l0.grad, expected, **EXACT)


@pytest.mark.parametrize("every_step", [False, True], ids=["last", "every"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh", "elu"])
def test_omega_is_the_gain_that_the_monitor_sees(cell, every_step):
    module, x, weight = build(cell, layer_norm=True), torch.randn(T, B, I).double(), torch.randn(T, B, H).double()
    if not every_step:
        weight[:-1] = 0
    expected = 0.0
    for b in range(B):  # one sample at a time: the report is a median
        with GradientMonitor(module) as monitor:
            (module(x[:, b : b + 1])[0] * weight[:, b : b + 1]).sum().backward()
        expected += float((monitor.report()[0].gain[:-1] - 1).square().sum()) / B
    assert penalties.omega(module, x, lambda y: (y * weight).sum()).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh"])
def test_omega_is_differentiated_through_one_step_only(cell):
    """Against central differences of the same sum with the states and the δ of the unchanged weights."""
    module, x = build(cell), torch.randn(T, B, I).double()
    hx = tuple(torch.randn(1, B, H).double() for _ in range(1 + (cell == "lstm")))
    readout = torch.randn(B, H).double()
    value = penalties.omega(module, x, lambda y: (y[-1] * readout).sum(), hx if cell == "lstm" else hx[0])
    (slope,) = torch.autograd.grad(value, module.weight_hh_l0)

    def step(x, state):
        state = tuple(state) if cell == "lstm" else state[0]
        after = module(x, state)[1]
        return after if cell == "lstm" else (after,)

    states = [hx]
    for t in range(T):
        states.append(step(x[t : t + 1], states[-1]))
    delta = {T: (readout.unsqueeze(0), *(torch.zeros(1, B, H).double() for _ in hx[1:]))}
    held = [tuple(s.detach().requires_grad_() for s in state) for state in states]
    for t in range(T - 1, 0, -1):
        delta[t] = torch.autograd.grad(step(x[t : t + 1], held[t]), held[t], delta[t + 1])

    def frozen():
        total = 0.0
        for t in range(1, T):
            back = torch.autograd.grad(step(x[t : t + 1], held[t]), held[t], delta[t + 1])
            ratio = torch.cat(back, -1).norm(dim=-1) / torch.cat(delta[t + 1], -1).norm(dim=-1)
            total += float((ratio - 1).square().sum()) / B
        return total

    assert value.item() == pytest.approx(frozen(), rel=1e-9)
    direction, eps = torch.randn_like(module.weight_hh_l0), 1e-5
    with torch.no_grad():
        module.weight_hh_l0.add_(eps * direction)
    above = frozen()
    with torch.no_grad():
        module.weight_hh_l0.sub_(2 * eps * direction)
    # central differences: eps² of the third derivative, and 1e-16 / eps of rounding
    assert float((slope * direction).sum()) == pytest.approx((above - frozen()) / (2 * eps), rel=1e-6)


def test_omega_makes_a_gradient_last():
    torch.manual_seed(0)
    module, x = fastrnn.RNN(I, 16), 0.1 * torch.randn(30, 8, I)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)

    def reach():
        with GradientMonitor(module) as monitor:
            module(x)[0][-1].sum().backward()
        return monitor.report()[0].horizon

    before = reach()
    for _ in range(60):
        optimizer.zero_grad()
        penalties.omega(module, x, lambda y: y[-1].sum()).backward()
        optimizer.step()
    assert before < 10 and reach() == 30


def test_omega_adds_to_a_loss_and_is_not_watched():
    module, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    with GradientMonitor(module) as monitor:
        y, _ = module(x)
        (y[-1].sum() + 0.5 * penalties.omega(module, x, lambda y: y[-1].sum())).backward()
    assert monitor.report()[0].valid.tolist() == [B] * T


def test_omega_without_a_gradient_is_zero():
    module = fastrnn.GRU(I, H)
    value = penalties.omega(module, torch.randn(T, B, I), lambda y: y[0].sum())
    value.backward()
    assert value == 0 and all(p.grad is None or (p.grad == 0).all() for p in module.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_layers": 2}, {"bidirectional": True}, {"batch_first": True}, {"clip_state_grad_norm": 1.0},
        {"zoneout": 0.1}, {"recurrent_dropout": 0.1}, {"weight_dropout": 0.1}, {"clip_state_grad_value": 1.0},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_omega_says_what_it_cannot_take(settings):
    with pytest.raises(ValueError, match=f"turn off {next(iter(settings))}"):
        penalties.omega(fastrnn.GRU(I, H, **settings), torch.randn(T, B, I), torch.sum)


def test_omega_checks_its_arguments():
    with pytest.raises(ValueError, match="got LSTM"):
        penalties.omega(torch.nn.LSTM(I, H), torch.randn(T, B, I), torch.sum)
    with pytest.raises(ValueError, match="T of at least 2"):
        penalties.omega(fastrnn.GRU(I, H), torch.randn(1, B, I), torch.sum)


# ------------------------------------------------------------------------------------------------------ adaptive clip


def norms(largest, shape=(2, 2, 2, T, B)):
    """Totals whose joint norm peaks at `largest`, in the second layer."""
    made = torch.rand(shape) * 0.1
    made[1, 0, 0, 3] = 0.6 * largest
    made[1, 0, 1, 3] = 0.8 * largest
    made[:, 1] = 1e9  # what is carried does not count
    return made


def test_the_threshold_is_the_percentile_of_the_largest_joint_norms():
    clip = penalties.AdaptiveClip(percentile=50, window=4)
    tensor, seen = clip.threshold, []
    for value in (4.0, 1.0, 3.0, 9.0, 5.0, 6.0):
        clip.update(norms(value))
        seen.append(value)
        expected = torch.tensor(seen[-4:]).quantile(0.5)
        torch.testing.assert_close(clip.threshold, expected)  # float32: 0.6² + 0.8² in float32
    assert clip.threshold is tensor and tensor.shape == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_what_is_not_finite_or_not_there_is_left_out(bad):
    clip = penalties.AdaptiveClip(percentile=100)
    untouched = clip.threshold.clone()
    clip.update(torch.full((1, 2, 1, T, B), bad))
    assert clip.threshold == untouched
    clip.update(norms(2.0))
    clip.update(torch.full((1, 2, 1, T, B), bad))
    torch.testing.assert_close(clip.threshold, torch.tensor(2.0))


def test_the_whole_range_of_float32():
    clip = penalties.AdaptiveClip()
    clip.update(norms(1e30))
    torch.testing.assert_close(clip.threshold, torch.tensor(1e30))


def test_before_the_first_update_nothing_is_clipped():
    module, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    clipped = fastrnn.LSTM(I, H, clip_state_grad_norm=penalties.AdaptiveClip().threshold)
    clipped.load_state_dict(module.state_dict())
    for m in (module, clipped):
        m(x)[0].sum().backward()
    for p, q in zip(module.parameters(), clipped.parameters(), strict=True):
        # torch's own kernel and the scan: float32 sums over T * B terms of order one
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_in_a_training_loop_fed_by_the_monitor():
    clip = penalties.AdaptiveClip(percentile=50)
    module, x = fastrnn.RNN(I, H, clip_state_grad_norm=clip.threshold), torch.randn(T, B, I)
    monitor = GradientMonitor(module)
    monitor.norms_to(lambda name, norms: clip.update(norms))
    with monitor:
        for scale in (1.0, 1.0, 10.0, 0.1):
            (scale * module(x)[0].square().sum()).backward()
    rates = monitor.history.curve("rnn.l0", "h", "clip_rate")
    # The second step has samples over the first one's median; the third is over it in every way, the last in none.
    assert rates[0] == 0 < rates[1] < rates[2] and rates[3] == 0


def test_it_goes_on_from_its_state():
    whole, first, second = (penalties.AdaptiveClip(percentile=50, window=3) for _ in range(3))
    tensor = second.threshold
    for clip in (whole, first):
        clip.update(norms(1.0))
        clip.update(norms(5.0))
    state = first.state_dict()
    first.update(norms(100.0))  # does not reach into the state
    second.load_state_dict(state)
    for value in (2.0, 3.0):
        assert torch.equal(second.threshold, whole.threshold) and second.threshold is tensor
        for clip in (whole, second):
            torch.manual_seed(0)
            clip.update(norms(value))
    with pytest.raises(ValueError, match="a window of 3 training steps, not 4"):
        penalties.AdaptiveClip(window=4).load_state_dict(state)


def test_update_reads_nothing_back():
    """On the meta device there is nothing to read: a .item() or a branch on a value would raise."""
    clip = penalties.AdaptiveClip(device="meta")
    clip.update(torch.zeros(1, 2, 1, T, B, device="meta"))


def test_lengths_of_another_shape_are_refused():
    for penalty in (penalties.activation, penalties.temporal_activation):
        with pytest.raises(ValueError, match=r"lengths should have shape \(3,\), got \(7,\)"):
            penalty(torch.randn(T, B, H), torch.full((T,), 2))
    with pytest.raises(ValueError, match=r"reset_mask does not fit the output: \[3, 7\], \[7, 3, 5\]"):
        penalties.temporal_activation(torch.randn(T, B, H), reset_mask=torch.zeros(B, T, dtype=torch.bool))


def test_the_arguments_are_checked():
    with pytest.raises(ValueError, match="norms should be"):
        penalties.AdaptiveClip().update(torch.ones(T, B))
    with pytest.raises(ValueError, match="percentile"):
        penalties.AdaptiveClip(percentile=101)
    with pytest.raises(ValueError, match="window"):
        penalties.AdaptiveClip(window=0)
