"""The tables and the picture of a results file.

python bench/report.py bench/results/bench-cpu.json                  prints the tables as Markdown
    --readme README.md      also rewrites what stands there between `<!-- bench:begin -->` and `<!-- bench:end -->`
    --picture FILE.png      also draws the ratios (needs matplotlib)
"""

import argparse
import json
import os
from pathlib import Path

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
YARDSTICK = "torch.nn"
TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200)


def load(path: str | Path) -> tuple[dict, list[dict]]:
    """The file, and the records of its cases. A file of `--records` will do, also of a run that was cut off."""
    if Path(path).suffix == ".jsonl":
        data, *records = map(json.loads, Path(path).read_text().splitlines())
        return data, records
    data = json.loads(Path(path).read_text())
    return data, [benchmark["extra_info"] for benchmark in data["benchmarks"]]


def by_suite(records: list[dict]) -> dict[str, list[dict]]:
    """The records of each of `SUITES` that has any, in that order."""
    found = {suite: [record for record in records if record["suite"] == suite] for suite in SUITES}
    return {suite: rows for suite, rows in found.items() if rows}


def title(record: dict) -> str:
    """A case in a reader's words."""
    size = f"B {record['B']}, T {record['T']}, H {record['H']}"
    size += f", I {record['I']}" if record["I"] != record["H"] else ""
    size += f", {record['num_layers']} layers" if record["num_layers"] > 1 else ""
    size += ", bidirectional" if record["bidirectional"] else ""
    dtype = type_name(record)
    what = "forward" if record["mode"] == "infer" else "training"
    return f"{record['cell'].upper().replace('_', ' ')}, {size}, {dtype}, {', '.join((what, *record['features']))}"


def type_name(record: dict) -> str:
    return "float32 (TF32)" if record["tf32"] else record["dtype"]


def contestants(records: list[dict]) -> list[str]:
    """Those that were timed in any case, in the order of the registry, the yardstick left out."""
    names = [name for record in records for name in record["contestants"] if name != YARDSTICK]
    return [n for n in dict.fromkeys(names) if any("ratio" in record["contestants"].get(n, {}) for record in records)]


def cell(record: dict, name: str) -> str:
    """A contestant's ratio to torch.nn with its interval, or why there is none."""
    entry = record["contestants"].get(name, {})
    if "ratio" in entry:
        low, high = entry["interval"]
        return f"{entry['ratio']:.2f} ({low:.2f}–{high:.2f})"
    if entry.get("same_as"):
        return "= " + entry["same_as"]
    return "failed" if "failed" in entry else "–"


def table(records: list[dict]) -> str:
    """Markdown: torch.nn's time, then everybody's time relative to it (below 1 is faster)."""
    names, limited = contestants(records), any(record.get("limit") for record in records)
    head = ["case", "torch.nn, ms", *names] + ["limit"] * limited
    rows = [head]
    for record in records:
        yardstick = record["contestants"][YARDSTICK].get("median")
        row = [title(record), f"{yardstick * 1e3:.3g}" if yardstick else "failed", *(cell(record, n) for n in names)]
        if limited:
            row.append(f"{record['limit']['seconds'] / yardstick:.2f}" if record.get("limit") and yardstick else "–")
        rows.append(row)
    return markdown(rows)


def memory_table(records: list[dict]) -> str:
    """Markdown: what torch.nn allocates at its height during a call, and everybody relative to it."""
    names = contestants(records)
    rows = [["case", "torch.nn, MiB", *names]]
    for record in records:
        peaks = {name: entry["peak_bytes"] for name, entry in record["contestants"].items() if "peak_bytes" in entry}
        if YARDSTICK in peaks:
            own = [f"{peaks[name] / peaks[YARDSTICK]:.2f}" if name in peaks else "–" for name in names]
            rows.append([title(record), f"{peaks[YARDSTICK] / 2**20:.0f}", *own])
    return markdown(rows) if len(rows) > 1 else ""


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def gain(entry: dict) -> str:
    """How many times faster than the loop, with its interval, or why there is no figure."""
    if "speed_up" in entry:
        low, high = entry["interval"]
        return f"{entry['speed_up']:.1f} ({low:.1f}–{high:.1f})"
    if entry.get("same_as"):
        return "= " + entry["same_as"]
    return "failed" if "failed" in entry else "–"


