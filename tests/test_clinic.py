"""The clinic: its patients are seeded, a resumed run gives the same, and the page counts right."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench/ and experiments/ are not installed

from bench import files
from experiments import clinic, clinic_page
from fastrnn.monitoring import checkup
from fastrnn.monitoring.diagnosis import Report

SICK = clinic.patient("order", 30, "RNN")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(clinic, "STEPS", 4)
    monkeypatch.setattr(clinic, "CHECKS", (0, 2))
    monkeypatch.setattr(clinic, "TEST", 8)
    monkeypatch.setattr(clinic, "HIDDEN", 4)


def test_a_seed_decides_about_the_start_and_the_data():
    first, again, other = (clinic.start(SICK, seed) for seed in (0, 0, 1))
    assert torch.equal(first.rnn.weight_hh_l0, again.rnn.weight_hh_l0)
    assert not torch.equal(first.rnn.weight_hh_l0, other.rnn.weight_hh_l0)
    (x, y), (x2, y2), (x3, _) = (clinic.data_of(SICK, seed) for seed in (0, 0, 1))
    assert torch.equal(x, x2) and torch.equal(y, y2) and not torch.equal(x, x3)


def without_time(file: Path) -> list[str]:
    rows = files.read(file)["runs"]
    return sorted(json.dumps({k: v for k, v in row.items() if k != "seconds"}, sort_keys=True) for row in rows)


def test_a_resumed_run_gives_the_same(short, tmp_path):
    file = tmp_path / "clinic.json"
    clinic.Clinic(clinic.Notes(file)).treat(SICK, 0)
    whole = without_time(file)
    rows = files.read(file)["runs"]
    treatments = [row["treatment"] for row in rows]
    first = rows[0]
    assert treatments[0] == "as it is" and first["failed"] and {"random", "LSTM, chrono"} <= set(treatments)
    assert [f"prescription {name}" for name in first["prescribed"]] == treatments[1:-2] != []
    assert set(first["checks"]) == {"0", "2"} and set(clinic_page.QUANTITIES) < set(first["checks"]["2"])
    # interrupted after the first training: the prescriptions are found again, by the same steps of training
    for kept in (1, 2):
        files.write(file, {"machine": "any"}, "runs", rows[:kept])
        clinic.Clinic(clinic.Notes(file)).treat(SICK, 0)
        assert without_time(file) == whole
    trained = []
    resumed = clinic.Clinic(clinic.Notes(file))
    resumed.notes.add = trained.append
    resumed.treat(SICK, 0)
    assert trained == []


def test_the_part_of_the_gradient_that_crosses_the_middle(short):
    """Where nothing is carried, nothing crosses; and both parts add up to the gradient of the whole batch."""
    task = clinic.patient("copy", 1, "RNN")
    model = clinic.start(task, 0)
    x, target = clinic.batch("copy", 1, 16, torch.Generator().manual_seed(0), False)
    whole, near = clinic.gradients(model, task, x, target), clinic.gradients(model, task, x, target, cut=True)
    assert whole.shape == (8, 16) and float((whole - near).norm()) > 1e-3 * float(whole.norm())
    (grad,) = torch.autograd.grad(clinic.loss_of("copy", model(x), target), model.rnn.weight_hh_l0)
    torch.testing.assert_close(whole.mean(0), grad.flatten().double(), rtol=1e-4, atol=1e-6)  # float32 sums
    with torch.no_grad():
        model.rnn.weight_hh_l0.zero_()
    whole, near = clinic.gradients(model, task, x, target), clinic.gradients(model, task, x, target, cut=True)
    torch.testing.assert_close(near, whole, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ the page


def row(task, failed, loss, held_out, verdict="healthy", treatment="as it is", seed=0, prescribed=("clip",)):
    check = dict.fromkeys(clinic_page.QUANTITIES, 0.5) | {"verdict": verdict, "loss": loss, "held out": held_out}
    return {
        "patient": clinic.patient(task, 10, "GRU"), "seed": seed, "treatment": treatment, "detail": "",
        "failed": failed, "loss": held_out, "checks": dict.fromkeys(("0", "50", "200"), check),
        "prescribed": list(prescribed), "seconds": 1.0,
    }  # fmt: skip


def test_sensitivity_and_specificity():
    base = [
        row("adding", True, 1.0, 1.0, "vanishing"),  # stuck
        row("adding", True, 0.1, 0.6),  # overfits
        row("adding", True, None, None),  # not finite
        row("adding", False, 0.5, 0.5, "exploding"),
        row("adding", False, 0.95, 0.8),  # one loss is low enough
    ]
    found = {name: (caught, quiet) for name, _, caught, quiet in clinic_page.predictions(base, 200)}
    verdict, stuck, both, outlook = found.values()
    assert verdict == ("0.33 (1 of 3)", "0.50 (1 of 2)")
    assert stuck == ("0.67 (2 of 3)", "1.00 (2 of 2)") and both == ("0.33 (1 of 3)", "1.00 (2 of 2)")
    assert outlook == ("1.00 (3 of 3)", "1.00 (2 of 2)")


@pytest.mark.parametrize("loss", [0.1, 0.5, 0.85, 0.95, 1.2])
@pytest.mark.parametrize("held_out", [0.1, 0.3, 0.7, 0.95, 2.0])
def test_the_page_has_the_rule_of_the_doctor(loss, held_out):
    trial = checkup.Trial("as it is", None, Report(), Report(), [loss], held_out)
    outlook = checkup.Checkup([trial], constant=1.0).outlook(trial)
    check = {"loss": loss, "held out": held_out, "verdict": "healthy"}
    *_, rule = clinic_page.RULES.values()
    assert rule(check) == (outlook in ("stuck", "overfits"))


def test_a_threshold_is_from_the_first_half_alone():
    tuned = [
        row("adding", failed, loss, 0.5) for failed, loss in ((False, 0.1), (False, 0.2), (True, 0.6), (True, 0.8))
    ]
    others = [row("text", failed, loss, 0.5) for failed, loss in ((False, 0.5), (True, 0.3), (True, 0.9))]
    found = next(line for line in clinic_page.single_quantities(tuned, others, 200) if "training data" in line[0])
    assert found[1:] == ("above 0.4", "1.00 (2 of 2)", "1.00 (2 of 2)", "0.50 (1 of 2)", "0.00 (0 of 1)")


def test_cures_count_the_first_prescription():
    rows = []
    for seed, (prescribed, cured) in enumerate([(["gated", "orthogonal"], True), (["gated"], False), ([], False)]):
        rows += [
            row("adding", True, 1.0, 1.0, seed=seed, prescribed=prescribed),
            row("adding", True, 1.0, 1.0, treatment="random", seed=seed),
            row("adding", False, 0.0, 0.0, treatment="LSTM, chrono", seed=seed),
            *(
                row("adding", not cured, 0.0, 0.0, treatment=f"prescription {name}", seed=seed)
                for name in prescribed[:1]
            ),
            *(row("adding", cured, 0.0, 0.0, treatment=f"prescription {name}", seed=seed) for name in prescribed[1:]),
        ]
    rows += [row("adding", True, 1.0, 1.0, seed=3, prescribed=["gated"])]  # a seed that is not finished
    seeds, (first, random, chrono) = clinic_page.cures(rows, ("adding",))
    assert seeds == [0, 1, 2]
    assert first[1:] == ("0.50 (1 of 2)", "0.33 (1 of 3)")
    assert random[1:] == ("0.00 (0 of 2)", "0.00 (0 of 3)") and chrono[1:] == ("1.00 (2 of 2)", "1.00 (3 of 3)")


def test_the_page_of_a_few_rows(tmp_path):
    file = tmp_path / "clinic.json"
    sick = clinic.PATIENTS[0]
    rows = [row("adding", True, 1.0, 1.0, "vanishing", seed=s) | {"patient": sick} for s in (0, 1)]
    rows += [row("text", False, 0.5, 0.5)]
    files.write(file, {"machine": "any"}, "runs", rows)
    page = clinic_page.write(file, tmp_path)
    assert (tmp_path / "clinic.md").read_text() == page
    assert "Trainings per seed: 2 (0), 1 (1); 2 of 3 failed." in page and "2 vanishing" in page and "2 stuck" in page


def test_the_committed_page_is_up_to_date():
    page = clinic_page.text(files.read(clinic.RESULTS)["runs"])
    assert (ROOT / "docs" / "clinic.md").read_text(encoding="utf-8") == page
