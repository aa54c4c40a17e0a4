"""Prescriptions: each changes what it says, keeps the rest, and is one line of the advice."""

import copy
import math

import pytest
import torch
from test_advice import B, H, I, T, finding, large, orthogonal, patient, seeded, steep  # noqa: F401
from torch import nn

import fastrnn
from fastrnn.monitoring import advice, prescription


def report_of(module, loss=lambda y: y[-1].sum(), steps=60):
    torch.manual_seed(1)
    x = torch.randn(steps, B, I)
    with fastrnn.GradientMonitor(module) as monitor:
        loss(module(x)[0]).backward()
    return monitor.report()


def prescribed(module, **how):
    return {p.name: p for p in fastrnn.prescribe(report_of(module, **how))}


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module, before):
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def test_rules_and_remedies_are_one_table():
    named = {rule.remedy for rule in advice.RULES} - {""}
    assert named == set(prescription.REMEDIES)
    for rule in advice.RULES:
        assert bool(rule.remedy) == bool(rule.quantity)
        if rule.remedy:
            assert f"{{f.{rule.quantity}" in rule.text  # the number is in the sentence


def test_the_advice_quotes_the_number():
    rnn = seeded(lambda: fastrnn.RNN(I, H))
    found = prescribed(rnn)["orthogonal"]
    assert found.quantity == "mean_sigma" and f"{found.number:.2f}" in found.advice and found.layers == ("rnn.l0",)
    assert found.number == pytest.approx(float(torch.linalg.svdvals(rnn.weight_hh_l0.detach()).square().mean().sqrt()))
    assert found.advice in str(found) and "rnn.l0" in str(found)


def test_orthogonal_changes_the_recurrent_weights_in_place():
    rnn = seeded(lambda: fastrnn.RNN(I, H))
    found, before, parameters = prescribed(rnn)["orthogonal"], snapshot(rnn), list(rnn.parameters())
    assert found.in_place and found.apply(rnn) is rnn
    assert all(a is b for a, b in zip(rnn.parameters(), parameters, strict=True))
    assert changed(rnn, before) == {"weight_hh_l0"}
    w = rnn.weight_hh_l0.detach()
    torch.testing.assert_close(w @ w.T, torch.eye(H), atol=1e-5, rtol=0)


def test_identity_is_for_a_one_sided_unit():
    rnn = seeded(lambda: fastrnn.RNN(I, H, nonlinearity="relu"))
    assert prescribed(rnn)["identity"].apply(rnn) is rnn
    assert torch.equal(rnn.weight_hh_l0, torch.eye(H)) and not rnn.bias_hh_l0.any()


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_chrono_opens_the_gates_and_the_optimiser_goes_on(cell):
    rnn = seeded(lambda: getattr(fastrnn, cell)(I, H))
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    before = snapshot(rnn)
    found = prescribed(rnn)["chrono"]
    assert found.apply(rnn) is rnn and changed(rnn, before) == {"bias_ih_l0", "bias_hh_l0"}
    memory = prescribed_memory(rnn)
    assert found.number < 30 <= memory <= 60  # in steps of a sequence of 60, by the bias alone
    rnn(torch.randn(5, 1, I))[0].sum().backward()
    now = snapshot(rnn)
    optimizer.step()
    assert changed(rnn, now) == {name for name, _ in rnn.named_parameters()}


def prescribed_memory(rnn):
    return advice.facts_of(rnn, [r for r in report_of(rnn) if r.layer == 0]).memory