def feature_table(records: list[dict]) -> str:
    """Markdown: the faster loop's time, everybody's speed relative to it (above 1 is faster), and where it was timed
    fastrnn's time relative to the same backend's plain call."""
    names = dict.fromkeys(name for record in records for name in record["contestants"])
    names = [n for n in names if any("speed_up" in r["contestants"].get(n, {}) for r in records) and "loop" not in n]
    rows = [["feature", "cell", "loop, ms", *names, "feature / plain call"]]
    for record in records:
        entries = record["contestants"]
        loops = [entry["median"] for name, entry in entries.items() if "loop" in name and "median" in entry]
        size = f"B {record['B']}, T {record['T']}, H {record['H']}, {type_name(record)}"
        costs = [entry["overhead"]["ratio"] for entry in entries.values() if "overhead" in entry]
        cell = record["cell"].upper().partition("_")[0]
        milliseconds = f"{min(loops) * 1e3:.3g}" if loops else "failed"
        row = [record["feature"], f"{cell}, {size}", milliseconds, *(gain(entries.get(n, {})) for n in names)]
        rows.append([*row, " ".join(f"{cost:.2f}" for cost in costs) or "–"])
    return markdown(rows)


SUITES = {
    "throughput": ("time relative to torch.nn's plain call (below 1 is faster)", table),
    "features": ("speed relative to the faster of two Python loops (above 1 is faster)", feature_table),
    "rivals": ("time relative to torch.nn (below 1 is faster), beside other people's kernels", table),
}


def caption(data: dict, path: str) -> str:
    """What was measured, on what, and how to make the table again."""
    info, commit = data["machine_info"], data["commit_info"]
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items() if version)
    threads = f", {info['cpu']['threads']} threads" if info["kind"] == "cpu" else ""
    lines = [
        f"{info['device']}{threads}; {versions}; commit {(commit.get('id') or 'unknown')[:10]}"
        f"{' with changes' if commit.get('dirty') else ''}, {data['datetime'][:10]}.",
        "Medians of interleaved rounds (their 95 % intervals).",
        f"Made by `python bench/report.py {path} --readme README.md`.",
    ]
    missing = data.get("not_run") or {}
    return "\n".join(lines + [f"Not run: {name}, {reason}." for name, reason in missing.items()])


def rewrite(readme: Path, block: str) -> None:
    """Replaces what stands between the markers. Raises ValueError where they are not there."""
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no {BEGIN} ... {END}")
    readme.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}")


def picture(records: list[dict], path: str) -> None:
    """One row per case, one mark per contestant, on a logarithmic axis of time relative to torch.nn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.32 * len(records)), layout="constrained")
    rows = range(len(records))
    for name, marker in zip(contestants(records), "osD^vP*X" * 2, strict=False):
        found = [(record["contestants"].get(name, {}).get("ratio"), k) for k, record in enumerate(records)]
        points = [(ratio, k) for ratio, k in found if ratio]
        axes.scatter(*zip(*points, strict=True), marker=marker, label=name, zorder=3)
    limits = [(r["limit"]["seconds"] / r["contestants"][YARDSTICK]["median"], k) for k, r in enumerate(records)
              if r.get("limit") and "median" in r["contestants"][YARDSTICK]]  # fmt: skip
    if limits:
        axes.scatter(*zip(*limits, strict=True), marker="|", s=120, color="black", label="limit", zorder=3)
    axes.axvline(1, color="0.4", linewidth=1, label=YARDSTICK)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(yticks=rows, yticklabels=map(title, records), xlabel="time relative to torch.nn")
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--picture")
    arguments = parser.parse_args()
    data, records = load(arguments.results)
    suites = by_suite(records)
    path = os.path.relpath(arguments.results)
    tables = []
    for suite, rows in suites.items():
        headline, make = SUITES[suite]
        memory = memory_table(rows) if make is table else ""
        tables.append(f"{headline[0].upper()}{headline[1:]}:\n\n{make(rows)}")
        if memory:
            tables.append(f"Peak memory relative to torch.nn's (below 1 is less):\n\n{memory}")
    block = "\n\n".join([*tables, caption(data, path)])
    print(block)
    if arguments.readme:
        rewrite(arguments.readme, block)
    if arguments.picture:
        picture(suites["throughput"], arguments.picture)


if __name__ == "__main__":
    main()
