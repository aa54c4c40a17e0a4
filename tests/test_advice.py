"""Advice: right for the module, from the gain, and with the number behind it."""

import itertools
import math
import re

import pytest
import torch

import fastrnn
from fastrnn import GradientMonitor
from fastrnn.monitoring import advice

T, B, I, H = 100, 4, 2, 32


def finding(module, loss=lambda y: y[-1].sum(), x=None, steps=T):
    torch.manual_seed(1)
    x = torch.randn(steps, B, I) if x is None else x
    with GradientMonitor(module) as monitor:
        loss(module(x)[0]).backward()
    (found,) = monitor.report().findings
    return found


def seeded(build, *change):
    torch.manual_seed(0)
    module = build()
    for function in change:
        function(module)
    return module


def large(module):
    with torch.no_grad():
        module.weight_hh_l0.normal_(std=3 / math.sqrt(H))


def orthogonal(module):
    fastrnn.init.orthogonal_(module)


def steep(module):
    """Inputs that saturate tanh, under a W_hh that does not shorten."""
    fastrnn.init.orthogonal_(module)
    with torch.no_grad():
        module.weight_ih_l0.mul_(20)


def patient(module):
    fastrnn.init.chrono_(module, T)


def bad_loss(y):
    return (y * torch.tensor([math.nan] + [1.0] * (len(y) - 1)).view(-1, 1, 1)).sum()


