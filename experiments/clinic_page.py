"""docs/clinic.md from experiments/results/clinic.json: `python -m experiments.clinic_page`."""

import argparse
import collections
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from bench import files
from bench.tables import markdown
from fastrnn.monitoring.checkup import OVERFIT_FROM, OVERFITS, STUCK

from .clinic import CHECKS, FAILED, PATIENTS, RESULTS, STEPS, TUNED_ON

DOCS = Path(__file__).parents[1] / "docs"
QUANTITIES = {
    "horizon": "horizon, as a share of the sequence",
    "gain": "gain of the last layer",
    "growth": "growth of the gradient on its way back",
    "early": "share of the norms of dL/dh in the first half of the sequence",
    "crossing": "share of W_hh's gradient that crosses the middle of the sequence",
    "noise": "signal to noise of W_hh's gradient over the batch",
    "crossing noise": "the same of the part that crosses the middle",
    "h growth": "growth of h over the sequence",
    "loss": "loss on training data, as a share of the constant answer's",
    "held out": "the same on held-out data",
}
"""What `clinic.observed` records of a training, and what it is."""


def _verdict(check: dict) -> bool:
    return check["verdict"] in ("vanishing", "exploding")


def _loss(check: dict, name: str) -> float:
    return float("inf") if check[name] is None else check[name]


def _stuck(check: dict) -> bool:
    return min(_loss(check, "loss"), _loss(check, "held out")) > STUCK


def _overfits(check: dict) -> bool:
    return not _stuck(check) and _loss(check, "held out") > max(OVERFITS * _loss(check, "loss"), OVERFIT_FROM)


RULES = {
    "verdict: the gradient vanishes or explodes": _verdict,
    f"stuck: loss above {STUCK} of the constant answer's, also on held-out data": _stuck,
    "stuck, and the verdict": lambda check: _verdict(check) and _stuck(check),
    f"outlook: stuck, or overfits (held-out loss {OVERFITS} times the training loss)": (
        lambda check: _stuck(check) or _overfits(check)
    ),
}
"""The last one is `Checkup.outlook`."""


SHORT_RULES = {
    "verdict": _verdict,
    f"training loss above {STUCK} of the constant answer's": lambda check: _loss(check, "loss") > STUCK,
}
"""Rules that need no held-out data."""


def key(row: dict) -> str:
    return str((row["patient"], row["seed"]))


def share(hits: int, of: int) -> str:
    return f"{hits / of:.2f} ({hits} of {of})" if of else "-"


def is_whole(row: dict) -> bool:
    """Whether the checks of a training have all quantities; earlier versions of the clinic recorded fewer."""
    return all(name in check for check in row["checks"].values() for name in QUANTITIES)


def counts(base: list[dict], check: int, rule: Callable[[dict], bool]) -> tuple[str, str]:
    """Sensitivity and specificity of a rule at a check."""
    seen = [(row["failed"], rule(row["checks"][str(check)])) for row in base if str(check) in row["checks"]]
    ill, well = [told for failed, told in seen if failed], [told for failed, told in seen if not failed]
    return share(sum(ill), len(ill)), share(len(well) - sum(well), len(well))


def predictions(base: list[dict], check: int) -> list[tuple]:
    """A row per rule: sensitivity and specificity at a check."""
    return [(name, str(check), *counts(base, check, rule)) for name, rule in RULES.items()]


def best_threshold(base: list[dict], check: int, name: str) -> tuple[bool, float]:
    """Whether the ill are above a threshold, and the one with the largest sum of sensitivity and specificity.

    A quantity that is not finite counts as ill, so it is left out here.
    """
    seen = [(row["failed"], row["checks"][str(check)][name]) for row in base if str(check) in row["checks"]]
    seen = [(failed, value) for failed, value in seen if value is not None]
    ill, well = [v for failed, v in seen if failed], [v for failed, v in seen if not failed]
    values = sorted({v for _, v in seen})
    borders = [(a + b) / 2 for a, b in pairwise(values)] or values
    scores = []
    for above in (True, False):
        for border in borders:
            caught = sum((v > border) == above for v in ill) / max(1, len(ill))
            quiet = sum((v > border) != above for v in well) / max(1, len(well))
            scores.append((caught + quiet, above, border))
    _, above, border = max(scores)
    return above, border


