"""The doctor's outlook: whether a training learns, is stuck, overfits or diverges, by its losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn.monitoring import checkup
from fastrnn.monitoring.diagnosis import Report
from fastrnn.monitoring.doctor import constant_loss

T, B = 12, 32


class Model(nn.Module):
    def __init__(self, rnn, outputs=1):
        super().__init__()
        self.rnn, self.out = rnn, nn.Linear(rnn.hidden_size, outputs)

    def forward(self, x):
        return self.out(self.rnn(x)[0][-1])


def squared_error(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def examined(x, target, lr=0.02, steps=40, **options):
    torch.manual_seed(0)
    model = Model(fastrnn.init.chrono_(fastrnn.GRU(1, 8), T))
    return fastrnn.doctor(model, (x, target), squared_error, steps=steps,
                          optimizer=lambda p: torch.optim.Adam(p, lr=lr), **options)  # fmt: skip


def data():
    torch.manual_seed(1)
    x = torch.rand(T, B, 1)
    return x, 300 + x[-1]


def test_the_constant_answer_is_found():
    x, target = data()
    found = examined(x, target, steps=1).constant
    assert found == pytest.approx(float(target.var(correction=0)), rel=0.05)
    assert examined(x, target, steps=1, constant=7.0).constant == 7.0


def test_the_constant_answer_of_classes():
    torch.manual_seed(0)
    model, share = Model(fastrnn.LSTM(1, 4), 3), torch.tensor([0.5, 0.3, 0.2])
    target = torch.repeat_interleave(torch.arange(3), (100 * share).int())
    batch = torch.randn(T, 100, 1), target
    found = constant_loss(model, [batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert found == pytest.approx(float(-(share * share.log()).sum()), rel=0.01)


def test_the_constant_answer_is_fitted_by_the_parameters_that_get_a_gradient(monkeypatch):
    given, LBFGS = [], torch.optim.LBFGS

    def noted(parameters, **options):
        given.extend(parameters)
        return LBFGS(given, **options)

    monkeypatch.setattr(torch.optim, "LBFGS", noted)
    model = Model(fastrnn.GRU(1, 8))
    constant_loss(model, [data()], squared_error)
    assert [id(p) for p in given] == [id(p) for p in model.out.parameters()]


def test_packed_outputs_are_zeroed_too():
    torch.manual_seed(0)
    rnn = fastrnn.GRU(1, 4)
    packed = pack_sequence([torch.randn(n, 1) for n in (5, 3)])
    found = constant_loss(rnn, [packed], lambda m, b: (m(b)[0].data - 1).square().mean())
    assert found == pytest.approx(1.0)


def test_a_training_that_learns_and_one_that_is_stuck():
    x, target = data()
    learns = examined(x, target - 300, steps=150)
    assert learns.outlook(learns.base) == "learns" and "As it is, it learns after 150 steps" in str(learns)
    stuck = examined(x, target - 300 + torch.randn(B, 1), lr=1e-6, constant=0.3)
    assert stuck.outlook(stuck.base) == "stuck" and stuck.base.worst.verdict == "healthy"
    assert "its gradient is healthy, so look elsewhere: the learning rate" in stuck.explanation()


def trial(loss, held_out=None):
    return checkup.Trial("as it is", None, Report(), Report(), [loss], held_out)


@pytest.mark.parametrize(
    ("loss", "held_out", "outlook"),
    [
        (0.95, None, "stuck"), (0.89, None, "learns"), (math.nan, None, "diverges"),
        (0.95, 0.95, "stuck"), (0.95, 0.85, "learns"),  # one lucky batch is not enough to be called stuck
        (0.3, 0.44, "learns"), (0.3, 0.46, "overfits"), (0.3, 2.0, "overfits"), (0.001, 0.2, "learns"),
        (0.3, math.nan, "overfits"), (0.3, math.inf, "overfits"),
    ],
)  # fmt: skip
def test_the_rule(loss, held_out, outlook):
    found = checkup.Checkup([trial(loss, held_out)], constant=1.0)
    assert found.outlook(found.base) == outlook
    if outlook != "diverges":
        assert outlook in found.explanation().split(" after ")[0] and f"{loss:.4g}" in found.explanation()


def test_without_the_loss_of_a_constant_answer():
    found = checkup.Checkup([trial(0.3)])
    assert found.outlook(found.base) == "unknown"
    assert found.explanation() == "has no loss to be compared with after 1 steps (loss 0.3); no gradient was recorded"


def test_a_loss_below_zero_has_a_bound_below_the_constant():
    found = checkup.Checkup([trial(-2.0)], constant=-2.0)
    assert found.outlook(found.base) == "stuck" and found.outlook(trial(-2.3)) == "learns"


def test_held_out_data_are_seen_in_eval_mode_and_change_nothing():
    x, target = data()
    modes = []

    def loss_fn(model, batch):
        modes.append((model.training, torch.is_grad_enabled(), len(batch[1])))
        return squared_error(model, batch)

    torch.manual_seed(0)
    model = Model(fastrnn.init.chrono_(fastrnn.GRU(1, 4), T))
    with_it = fastrnn.doctor(model, (x, target), loss_fn, steps=2, held_out=(x[:, :5], target[:5]))
    assert [m for m in modes if m[2] == 5] == [(False, False, 5)] * len(with_it)
    without = fastrnn.doctor(model, (x, target), squared_error, steps=2)
    assert with_it.base.losses == without.base.losses and without.base.held_out is None
    assert with_it.base.held_out > 0 and "on held-out data" in str(with_it)
