"""`tune`: what is asked, recorded and used. `test_misbehaving_candidates.py` has the candidates that fail."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from setups import needs_cpu_library

import fastrnn
from fastrnn import evidence
from fastrnn.__main__ import main
from fastrnn.tuning import search as tuning
from fastrnn.tuning.job import Job

COUNT = torch.get_num_threads()
THREADS = f"{COUNT} thread{'s' * (COUNT > 1)}"
JOB = Job("cpu", "gru", "float32", 8, 8, 2, True, COUNT)
pytestmark = needs_cpu_library


def test_a_child_that_does_not_start_is_an_error_and_no_candidates_fault(evidence_in):
    search = tuning.Search(60.0, evidence.keep, (sys.executable, "-c", "import sys; sys.exit('no torch here')"))
    with pytest.raises(RuntimeError, match="does not start: no torch here"):
        search.bucket(tuning.Bucket((JOB,)), "cpu")
    assert not list(evidence_in.rglob("*.json"))


def ratios(*values):
    """A search whose candidates take these shares of the rival's time, one after the other, as the jobs come."""

    class Scripted(tuning.Search):
        asked = ()

        def _ask(self, job, candidate):
            self.asked = (*self.asked, (job.steps, job.batch))
            median = values[min(len(self.asked), len(values)) - 1]
            return {"ratio": [median, median - 0.01, median + 0.01]}

    return Scripted(60.0, lambda entry, threads: None)


def rungs(start, *steps):
    return tuning.Ladder(tuple(tuning.Bucket((JOB._replace(steps=T),)) for T in steps), start)


@pytest.mark.parametrize(("values", "asked"), [
    ((0.5, 0.5), [16, 8]),  # wins, so shorter calls are tried
    ((0.5, 1.5), [16, 8]),
    ((1.5, 1.5, 0.5), [16, 32, 128]),  # loses, so longer ones are
    ((1.5, 0.5), [16, 32]),
])  # fmt: skip
def test_a_ladder_looks_for_the_shortest_call_that_gains(values, asked):
    search = ratios(*values)
    results = list(search.ladder(rungs(1, 8, 16, 32, 128), "cpu"))
    assert [steps for steps, _ in search.asked] == asked == [r.entry.key.steps for r in results]


def test_the_slowest_corner_of_a_bucket_counts_and_a_loss_ends_it():
    corners = tuning.Bucket(tuple(JOB._replace(batch=B) for B in (2, 9, 16)))
    assert ratios(0.3, 0.9, 0.5).bucket(corners, "cpu").entry.ratio[0] == 0.9
    search = ratios(1.5, 0.1)
    assert search.bucket(corners, "cpu").entry.ratio[0] == 1.5 and len(search.asked) == 1


def test_the_standard_set_has_jobs_of_one_bucket_in_each_bucket():
    ladders = tuning.standard_set("cpu", 2)
    assert len(ladders) > 200
    for ladder in ladders:
        for bucket in ladder.rungs:
            assert {evidence.key_of(job.request()) for job in bucket.jobs} == {bucket.key}
        assert [b.key.steps for b in ladder.rungs] == sorted({b.key.steps for b in ladder.rungs})


def test_the_standard_set_of_one_kind():
    ladders = tuning.standard_set("cpu", 2, ("gru", "lstm"), ("float32",), ("projected", "packed_projected"))
    jobs = [job for ladder in ladders for bucket in ladder.rungs for job in bucket.jobs]
    assert {job.cell for job in jobs} == {"lstm"} and all(job.proj_size == job.hidden_size // 2 for job in jobs)
    assert {job.filled for job in jobs} == {None, 0.5} and min(job.steps for job in jobs) == 1


@pytest.mark.slow
def test_tune_measures_the_calls_of_a_model_and_auto_follows(evidence_in, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = fastrnn.GRU(3, 8, num_layers=2), fastrnn.LSTM(8, 4, bidirectional=True)

        def forward(self, x, lengths):
            return self.second(self.first(x)[0], lengths=lengths)[0]

    model, x, lengths = Model(), torch.randn(20, 4, 3), torch.tensor([20, 3, 4, 5])
    results = fastrnn.tune(model, x, lengths=lengths, minutes=5)
    assert {(r.entry.key.cell, r.entry.key.kind, r.entry.key.gradients) for r in results} == {
        (cell, kind, mode) for cell, kind in (("gru", "plain"), ("lstm", "extras")) for mode in (False, True)
    }
    assert {r.entry.verdict for r in results} == {"measured"} and "not kept" not in str(results)
    evidence.clear()
    explained = str(fastrnn.explain(model.second, torch.randn(20, 4, 8), lengths=lengths))
    assert "measured here" in explained and "of the loop's time" in explained
    with pytest.raises(ValueError, match="calls no fastrnn"):
        fastrnn.tune(torch.nn.Linear(2, 3), torch.randn(2))


@pytest.mark.slow
def test_tune_measures_a_users_cell(evidence_in, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = fastrnn.Recurrent(fastrnn.cells.leaky_rnn, 3, 8, bidirectional=True)
    call = {"input": torch.randn(20, 4, 3), "noise": torch.randn(20, 4, 8)}
    results = fastrnn.tune(model, **call, minutes=5)
    assert [(r.entry.verdict, r.entry.candidate, r.entry.against) for r in results] == [
        ("measured", "cpu", "reference")
    ] * 2
    name = results[0].entry.key.cell
    assert name.startswith("leaky_rnn-")
    evidence.clear()
    assert "measured here" in str(fastrnn.explain(model, **call))
    other = fastrnn.Recurrent(fastrnn.cells.leaky(alpha=0.5, learnable=False), 3, 8)
    assert "measured here" not in str(fastrnn.explain(other, **call))  # of the same name


def command(*arguments, **environment):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.Popen(
        [sys.executable, "-m", "fastrnn", "tune", *arguments], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # What runs in the background of a shell script ignores SIGINT, unless it is told to heed it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_measures_shows_and_forgets(evidence_in, capsys):
    tune = command("--minutes", "0.05", "--cell", "gru")
    out, err = tune.communicate(timeout=120)
    assert tune.returncode == 0, err
    assert "the time is up" in out and "gru float32 plain training" in out
    count = len(list(evidence_in.rglob("*.json")))
    assert main(["tune", "--show"]) == 0
    out = capsys.readouterr().out
    assert f"{THREADS}, torch" in out and out.count("measured here") >= 1 and count >= 1
    assert main(["tune", "--forget"]) == 0
    assert f"{count} records removed" in capsys.readouterr().out and not list(evidence_in.rglob("*.json"))


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(tmp_path):
    tune = command("--minutes", "5", "--cell", "gru", FASTRNN_CACHE=str(tmp_path), OMP_NUM_THREADS="1")
    deadline = time.monotonic() + 100
    while not list(tmp_path.rglob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    tune.send_signal(signal.SIGINT)
    out, err = tune.communicate(timeout=60)
    assert tune.returncode == 0, err
    assert "results" in out and "broken" not in out and list(tmp_path.rglob("*.json"))
