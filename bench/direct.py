"""Suites whose contestants are plain functions: what a user writes is timed as it is, without the code around it that
`problem.py` needs for its many kinds of cases."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrnn.tuning import timing

from . import machine
from .cases import DEVICE
from .contestants import CannotRun
from .limit import floor_here
from .problem import SEED

Run = Callable[[int], list[Tensor]]  # takes a running number, returns what is compared


@dataclass(frozen=True)
class Direct:
    """A row of SUITES, with the fields of `suites.Suite` that the session reads.

    Attributes:
        makers: (case, truth) -> by name, a function that makes the contestant's Run or raises CannotRun. The first is
            what the times are relative to; with `truth` it is in float64, and what the results are compared with.
        tolerance: of the largest difference, relative to the largest number of the same tensor.
    """

    cases: list
    makers: Callable[..., dict[str, Callable[[], Run]]]
    against: tuple[str, ...]
    tolerance: float
    session_seconds: float
    case_seconds: float
    longest: float = 90.0


def difference(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest one, relative to the largest number of the tensor that it is in."""
    pairs = zip(found, truth, strict=True)
    return max(float((one.double() - other).abs().max() / other.abs().max()) for one, other in pairs)


OWN_THREADS = {"onnxruntime"}
"""Contestants with threads beside PyTorch's. Threads look for work for a while after a call, and hold a core."""
REST = 0.02
"""Seconds after which they sleep."""


def measure_with(suite: Direct) -> Callable[[object, Mapping[str, str]], dict]:
    """The function that measures a case of this suite."""

    def measure(case, broken: Mapping[str, str]) -> dict:
        record = {"suite": case.suite, "case": case.name, **case.describe(), "contestants": {}}
        entries, runs = record["contestants"], {}
        torch.manual_seed(SEED)
        truth = next(iter(suite.makers(case, True).values()))()(0)
        for name, make in suite.makers(case, False).items():
            entry = entries[name] = {}
            try:
                run = make()
                entry["difference"] = float(f"{difference(run(0), truth):.3g}")
                if not entry["difference"] <= suite.tolerance:
                    raise ArithmeticError(f"differs by {entry['difference']} from float64, allowed {suite.tolerance}")
                runs[name] = run
            except CannotRun as reason:
                entry["cannot"] = str(reason)
            except Exception as error:  # one broken contestant must not hide the others; the test fails on it
                entry["failed"] = f"{type(error).__name__}: {error}"[:1000]
        load = os.getloadavg()[0]
        rest = REST if OWN_THREADS & runs.keys() else 0.0
        samples = timing.interleave(runs, DEVICE, suite.case_seconds, set(), warmup=0.05, rest=rest)
        base = next((samples[name] for name in suite.against if name in samples), None)
        for name, own in samples.items():
            entries[name]["seconds"] = own.record()
            if base is not None:
                entries[name]["ratio"] = timing.ratio(own, base).record()
        record |= {"load": [load, os.getloadavg()[0]], "torch.nn runs": machine.torch_algorithm(case, DEVICE)}
        return record | {"limit": floor_here(case)}

    return measure


def check(case, session, suite: Direct, must: set[str]) -> None:
    """Measures a case, and fails where one of the contestants in `must` failed or is missing."""
    entries = session.record(case, measure_with(suite))["contestants"]
    wrong = {name: entries[name] for name in must if "seconds" not in entries[name]}
    assert not wrong, f"{case.name}: {wrong}"
