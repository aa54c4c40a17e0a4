"""The doctor: its trials, what it leaves alone, and the command."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrnn
from fastrnn.__main__ import main

T, B = 60, 8


class Model(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.drop, self.out = rnn, nn.Dropout(0.1), nn.Linear(16, 1)

    def forward(self, x):
        return self.out(self.drop(self.rnn(x)[0][-1]))


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def sick():
    torch.manual_seed(0)
    return Model(fastrnn.RNN(2, 16)), (torch.randn(T, B, 2), torch.randn(B, 1))


def test_every_prescription_is_tried_from_the_same_start(sick):
    checkup = fastrnn.doctor(*sick, loss_fn, steps=4)
    assert [trial.name for trial in checkup] == ["as it is", *(p.name for p in checkup.prescriptions)]
    assert {"orthogonal", "gated"} <= {trial.name for trial in checkup}
    assert all(len(trial.losses) == 4 for trial in checkup)
    again = fastrnn.doctor(*sick, loss_fn, steps=4)
    assert [trial.losses for trial in again] == [trial.losses for trial in checkup]
    base, gated = checkup.base, next(trial for trial in checkup if trial.name == "gated")
    assert base.worst.verdict == "vanishing" and gated.worst.verdict == "healthy"
    helps = checkup.helps(gated)
    assert helps["horizon"] and helps["verdict"]
    assert not any(checkup.helps(base).values())
    text = str(checkup)
    assert "better than as it is" in text and all(p.advice in text for p in checkup.prescriptions)
    assert checkup.best().loss == min(trial.loss for trial in checkup)


def test_the_model_its_gradients_its_mode_and_the_random_state_are_as_before(sick):
    model, (x, target) = copy.deepcopy(sick[0]).eval(), sick[1]
    model.rnn.train()
    x = x.clone().requires_grad_()
    model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads, x_grad = [p.grad.clone() for p in model.parameters()], x.grad.clone()
    modes, objects = [m.training for m in model.modules()], list(model.parameters())
    generator, python = torch.get_rng_state(), random.getstate()
    fastrnn.doctor(model, (x, target), loss_fn, steps=2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(x.grad, x_grad) and all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    assert [m.training for m in model.modules()] == modes and type(model.rnn) is fastrnn.RNN
    assert torch.equal(torch.get_rng_state(), generator) and random.getstate() == python
    assert model.rnn._watch is None


def test_batches_may_be_drawn_by_step(sick):
    seen = []

    def draw(step):
        seen.append(step)
        return torch.randn(T, B, 2), torch.zeros(B, 1)

    checkup = fastrnn.doctor(sick[0], draw, loss_fn, steps=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trials, constant = seen[: 3 * len(checkup)], seen[3 * len(checkup) :]
    assert trials == [0, 1, 2] * len(checkup) and set(constant) == {0, 1, 2}
    # nothing is learnt at rate 0, so the same seeds give the losses that the caller can compute
    torch.manual_seed(0)
    model = copy.deepcopy(sick[0]).train()
    assert checkup.base.losses[0] == pytest.approx(loss_fn(model, draw(0)).item())


def test_a_loss_that_is_not_finite_ends_the_trial(sick):
    def bad(model, batch):
        return loss_fn(model, batch) * (math.nan if bad.calls > 1 else 1)

    def counted(model, batch):
        bad.calls += 1
        return bad(model, batch)

    bad.calls = 0
    checkup = fastrnn.doctor(*sick, counted, steps=5)
    assert len(checkup.base.losses) == 2 and checkup.base.loss == math.inf


def test_a_healthy_model_needs_nothing(sick):
    torch.manual_seed(0)
    model = Model(fastrnn.init.chrono_(fastrnn.GRU(2, 16), T))
    checkup = fastrnn.doctor(model, sick[1], loss_fn, steps=2)
    assert len(checkup) == 1 and checkup.prescriptions == [] and "as it is" in str(checkup)


def test_bad_arguments(sick):
    with pytest.raises(ValueError, match="steps is a count"):
        fastrnn.doctor(*sick, loss_fn, steps=0)
    with pytest.raises(ValueError, match="holds no fastrnn"):
        fastrnn.doctor(nn.Linear(2, 2), sick[1], loss_fn)


SCRIPT = """
import torch, fastrnn

def factory():
    rnn = fastrnn.LSTM(2, 8)
    x = torch.randn(30, 4, 2)
    return rnn, x, lambda model, x: model(x)[0][-1].square().mean()

def wrong():
    return 3

if __name__ == "__main__":
    raise SystemExit("this is imported, not run")
"""


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    script = tmp_path / "patient.py"
    script.write_text(SCRIPT)
    picture = tmp_path / "doctor.png"
    assert main(["doctor", f"{script}:factory", "--steps", "3", "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "chrono" in out and "as it is" in out and picture.stat().st_size > 10_000
    for place, message in (
        (f"{script}:nothing", "no function"),
        ("nowhere.py:f", "exists"),
        (f"{script}:wrong", "loss"),
    ):
        assert main(["doctor", place, "--out", str(picture)]) == 2
        assert message in capsys.readouterr().err
