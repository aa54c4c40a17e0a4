"""The experiments: a run, resuming it, the page that shows the results, and whether the committed one is up to date."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench/ and experiments/ are not installed

from experiments import __main__ as command
from experiments import page, store, table, training

SMALL = {"T": 12, "batch": 4, "hidden": 3, "steps": 4, "every": 2}
TINY = table.Experiment(
    title="Tiny",
    about="Nothing to see.",
    base=SMALL,
    arms={"LSTM": {}, "RNN": {"cell": "RNN", "module": {"clip_state_grad_norm": 0.1}}},
    points={"lr 0.1": {"optimizer_settings": {"lr": 0.1}}, "lr 1e-3": {"optimizer_settings": {"lr": 1e-3}}},
    claims=(("Four steps are enough", lambda r: r.share("solved", "LSTM") == 1),),
    seeds=2,
    full={"T": 14},
)


@pytest.fixture
def tiny(monkeypatch):
    pytest.importorskip("tqdm")
    experiments = {"tiny": TINY}
    for module in (command, store, page, table):
        monkeypatch.setattr(module, "EXPERIMENTS", experiments)
    return experiments


def settings(**change):
    return table.BASE | SMALL | change


# ---------------------------------------------------------------------------------------------------------- one run


@pytest.mark.parametrize("task", training.TASKS)
def test_every_task_trains(task):
    if task == "digits":
        pytest.importorskip("sklearn")
    result = training.train(settings(task=task, T=64 if task == "digits" else 12, goal=-1.0), seed=0)
    assert result["steps"] == 4 and result["solved"] is None
    assert [row[0] for row in result["curve"]] == [2, 4] and [row[0] for row in result["monitor"]] == [0, 2, 4]
    assert result["curve"][-1][3] == result["score"] > 0
    assert all(verdict in ("vanishing", "healthy", "exploding") for _, verdict, _, _ in result["monitor"])


def test_one_seed_gives_one_result_and_another_another():
    first, again, other = (training.train(settings(), seed) for seed in (0, 0, 1))
    assert first == again != other


def test_the_monitor_changes_nothing(monkeypatch):
    watched = training.train(settings(), 0)
    monkeypatch.setattr(training, "diagnose", lambda *_: ("healthy", 1.0, 12))
    assert training.train(settings(), 0)["curve"] == watched["curve"]


def test_a_run_stops_where_it_meets_its_goal():
    result = training.train(settings(goal=100.0), 0)
    assert result["solved"] == result["steps"] == 2


def test_a_run_that_leaves_the_numbers_has_diverged():
    wild = {"optimizer": "SGD", "optimizer_settings": {"lr": 1e30}, "clip_grad_norm": None, "cell": "RNN"}
    result = training.train(settings(module={"nonlinearity": "relu"}, steps=50, every=50, **wild), 0)
    assert result["diverged"] and result["solved"] is None and result["score"] is None and result["steps"] < 50
    json.dumps(result, allow_nan=False)


def test_the_settings_reach_the_model():
    model = training.Model(
        settings(
            cell="RNN", init={"xavier_": {}, "identity_": {"scale": 0.5}}, hidden=200,
            module={"nonlinearity": "relu", "clip_state_grad_norm": 0.3},
        )
    )  # fmt: skip
    assert torch.equal(model.rnn.weight_hh_l0, 0.5 * torch.eye(200)) and model.rnn.clip_state_grad_norm == 0.3
    assert (
        model.rnn.weight_ih_l0.abs().max() > 1.1 / 200**0.5
    )  # Xavier's bound is sqrt(6 / 202), the default's 1 / sqrt(H)


def test_scores_against_hand_counts():
    copy = training.TASKS["copy"]
    flat = torch.zeros(32, 5, 9)
    _, target = copy.test({"T": 12})
    assert copy.score(flat, target[:, :5], 12) == pytest.approx(math.log(9) / (10 * math.log(8) / 32))
    scores = torch.eye(4)
    assert training.TASKS["order"].score(scores, torch.tensor([0, 1, 2, 0]), 50) == 0.25
    assert training.TASKS["adding"].score(torch.ones(2, 1), torch.tensor([[1.0], [3.0]]), 100) == pytest.approx(2**0.5)


# ------------------------------------------------------------------------------------------------------ the runner


def test_finished_runs_are_skipped_and_changed_ones_run_anew(tiny, tmp_path, monkeypatch):
    trained = []
    real = command.train
    monkeypatch.setattr(command, "train", lambda s, seed, p: trained.append((s["cell"], seed)) or real(s, seed, p))
    command.run("tiny", seeds=1, folder=tmp_path)
    assert trained == [("LSTM", 0)] * 2 + [("RNN", 0)] * 2
    before = store.path("tiny", False, tmp_path).read_text()
    command.run("tiny", seeds=1, folder=tmp_path)
    assert len(trained) == 4
    command.run("tiny", folder=tmp_path)
    assert trained[4:] == [("LSTM", 1)] * 2 + [("RNN", 1)] * 2
    runs = store.load(store.path("tiny", False, tmp_path))["runs"]
    assert [r["seed"] for r in runs] == [0] * 4 + [1] * 4
    assert all(json.dumps(r) in before for r in runs[:4])
    tiny["tiny"] = table.Experiment(**{**vars(TINY), "arms": {"LSTM": {}, "RNN": {"cell": "GRU"}}})
    command.run("tiny", folder=tmp_path)
    assert trained[8:] == [("GRU", 0)] * 2 + [("GRU", 1)] * 2
    assert len(store.load(store.path("tiny", False, tmp_path))["runs"]) == 8


def test_what_an_interruption_leaves_is_kept(tiny, tmp_path, monkeypatch):
    real, calls = command.train, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(command, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run("tiny", folder=tmp_path)
    assert len(store.load(store.path("tiny", False, tmp_path))["runs"]) == 2
    command.run("tiny", folder=tmp_path)
    assert len(calls) == 3 + 6


def test_full_sizes_have_a_file_of_their_own(tiny, tmp_path):
    command.run("tiny", full=True, seeds=1, folder=tmp_path)
    runs = store.load(tmp_path / "tiny-full.json")["runs"]
    assert {r["settings"]["T"] for r in runs} == {14} and not (tmp_path / "tiny.json").exists()


def test_an_unknown_name_is_refused(tiny, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["nope"])
    assert end.value.code == 2 and "unknown experiment nope; there are tiny" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- the page


def record(arm, point, seed, **result):
    """A finished run of TINY with made-up results."""
    run = next(r for r in table.plan(TINY) if (r.arm, r.point, r.seed) == (arm, point, seed))
    made = {
        "seconds": 30.0, "solved": None, "diverged": False, "score": 0.5, "steps": 4,
        "curve": [[2, 1.0, 1.0, 0.7], [4, 1.0, 1.0, 0.5]],
        "monitor": [[0, "vanishing", 0.5, 3], [4, "healthy", 0.9, 12]],
    }  # fmt: skip
    return {**run._asdict(), **made, **result}


def test_the_page_counts(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    runs = [
        record("LSTM", "lr 0.1", 0, solved=2, score=0.01),
        record("LSTM", "lr 1e-3", 0, solved=4, score=0.03),
        record("RNN", "lr 0.1", 0, diverged=True, score=None, curve=[[2, None, None, None]]),
        record("RNN", "lr 1e-3", 0, monitor=[[0, "healthy", 1.0, 12], [4, "vanishing", None, 0]]),
    ]
    store.save(store.path("tiny", False, tmp_path), runs)
    text = page.write(tmp_path, tmp_path)
    assert text == (tmp_path / "experiments.md").read_text() and (tmp_path / "experiments_tiny.png").exists()
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert rows["LSTM"] == [
        "2", "2 of 2", "3 (2 to 4)", "0.02 (0.01 to 0.03)", "0", "vanishing; gain 0.50", "healthy; gain 0.90",
    ]  # fmt: skip
    assert rows["RNN"][:5] == ["2", "0 of 2", "–", "inf (0.5 to inf)", "1"]
    assert rows["RNN"][5] == "1 vanishing, 1 healthy; gain 0.75"
    assert rows["lr 0.1"] == ["1 / 0 / 1", "0 / 1 / 1"]
    assert "Four steps are enough: **holds**" in text
    assert "**1 of 2 seeds run**" in text and ", 2 min on" in text


def test_a_claim_that_fails_says_so_and_one_without_runs_is_open(tiny, tmp_path):
    runs = [record("LSTM", point, 0) for point in TINY.points]
    store.save(store.path("tiny", False, tmp_path), runs)
    text = page.write(tmp_path, tmp_path, pictures=False)
    assert "Four steps are enough: **open, not every arm has run**" in text
    assert "**0 to 1 of 2 seeds run**" in text
    store.save(store.path("tiny", False, tmp_path), [*runs, record("RNN", "lr 0.1", 0)])
    assert "Four steps are enough: **does not hold**" in page.write(tmp_path, tmp_path, pictures=False)


def test_more_is_more_than_chance(tiny, tmp_path):
    """The tail of the hypergeometric distribution by hand: 5 / 210 for 4 of 5 to none, 4 / 56 for 3 of 4 to none."""

    def results(hits, others, n):
        arms = {"a": [1] * hits + [None] * (n - hits), "b": [1] * others + [None] * (n - others)}
        made = page.Results("tiny", folder=tmp_path)
        made.runs = [{"arm": arm, "point": "", "solved": s} for arm, solved in arms.items() for s in solved]
        return made

    assert results(4, 0, 5).more("solved", "a", than="b") and not results(0, 4, 5).more("solved", "a", than="b")
    assert not results(3, 0, 4).more("solved", "a", than="b") and not results(2, 2, 5).more("solved", "a", than="b")


def test_an_experiment_without_results_says_so(tiny, tmp_path):
    assert "Not run yet: `python -m experiments tiny`" in page.write(tmp_path, tmp_path, pictures=False)


# --------------------------------------------------------------------------------------------- what is committed


@pytest.mark.parametrize("name", table.EXPERIMENTS)
def test_committed_results_are_the_tables(name):
    """Every committed run is one that the table asks for, with exactly these settings."""
    file = store.path(name, False)
    runs = store.load(file)["runs"]
    assert runs and len(store.done(file, name, False)) == len(runs)
    for run in runs:
        assert run["curve"][-1][0] == run["steps"] <= run["settings"]["steps"]
        assert run["solved"] is None or run["score"] <= run["settings"]["goal"]


def test_the_page_is_up_to_date(tmp_path):
    assert page.write(docs=tmp_path, pictures=False) == (ROOT / "docs" / "experiments.md").read_text()
    for name in table.EXPERIMENTS:
        assert (ROOT / "docs" / f"experiments_{name}.png").exists()
