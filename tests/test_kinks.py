"""The comparison of `tune` and of the first use where a derivative jumps: of a ReLU, near zero."""

import pytest
import torch

import fastrnn
from fastrnn.evidence import agreement
from fastrnn.tuning import job as jobs
from fastrnn.tuning import trial

EPS = agreement.EPS[torch.float32]
JOB = jobs.Job("cpu", "rnn_relu", "float32", 8, 3, 4, True, torch.get_num_threads())


def near(function, *values):
    """`near_kinks` of the sum of a function, at a sequence of one number for each value."""

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    return agreement.near_kinks(gradient, torch.tensor(values, dtype=torch.float64).view(1, -1, 1), EPS).tolist()


def test_sequences_near_a_jump_of_the_derivative_are_found():
    assert near(torch.relu, 1.0, 1e-7, -2.0, -1e-7, 1e-4) == [False, True, False, True, False]
    assert near(torch.nn.functional.leaky_relu, 1.0, 1e-7) == [False, True]
    assert near(torch.tanh, 1.0, 1e-7, 3.0) == [False, False, False]
    assert near(lambda x: torch.relu(x - 1), 1 + 1e-7, 2.0) == [True, False]
    assert near(lambda x: torch.relu(x - 1), 1 + 1e-7, 1 - 1e-7) == [False, False]  # something must be compared


def test_cells_with_jumps_are_known():
    names = ("lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_leaky_relu", "rnn_elu")
    assert [agreement.has_kinks(name) for name in names] == [False, False, False, True, True, False]
    assert agreement.has_kinks(fastrnn.cells.li_gru.text)  # whose candidate is a ReLU
    assert not agreement.has_kinks(fastrnn.cells.peephole_lstm.text)


@pytest.fixture
def at_the_kink(monkeypatch):
    """In the job's calls, unit 0 of sequence 1 has a pre-activation of some 1e-8 at the first step."""
    module = jobs.build(JOB)
    w, b = module.weight_ih_l0[0].detach(), (module.bias_ih_l0 + module.bias_hh_l0)[0].detach()

    class AtTheKink(jobs.Call):
        def __init__(self, *args):
            super().__init__(*args)
            with torch.no_grad():
                self.x[0, 1] = -b * w / w.square().sum()

    monkeypatch.setattr(trial, "Call", AtTheKink)


def verdicts():
    """Of networks whose sums differ by some roundings, so that the unit is on one side of its kink and on the other."""
    tried = trial.Trial(JOB, lambda name: None)
    found = []
    for roundings in (-4, 4):
        other = jobs.build(JOB)
        other.backend = "reference"
        with torch.no_grad():
            other.bias_hh_l0[0] += roundings * EPS / 4
        results = tried.call(other, True)
        found.append(tried.disagreement(results))
        wrong = results | {"d x": results["d x"] * 1.001}
        assert tried.disagreement(wrong) is not None, "what remains is compared as before"
    return found


def test_a_unit_on_the_other_side_of_its_kink_is_not_wrong(at_the_kink, monkeypatch):
    assert verdicts() == [None, None]
    monkeypatch.setattr(agreement, "near_kinks", lambda gradient, x, eps: torch.zeros(x.shape[-2], dtype=torch.bool))
    assert any(wrong is not None and wrong.startswith("d ") for wrong in verdicts())