def single_quantities(tuned: list[dict], others: list[dict], check: int) -> list[tuple]:
    """A row per quantity: the threshold from the first half, and how it does on both."""
    rows = []
    for name, words in QUANTITIES.items():
        above, border = best_threshold(tuned, check, name)

        def rule(found: dict, name=name, above=above, border=border) -> bool:
            return found[name] is None or (found[name] > border) == above

        fails = f"{'above' if above else 'below'} {border:.2g}"
        rows.append((words, fails, *counts(tuned, check, rule), *counts(others, check, rule)))
    return rows


def cures(rows: list[dict], names: tuple[str, ...]) -> tuple[list[int], list[tuple]]:
    """The seeds that count, and a row per treatment of the failed trainings of these tasks.

    A seed counts if every failed training has been treated with its first prescription and both controls.
    """
    by_training = collections.defaultdict(dict)
    for row in rows:
        if row["patient"]["task"] in names:
            by_training[key(row)][row["treatment"]] = row
    failed = [runs for runs in by_training.values() if "as it is" in runs and runs["as it is"]["failed"]]
    seeds = collections.defaultdict(list)
    for runs in failed:
        needed = {"random", "LSTM, chrono", *(f"prescription {name}" for name in runs["as it is"]["prescribed"][:1])}
        seeds[runs["as it is"]["seed"]].append(needed <= runs.keys())
    counted = sorted(seed for seed, treated in seeds.items() if all(treated))
    failed = [runs for runs in failed if runs["as it is"]["seed"] in counted]
    told = [
        runs | {"first": runs[f"prescription {runs['as it is']['prescribed'][0]}"]}
        for runs in failed
        if runs["as it is"]["prescribed"]
    ]

    def cured(name: str) -> tuple[str, str]:
        return tuple(
            share(sum(name in runs and not runs[name]["failed"] for runs in of), len(of)) for of in (told, everyone)
        )

    everyone = told + [runs for runs in failed if not runs["as it is"]["prescribed"]]
    titles = {"first": "first prescription", "random": "random remedy", "LSTM, chrono": "always LSTM with chrono"}
    return counted, [(title, *cured(name)) for name, title in titles.items()]


def judgement(rate: str) -> str:
    """Whether a `share` of cures reaches the goal."""
    return "not measured" if rate == "-" else "met" if float(rate.split()[0]) >= CURE_GOAL else "missed"


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
        checks = [row["checks"][str(CHECKS[-1])] for row in runs if str(CHECKS[-1]) in row["checks"]]
        verdicts = collections.Counter(check["verdict"] for check in checks)
        outlooks = collections.Counter(
            "stuck" if _stuck(check) else "overfits" if _overfits(check) else "learns"
            for check in checks
            if "held out" in check
        )
        found.append((
            f"{patient['task']}, T = {patient['T']}",
            f"{patient['cell']}{options}, {patient['optimizer']} {patient['lr']}",
            f"{sum(row['failed'] for row in runs)} of {len(runs)}",
            ", ".join(f"{n} {name}" for name, n in verdicts.items()),
            ", ".join(f"{n} {name}" for name, n in outlooks.items()) or "-",
            ", ".join(f"{name} {sum(ok)} of {len(ok)}" for name, ok in treated.items()) or "-",
        ))  # fmt: skip
    return found


def _introduction(base: list[dict]) -> str:
    seeds = collections.Counter(row["seed"] for row in base)
    whole = sum(map(is_whole, base))
    return (
        "Does the diagnosis tell which trainings fail, and does following the advice help? "
        f"`python -m experiments.clinic` trains {len(PATIENTS)} networks for {STEPS} steps each (hidden size 32, "
        "batches of 32, clip_grad_norm_ 1), and trains those that fail again under each prescription. "
        "`python -m experiments.clinic_page` makes this page. *Failed*: the loss on held-out data at the end is above "
        "a fixed share of the loss of the best constant answer ("
        + ", ".join(f"{name} {value}" for name, value in FAILED.items())
        + f"); the shares were fixed first. Trainings per seed: {', '.join(f'{n} ({s})' for s, n in seeds.items())}; "
        f"{sum(row['failed'] for row in base)} of {len(base)} failed. "
        + (
            f"The tables of rules are of the {whole} trainings during which the loss on held-out data was recorded."
            if whole < len(base)
            else ""
        )
    ).rstrip()


