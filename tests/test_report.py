"""The report as a whole: it agrees with itself, follows the gradient from call to call, and says what it is about."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import GradientMonitor
from fastrnn.monitoring import diagnosis

T, B, I, H = 24, 4, 3, 6
CELLS = {
    "LSTM": lambda: fastrnn.LSTM(I, H, 2),
    "GRU": lambda: fastrnn.GRU(I, H),
    "RNN": lambda: fastrnn.RNN(I, H),
    "projected": lambda: fastrnn.LSTM(I, H, proj_size=2),
    "layer norm": lambda: fastrnn.LSTM(I, H, layer_norm=True),
}
cells = pytest.mark.parametrize("cell", CELLS)
calls = pytest.mark.parametrize("pieces", [[24], [1] * 24, [5, 1, 10, 8]], ids=["one", "steps", "pieces"])


def made(cell):
    torch.manual_seed(0)
    return CELLS[cell]()


def each(run, state):
    """A function on one state or on each of a pair."""
    return tuple(run(s) for s in state) if isinstance(state, tuple) else run(state)


def same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        for name in ("total", "carried", "gain"):
            # float32 norms and seams; sums in another order, ten roundings
            torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=1e-5, atol=1e-12, equal_nan=True)
        assert (x.verdict, x.horizon, x.longest, x.valid.tolist()) == (
            y.verdict,
            y.horizon,
            y.longest,
            y.valid.tolist(),
        )
        assert x.gain_median == pytest.approx(y.gain_median, rel=1e-5)


def in_one_call(module, x, loss, **call):
    with GradientMonitor(module) as monitor:
        loss(module(x, **call)[0]).backward()
    return monitor.report()


# ------------------------------------------------------------------------------------------ from one call to the next


@cells
@calls
@pytest.mark.parametrize("loss", [lambda y: y[-1].square().sum(), lambda y: y.square().sum()], ids=["last", "every"])
def test_calls_that_continue_one_another_are_one_sequence(cell, pieces, loss):
    module, x, state, out = made(cell), torch.randn(T, B, I), None, []
    with GradientMonitor(module) as monitor:
        for part in x.split(pieces):
            y, state = module(part, state)
            out.append(y)
        loss(torch.cat(out)).backward()
    same(monitor.report(), in_one_call(module, x, loss))
    assert "earlier call" not in str(monitor.report())


@cells
@pytest.mark.parametrize("how", ["multiplied", "where"])
def test_episodes_that_end_between_calls_are_resets(cell, how):
    """As reinforcement learners do it: split where an episode ends, and the states masked there."""
    module, x = made(cell), torch.randn(T, B, I)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[6, 0] = resets[6, 2] = resets[15, 1] = resets[15, 2] = resets[20, 3] = True

    def begin(state, done):
        return state * ~done if how == "multiplied" else torch.where(done, torch.zeros_like(state), state)

    def loss(y):
        return y.square().sum()

    state, out = None, []
    with GradientMonitor(module) as monitor:
        for begins, part in zip((0, 6, 15, 20), x.split([6, 9, 5, 4]), strict=True):
            if state is not None:
                state = each(lambda s, begins=begins: begin(s, resets[begins].view(1, -1, 1)), state)
            y, state = module(part, state)
            out.append(y)
        loss(torch.cat(out)).backward()
    same(monitor.report(), in_one_call(module, x, loss, reset_mask=resets))


@pytest.mark.parametrize("packed", [False, True])
def test_the_padding_of_a_call_is_left_out_between_two(packed):
    module, x = made("GRU"), torch.randn(T, B, I)
    first, second = torch.tensor([10, 3, 7, 1]), torch.tensor([2, 12, 5, 9])
    with GradientMonitor(module) as monitor:
        if packed:
            a, h = module(pack_padded_sequence(x[:12], first, enforce_sorted=False))
            b, _ = module(pack_padded_sequence(x[12:], second, enforce_sorted=False), h)
            (a.data.square().sum() + b.data.square().sum()).backward()
        else:
            a, h = module(x[:12], lengths=first)
            b, _ = module(x[12:], h, lengths=second)
            (a.square().sum() + b.square().sum()).backward()
    whole = torch.zeros(int((first + second).max()), B, I)
    for n in range(B):
        whole[: first[n] + second[n], n] = torch.cat([x[: first[n], n], x[12 : 12 + second[n], n]])
    same(monitor.report(), in_one_call(module, whole, lambda y: y.square().sum(), lengths=first + second))


def test_a_loss_on_the_states_does_not_count_as_carried():
    module, x, state, loss = made("GRU"), torch.randn(T, B, I), None, 0.0
    with GradientMonitor(module) as monitor:
        for part in x:
            _, state = module(part.unsqueeze(0), state)
            loss = loss + state.square().sum()
        loss.backward()
    expected = in_one_call(module, x, lambda y: y.square().sum())
    for a, b in zip(monitor.report(), expected, strict=True):
        assert (a.verdict, a.horizon, a.longest) == (b.verdict, b.horizon, b.longest)
        assert a.longest == T
    # The last state has its loss on h_n, which counts as carried to the last step.
    torch.testing.assert_close(monitor.report()[0].carried[:-1], expected[0].carried[:-1], rtol=1e-5, atol=1e-12)


def test_a_model_in_steps_is_told_what_it_is():
    """The gradient of a linear network whose calls are single steps."""
    module = fastrnn.RNN(4, 4, nonlinearity="relu", bias=False)
    with torch.no_grad():
        module.weight_hh_l0.copy_(0.5 * torch.eye(4))
        module.weight_ih_l0.copy_(torch.eye(4))
    state = None
    with GradientMonitor(module) as monitor:
        for x in torch.rand(40, 1, B, 4) + 0.1:
            y, state = module(x, state)
        y.sum().backward()
    record = monitor.report()[0]
    assert (record.verdict, record.horizon, record.longest) == ("vanishing", 6, 40)  # 0.5^6 > 1 % > 0.5^7
    assert record.gain_median == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("why", ["two continue", "by the output", "both directions"])
def test_what_cannot_be_put_together_is_said(why):
    module = fastrnn.GRU(I, H, bidirectional=why == "both directions")
    x, later = torch.randn(6, B, I), torch.randn(6, B, I)
    with GradientMonitor(module) as monitor:
        y, h = module(x)
        state = y[-1:] if why == "by the output" else h
        loss = module(later, state)[0].sum()
        if why == "two continue":
            loss = loss + module(later, state)[0].square().sum()
        loss.backward()
    report = monitor.report()
    assert all(r.cut and r.longest <= 6 for r in report)
    assert all("goes on into an earlier call, where it is not followed" in f.summary for f in report.findings)
    assert report.as_dict()["records"][0]["cut"] is True


def test_an_encoder_is_no_earlier_call_of_its_decoder():
    encoder, decoder = made("GRU"), fastrnn.GRU(I, H)
    with GradientMonitor(nn.ModuleList([encoder, decoder])) as monitor:
        _, h = encoder(torch.randn(7, B, I))
        decoder(torch.randn(5, B, I), h)[0].sum().backward()
    assert [(r.module, len(r.total), r.cut) for r in monitor.report()] == [("0", 7, False), ("1", 5, False)]


def test_a_detached_state_is_no_continuation():
    module, state = made("LSTM"), None
    with GradientMonitor(module) as monitor:
        for part in torch.randn(T, B, I).split(6):
            y, state = module(part, state)
            y.sum().backward()
            state = tuple(s.detach() for s in state)
    assert monitor.history.steps == [0, 1, 2, 3]
    assert all(len(r.total) == 6 and not r.cut for report in monitor.history.reports for r in report)


def test_the_first_bad_step_is_counted_over_all_calls():
    module, x, state, out = made("GRU"), torch.randn(T, B, I), None, []
    x[14] = math.nan
    with GradientMonitor(module) as monitor:
        for part in x.split(6):
            y, state = module(part, state)
            out.append(y)
        torch.cat(out).sum().backward()
    assert {r.forward_nonfinite for r in monitor.report()} == {14}


# ------------------------------------------------------------------------------------------------ numbers that agree


def test_a_gain_weighs_its_steps():
    """Four long sequences that keep their gradient among many short ones that lose it: both numbers say healthy."""
    steps, n = 29, 24
    log_gain = torch.full((steps, n), math.nan, dtype=torch.float64)
    log_gain[1:, :4] = math.log(0.99)
    log_gain[-3:, 4:] = math.log(0.3)  # in backward order; of 4 steps, 3 have a gain
    reached = torch.zeros(steps, n, dtype=torch.bool)
    reached[:, :4], reached[-4:, 4:] = True, True
    cuts = torch.zeros(steps, n, dtype=torch.bool)
    cuts[:-4, 4:] = True
    mean, horizon, longest, _, verdict = diagnosis._judge(log_gain, reached, cuts)
    assert math.exp(mean) == pytest.approx(0.99) and (horizon, longest, verdict) == (29, 29, "healthy")


def test_the_weighted_median_of_equal_weights_is_the_median():
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 12):
        values = torch.randn(n, generator=generator).double()
        assert diagnosis._weighted_median(values, torch.full((n,), 7)) == float(values.median())
    assert diagnosis._weighted_median(torch.tensor([-math.inf, 0.0, 1.0]), torch.tensor([1, 1, 5])) == 1.0


# ------------------------------------------------------------------------------------------------- what is printed


def test_advice_that_layers_share_is_printed_once():
    torch.manual_seed(0)
    module = fastrnn.LSTM(I, 16, 3, bidirectional=True)
    report = in_one_call(module, torch.randn(100, B, I), lambda y: y[-1].sum() + y[0].sum())
    vanishing = [f for f in report.findings if f.verdict == "vanishing"]
    assert len(vanishing) > 4 and all(f.advice for f in vanishing)
    printed = [line for line in str(report).splitlines() if line.startswith("  - ")]
    assert len(printed) == len({(f.verdict, rule) for f in report.findings for rule in f.rules})
    assert any("(so also lstm.l" in line and line.endswith("more)") for line in printed)
    for found in report.findings:
        assert sum(line.startswith(f"{found.name}: ") for line in str(report).splitlines()) == 1
    assert "rules" not in report.as_dict()["findings"][0]
    assert report.as_dict()["findings"][0]["advice"] == list(report.findings[0].advice)


def test_a_short_last_batch_is_named():
    module = made("GRU")
    with GradientMonitor(module) as monitor:
        for samples, steps in ((32, 40), (32, 38), (32, 40)):
            module(torch.randn(steps, samples, I))[0].sum().backward()
        assert "training step" not in str(monitor.report())
        module(torch.randn(9, 2, I))[0].sum().backward()
    text = str(monitor.report())
    assert "this is training step 3, with 2 sequences of up to 9 steps; step 2 had 32 of up to 40" in text
    assert text.split("\n\n")[1] == monitor.report().note


class Own(nn.LSTM):
    pass


def test_what_convert_leaves_alone_is_not_sent_there_again():
    with pytest.raises(ValueError, match=r"fastrnn\.convert\(model\) replaces torch\.nn's"):
        GradientMonitor(nn.Sequential(nn.GRU(I, H)))
    subclass = nn.Sequential(Own(I, H))
    with pytest.warns(UserWarning, match="was left as it is"):
        fastrnn.convert(subclass)
    message = r"its Own is a subclass, so fastrnn\.convert leaves it as it is: write it with fastrnn\.LSTM in the place"
    with pytest.raises(ValueError, match=message):
        GradientMonitor(subclass)
    patched = nn.GRU(I, H)
    patched.forward = patched.forward
    with pytest.raises(
        ValueError, match=r"its GRU has its own forward, so .* fastrnn\.GRU in the place of torch\.nn\.GRU"
    ):
        GradientMonitor(nn.Sequential(patched))
