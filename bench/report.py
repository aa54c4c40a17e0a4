"""The tables of a results file.

    python -m bench.report bench/results/bench-cpu.json             prints them as Markdown
    python -m bench.report bench/results/bench-cpu.json --write     also writes them into the pages

They go between the markers `<!-- bench:cpu:begin -->` and `<!-- bench:cpu:end -->` (cuda for a GPU's): the wide tables
in docs/benchmarks.md, and of a CPU's a small one in README.md.
"""

import argparse
import os
from pathlib import Path

from . import files, goals, tables

ROOT = Path(__file__).parents[1]


def source(data: dict) -> str:
    """The machine, the versions, the commit and the day."""
    machine, commit = data["machine"], data["commit"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    threads = f", {machine['cpu']['threads']} threads" if machine["kind"] == "cpu" else ""
    changed = " with changes" if commit.get("dirty") else ""
    commit_id = (commit.get("id") or "unknown")[:10] + changed
    return f"{machine['device']}{threads}; {versions}; commit {commit_id}, {data['date'][:10]}"


def wide(data: dict, command: str) -> str:
    """All tables, on a CPU first that of the goals, and what was measured on what."""
    parts = [f"{title}:\n\n{table}" for title, table in tables.by_suite(data["cases"]).items()]
    if data["machine"]["kind"] == "cpu":
        parts.insert(0, f"Goals, times relative to torch.nn's where no other is named:\n\n{goals.table(data['cases'])}")
    lines = [f"{source(data)}.", "Medians of interleaved rounds (their 95 % intervals).", f"Written by `{command}`."]
    lines += [f"Not run: {name}, {reason}." for name, reason in data["not_run"].items()]
    return "\n\n".join([*parts, "\n".join(lines)])


def small(data: dict, command: str) -> str:
    """A few cases for readers in a hurry."""
    about = "B 32, T 100, float32. The times of the loop and of torch.nn are multiples of fastrnn's, by medians"
    return f"{tables.small(data['cases'])}\n\n{about}: {source(data)}; `{command}`."


def blocks(file: Path) -> dict[str, tuple[str, str, str]]:
    """By page: the marker before the tables, the tables, the marker after them."""
    data = files.read(file)
    command = f"python -m bench.report {Path(os.path.relpath(file, ROOT)).as_posix()} --write"
    kind = data["machine"]["kind"]
    pages = {"docs/benchmarks.md": wide} | ({"README.md": small} if kind == "cpu" else {})
    begin, end = (f"<!-- bench:{kind}:{edge} -->" for edge in ("begin", "end"))
    return {page: (begin, f"\n{make(data, command)}\n", end) for page, make in pages.items()}


def replaced(text: str, begin: str, block: str, end: str) -> str:
    """The page with this block between the markers. Raises ValueError where they are missing."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no {begin} ... {end}")
    return before + begin + block + end + after


def write(file: Path, root: Path = ROOT) -> None:
    for page, block in blocks(file).items():
        text = (root / page).read_text(encoding="utf-8")
        (root / page).write_text(replaced(text, *block), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and README.md, too")
    arguments = parser.parse_args()
    for title, table in tables.by_suite(files.read(arguments.results)["cases"]).items():
        print(f"{title}:\n\n{table}\n")
    if arguments.write:
        write(arguments.results)


if __name__ == "__main__":
    main()
