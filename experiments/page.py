"""docs/experiments.md and its pictures, from the JSON: `python -m experiments.page`."""

import argparse
import collections
import math
import statistics
from pathlib import Path

from bench.tables import markdown

from . import store
from .table import EXPERIMENTS, Experiment
from .training import DIVERGED, TASKS, TEST_BATCH

DOCS = Path(__file__).parents[1] / "docs"
COMMAND = "python -m experiments.page"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe & Ito's palette."""

HEAD = f"""# Experiments

`python -m experiments` trains the runs that the table in `experiments/table.py` asks for, seeded and on one thread, and
writes them to `experiments/results/*.json`; `{COMMAND}` makes this page from the results. A row pools the
seeds of one arm. *Solved*: the score met the goal on {TEST_BATCH:,} test sequences, and the run stopped there.
*Diverged*: at the end, the test loss is not finite or above {DIVERGED:g} times that of the best constant answer.
*Monitor*: `GradientMonitor`'s verdict on test sequences before the first step and after the last, with the median gain
per step. Figures are medians over the seeds, with the extremes in brackets. A claim that an arm is solved or diverges
more often than another holds where Fisher's exact test says so at 5 %. Failures stay in the tables.
"""


class Results:
    """The finished runs of one experiment that are still in the table."""

    def __init__(self, name: str, full: bool = False, folder: Path = store.RESULTS):
        file = store.path(name, full, folder)
        self.experiment: Experiment = EXPERIMENTS[name]
        self.runs = list(store.done(file, name, full).values())
        self.machine = store.load(file).get("machine")

    def of(self, arm: str, point: str | None = None) -> list[dict]:
        return [r for r in self.runs if r["arm"] == arm and point in (None, r["point"])]

    def share(self, field: str, arm: str) -> float:
        """The share of an arm's runs that `solved` the task, or that `diverged`."""
        runs = self.of(arm)
        return sum(r[field] not in (None, False) for r in runs) / len(runs)

    def more(self, field: str, arm: str, than: str) -> bool:
        """Whether more runs of `arm` than of `than` are solved (diverged), by Fisher's exact test at 5 %."""
        n, m = len(self.of(arm)), len(self.of(than))
        hits, others = round(n * self.share(field, arm)), round(m * self.share(field, than))
        ways = sum(math.comb(n, k) * math.comb(m, hits + others - k) for k in range(hits, min(n, hits + others) + 1))
        return ways < 0.05 * math.comb(n + m, hits + others)

    def scores(self, arm: str) -> list[float]:
        """The scores at the end; infinite where they are not finite."""
        return [float("inf") if r["score"] is None else r["score"] for r in self.of(arm)]

    def steps(self, arm: str) -> float:
        """Median steps to the goal over all seeds, where a run that never met it counts as infinite."""
        return statistics.median(float("inf") if r["solved"] is None else r["solved"] for r in self.of(arm))

    def verdicts(self, arm: str, when: int) -> list[str]:
        """The monitor's, at the first (0) or the last (-1) look."""
        return [r["monitor"][when][1] for r in self.of(arm)]


