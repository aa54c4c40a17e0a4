"""`tune` asks a module for its calls, and leaves the module, its random numbers and the files of others alone."""

import json
import signal
import sys

import pytest
import torch
from setups import needs_cpu_library
from torch import nn

import fastrnn
from fastrnn import evidence
from fastrnn.__main__ import main
from fastrnn.evidence import records
from fastrnn.tuning import command, trial
from fastrnn.tuning import search as tuning
from fastrnn.tuning.job import Job

JOB = Job("cpu", "gru", "float32", 8, 8, 2, True, torch.get_num_threads())


class Named(fastrnn.LSTM):
    """A subclass with arguments of its own."""

    def forward(self, x, words, scale=1.0):
        return super().forward(scale * x, lengths=torch.tensor([len(word) for word in words]))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.rnn = nn.BatchNorm1d(2), nn.Dropout(0.5), Named(2, 3)

    def forward(self, x):
        return self.rnn(words=["a", "bcd"], x=self.drop(self.norm(x)))


def test_a_models_calls_are_those_that_its_networks_make_and_it_stays_as_it_was():
    model, x = Model(), torch.randn(4, 2, 2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    with fastrnn.GradientMonitor(model) as monitor:
        watch = model.rnn._watch
        ((module, request),) = tuning.calls_of(model, (x,), {})
        assert model.rnn._watch is watch and len(monitor.report()) == 0
    assert module is model.rnn and request.features == {"lengths"} and (request.steps, request.batch) == (4, 2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator) and "_watch" not in vars(model.rnn)
    with pytest.raises(TypeError):
        tuning.calls_of(model, (x, 1), {})
    assert "_watch" not in vars(model.rnn)


CALLS = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {}),
    "unbatched": ({}, {}),
    "packed": ({}, {}),
    "clip": ({"clip_state_grad_norm": 1.0}, {}),
    "resets": ({}, {"reset_mask": torch.zeros(5, 3, dtype=torch.bool)}),
    "tap": ({}, {"tap": torch.zeros(1, 2, 2, 5, 3, requires_grad=True)}),
    "projection": ({"proj_size": 2}, {}),
}


@needs_cpu_library
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_told_in_the_same_words_on_every_path(name, gradients, monkeypatch):
    options, call = CALLS[name]
    module = fastrnn.LSTM(4, 6, backend="cpu", **options)
    x = torch.randn(*((3, 5) if name == "batch first" else (5,) if name == "unbatched" else (5, 3)), 4)
    if name == "packed":
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 5, 1]), enforce_sorted=False)
    told = []

    def request():
        ((_, found),) = told
        told.clear()
        return found

    monkeypatch.setitem(vars(module), "_watch", tuning._Listener(module, told))
    with torch.set_grad_enabled(gradients):
        module(x, **call)
        by_operation = request()
        monkeypatch.setattr("fastrnn.network.takes", lambda *sizes: False)
        module(x, **call)
    assert by_operation == request()


@pytest.mark.parametrize("module", [None, "lstm", fastrnn.GRU])
def test_what_is_no_module_is_refused(module):
    with pytest.raises(TypeError, match="tune takes a module and the arguments of its call"):
        fastrnn.tune(module, torch.zeros(2, 1, 2))


def test_meta_tensors_cannot_be_measured(capsys):
    with pytest.raises(ValueError, match="on meta tensors"):
        fastrnn.tune(fastrnn.GRU(2, 3, device="meta"), torch.zeros(2, 1, 2, device="meta"))
    with pytest.raises(SystemExit):
        main(["tune", "--device", "meta"])
    assert "there is no device 'meta' here" in capsys.readouterr().err


