"""What cannot be measured is refused before the measurement, and is no candidate's fault."""

import pytest
import torch
from setups import needs_cpu_library

import fastrnn
from fastrnn.__main__ import main
from fastrnn.tuning import trial
from fastrnn.tuning.job import Job


@pytest.mark.parametrize("options", [
    ("--minutes", "-1"), ("--minutes", "nan"), ("--minutes", "0"), ("--threads", "0"), ("--threads", "-3", "--show"),
    ("--device", "nonsense"), ("--device", "xla", "--show"), ("--out", "/"),
])  # fmt: skip
def test_a_bad_option_is_refused_in_one_line(options, capsys, evidence_in):
    with pytest.raises(SystemExit) as refused:
        main(["tune", *options])
    assert refused.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(evidence_in.rglob("*.json"))


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan"), "1", None])
def test_minutes_are_a_positive_number(minutes):
    with pytest.raises(ValueError, match="minutes should be a positive number"):
        fastrnn.tune(fastrnn.GRU(2, 3), torch.zeros(2, 1, 2), minutes=minutes)


def test_an_empty_batch_is_nothing_to_measure(evidence_in):
    with pytest.raises(ValueError, match="with a batch that is not empty"):
        fastrnn.tune(fastrnn.GRU(2, 3), torch.zeros(2, 0, 2))
    assert not list(evidence_in.rglob("*.json"))


@needs_cpu_library
def test_a_call_that_cannot_be_made_says_nothing_about_the_candidate():
    def say(name):
        say.last = name

    say.last = "aten"  # of an earlier call
    job = Job("cpu", "gru", "float32", 8, 8, 0, True, torch.get_num_threads())._asdict()
    answer = trial.answer({"job": job, "candidate": "cpu", "seconds": 0.0}, {}, say)
    assert set(answer) == {"cannot"}
