"""A report as text: a table with the findings under it. In a deep network, layers that are alike share a line.

`diagnosis.Report` prints itself by this, so its types are not imported here: a run is a list of `Record`s.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

DEEP = 6
"""A report on more layers and directions than this is shortened."""
NAMED = 3
"""The number of further layers that are named beside advice which they share."""
HEAD = ("layer", "state", "norm, first step", "last step", "gain", "half-life", "horizon", "clipped", "verdict")


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of strings (the first one is the head) as text with aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{v:<{w}}" for v, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def text(report: list) -> str:
    """The table of a report that is not empty, its note and its findings."""
    runs = runs_of(report)
    rows = [row for run in runs for row in _rows(run)]
    notes = [report.note] if report.note else []
    return "\n\n".join((table([HEAD, *rows]), *notes, *_findings(report, runs)))


def runs_of(report: list) -> list[list]:
    """The records in groups that share a line of text.

    Where there are more than DEEP layers and directions, a group is made of layers in a row, of one module and
    direction, with one verdict and only finite norms. Otherwise each layer and direction is a group.
    """
    layers = [list(states) for _, states in groupby(report, key=lambda record: record.name)]
    deep = len(layers) > DEEP
    runs: list[list] = []
    open_runs: dict[tuple, list] = {}  # by module and direction, the group that its next layer may join
    for states in layers:
        first = states[0]
        key = first.module, first.direction
        finite = all(r.first_nonfinite is None and r.forward_nonfinite is None for r in states)
        run = open_runs.get(key)
        if deep and finite and run is not None and run[-1].verdict == first.verdict:
            run += states
            continue
        runs.append(list(states))
        if finite:
            open_runs[key] = runs[-1]
        else:
            open_runs.pop(key, None)
    return runs


def label(run: list) -> str:
    """`gru.l3`, or `gru.l0-l19` and `gru.l0-l19_reverse` of several layers."""
    first, last = run[0], run[-1]
    if first.layer == last.layer:
        return first.name
    return f"{first.module}.l{first.layer}-l{last.layer}" + ("_reverse" if first.direction == "reverse" else "")


def _rows(run: list) -> list[tuple[str, ...]]:
    """A row of the table for each state; numbers of several layers are given as the smallest and the largest."""
    rows = []
    for state in dict.fromkeys(record.state for record in run):
        records = [record for record in run if record.state == state]
        first = records[0]
        verdict = first.verdict
        if first.forward_nonfinite is not None:
            verdict += f" (the forward is not finite from step {first.forward_nonfinite})"
        elif first.first_nonfinite is not None:
            verdict += f" (not finite from step {first.first_nonfinite})"
        horizon = _between(records, lambda r: r.horizon, "{}")
        rows.append((
            label(records), state,
            _between(records, lambda r: float(r.total[0]), "{:.2e}"),
            _between(records, lambda r: float(r.total[-1]), "{:.2e}"),
            _between(records, lambda r: r.gain_median, "{:.3f}"),
            _between(records, lambda r: r.half_life, "{:.1f}"),
            horizon if horizon == "-" else f"{horizon} of {_between(records, lambda r: r.longest, '{}')}",
            _between(records, lambda r: None if r.clip_rate is None else 100 * r.clip_rate, "{:.0f} %"), verdict,
        ))  # fmt: skip
    return rows


def _between(records: list, quantity: Callable, form: str) -> str:
    """`0.470..0.710`; "-" where there is no number, which counts as the largest (of half-lives, say)."""
    values = sorted((quantity(record) for record in records), key=lambda v: math.inf if v is None or v != v else v)
    ends = ["-" if v is None else form.format(v) for v in (values[0], values[-1])]
    return ends[0] if ends[0] == ends[1] else "..".join(ends)


def _findings(report: list, runs: list[list]) -> list[str]:
    """A paragraph for each group; advice that several groups share is given once, with the numbers of the first."""
    run_of = {record.name: label(run) for run in runs for record in run}
    groups: dict[str, list] = {}
    for finding in report.findings:
        groups.setdefault(run_of.get(finding.name, finding.name), []).append(finding)
    named: dict[tuple[str, str], list[str]] = {}  # by verdict and rule, the groups and single layers that it is about
    for name, members in groups.items():
        for rule in dict.fromkeys(rule for finding in members for rule in _rules(finding)):
            having = [finding.name for finding in members if rule in _rules(finding)]
            named.setdefault((members[0].verdict, rule), []).extend([name] if len(having) == len(members) else having)
    horizons = {record.name: math.inf if record.horizon is None else record.horizon for record in report}
    texts, said = [], set()
    for name, members in groups.items():
        verdict, worst = members[0].verdict, min(members, key=lambda finding: horizons.get(finding.name, math.inf))
        about = worst.summary if len(members) == 1 else f"the shortest horizon is that of {worst.name}: {worst.summary}"
        lines = [f"{name}: {verdict}: {about}"]
        for finding in members:
            for advice, rule in zip(finding.advice, _rules(finding), strict=True):
                if (verdict, rule) in said:
                    continue
                said.add((verdict, rule))
                first, *others = named[verdict, rule]
                if first != name and len(members) > 1:
                    others = [first, *others]
                more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
                also = "so also" if first == name or len(members) == 1 else "in"
                lines.append(f"  - {advice}" + (f" ({also} {', '.join(others[:NAMED])}{more})" if others else ""))
        texts.append("\n".join(lines))
    return texts


def _rules(finding) -> tuple[str, ...]:
    return finding.rules or finding.advice
