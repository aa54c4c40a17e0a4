"""Markdown tables of the records of `measure.py`."""

YARDSTICK = "torch.nn"


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def milliseconds(entry: dict) -> str:
    return f"{entry['seconds']['median'] * 1e3:.3g}" if "seconds" in entry else "failed"


def type_name(record: dict) -> str:
    return "float32 (TF32)" if record["tf32"] else record["dtype"]


def size(record: dict) -> str:
    own_input = f", I {record['I']}" if record["I"] != record["H"] else ""
    return f"B {record['B']}, T {record['T']}, H {record['H']}{own_input}"


def title(record: dict) -> str:
    """A case of the throughput suite in a reader's words."""
    layers = f", {record['num_layers']} layers" if record["num_layers"] > 1 else ""
    layers += ", bidirectional" if record["bidirectional"] else ""
    what = ", ".join(("forward" if record["mode"] == "infer" else "training", *record["features"]))
    return f"{record['cell'].upper().replace('_', ' ')}, {size(record)}{layers}, {type_name(record)}, {what}"


def figure(entry: dict, name: str, digits: int) -> str:
    """`median (low–high)`, or the reason why there is none."""
    if name in entry:
        median, (low, high) = entry[name].values()
        return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
    if "same_as" in entry:
        return "= " + entry["same_as"]
    return "failed" if "failed" in entry else "–"


def measured(records: list[dict], figure: str) -> list[str]:
    """The contestants that have the figure in any record, in the order of the records."""
    names = dict.fromkeys(name for record in records for name in record["contestants"])
    return [n for n in names if any(figure in record["contestants"].get(n, {}) for record in records)]


def throughput(records: list[dict], yardstick: str = YARDSTICK) -> str:
    """The time of torch.nn, or of another yardstick, then the time of the others and the limit relative to it; and the
    limit over the time of fastrnn, where that was timed."""
    names = [name for name in measured(records, "ratio") if name != yardstick]
    limited = any(record["limit"] for record in records)
    shared = limited and any("seconds" in record["contestants"].get("fastrnn", {}) for record in records)
    rows = [["case", f"{yardstick}, ms", *names] + ["limit"] * limited + ["share of the limit"] * shared]
    for record in records:
        entries = record["contestants"]
        row = [title(record), milliseconds(entries[yardstick])]
        row += [figure(entries.get(name, {}), "ratio", 2) for name in names]
        if limited:
            least, own = record["limit"], entries[yardstick].get("seconds")
            fastest = entries.get("fastrnn", {}).get("seconds")
            times = (own, fastest) if shared else (own,)
            row += [f"{least['seconds'] / one['median']:.2f}" if least and one else "–" for one in times]
        rows.append(row)
    return markdown(rows)


def memory(records: list[dict]) -> str:
    """The most that torch.nn allocates during a call, and the others relative to it; empty where none was recorded."""
    names = [name for name in measured(records, "peak_bytes") if name != YARDSTICK]
    rows = [["case", "torch.nn, MiB", *names]]
    for record in records:
        peaks = {name: entry["peak_bytes"] for name, entry in record["contestants"].items() if "peak_bytes" in entry}
        if YARDSTICK in peaks:
            own = [f"{peaks[name] / peaks[YARDSTICK]:.2f}" if name in peaks else "–" for name in names]
            rows.append([title(record), f"{peaks[YARDSTICK] / 2**20:.0f}", *own])
    return markdown(rows) if len(rows) > 1 else ""


def busy(records: list[dict]) -> str:
    """How many times longer a step takes beside busy processes, and that over the fair share."""
    rows = [["case", "others", "fair share"]]
    rows[0] += [f"{name}{what}" for name in measured(records, "slowdown") for what in ("", ", over the fair share")]
    for record in records:
        row = [title(record), f"{record['others']}, on {record['cores']} cores", f"{record['fair slowdown']:.2f}"]
        for entry in record["contestants"].values():
            row += [figure(entry, "slowdown", 2), figure(entry, "over fair share", 2)]
        rows.append(row)
    return markdown(rows)


def faster_loop(entries: dict) -> dict:
    """The entry of the faster of the loops that were timed."""
    loops = [entry for name, entry in entries.items() if "loop" in name and "seconds" in entry]
    return min(loops, key=lambda entry: entry["seconds"]["median"], default={})


