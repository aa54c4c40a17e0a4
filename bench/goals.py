"""What calls on a CPU should cost, and what they do: goals for the records of `measure.py`, and why one is missed."""

import math
from collections.abc import Callable
from typing import NamedTuple

from . import tables


class Goal(NamedTuple):
    name: str
    most: float
    figure: Callable[[dict], float | None]  # of a record; None where the goal is not for it
    why_not: str  # printed where the goal is missed


def relative(entries: dict, name: str, other: str) -> float | None:
    """The median time of a contestant over that of another one."""
    if not all("seconds" in entries.get(one, {}) for one in (name, other)):
        return None
    return entries[name]["seconds"]["median"] / entries[other]["seconds"]["median"]


def of_suite(suite: str, **wanted):
    """The figure `fastrnn / torch.nn` of the calls of one suite, without clipping and tap, that have one of these
    values in each of these fields."""

    def figure(record: dict) -> float | None:
        plain = record["suite"] == suite and set(record.get("features", ())) <= {"packed"}
        if not plain or any(record.get(field) not in values for field, values in wanted.items()):
            return None
        return relative(record["contestants"], "fastrnn", tables.YARDSTICK)

    return figure


def against_onnxruntime(record: dict) -> float | None:
    return relative(record["contestants"], "fastrnn", "onnxruntime") if record["suite"] == "streams" else None


def over_products(record: dict) -> float | None:
    """The time over that of the products alone."""
    own = record["contestants"].get("fastrnn", {}).get("seconds")
    if record["suite"] != "throughput" or record["features"] or record["B"] < 32 or record["H"] < 256 or not own:
        return None
    return own["median"] / record["limit"]["seconds"]


def over_plain(record: dict) -> float | None:
    if record["suite"] != "features" or record["feature"].split()[0] not in ("tap", "clipping", "resets", "lengths"):
        return None
    found = [entry["overhead"]["median"] for entry in record["contestants"].values() if "overhead" in entry]
    return found[0] if found else None


def over_loop(record: dict) -> float | None:
    if record["suite"] != "features" or record["feature"] not in ("layer norm", "zoneout"):
        return None
    own = record["contestants"]["fastrnn"]["seconds"]["median"]
    return own / tables.faster_loop(record["contestants"])["seconds"]["median"]


def of_memory(record: dict) -> float | None:
    peaks = {name: entry.get("peak_bytes") for name, entry in record["contestants"].items()}
    return peaks["fastrnn"] / peaks[tables.YARDSTICK] if record["suite"] == "memory" and all(peaks.values()) else None


def over_fair_share(record: dict) -> float | None:
    return record["contestants"]["fastrnn"]["over fair share"]["median"] if record["suite"] == "busy" else None


LSTM, GRU, OTHERS = ("lstm",), ("gru",), ("gru", "rnn_tanh")
TRAINING, FORWARD = ("train",), ("infer",)
FULL, HALF = ("float32",), ("bfloat16",)
BY_PRODUCTS = "torch's LSTM is one operation, too, whose products take most of the time"
BY_CALL = "the arithmetic takes a few microseconds; Python, autograd and the allocation of tensors take the rest"
BY_DOTS = "beside fast products of bfloat16, the arithmetic of the cells and the memory take most of the time"

GOALS = (
    Goal("LSTM, training, B 16 to 256, H 128 to 512", 0.8, of_suite("grid", cell=LSTM, mode=TRAINING, dtype=FULL),
         BY_PRODUCTS),
    Goal("LSTM, forward, the same", 0.92, of_suite("grid", cell=LSTM, mode=FORWARD, dtype=FULL), BY_PRODUCTS),
    Goal("GRU and RNN, training, the same", 0.45, of_suite("grid", cell=OTHERS, mode=TRAINING, dtype=FULL),
         "the products alone take most of that"),
    Goal("GRU and RNN, forward, the same", 0.5, of_suite("grid", cell=OTHERS, mode=FORWARD, dtype=FULL),
         "the products alone take most of that"),
    Goal("LSTM in bfloat16, training, to H 256", 0.75, of_suite("grid", cell=LSTM, mode=TRAINING, dtype=HALF), BY_DOTS),
    Goal("LSTM in bfloat16, forward, the same", 0.92, of_suite("grid", cell=LSTM, mode=FORWARD, dtype=HALF), BY_DOTS),
    Goal("GRU in bfloat16, training and forward, the same", 0.35, of_suite("grid", cell=GRU, dtype=HALF), BY_DOTS),
    Goal("LSTM, short calls, training", 0.5, of_suite("short", cell=LSTM, mode=TRAINING), BY_CALL),
    Goal("LSTM, short calls, forward", 0.45, of_suite("short", cell=LSTM, mode=FORWARD), BY_CALL),
    Goal("GRU and RNN, short calls, training", 0.25, of_suite("short", cell=OTHERS, mode=TRAINING),
         f"{BY_CALL}; torch.nn's calls of one step have few operations"),
    Goal("GRU and RNN, short calls, forward", 0.45, of_suite("short", cell=OTHERS, mode=FORWARD), BY_CALL),
    Goal("one step of a stream", 0.2, of_suite("streams"),
         "torch.nn's GRU and RNN take few operations for one step; the LSTM's takes many"),
    Goal("one step of a stream, over onnxruntime", 1.0, against_onnxruntime,
         "onnxruntime packs the weights beforehand; `step` reads them where they are, since any part of a program "
         "may change them without a count of versions (`p.data`)"),
    Goal("packed, lengths from 1 to T", 0.6, of_suite("packed"), "the products of long batches"),
    Goal("tap, clipping, resets, lengths over the plain call", 1.03, over_plain, "one more pass over each step's rows"),
    Goal("layer norm and zoneout over the Python loop", 0.2, over_loop,
         "masks are drawn by PyTorch's generator on one thread, as in the loop; the backward of layer norm multiplies "
         "with W_hh again"),
    Goal("time over the products' alone, B >= 32, H >= 256", 1.25, over_products,
         "a step's product has few rows, and every call reads its memory anew"),
    Goal("training beside busy processes over the fair share", 1.5, over_fair_share,
         "a call notices busy cores only after it has waited for them"),
    Goal("peak memory of a training step", 1.0, of_memory, "not known"),
)  # fmt: skip


def table(records: list[dict]) -> str:
    """Each goal, the geometric mean of its figures and the largest; relative to torch.nn where it says no other."""
    rows = [["goal", "at most", "geometric mean", "largest", "if the mean misses it, why"]]
    for goal in GOALS:
        found = [figure for figure in map(goal.figure, records) if figure is not None]
        if found:
            mean = math.exp(sum(map(math.log, found)) / len(found))
            row = [goal.name, f"{goal.most:g}", f"{mean:.2f}", f"{max(found):.2f}"]
            rows.append([*row, goal.why_not if mean > goal.most else "–"])
    return tables.markdown(rows)
