"""The form of a results file: one JSON object that first says what was measured on what, then has a row per line.

It is written whole after every row, beside the old one, and moved there: an interruption leaves the last good file, and
a changed row is a changed line.
"""

import json
import os
from datetime import datetime, timezone
from pathlib import Path

from . import machine


def head(device: str) -> dict:
    """When, on what machine, and at which commit."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": now, "machine": machine.describe(device), "commit": machine.commit()}


def write(file: Path, head: dict, name: str, rows: list[dict]) -> None:
    """`head`, and under `name` the rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(f"{json.dumps(head)[:-1]},\n{json.dumps(name)}: [\n{lines}\n]}}\n", encoding="utf-8")
    os.replace(beside, file)


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))