def test_a_tanh_network_becomes_gated_inside_a_copy():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fastrnn.RNN(I, H, 2, bidirectional=True, batch_first=True, dropout=0.1, dtype=torch.float64)
            self.same = nn.ModuleList([self.rnn])
            self.out = nn.Linear(2 * H, 1, dtype=torch.float64)

        def forward(self, x):
            return self.out(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    model = Model().eval()
    before, x = snapshot(model), torch.randn(3, 60, I, dtype=torch.float64)
    with fastrnn.GradientMonitor(model) as monitor:
        model(x).sum().backward()
    found = {p.name: p for p in fastrnn.prescribe(monitor.report())}["gated"]
    new = found.apply(model)
    assert not found.in_place and new is not model and type(model.rnn) is fastrnn.RNN and not changed(model, before)
    assert type(new.rnn) is fastrnn.GRU and new.same[0] is new.rnn and torch.equal(new.out.weight, model.out.weight)
    for name in ("input_size", "hidden_size", "num_layers", "bidirectional", "batch_first", "dropout", "training"):
        assert getattr(new.rnn, name) == getattr(model.rnn, name)
    assert new.rnn.weight_hh_l0.dtype == torch.float64 and new(x).shape == (3, 1)


def test_a_gate_without_bias_gets_one():
    rnn = seeded(lambda: fastrnn.LSTM(I, H, bias=False))
    new = prescribed(rnn)["biased"].apply(rnn)
    assert new is not rnn and not rnn.bias and new.bias and torch.equal(new.weight_hh_l0, rnn.weight_hh_l0)
    forget = new.bias_ih_l0.chunk(4)[1]
    assert float(forget.detach().min()) >= 0 and float(forget.detach().max()) <= math.log(59)  # log U(1, 59)


def test_layer_norm_keeps_the_weights():
    rnn = seeded(lambda: fastrnn.RNN(I, H), steep)
    new = prescribed(rnn)["layer_norm"].apply(rnn)
    assert new.layer_norm is True and rnn.layer_norm is False
    assert torch.equal(new.weight_hh_l0, rnn.weight_hh_l0) and hasattr(new, "ln_hh_l0")


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_gated_cell_gets_layer_norm_and_chrono_first(cell):
    rnn = seeded(lambda: getattr(fastrnn, cell)(I, H))
    before = snapshot(rnn)
    first, second = fastrnn.prescribe(report_of(rnn))
    assert (first.name, second.name) == ("normed", "chrono") and not first.in_place and second.in_place
    assert first.quantity == "memory" and f"{first.number:.1f} of 60" in first.advice
    new = first.apply(rnn)
    assert new.layer_norm is True and not rnn.layer_norm and not changed(rnn, before)
    assert torch.equal(new.weight_hh_l0, rnn.weight_hh_l0) and torch.equal(new.weight_ih_l0, rnn.weight_ih_l0)
    assert first.number < 30 <= prescribed_memory(new) <= 60
    assert "normed" not in prescribed(seeded(lambda: getattr(fastrnn, cell)(I, H, layer_norm=True)))


def test_in_place_keeps_what_an_optimiser_refers_to_and_a_copy_does_not():
    rnn = seeded(lambda: fastrnn.GRU(I, H))
    optimizer = torch.optim.Adam(rnn.parameters(), lr=0.1)
    rnn(torch.randn(5, 1, I))[0].sum().backward()
    optimizer.step()
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for found in fastrnn.prescribe(report_of(rnn)):
        new = found.apply(rnn)
        same = [a is b for a, b in zip(new.parameters(), held, strict=False)]
        assert all(same) if found.in_place else not any(same)
        assert all(a is b for a, b in zip(rnn.parameters(), held, strict=True))
    assert all(torch.equal(v, state[p][k]) for p, s in optimizer.state.items() for k, v in s.items())


def test_an_explosion_is_clipped_at_the_norm_where_it_starts():
    rnn = seeded(lambda: fastrnn.RNN(I, H), large)
    first, *_ = fastrnn.prescribe(report_of(rnn))
    assert first.name == "clip" and first.apply(rnn) is rnn and rnn.clip_state_grad_norm == first.number
    assert report_of(rnn)[0].total.max() <= 60 and report_of(rnn)[0].clip_rate > 0


def test_a_bound_that_clips_everything_gets_larger():
    rnn = seeded(lambda: fastrnn.RNN(I, H, clip_state_grad_norm=1e-3))
    found = prescribed(rnn, loss=torch.sum)["larger_bound"]
    found.apply(rnn)
    assert found.quantity == "clip_rate" and found.number > 0.9 and rnn.clip_state_grad_norm == pytest.approx(1e-2)


def test_a_growing_layer_norm_starts_lower():
    rnn = seeded(lambda: fastrnn.RNN(I, H, layer_norm=True))
    with torch.no_grad():
        rnn.ln_hh_l0.fill_(3.0)
        rnn.weight_ih_l0.mul_(0.01)
        rnn.ln_ih_l0.mul_(0.01)
    found = prescribed(rnn)
    if "smaller_norm" not in found:
        pytest.fail(str(report_of(rnn)))
    before = snapshot(rnn)
    found["smaller_norm"].apply(rnn)
    assert changed(rnn, before) == {"ln_hh_l0"} and float(rnn.ln_hh_l0.detach().max()) < 3


def test_layers_share_a_prescription_and_explosions_come_first():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": fastrnn.GRU(I, H, 2), "b": fastrnn.RNN(I, H)})
    large(model["b"])
    x = torch.randn(60, B, I)
    with fastrnn.GradientMonitor(model) as monitor:
        (model["a"](x)[0][-1].sum() + model["b"](x)[0][-1].sum()).backward()
    found = fastrnn.prescribe(monitor.report())
    assert [p.name for p in found] == ["clip", "orthogonal", "normed", "chrono"]
    assert found[2].layers == found[3].layers == ("a.l0", "a.l1")
    found[3].apply(copy.deepcopy(model))


def test_what_does_not_fit():
    rnn = seeded(lambda: fastrnn.RNN(I, H))
    found = prescribed(rnn)
    with pytest.raises(ValueError, match="no rnn; there are gru"):
        found["orthogonal"].apply(fastrnn.GRU(I, H))
    subclass = type("RNN", (fastrnn.RNN,), {})
    with pytest.raises(ValueError, match="is not replaced"):
        found["gated"].apply(subclass(I, H))
    assert fastrnn.prescribe(report_of(seeded(lambda: fastrnn.LSTM(I, H), lambda m: fastrnn.init.chrono_(m, 60)))) == []
