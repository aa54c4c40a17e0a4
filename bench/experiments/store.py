"""The results on disk: one JSON file per experiment, one line per finished run, rewritten whole after each.

A run is known by what it did: arm, grid point, seed and all settings. Change the table, and what no longer matches it
is dropped when the experiment is run again, and run anew.
"""

import json
import os
from pathlib import Path

from .. import machine
from .table import EXPERIMENTS, Run, plan

RESULTS = Path(__file__).parents[1] / "results" / "experiments"


def path(name: str, full: bool, folder: Path = RESULTS) -> Path:
    return folder / f"{name}{'-full' if full else ''}.json"


def load(file: Path) -> dict:
    """`{"machine": ..., "runs": [...]}`; without runs where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": []}


def key(run: dict) -> str:
    return json.dumps([run[field] for field in Run._fields], sort_keys=True)


def done(file: Path, name: str, full: bool) -> dict[str, dict]:
    """The finished runs that the table still asks for, by `key`."""
    wanted = {key(run._asdict()) for run in plan(EXPERIMENTS[name], full)}
    return {key(run): run for run in load(file)["runs"] if key(run) in wanted}


def save(file: Path, runs: list[dict]) -> None:
    """Writes beside the file and moves it there, so that an interruption leaves the old one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"machine": machine.describe("cpu")})[:-1]
    lines = ",\n".join(json.dumps(run) for run in runs)
    beside = file.with_suffix(".tmp")
    beside.write_text(f'{head}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(beside, file)
