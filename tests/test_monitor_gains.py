"""GradientMonitor's gains, horizons and verdicts against closed forms."""

import math

import pytest
import torch
from setups import linear_rnn, watched
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import GradientMonitor
from fastrnn.monitoring import diagnosis

T, B, I, H = 12, 4, 3, 6


@pytest.mark.parametrize("loss", [lambda y: y[-1].sum(), lambda y: y.sum()], ids=["last", "every"])
@pytest.mark.parametrize("alpha", [0.5, 0.97, 1.0, 1.3])
def test_a_linear_network_has_gain_alpha(alpha, loss):
    record = watched(linear_rnn(alpha), torch.rand(40, B, 4) + 0.1, loss).report()[0]
    # float32 norms, one rounding or two per step: 1e-6 is ten of them.
    torch.testing.assert_close(record.gain[:-1], torch.full((39,), alpha).double(), rtol=1e-6, atol=0)
    assert math.isnan(record.gain[-1])
    assert record.gain_median == pytest.approx(alpha, rel=1e-6)
    if alpha < 1:
        assert record.half_life == pytest.approx(math.log(2) / -math.log(alpha), rel=1e-4)
    else:
        assert record.half_life is None
    assert record.horizon == (int(math.log(0.01) / math.log(alpha)) if alpha == 0.5 else 40)
    assert record.verdict == {0.5: "vanishing", 1.3: "exploding"}.get(alpha, "healthy")


def test_an_lstm_without_w_hh_has_the_forget_gate_as_gain():
    module, b = fastrnn.LSTM(I, H), 1.3
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_ih_l0[H : 2 * H].zero_()
        module.bias_ih_l0[H : 2 * H] = b
        module.bias_hh_l0[H : 2 * H] = 0
    with GradientMonitor(module) as watch:
        module(torch.randn(T, B, I))[1][1].sum().backward()  # through c_n alone
    h, c = watch.report()
    sigma = 1 / (1 + math.exp(-b))
    torch.testing.assert_close(
        c.gain[:-1], torch.full((T - 1,), sigma).double(), rtol=1e-6, atol=0
    )  # float32, as above
    assert (h.total == 0).all() and (h.valid == 0).all() and (c.valid == B).all()
    torch.testing.assert_close(h.gain, c.gain, equal_nan=True)


def test_a_loss_at_every_step_does_not_hide_vanishing():
    record = watched(linear_rnn(0.5), torch.rand(40, B, 4) + 0.1).report()[0]
    assert record.total.min() > 0.4 * record.total.max()  # level: 1 + 0.5 + 0.25 + ..
    assert record.verdict == "vanishing" and record.horizon == 6  # 0.5^6 > 1 % > 0.5^7


def test_underflow_counts_as_vanishing_and_not_as_a_gain():
    record = watched(linear_rnn(1e-3), torch.rand(40, B, 4) + 0.1, lambda y: y[-1].sum()).report()[0]
    assert record.total[0] == 0 and record.valid[0] == 0
    assert record.gain_median == pytest.approx(1e-3, rel=1e-5)
    assert record.half_life == pytest.approx(math.log(2) / math.log(1000), rel=1e-5)
    assert record.horizon == 0 and record.verdict == "vanishing"


def test_a_gradient_that_reaches_nothing_tells_nothing():
    watch = watched(linear_rnn(1.0), torch.rand(5, B, 4), lambda y: (y * 0).sum())
    record = watch.report()[0]
    assert record.verdict == "unknown" and (record.valid == 0).all()
    assert record.horizon is None and record.longest == 0 and "no gradient arrives" in str(watch.report())
    assert "fastrnn/rnn.l0/h/horizon" not in watch.scalars()