def number(value: float) -> str:
    """Three digits; whole numbers in full up to a million."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def spread(values: list[float]) -> str:
    """`median (least to largest)`."""
    middle, low, high = map(number, (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _monitor(runs: list[dict], when: int) -> str:
    looks = [r["monitor"][when] for r in runs]
    counts = collections.Counter(look[1] for look in looks).most_common()
    verdicts = ", ".join(verdict if len(counts) == 1 else f"{n} {verdict}" for verdict, n in counts)
    gains = [look[2] for look in looks if look[2] is not None]
    return verdicts + (f"; gain {statistics.median(gains):.2f}" if gains else "")


def table(results: Results) -> str:
    """One row per arm, over all its points and seeds."""
    measure = TASKS[results.runs[0]["settings"]["task"]].measure
    head = ("arm", "runs", "solved", "steps to the goal", f"{measure} at the end", "diverged")
    rows = [[*head, "monitor, step 0", "at the end"]]
    for arm in results.experiment.arms:
        runs = results.of(arm)
        if not runs:
            rows.append([arm, "0", *["–"] * 6])
            continue
        solved = [r["solved"] for r in runs if r["solved"] is not None]
        goal = f"{len(solved)} of {len(runs)}" if runs[0]["settings"]["goal"] else "–"
        rows.append([
            arm, str(len(runs)), goal, spread(solved) if solved else "–", spread(results.scores(arm)),
            str(sum(r["diverged"] for r in runs)), _monitor(runs, 0), _monitor(runs, -1),
        ])  # fmt: skip
    return markdown(rows)


def grid(results: Results) -> str:
    """Solved and diverged runs by grid point and arm."""
    arms = [arm for arm in results.experiment.arms if results.of(arm)]
    rows = [["solved / diverged / runs", *arms]]
    for point in results.experiment.points:
        cells = []
        for arm in arms:
            runs = results.of(arm, point)
            solved, diverged = sum(r["solved"] is not None for r in runs), sum(r["diverged"] for r in runs)
            cells.append(f"{solved} / {diverged} / {len(runs)}")
        rows.append([point, *cells])
    return markdown(rows)


def claims(results: Results) -> str:
    """The claims, and whether they hold; open until every arm has a run."""
    decided = all(results.of(arm) for arm in results.experiment.arms)
    verdicts = [
        (text, ("holds" if check(results) else "does not hold") if decided else "open, not every arm has run")
        for text, check in results.experiment.claims
    ]
    return "\n".join(f"- {text}: **{verdict}**." for text, verdict in verdicts)


def seeds(results: Results) -> str:
    """`5 seeds`, or how many of the planned ones were run."""
    asked, points = results.experiment.seeds, len(results.experiment.points)
    counts = {len(results.of(arm)) // points for arm in results.experiment.arms}
    if counts == {asked}:
        return f"{asked} seeds"
    ran = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts)
    return f"**{ran} of {asked} seeds run**"


def settings(results: Results) -> str:
    """The settings that all runs share, in one line; `task` is in the title."""
    first, others = results.runs[0]["settings"], [r["settings"] for r in results.runs]
    shared = {k: v for k, v in first.items() if k != "task" and v and all(s[k] == v for s in others)}
    return ", ".join(f"{k} {_words(v)}" for k, v in shared.items())


def _words(value) -> str:
    return " ".join(f"{k} {_words(v)}".strip() for k, v in value.items()) if isinstance(value, dict) else str(value)


def section(name: str, full: bool, results: Results) -> str:
    experiment, picture = results.experiment, f"experiments_{name}{'_full' if full else ''}.png"
    flags = " --full" if full else ""
    minutes = sum(r["seconds"] for r in results.runs) / 60
    parts = [
        f"## {experiment.title}{' (full size)' if full else ''}",
        experiment.about,
        claims(results),
        table(results),
        grid(results) if len(experiment.points) > 1 else "",
        f"![{experiment.title}]({picture})",
        f"`python -m experiments {name}{flags}`: {seeds(results)}, {minutes:.0f} min on one thread of "
        f"{results.machine['device']}, torch {results.machine['versions']['torch']}. {settings(results)}.",
    ]
    return "\n\n".join(filter(None, parts))


def picture(results: Results, path: Path) -> None:
    """The test score against the step: a thin line per run, a colour per arm, a dot at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    looks = [(color, style) for style in ("-", "--") for color in COLORS]
    for arm, (color, style) in zip(results.experiment.arms, looks, strict=False):
        label = arm
        for run in results.of(arm):
            steps = [row[0] for row in run["curve"]]
            scores = [float("nan") if row[3] is None else row[3] for row in run["curve"]]
            axes.plot(steps, scores, style, color=color, linewidth=1.1, alpha=0.75, label=label)
            axes.plot(steps[-1:], scores[-1:], "x" if run["diverged"] else ".", color=color)
            label = None
    goal = results.runs[0]["settings"]["goal"]
    if goal > 0:
        axes.axhline(goal, color="black", linewidth=0.8, linestyle=":", label="goal")
    measure = TASKS[results.runs[0]["settings"]["task"]].measure
    axes.set(xlabel="step", ylabel=measure, yscale="linear" if measure == "test error" else "log")  # it may be 0
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def write(folder: Path = store.RESULTS, docs: Path = DOCS, pictures: bool = True) -> str:
    """Writes the page and its pictures; returns the text."""
    sections = [HEAD]
    for name in EXPERIMENTS:
        for full in (False, True):
            results = Results(name, full, folder)
            if results.runs:
                sections.append(section(name, full, results))
                if pictures:
                    picture(results, docs / f"experiments_{name}{'_full' if full else ''}.png")
            elif not full:
                sections.append(f"## {EXPERIMENTS[name].title}\n\nNot run yet: `python -m experiments {name}`.")
    text = "\n\n".join(part.strip() for part in sections) + "\n"
    (docs / "experiments.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(prog=COMMAND, description=__doc__).parse_args()
    write()