PREDICTS = (
    "Sensitivity: the share of the failed trainings that the rule names. Specificity: the share of the others "
    "that it leaves alone; the rest are false alarms. The goal was 0.9 and 0.9 after 200 steps. The loss is that of "
    "128 training samples at the check; held-out data are those that also decide about the failure, 300 steps later.",
    "The verdict on the gradient alone does not predict a failure: text trains although its gradient vanishes, "
    "because it needs few steps back; the sunspots fit the training data and fail on the rest, which no gradient "
    "shows. **The losses predict, the gradient explains:** `fastrnn.doctor` therefore gives an outlook from the losses "
    "(the last rule), and for a stuck training says whether its gradient is the reason, or to look elsewhere.",
    "This is no blind test. The outlook's three thresholds are round numbers that were picked when results of both "
    "halves had been seen; none was fitted. The verdict and the definition of a failure were fixed before. "
    "The thresholds of the table of single quantities come from the first half only.",
)
CURES = (
    "*Cured*: no longer failed, from the same start and on the same batches. The second column leaves out the "
    "failures for which there is no prescription. The third has all: one without a prescription counts as not cured, "
    "and the two controls are tried on it, too. The goal was 0.8, and well above both controls. The order of the "
    "prescriptions was chosen on seeds 0 and 1, of the first half (layer norm with chrono for gated cells) and of both "
    "(a GRU for plain RNNs).",
)
CURE_GOAL = 0.8


def text(rows: list[dict]) -> str:
    base = [row for row in rows if row["treatment"] == "as it is"]
    whole = [row for row in base if is_whole(row)]
    halves = {
        "First half": TUNED_ON,
        "Second half": tuple(name for name in FAILED if name not in TUNED_ON),
    }
    tuned, others = ([row for row in whole if row["patient"]["task"] in names] for names in halves.values())
    parts = ["# The clinic", _introduction(base), "## What predicts a failure?", *PREDICTS]
    for (half, names), chosen in zip(halves.items(), (tuned, others), strict=True):
        table = [line for check in CHECKS for line in predictions(chosen, check)]
        parts += [
            f"{half}: {', '.join(names)}.",
            markdown([("rule", "after step", "sensitivity", "specificity"), *table]),
        ]
    if len(whole) < len(base):
        halved = [[row for row in base if row["patient"]["task"] in names] for names in halves.values()]
        table = [
            (name, *(number for half in halved for number in counts(half, CHECKS[-1], rule)))
            for name, rule in SHORT_RULES.items()
        ]
        head = ("rule, after 200 steps", "sensitivity, first half", "specificity")
        parts += [
            f"What needs no held-out data, on all {len(base)} trainings:",
            markdown([(*head, "sensitivity, second half", "specificity"), *table]),
        ]
    head = ("quantity after 200 steps", "fails if", "sensitivity, first half", "specificity")
    parts += [
        "One quantity at a time, with the threshold that has the largest sum of both on the first half:",
        markdown([(*head, "sensitivity, second half", "specificity"), *single_quantities(tuned, others, CHECKS[-1])]),
        "## Does the advice cure?", *CURES,
    ]  # fmt: skip
    judged = []
    for half, names in halves.items():
        seeds, table = cures(rows, names)
        judged.append(f"{judgement(table[0][1])} on the {half.lower()}")
        parts += [
            f"{half}: {', '.join(names)}; seeds {', '.join(map(str, seeds))}, of which all treatments are finished.",
            markdown([("treatment", "where there is a prescription", "of all failures"), *table]),
        ]
    by_task = (f"{task} {cures(rows, (task,))[1][0][1]}" for task in FAILED)
    parts.append(f"The goal is {' and '.join(judged)}. The first prescription by task: {', '.join(by_task)}.")
    head = ("task", "network", "failed", "verdict after 200 steps", "outlook", "cured by")
    parts += ["## The patients", markdown([head, *patients(base, rows)])]
    return "\n\n".join(parts) + "\n"


def write(source: Path = RESULTS, docs: Path = DOCS) -> str:
    """Makes the page from the results."""
    page = text(files.read(source)["runs"])
    (docs / "clinic.md").write_text(page, encoding="utf-8")
    return page


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m experiments.clinic_page", description=__doc__).parse_args()
    write()
