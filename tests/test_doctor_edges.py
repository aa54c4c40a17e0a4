"""The doctor and the prescriptions with models, losses and scripts that are not as they should be, or odd."""

import sys

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrnn
from fastrnn.monitoring import prescription
from fastrnn.monitoring.doctor import errors_placed, load

I, H, T, B = 2, 4, 20, 2
X, TARGET = torch.ones(T, B, I), torch.ones(B, 1)


class Model(nn.Module):
    def __init__(self, rnn, width=H):
        super().__init__()
        self.rnn, self.out = rnn, nn.Linear(width, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0][-1])


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def checked(model, loss=loss_fn, **options):
    torch.manual_seed(0)
    return fastrnn.doctor(model, (X, TARGET), loss, steps=1, constant=1.0, **options)


LOSSES = {
    "a vector": (lambda m, b: m(b[0]), r"scalar tensor, got torch.float32 \[2, 1\]"),
    "a number": (lambda m, b: loss_fn(m, b).item(), "scalar tensor, got a float"),
    "nothing": (lambda m, b: None, "scalar tensor, got a NoneType"),
    "a pair": (lambda m, b: (loss_fn(m, b), 1), "scalar tensor, got a tuple"),
    "whole numbers": (lambda m, b: loss_fn(m, b).long(), r"scalar tensor, got torch.int64 \[\]"),
    "complex": (lambda m, b: loss_fn(m, b) * 1j, r"scalar tensor, got torch.complex64 \[\]"),
    "detached": (lambda m, b: loss_fn(m, b).detach(), "the loss has no gradient"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_none_is_refused(name):
    loss, message = LOSSES[name]
    with pytest.raises(ValueError, match=message):
        checked(Model(fastrnn.RNN(I, H)), loss)


def test_arguments_that_are_none():
    model = Model(fastrnn.RNN(I, H))
    with pytest.raises(TypeError, match="doctor takes a module, got 'lstm'"):
        checked("lstm")
    with pytest.raises(TypeError, match="loss_fn should be a function"):
        checked(model, "mse")
    for optimizer in ("adam", torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(TypeError, match="optimizer should be a function of the parameters"):
            checked(model, optimizer=optimizer)
    with pytest.raises(ValueError, match="clip_grad_norm should be a positive number"):
        checked(model, clip_grad_norm=-1.0)
    with pytest.raises(ValueError, match="the loss has no gradient"):
        checked(Model(fastrnn.RNN(I, H)).requires_grad_(False))
    model.cache = model(X)
    with pytest.raises(ValueError, match="the Model cannot be copied: Only Tensors created explicitly"):
        checked(model)


def test_numpys_random_numbers_are_the_same_in_every_trial_and_kept():
    drawn = []

    def noisy(model, batch):
        drawn.append(numpy.random.rand())
        return loss_fn(model, batch)

    numpy.random.seed(3)
    with torch.no_grad():  # which does not count
        checkup = checked(Model(fastrnn.RNN(I, H)), noisy)
    assert len(checkup) > 1 and len(set(drawn)) == 1
    after = numpy.random.rand()
    numpy.random.seed(3)
    assert after == numpy.random.rand()


def test_a_forced_backend_without_norms_gives_way_in_the_copies():
    model = Model(fastrnn.LSTM(I, H, backend="aten"))
    assert checked(model).base.worst is not None and model.rnn.backend == "aten"


def test_a_direction_with_no_step_to_go_is_not_the_gravest():
    checkup = checked(Model(fastrnn.RNN(I, H, bidirectional=True), 2 * H))
    assert {record.verdict for record in checkup.base.after} == {"vanishing", "unknown"}
    assert "its gradient is vanishing" in checkup.explanation()


SCRIPT = """
import sys
class Patient: pass
def raises(): raise KeyError("boom")
def ends(): sys.exit(0)
def needs(argument): pass
def mixed(): return 1, 2
def losing(): return Patient()
"""


@pytest.mark.parametrize(("script", "factory", "message"), [
    (SCRIPT, "raises", "patient.py, line 4: KeyError: 'boom'"), (SCRIPT, "ends", "patient.py, line 5: SystemExit: 0"),
    (SCRIPT, "needs", "patient.py:needs: TypeError: needs.. missing"), (SCRIPT, "mixed", r"got \(int, int\)"),
    (SCRIPT, "losing", "got Patient"), ("def f(:", "f", "patient.py, line 1: SyntaxError"),
    ("\n1 / 0", "f", "patient.py, line 2: ZeroDivisionError"), ("import sys; sys.exit()", "f", "line 1: SystemExit"),
])  # fmt: skip
def test_a_script_that_fails_is_told_with_its_line(script, factory, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "patient.py"
    file.write_text(script)
    with pytest.raises(ValueError, match=message):
        load(f"{file}:{factory}")


def test_what_the_doctor_says_itself_and_a_missing_package_stay(tmp_path):
    for error in (ValueError("steps is a count"), ImportError("no such package")):
        with pytest.raises(type(error), match=f"^{error}$"), errors_placed(f"{tmp_path}/patient.py:f"):
            raise error


# ---------------------------------------------------------------------------------------------------- prescriptions


def exploding(steps=T):
    rnn = fastrnn.RNN(I, H)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
        rnn.weight_hh_l0.copy_(2 * torch.eye(H))
    return rnn


@pytest.mark.parametrize("loss", [lambda y: y[T // 2].sum(), lambda y: y[: T // 2].sum(), lambda y: y[-1].sum()])
def test_a_bound_is_a_norm_that_arrives_also_where_none_comes_to_the_last_steps(loss):
    rnn = exploding()
    with fastrnn.GradientMonitor(rnn) as monitor:
        loss(rnn(X)[0]).backward()
    first, *_ = fastrnn.prescribe(monitor.report())
    assert first.name == "clip" and first.number == pytest.approx(H**0.5)
    with fastrnn.GradientMonitor(first.apply(rnn)) as monitor:
        loss(rnn(X)[0]).backward()
    assert monitor.report()[0].clip_rate > 0.1


@pytest.mark.parametrize("name", ["layer_norm", "biased"])
def test_a_module_with_more_parameters_keeps_ties_frozen_weights_and_hooks(name):
    """The parameters are the very objects of the copy, so what else is tied to them there remains so."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (fastrnn.GRU(I, H, bias=name != "biased") for _ in range(2))
            self.two.weight_hh_l0 = self.one.weight_hh_l0
            self.one.weight_ih_l0.requires_grad_(False)
            self.seen = []
            self.one.register_forward_hook(lambda *call: seen.append(1))

    seen = []
    model = Tied()
    facts = type("Facts", (), {"T": T})
    asked = prescription.Prescription(name, "", "", 0.0, ("one.l0",), False, {"one": facts})
    new = asked.apply(model)
    assert new is not model and new.one is not model.one and new.one.weight_hh_l0 is not model.one.weight_hh_l0
    assert new.one.weight_hh_l0 is new.two.weight_hh_l0 and not new.one.weight_ih_l0.requires_grad
    assert len(list(new.one.parameters())) > len(list(model.one.parameters()))
    new.one(X)
    assert seen == [1]


def test_a_subclass_is_named_where_it_is_not_replaced():
    model = fastrnn.convert(nn.GRU(I, H, bias=False), keep_type=True)
    asked = prescription.Prescription("biased", "", "", 0.0, ("gru.l0",), False, {"gru": None})
    with pytest.raises(ValueError, match=r"gru is a fastrnn\.compat\.GRU, which is not replaced: only fastrnn.LSTM"):
        asked.apply(model)


def test_the_bound_of_a_stack_leaves_the_top_layer_its_gradient():
    """The lower layer explodes, and what comes to it is a billionth of what comes to the upper one."""
    rnn = fastrnn.RNN(I, H, 2)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
        rnn.weight_hh_l0.copy_(2 * torch.eye(H))
        rnn.weight_hh_l1.copy_(torch.eye(H))
        rnn.weight_ih_l1.copy_(1e-9 * torch.eye(H))
    with fastrnn.GradientMonitor(rnn) as monitor:
        rnn(X)[0][-1].sum().backward()
    report = monitor.report()
    assert [record.verdict for record in report] == ["exploding", "healthy"]
    first, *_ = fastrnn.prescribe(report)
    assert first.name == "clip" and first.layers == ("rnn.l0",) and first.number == pytest.approx(H**0.5)