def test_the_index_of_a_device_is_kept(monkeypatch):
    """Two GPUs without one: the command chooses the one that was asked for, the child that of its parent."""
    chosen = []

    class Gpus:
        current_device = staticmethod(lambda: 1)
        set_device = staticmethod(chosen.append)

    monkeypatch.setattr(torch, "get_device_module", lambda device: Gpus)
    monkeypatch.setattr(command, "_show", lambda options: None)
    monkeypatch.setattr(command, "_device", torch.device)
    assert main(["tune", "--device", "cuda:1", "--show"]) == 0 and chosen == [1]
    job = JOB._replace(device="meta")._asdict()
    trial.answer({"job": job, "candidate": "reference", "seconds": 0.0, "gpu": 3}, {}, lambda name: None)
    assert chosen == [1, 3]


def test_a_folder_for_out_is_made_when_it_is_written_and_not_before(tmp_path, capsys):
    assert main(["tune", "--out", str(tmp_path / "new/record.json"), "--show"]) == 0
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["tune", "--out", str(tmp_path / "file/record.json")])
    assert capsys.readouterr().err.count("\n") == 1


def test_forget_removes_records_alone(evidence_in, monkeypatch, capsys):
    entry = records.Entry(evidence.key_of(JOB.request()), "cpu", "measured", "2026-12-01", "torch.nn", (0.5, 0.4, 0.6))
    assert evidence.keep(entry, JOB.threads) is None
    mine = evidence_in / "records/2024/results.json"
    mine.parent.mkdir()
    mine.touch()
    assert main(["tune", "--forget"]) == 0 and "1 records removed" in capsys.readouterr().out
    assert [path for path in evidence_in.rglob("*") if path.is_file()] == [mine]

    def refused():
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(records, "forget", refused)
    assert main(["tune", "--forget"]) == 2 and "Permission denied" in capsys.readouterr().err


MESSAGES = """
import os, signal, sys, time
print("{}", flush=True)
sys.stdin.readline()
%s
time.sleep(100)
"""


@needs_cpu_library
@pytest.mark.parametrize(("does", "answer"), [
    ("print(5, flush=True)", {"broken": "killed after 30 s", "blame": "cpu"}),
    ("os.kill(os.getpid(), signal.SIGRTMIN + 1)",
     {"broken": f"its process ended with signal {getattr(signal, 'SIGRTMIN', 0) + 1}", "blame": "cpu"}),
    ("", {"cannot": "the time is up"}),
])  # fmt: skip
@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="this system has no real-time signals")
def test_a_child_that_says_nothing_of_use(does, answer):
    search = tuning.Search(60.0, evidence.keep, (sys.executable, "-c", MESSAGES % does))
    search.deadline = 0.0 if "time" in answer.get("cannot", "") else search.deadline
    assert search._ask(JOB, "cpu") == answer
    assert search.child is None


def test_every_wrong_value_in_a_record_is_not_believed(evidence_in):
    """Each field of the file with each value that is of another type, or out of its range."""
    entry = records.Entry(evidence.key_of(JOB.request()), "cpu", "measured", "2026-12-01", "torch.nn", (0.5, 0.4, 0.6))
    here = records.where("cpu", JOB.threads)
    records.save(here, entry)
    file = records.path(here, entry.key, entry.candidate)
    text = file.read_text()
    numbers = [-1, 1.5, 10**400, float("nan"), float("inf")]
    wrong = [None, "", "\ud800", "\x1b[2J", "x" * 1000, [], [[]], {}, {"a": 1}, *numbers]

    def places(part, way=()):
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            yield (*way, key)
            yield from places(part[key], (*way, key))

    fields = list(places(json.loads(text)))
    assert len(fields) > 20
    for way in fields:
        for value in (*wrong, True, "9999-99-99"):
            found = json.loads(text)
            part = found
            for key in way[:-1]:
                part = part[key]
            if part[way[-1]] is value or (isinstance(part[way[-1]], str) and value in ("9999-99-99", "")):
                continue  # a text like another one; the date is below
            part[way[-1]] = value
            file.write_text(json.dumps(found))
            assert entry not in records.load(here), (way, value)
    for field, value in (("date", ""), ("date", "9999-99-99"), ("against", ""), ("against", "torch")):
        found = json.loads(text)
        found["entries"][0][field] = value
        file.write_text(json.dumps(found))
        assert records.load(here) == []
