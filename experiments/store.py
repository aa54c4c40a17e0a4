"""The results on disk: one JSON file per experiment with one line per finished run, written whole after each.

A run is identified by its arm, grid point, seed and all settings. After a change of the table, the runs that no longer
match it are dropped and repeated when the experiment is run again.
"""

import json
from pathlib import Path

from bench import files, machine

from .table import EXPERIMENTS, Run, plan

RESULTS = Path(__file__).parent / "results"


def path(name: str, full: bool, folder: Path = RESULTS) -> Path:
    return folder / f"{name}{'-full' if full else ''}.json"


def load(file: Path) -> dict:
    """`{"machine": ..., "runs": [...]}`; without runs where there is no file."""
    return files.read(file) if file.exists() else {"runs": []}


def key(run: dict) -> str:
    return json.dumps([run[field] for field in Run._fields], sort_keys=True)


def done(file: Path, name: str, full: bool) -> dict[str, dict]:
    """The finished runs that the table still asks for, by `key`."""
    wanted = {key(run._asdict()) for run in plan(EXPERIMENTS[name], full)}
    return {key(run): run for run in load(file)["runs"] if key(run) in wanted}


def save(file: Path, runs: list[dict]) -> None:
    files.write(file, {"machine": machine.describe("cpu")}, "runs", runs)
