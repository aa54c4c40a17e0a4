"""docs/clinic.md from experiments/results/clinic.json: `python -m experiments.clinic_page`."""

import argparse
import collections
from pathlib import Path

from bench import files
from bench.tables import markdown

from .clinic import CHECKS, FAILED, PATIENTS, RESULTS, STEPS, TUNED_ON

DOCS = Path(__file__).parents[1] / "docs"
STUCK = 0.9
"""A training is stuck at a loss above this share of the constant answer's; picked after the results were seen."""


def _verdict(check: dict) -> bool:
    return check["verdict"] in ("vanishing", "exploding")


def _stuck(check: dict) -> bool:
    return check["loss"] is None or check["loss"] > STUCK


RULES = {
    "verdict: vanishing or exploding": _verdict,
    f"loss above {STUCK} of the constant answer's": _stuck,
    "both": lambda check: _verdict(check) and _stuck(check),
    "under 1 % of the norms in the first half": lambda check: check["early"] is not None and check["early"] < 0.01,
}


def key(row: dict) -> str:
    return str((row["patient"], row["seed"]))


def share(hits: int, of: int) -> str:
    return f"{hits / of:.2f} ({hits} of {of})" if of else "-"


def predictions(base: list[dict], check: int) -> list[tuple]:
    """A row per rule: sensitivity and specificity at a check."""
    rows = []
    seen = [row for row in base if str(check) in row["checks"]]
    ill = [row for row in seen if row["failed"]]
    well = [row for row in seen if not row["failed"]]
    for name, rule in RULES.items():
        caught = sum(rule(row["checks"][str(check)]) for row in ill)
        quiet = sum(not rule(row["checks"][str(check)]) for row in well)
        rows.append((name, str(check), share(caught, len(ill)), share(quiet, len(well))))
    return rows


def cures(rows: list[dict], names: tuple[str, ...]) -> list[tuple]:
    """A row per treatment of the failed trainings of these tasks."""
    order = _order()
    by_training = collections.defaultdict(dict)
    for row in rows:
        if row["patient"]["task"] in names:
            by_training[key(row)][row["treatment"]] = row
    failed = [runs for runs in by_training.values() if runs["as it is"]["failed"] and "LSTM, chrono" in runs]
    first = []
    for runs in failed:
        given = [order.index(n.removeprefix("prescription ")) for n in runs if n.startswith("prescription ")]
        first.append(runs[f"prescription {order[min(given)]}"] if given else None)
    told = [row for row in first if row is not None]
    paired = [runs for runs, row in zip(failed, first, strict=True) if row is not None]

    def cured(name, of):
        return share(sum(not runs[name]["failed"] for runs in of), len(of))

    return [
        ("first prescription", share(sum(not r["failed"] for r in told), len(told)),
         share(sum(not r["failed"] for r in told), len(failed))),
        ("random remedy", cured("random", paired), cured("random", failed)),
        ("always LSTM with chrono", cured("LSTM, chrono", paired), cured("LSTM, chrono", failed)),
    ]  # fmt: skip


def _order() -> list[str]:
    from fastrnn.monitoring.prescription import REMEDIES

    return list(REMEDIES)


def patients(base: list[dict], rows: list[dict]) -> list[tuple]:
    """A row per patient."""
    found = []
    for patient in PATIENTS:
        runs = [row for row in base if row["patient"] == patient]
        if not runs:
            continue
        treated = collections.defaultdict(list)
        for row in rows:
            if row["patient"] == patient and row["treatment"].startswith("prescription "):
                treated[row["treatment"].removeprefix("prescription ")].append(not row["failed"])
        options = "".join(f", {name}={value}" for name, value in patient["module"].items())
        verdicts = collections.Counter(row["checks"].get("200", {}).get("verdict", "-") for row in runs)
        found.append((
            f"{patient['task']}, T = {patient['T']}",
            f"{patient['cell']}{options}, {patient['optimizer']} {patient['lr']}",
            f"{sum(row['failed'] for row in runs)} of {len(runs)}",
            ", ".join(f"{n} {name}" for name, n in verdicts.items()),
            ", ".join(f"{name} {sum(ok)} of {len(ok)}" for name, ok in treated.items()) or "-",
        ))  # fmt: skip
    return found


def text(rows: list[dict]) -> str:
    base = [row for row in rows if row["treatment"] == "as it is"]
    halves = {
        "First half": TUNED_ON,
        "Second half": tuple(name for name in FAILED if name not in TUNED_ON),
    }
    seeds = collections.Counter(row["seed"] for row in base)
    parts = [
        "# The clinic",
        f"Does the verdict tell which trainings fail, and does following the advice help? "
        "`python -m experiments.clinic` "
        f"trains {len(PATIENTS)} networks for {STEPS} steps each (hidden size 32, batches of 32, clip_grad_norm_ 1), "
        "and trains those that fail again under each prescription. "
        "`python -m experiments.clinic_page` makes this page. "
        "*Failed*: the test loss at the end is above a fixed share of the loss of the best constant answer ("
        + ", ".join(f"{name} {value}" for name, value in FAILED.items())
        + f"); the shares were fixed first. Trainings per seed: {', '.join(f'{n} ({s})' for s, n in seeds.items())}; "
        f"{sum(row['failed'] for row in base)} of {len(base)} failed.",
        "## Does the verdict predict?",
        "Sensitivity: the share of the failed trainings that the rule names. Specificity: the share of the others "
        "that it "
        "leaves alone; the rest are false alarms. The loss is that of training data at the check.",
        "The tasks are in two halves, but this is no blind test: the threshold of the loss and the order of the "
        "prescriptions (a GRU before another W_hh) were picked when the results of both halves had been seen. Only the "
        "rule *verdict* and the definition of a failure were fixed before. The verdict misses the goal of 0.9 "
        "and 0.9. Text trains well although its gradient vanishes, probably because it needs "
        "only a few steps back; the sunspots mostly fit the training data and fail on the test data, which no gradient "
        "shows. A loss that does not fall tells more on the second half and less on the first.",
    ]
    for half, names in halves.items():
        chosen = [row for row in base if row["patient"]["task"] in names]
        table = [line for check in CHECKS for line in predictions(chosen, check)]
        parts += [
            f"{half}: {', '.join(names)}.",
            markdown([("rule", "after step", "sensitivity", "specificity"), *table]),
        ]
    parts += ["## Does the advice cure?", "*Cured*: no longer failed, from the same start and on the same batches. "
              "The second column leaves out the failures for which there is no prescription; the third counts them as "
              "not cured. The goal was 0.8. The first prescription cures about as many as "
              "an LSTM with chrono initialisation does, and somewhat more than a random "
              "remedy (not tested for significance)."]  # fmt: skip
    for half, names in halves.items():
        parts += [
            f"{half}: {', '.join(names)}.",
            markdown([("treatment", "where there is a prescription", "of all failures"), *cures(rows, names)]),
        ]
    parts += ["## The patients", markdown(
        [("task", "network", "failed", "verdict after 200 steps", "cured by"), *patients(base, rows)]
    )]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def write(source: Path = RESULTS, docs: Path = DOCS) -> str:
    """Makes the page from the results."""
    page = text(files.read(source)["runs"])
    (docs / "clinic.md").write_text(page, encoding="utf-8")
    return page


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m experiments.clinic_page", description=__doc__).parse_args()
    write()
