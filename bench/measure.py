"""A case from start to end: build all contestants on the same parameters, compare their results, time them.

Every contestant that takes part has computed the right thing first: see `agreement.py`.
"""

import gc
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch

from fastrnn.tuning import timing

from . import agreement, contestants, machine
from .cases import DEVICE
from .contestants import CannotRun, Contestant
from .limit import floor_here
from .problem import NAMES, SEED, Inputs, Model, Problem, call, results
from .suites import SUITES, Suite
from .worker import raise_if_lost


@contextmanager
def precision(tf32: bool):
    """float32 products in TF32 or in full, for cuDNN's recurrent kernels and for matrix products alike."""
    places, wanted = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul), "tf32" if tf32 else "ieee"
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = wanted
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def measure(case, broken: Mapping[str, str]) -> dict:
    """The record of a case; `tables.py` shows what is made of it.

    `broken`: contestants that are not tried, each with the reason. Raises GpuLost where another one must join them.
    """
    suite = SUITES[case.suite]
    torch.manual_seed(SEED)
    record = {"suite": case.suite, "case": case.name, **case.describe(), "contestants": {}}
    entries = record["contestants"]
    with precision(case.tf32):
        problem = Problem(case)
        inputs, rows = problem.inputs(), suite.contestants(case)
        models = build(problem, rows, broken, entries)
        models = agreeing(suite, problem, inputs, rows, models, entries)
        load, clocks = os.getloadavg()[0], machine.clocks(DEVICE)
        samples = _time(suite, problem, inputs, rows, models, entries)
        record |= {"load": [load, os.getloadavg()[0]], "clocks": [clocks, machine.clocks(DEVICE)]}
    _compare(suite, samples, entries)
    if suite.figure == "ratio":
        record["torch.nn runs"] = machine.torch_algorithm(case, DEVICE)
        record["limit"] = floor_here(case)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return record


def build(problem: Problem, rows: tuple[Contestant, ...], broken: Mapping[str, str], entries: dict) -> dict[str, Model]:
    """The contestants that take part, by name; every contestant gets an entry that says why not, or a note."""
    models = {}
    for row in rows:
        entry = entries[row.name] = {}
        if row.name in broken:
            entry["failed"] = broken[row.name]
            continue
        try:
            if row.name in problem.case.without:
                raise CannotRun(problem.case.without[row.name])
            model = models[row.name] = row.build(problem)
            entry |= {key: text for key, text in (("note", model.note), ("takes", model.takes)) if text}
        except CannotRun as reason:
            entry["cannot"] = str(reason)
            if reason.same_as:
                entry["same_as"] = reason.same_as
        except Exception as error:  # one broken contestant must not hide the others; the test fails on it
            _fail(row.name, error, entry)
    return models


def agreeing(suite: Suite, problem: Problem, inputs: Inputs, rows, models: dict[str, Model], entries: dict):
    """The contestants whose results are right; the entries of the others say what is wrong."""
    case, twin = problem.case, problem.double()
    truths, yardstick, right = {}, {}, {}
    for row in rows:
        if row.name not in models:
            continue
        try:
            if row.checked:
                plain = row.plain or not case.features or bool(row.own_way & case.features)
                if plain not in truths:
                    truth = contestants.torch_nn if plain else suite.truth
                    truths[plain] = results(twin, truth(twin), inputs)
                found = agreement.errors(results(problem, models[row.name], inputs), truths[plain])
                if "clip" in row.own_way & case.features:
                    found = {name: pair for name, pair in found.items() if name in NAMES}
                entries[row.name]["errors"] = agreement.worst(found)
                rounding = suite.rounding.get(case.dtype, 1.0)
                if wrong := agreement.violations(found, yardstick or found, case, rounding):
                    raise ArithmeticError("; ".join(wrong))
                if row.yardstick:
                    yardstick |= {name: [*map(max, pair, yardstick.get(name, pair))] for name, pair in found.items()}
            right[row.name] = models[row.name]
        except Exception as error:
            _fail(row.name, error, entries[row.name])
    return right


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _fail(name: str, error: Exception, entry: dict) -> None:
    entry["failed"] = in_words(error)
    raise_if_lost(name, entry["failed"])


def _time(suite: Suite, problem: Problem, inputs: Inputs, rows, models: dict[str, Model], entries: dict):
    """Samples by contestant; their medians, and on a GPU their memory, go into the entries."""
    bytes_per_set = inputs.x.nbytes + inputs.gradients["y"].nbytes
    sets = [inputs, *(problem.inputs() for _ in range(timing.input_sets(bytes_per_set, DEVICE) - 1))]
    calls = {name: lambda k, m=model: call(problem, m, sets[k % len(sets)]) for name, model in models.items()}
    brief = {row.name for row in rows if row.brief} - {bound.contestant for bound in problem.case.bounds}
    samples = timing.interleave(calls, DEVICE, suite.case_seconds, brief, suite.warmup)
    for name, own in samples.items():
        entries[name]["seconds"] = own.record()
        if DEVICE == "cuda":
            entries[name]["peak_bytes"] = _peak_bytes(calls[name])
    return samples


def _compare(suite: Suite, samples: dict[str, timing.Samples], entries: dict) -> None:
    """Every contestant relative to what the suite compares with, and fastrnn to the same backend's plain call."""
    base = min((samples[name] for name in suite.against if name in samples), key=lambda own: own.median, default=None)
    for name, own in samples.items():
        if base is not None and not name.startswith(contestants.PLAIN):
            pair = (own, base) if suite.figure == "ratio" else (base, own)
            entries[name][suite.figure] = timing.ratio(*pair).record()
        backend = entries[name].get("takes") or name.removeprefix("fastrnn:")
        plain = samples.get(contestants.PLAIN + backend)
        if plain is not None:
            entries[name]["overhead"] = timing.ratio(own, plain).record()


def _peak_bytes(run: Callable[[int], object]) -> int:
    """The most that one call allocates on the GPU, beyond what was there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def fastrnn_call(case) -> Callable[[], None]:
    """A call of fastrnn on the backend that it chooses, waited for."""
    problem = Problem(case)
    model, inputs = contestants.fused(problem, None), problem.inputs()

    def run():
        with precision(case.tf32):
            call(problem, model, inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run