def test_a_step_whose_state_is_detached_tells_nothing():
    module, h, loss = fastrnn.GRU(I, H), None, 0.0
    with GradientMonitor(module) as watch:
        for _ in range(T):
            y, h = module(torch.randn(1, B, I), None if h is None else h.detach())
            loss = loss + y.sum()
        loss.backward()
    record = watch.report()[0]
    assert (record.verdict, record.horizon, record.longest) == ("unknown", None, 1)
    assert "Pass whole sequences in one call, with reset_mask=" in str(watch.report())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_exploding_and_named(bad):
    weight = torch.ones(T, 1, 1)
    weight[5] = bad
    record = watched(linear_rnn(0.9), torch.rand(T, B, 4), lambda y: (y * weight).sum()).report()[0]
    assert record.verdict == "exploding" and record.first_nonfinite == 5


def test_a_forward_that_is_not_finite_is_not_blamed_on_the_gradient():
    def finding(change, **call):
        module, x = fastrnn.GRU(I, H, batch_first=call.pop("batch_first", False)), torch.randn(T, B, I)
        with torch.no_grad():
            change(module, x)
        x = x.transpose(0, 1) if module.batch_first else x
        if call.pop("packed", False):
            x = pack_padded_sequence(x, torch.tensor([T, T, 8, 1]))
        watch = watched(module, x, lambda y: (y if torch.is_tensor(y) else y.data).sum(), **call)
        record, (found,) = watch.report()[0], watch.report().findings
        assert (record.verdict, record.horizon, record.first_nonfinite is None) == ("unknown", None, False)
        assert f"forward pass is not finite from step {record.forward_nonfinite} on" in found.summary
        assert f"from step {record.forward_nonfinite})" in str(watch.report())
        assert watch.scalars()["fastrnn/gru.l0/h/nonfinite"] == 1 and not watch.scalars()["fastrnn/gru.l0/h/exploding"]
        return record.forward_nonfinite, found.advice

    def at_step_5(module, x):
        x[5] = math.nan

    def in_one_sample(module, x):
        x[5, 2] = math.nan

    def in_the_weights(module, x):
        module.weight_hh_l0[0, 0] = math.nan

    for change, call in (
        (at_step_5, {}), (in_one_sample, {}), (in_one_sample, {"batch_first": True}), (in_one_sample, {"packed": True}),
    ):  # fmt: skip
        step, advice = finding(change, **call)
        assert step == 5 and "the weights are finite" in advice[0] and len(advice) == 1
    step, advice = finding(in_the_weights)
    assert step == 0 and "the weights are not finite" in advice[0] and len(advice) == 1


def test_gain_overflows_to_exploding():
    # 2 * 30^26 is the first norm beyond float32's 3.4e38; the input is small enough for the forward to stay within.
    record = watched(linear_rnn(30.0), 1e-10 * torch.rand(28, B, 4), lambda y: y[-1].sum()).report()[0]
    assert record.verdict == "exploding" and record.first_nonfinite == 27 - 26
    assert record.horizon is None and record.forward_nonfinite is None
    assert record.gain_median == pytest.approx(30.0, rel=1e-6)


def test_clipping_is_counted_and_undone_in_the_gain():
    module = linear_rnn(1.5, clip_state_grad_norm=3.0)
    record = watched(module, torch.rand(T, B, 4), lambda y: y[-1].sum()).report()[0]
    # Norms: 2, 3, then 4.5 before every clipping.
    assert record.total.tolist() == pytest.approx([4.5] * (T - 2) + [3.0, 2.0], rel=1e-6)
    assert record.clipped == (T - 2) * B and record.clip_rate == (T - 2) / T
    torch.testing.assert_close(record.gain[:-1], torch.full((T - 1,), 1.5).double(), rtol=1e-6, atol=0)
    assert watched(linear_rnn(1.5), torch.rand(T, B, 4)).report()[0].clipped is None