def features(records: list[dict]) -> str:
    """The faster loop's time, the speed of the others relative to it, and the time of the feature relative to the same
    backend's plain call."""
    names = [name for name in measured(records, "speed_up") if "loop" not in name]
    rows = [["feature", "cell", "loop, ms", *names, "feature / plain call"]]
    for record in records:
        entries = record["contestants"]
        costs = [f"{entry['overhead']['median']:.2f}" for entry in entries.values() if "overhead" in entry]
        cell = f"{record['cell'].upper().partition('_')[0]}, {size(record)}, {type_name(record)}"
        row = [record["feature"], cell, milliseconds(faster_loop(entries))]
        row += [figure(entries.get(name, {}), "speed_up", 1) for name in names]
        rows.append([*row, " ".join(costs) or "–"])
    return markdown(rows)


# By suite: titles, and the tables under them.
TABLES = {
    "throughput": {
        "Time relative to torch.nn's plain call (below 1 is faster)": throughput,
        "Peak memory relative to torch.nn's (below 1 is less)": memory,
    },
    "features": {"Speed relative to the faster of two Python loops (above 1 is faster)": features},
    "cells": {
        "Time of a user's cell relative to the built-in one on the same backend (below 1 is faster)": (
            lambda records: throughput(records, "fastrnn:cpu")
        ),
    },
    "heads": {
        "Time of eight heads relative to the dense W_hh with the same blocks (below 1 is faster)": (
            lambda records: throughput(records, "dense")
        ),
    },
    "grid": {"Time of plain calls from small to large relative to torch.nn's (below 1 is faster)": throughput},
    "short": {"Time of short calls relative to torch.nn's (below 1 is faster)": throughput},
    "streams": {"Time of one step of a stream relative to torch.nn's module at T = 1 (below 1 is faster)": throughput},
    "packed": {
        "Time of packed batches, lengths from 1 to T, relative to torch.nn's (below 1 is faster; the limit is that of"
        " whole batches)": throughput,
    },
    "busy": {"Times longer that a training step takes beside processes that keep the cores busy": busy},
    "memory": {"Peak memory of a training step relative to torch.nn's (below 1 is less)": memory},
    "rivals": {
        "Time relative to torch.nn (below 1 is faster), beside other projects' kernels": throughput,
        "Peak memory relative to torch.nn's (below 1 is less), beside other projects' kernels": memory,
    },
}


def by_suite(records: list[dict]) -> dict[str, str]:
    """The tables of all suites that have records, by title."""
    found = {}
    for suite, tables in TABLES.items():
        rows = [record for record in records if record["suite"] == suite]
        found |= {title: table(rows) for title, table in tables.items() if rows}
    return {title: table for title, table in found.items() if table}


SMALL = {
    "lstm-B32-T100-I256-H256-fp32-train": "LSTM",
    "gru-B32-T100-I256-H256-fp32-train": "GRU",
    "rnn_tanh-B32-T100-I256-H256-fp32-train": "tanh RNN",
    "tap-B32-T100-I128-H128-float32": "LSTM, gradient norm of every step",
    "lengths-B32-T100-I128-H128-float32": "LSTM, sequences of different lengths",
    "resets-B32-T100-I128-H128-float32": "LSTM, resets in mid-sequence",
    "layer_norm-B32-T100-I128-H128-float32": "LSTM, layer norm",
    "zoneout-B32-T100-I128-H128-float32": "LSTM, zoneout",
}


def small(records: list[dict]) -> str:
    """A few cases: fastrnn's median time, and the medians of the faster loop and of torch.nn relative to it."""
    found = {record["case"]: record for record in records if record["suite"] in ("throughput", "features")}
    rows = [["training step", "Python loop", "torch.nn", "fastrnn"]]
    for case, name in SMALL.items():
        entries = found[case]["contestants"]
        own = entries["fastrnn"]["seconds"]["median"]

        def relative(entry, own=own):
            return f"{entry['seconds']['median'] / own:.1f} ×" if "seconds" in entry else "cannot"

        row = [f"{name}, H {found[case]['H']}", relative(faster_loop(entries)), relative(entries[YARDSTICK])]
        rows.append([*row, f"{milliseconds(entries['fastrnn'])} ms"])
    return markdown(rows)