CASES = {
    "tanh": (lambda: fastrnn.RNN(I, H), (), "vanishing", ["orthogonal_", "LSTM or GRU"]),
    "saturated": (lambda: fastrnn.RNN(I, H), (steep,), "vanishing", ["layer_norm=True", "LSTM or GRU"]),
    "relu": (lambda: fastrnn.RNN(I, H, nonlinearity="relu"), (), "vanishing", ["identity_", "LSTM or GRU"]),
    "elu": (lambda: fastrnn.RNN(I, H, nonlinearity="elu"), (), "vanishing", ["identity_", "LSTM or GRU"]),
    "lstm": (lambda: fastrnn.LSTM(I, H), (), "vanishing", ["layer_norm=True", "chrono_"]),
    "no bias": (lambda: fastrnn.LSTM(I, H, bias=False), (), "vanishing", ["bias=True"]),
    "gru": (lambda: fastrnn.GRU(I, H), (), "vanishing", ["layer_norm=True", "chrono_"]),
    "user's": (lambda: fastrnn.Recurrent(fastrnn.cells.slstm, I, H), (), "vanishing", ["orthogonal_", "log 100"]),
    "user's, unconnected": (lambda: fastrnn.Recurrent(fastrnn.cells.min_gru, I, H), (), "vanishing", ["log 100"]),
    "chrono": (lambda: fastrnn.LSTM(I, H), (patient,), "healthy", []),
    "large": (lambda: fastrnn.RNN(I, H), (large,), "exploding", ["clip_state_grad_norm=", "orthogonal_"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_advice_fits_the_module(case):
    build, change, verdict, expected = CASES[case]
    found = finding(seeded(build, *change))
    assert found.verdict == verdict
    assert len(found.advice) == len(expected)
    for text, part in zip(found.advice, expected, strict=True):
        assert part in text and re.search(r"\d", text)


def test_no_gated_cell_is_told_to_become_one():
    for rule in advice.RULES:
        if "fastrnn.LSTM" in rule.text or "identity_" in rule.text:
            assert all(cell.startswith("rnn") for cell in ([rule.cells] if isinstance(rule.cells, str) else rule.cells))
        if "forget_bias_" in rule.text:
            assert rule.cells == "lstm"


def test_every_rule_quotes_a_number():
    for rule in advice.RULES:
        assert "{f." in rule.text


def test_whatever_the_numbers_are_there_are_words_for_them():
    """Over a grid of facts: one summary at least, every text can be written, and no rule is never said."""
    nan, inf = math.nan, math.inf
    grid = itertools.product(
        ("rnn_tanh", "rnn_relu", "lstm", "gru", "cell own"), (True, False), (True, False),
        (nan, 0.0, 0.5, 1.0, 1.5), (3.0, inf),
        (None, 0.1, 1.0), ((None, None), (3, None), (3, 2)), (nan, 0.5, 2.0), (nan, 2.0, 500.0), (0, 1, 100),
    )  # fmt: skip
    said = set()
    for cell, bias, layer_norm, gain, half_life, clip_rate, (nonfinite, forward), sigma, memory, steps in grid:
        facts = advice.Facts(
            cell=cell, bias=bias, layer_norm=layer_norm, T=steps, gain=gain, half_life=half_life, horizon=9, growth=1e3,
            clip_rate=clip_rate, start=1.0, nonfinite=nonfinite, forward=forward, finite_weights=sigma == sigma,
            sigma=sigma, mean_sigma=sigma, ln_gain=1.0, memory=memory,
        )  # fmt: skip
        for verdict in ("vanishing", "exploding", "healthy", "unknown"):
            for rules in (advice.SUMMARIES, advice.RULES):
                chosen = advice.matching(rules, verdict, facts)
                assert chosen or rules is advice.RULES
                for rule in chosen:
                    assert rule.text.format(f=facts)
                    said.add(rule.text)
    assert said == {rule.text for rule in (*advice.SUMMARIES, *advice.RULES)}


def test_every_initialisation_that_is_advised_exists():
    named = {name for rule in advice.RULES for name in re.findall(r"fastrnn\.init\.(\w+)", rule.text)}
    assert named >= {"orthogonal_", "identity_", "chrono_", "forget_bias_"}
    assert all(callable(getattr(fastrnn.init, name)) for name in named)


def linear(alpha):
    module = fastrnn.RNN(4, 4, nonlinearity="relu", bias=False)
    with torch.no_grad():
        module.weight_hh_l0.copy_(alpha * torch.eye(4))
        module.weight_ih_l0.copy_(torch.eye(4))
    return module


@pytest.mark.parametrize("loss", [lambda y: y[-1].sum(), lambda y: y.sum()], ids=["last", "every"])
def test_the_words_say_the_closed_form_whatever_the_total_does(loss):
    found = finding(linear(0.8), loss, torch.rand(T, B, 4) + 0.1)
    # 0.8^n = 1/2 at n = 3.1; 0.8^20 = 1.15 % and 0.8^21 = 0.92 %.
    assert found.summary.startswith("the carried gradient halves every 3.1 steps: beyond 20 of 100 steps this layer")


def test_growth_is_quoted():
    found = finding(linear(1.2), x=torch.rand(61, B, 4) + 0.1)
    assert f"doubles every {math.log(2) / math.log(1.2):.1f} steps and grows {1.2**60:.1e}-fold" in found.summary
    assert "clip_state_grad_norm=2.0e+00" in found.advice[0]  # the norm of four ones


def test_what_is_not_finite_is_named_first():
    found = finding(fastrnn.GRU(I, H), bad_loss, steps=9)
    assert found.verdict == "exploding" and "not finite from step 0 back" in found.summary
    assert any("step 0" in text for text in found.advice)


def test_weights_that_are_not_finite_are_not_looked_into():
    module = fastrnn.LSTM(I, H)
    with torch.no_grad():
        module.weight_hh_l0[0, 0] = math.nan
    assert finding(module).verdict == "unknown"


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("bias", [40.0, 1e30])
def test_a_gate_that_is_open_for_good_is_no_division_by_zero(cell, bias):
    module = seeded(lambda: getattr(fastrnn, cell)(4, 8))
    with torch.no_grad():
        module.bias_ih_l0[8], module.bias_hh_l0[8] = bias, 0  # of one unit of the forget gate, of the update gate
    with GradientMonitor(module) as monitor:
        module(torch.randn(50, 3, 4))[0][-1, :, 1:].sum().backward()
    memory = advice.facts_of(module, list(monitor.report())).memory
    assert memory == pytest.approx(1 + math.exp(bias) if bias < 700 else math.inf, rel=1e-6)
    assert all(str(found) for found in monitor.report().findings)


def test_parameters_beyond_all_bounds():
    module = fastrnn.GRU(4, 8)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(1e30)
    assert finding(module, x=torch.randn(50, 3, 4)).summary


def test_a_bound_that_clips_everything_is_mentioned():
    module = seeded(lambda: fastrnn.RNN(I, H, clip_state_grad_norm=1e-3), large)
    found = finding(module, torch.sum)
    assert any("shortens 100% of the gradients" in text for text in found.advice)
    assert not any("clip inside the recursion" in text for text in found.advice)


def test_numbers_of_the_weights():
    module = seeded(lambda: fastrnn.LSTM(I, H), orthogonal)
    with GradientMonitor(module) as monitor:
        module(torch.randn(5, B, I))[0].sum().backward()
    facts = advice.facts_of(module, list(monitor.report()))
    # float64 singular values of a float32 orthogonal matrix
    assert facts.sigma == pytest.approx(1, rel=1e-6) and facts.mean_sigma == pytest.approx(1, rel=1e-6)
    fastrnn.init.forget_bias_(module, 2.0)
    facts = advice.facts_of(module, list(monitor.report()))
    assert facts.memory == pytest.approx(1 + math.exp(2.0), rel=1e-6) and math.isnan(facts.ln_gain)
    assert facts.start == pytest.approx(float(torch.stack([r.total[-1] for r in monitor.report()]).norm()))