# ------------------------------------------------------------------------------------ sequences of different lengths


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(
    "lengths, horizon, longest, verdict",
    [
        ([40] * 10, 6, 40, "vanishing"),  # 0.5^6 > 1 % > 0.5^7
        ([40] * 4 + [5] * 6, 6, 40, "vanishing"),
        ([40] + [4] * 9, 6, 40, "vanishing"),
        ([40] * 4 + [10] * 6, 6, 40, "vanishing"),
        ([10] * 10, 6, 10, "healthy"),  # more than half of the way
        ([5] * 10, 5, 5, "healthy"),
    ],
)
def test_a_short_sequence_tells_only_of_its_own_length(lengths, horizon, longest, verdict, direction):
    module, n = linear_rnn(0.5, bidirectional=True), torch.tensor(lengths)
    module.load_state_dict({k: module.state_dict()[k.removesuffix("_reverse")] for k in module.state_dict()})
    with GradientMonitor(module) as watch:
        module(torch.rand(40, 10, 4) + 0.1, lengths=n)[1].sum().backward()
    record = watch.report()[direction == "reverse"]
    assert record.direction == direction
    assert (record.horizon, record.longest, record.verdict) == (horizon, longest, verdict)
    assert record.gain_median == pytest.approx(0.5, rel=1e-6)


def test_sequences_of_one_length_have_the_plain_median_as_horizon():
    generator = torch.Generator().manual_seed(0)
    log_gain = torch.randn(60, 9, generator=generator).double() - 0.2
    log_gain[0] = math.nan  # backward order: nothing comes back to the last step
    everywhere, nowhere = torch.ones(60, 9, dtype=torch.bool), torch.zeros(60, 9, dtype=torch.bool)
    kept = (log_gain[1:].cumsum(0) >= math.log(0.01)).cumprod(0).sum(0)
    assert int(kept.max()) < 59  # all fall
    _, horizon, longest, *_ = diagnosis._judge(log_gain, everywhere, nowhere)
    assert (horizon, longest) == (int(kept.median()), 60)


def test_short_sequences_do_not_outvote_an_explosion():
    lengths = torch.tensor([40] * 4 + [5] * 6)  # 1.2^39 is over 100, 1.2^4 is not
    record = watched(linear_rnn(1.2), torch.rand(40, 10, 4), lengths=lengths, loss=lambda y: y[-1].sum() + y[4].sum())
    record = record.report()[0]
    assert record.verdict == "exploding" and record.horizon == record.longest == 40
    assert record.growth == pytest.approx(1.2**39, rel=1e-4)


def test_a_segment_tells_only_of_its_own_length():
    resets = torch.zeros(40, B, dtype=torch.bool)
    resets[::5] = True
    record = watched(linear_rnn(0.5), torch.rand(40, B, 4) + 0.1, reset_mask=resets).report()[0]
    assert (record.horizon, record.longest, record.verdict) == (5, 5, "healthy")
    resets[::5], resets[20] = False, True
    record = watched(linear_rnn(0.5), torch.rand(40, B, 4) + 0.1, reset_mask=resets).report()[0]
    assert (record.horizon, record.longest, record.verdict) == (6, 20, "vanishing")


def test_a_loss_in_the_middle_starts_the_way_there():
    record = watched(linear_rnn(1.0), torch.rand(40, B, 4) + 0.1, lambda y: y[20].sum()).report()[0]
    assert (record.horizon, record.longest) == (21, 21)


@pytest.mark.parametrize("reverse", [0, 1])
def test_a_gain_of_zero_is_no_end_of_a_sequence(reverse):
    """W_hh = 0, with the loss where each direction ends: no gradient is carried on, though there are steps to go."""
    module = linear_rnn(0.0, bidirectional=True)
    with torch.no_grad():
        module.weight_hh_l0_reverse.zero_()

    def loss(y):
        return y[0, :, 4:].sum() + y[-1, :, :4].sum()

    record = watched(module, torch.rand(T, B, 4) + 0.1, loss).report()[reverse]
    assert (record.verdict, record.horizon, record.longest, record.gain_median) == ("vanishing", 0, T, 0)
