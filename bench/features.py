"""What each feature beyond torch.nn's plain call gains: fastrnn against the Python loop, one case per feature.

A case is measured as in `measure.py`: all contestants on the same parameters are held to each other, then timed round
by round. The truth is the loop in float64, which shares no code with fastrnn; the yardstick of the 2x rule is the
largest error of the loops and of torch.nn in the dtype under test. Where a feature is random, every call starts from
the same seed, and the loop draws its masks by the same calls of torch in the same order: in the float64 run in the
dtype under test, so that they are the same.
"""

import copy
import gc
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import dispatch, functional

from . import agreement, loops, machine, timing
from .cases import DEVICE
from .contestants import CannotRun
from .feature_cases import CASE_SECONDS, LOOPS, PLAIN, ROUNDING, FeatureCase, P
from .measure import SEED, in_words, precision
from .worker import raise_if_lost

NAMES = ("y", "h_n", "c_n", "c")


# ----------------------------------------------------------------------------------------------------- contestants


class Outcome(NamedTuple):
    """The outputs in the order of NAMES; the norms as a leaf that receives them, or as a function to call later."""

    outputs: tuple[Tensor, ...]
    tap: Tensor | None = None
    norms: Callable[[], Tensor] | None = None


Contestant = Callable[[Tensor], Outcome]


class Problem:
    """A case's module, parameters and masks on its device. `double()` is the same problem in float64."""

    def __init__(self, case: FeatureCase):
        self.case, feature = case, case.feature
        kind, _, nonlinearity = feature.cell.partition("_")
        options = dict(feature.module)
        if "proj_size" in options:
            options["proj_size"] = int(options["proj_size"] * case.H)
        if "clip_state_grad_norm" in options:
            options["clip_state_grad_norm"] *= case.H**0.5
        if nonlinearity:
            options["nonlinearity"] = nonlinearity
        self.kind, self.options = kind.upper(), options
        self.module = getattr(fastrnn, self.kind)(case.I, case.H, **options, device=DEVICE, dtype=case.dtype).train()
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if name.startswith("ln_"):  # neither ones nor zeros
                    parameter.add_(0.1 * torch.randn_like(parameter))
            # With gains of one the network is chaotic, and rounding errors grow from step to step.
            if feature.module.get("layer_norm"):
                self.module.ln_hh_l0.mul_(0.3)
        call = feature.call
        self.lengths = torch.randint(1, case.T + 1, (case.B,), device=DEVICE) if "lengths" in call else None
        self.reset_mask = torch.rand(case.T, case.B, device=DEVICE) < 0.05 if "resets" in call else None
        self.tap, self.return_cells = "tap" in call, "return_cells" in call

    def double(self) -> "Problem":
        twin = copy.copy(self)
        twin.module = copy.deepcopy(self.module).double()
        return twin

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())


def loop(problem: Problem, style: str) -> Contestant:
    if style == "cells" and not problem.case.feature.cells:
        raise CannotRun("torch.nn's cells do not have it")
    own = {name: v for name, v in problem.options.items() if name in loops.Extras.__dataclass_fields__}
    extras = loops.Extras(
        mask_dtype=problem.case.dtype, lengths=problem.lengths, reset_mask=problem.reset_mask, tap=problem.tap,
        return_cells=problem.return_cells, **own,
    )  # fmt: skip
    params, cell = problem.parameters, problem.case.feature.cell

    def run(x):
        looped = loops.run(cell, style, params, x, extras)
        return Outcome(looped.outputs, norms=looped.norms)

    return run


def torch_nn(problem: Problem) -> Contestant:
    """torch.nn's fused kernels where a way leads through them."""
    name, case = problem.case.feature.name, problem.case
    if name not in ("lengths", "weight dropout", "projection"):
        raise CannotRun("torch.nn has no way to it")
    size = problem.options.get("proj_size", 0)
    module = nn.LSTM(case.I, case.H, proj_size=size, device="meta")
    for key, parameter in problem.parameters.items():
        setattr(module, key, parameter)
    module.flatten_parameters()
    lengths = None if problem.lengths is None else problem.lengths.cpu()  # where packing wants them

    def flat(y, hidden):
        return Outcome((y, *hidden))

    def packed(x):
        sequence = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, hidden = module(sequence)
        return flat(pad_packed_sequence(y, total_length=case.T)[0], hidden)

    def dropped(x):
        weight = F.dropout(module.weight_hh_l0, P)
        return flat(*torch.func.functional_call(module, {"weight_hh_l0": weight}, (x,)))

    ways = {"lengths": packed, "weight dropout": dropped}
    return ways.get(name, lambda x: flat(*module(x)))


def fused(problem: Problem, backend: str | None, plain: bool = False) -> Contestant:
    """fastrnn, on the backend that it chooses or on a given one; `plain`: without the feature."""
    case, module = problem.case, copy.copy(problem.module)
    module.backend = backend
    keywords = {"lengths": problem.lengths, "reset_mask": problem.reset_mask, "return_cells": problem.return_cells}
    keywords = {} if plain else keywords
    states = 2 if case.feature.cell == "lstm" else 1
    shape = (1, 2, states, case.T, case.B) if problem.tap and not plain else None

    def tap(x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        return None if shape is None else torch.zeros(shape, dtype=dtype, device=x.device, requires_grad=True)

    def run(x):
        leaf = tap(x)
        y, hidden, *c = module(x, tap=leaf, **keywords)
        return Outcome((y, *(hidden if isinstance(hidden, tuple) else (hidden,)), *c), leaf)

    probe = torch.empty(case.T, case.B, case.I, device=DEVICE, dtype=case.dtype, requires_grad=True)
    arguments = {**module._arguments(), **keywords, "tap": tap(probe)}
    request = functional.check(module._cell, probe, None, module._parameters_by_name(), **arguments).request
    if backend is None:
        run.takes = dispatch.choose(request)
        return run
    reason = dispatch.BACKENDS[backend].reason(request)
    if reason is not None:
        raise CannotRun(reason)
    if not plain and dispatch.choose(request) == backend:
        raise CannotRun(f"auto takes {backend}: the same as fastrnn", same_as="fastrnn")
    return run


def contestants(problem: Problem) -> dict[str, Callable[[], Contestant]]:
    """By name, how to build each; the loops first, the first of them being the yardstick."""
    rows = {
        "loop": lambda: loop(problem, "ops"),
        "loop of cells": lambda: loop(problem, "cells"),
        "torch.nn": lambda: torch_nn(problem),
        "fastrnn": lambda: fused(problem, None),
    }
    own = [name for name in dispatch.BACKENDS if name != "aten"]
    rows |= {f"fastrnn:{name}": lambda name=name: fused(problem, name) for name in own}
    if problem.case.feature.overhead:
        rows |= {f"{PLAIN}{name}": lambda name=name: fused(problem, name, plain=True) for name in own[:-1]}
    return rows


# -------------------------------------------------------------------------------------------------------- measuring


def call(contestant: Contestant, leaves: list[Tensor], x: Tensor, gradients: dict[str, Tensor]):
    """Forward, and the gradients of the leaves and the norms, from those of the outputs in `gradients`."""
    outcome = contestant(x)
    used = [(out, gradients[name]) for name, out in zip(NAMES, outcome.outputs, strict=False) if name in gradients]
    leaves = leaves if outcome.tap is None else [*leaves, outcome.tap]
    found = torch.autograd.grad([out for out, _ in used], leaves, [g.to(out.dtype) for out, g in used])
    return outcome.outputs, found if outcome.norms is None else (*found, outcome.norms())


def results(problem: Problem, contestant: Contestant, x: Tensor, gradients) -> agreement.Tensors:
    torch.manual_seed(SEED)
    names = ["dx", *(f"d {name}" for name in problem.parameters), "norms"]
    outputs, found = call(contestant, [x, *problem.parameters.values()], x, gradients)
    outputs = [out.detach() for out in outputs]
    return dict(zip(NAMES, outputs, strict=False)) | dict(zip(names, found, strict=False))


def measure(case: FeatureCase, broken: Mapping[str, str]) -> dict:
    """The record of a case, as in `measure.measure`, with `speed_up` by contestant: the faster loop's time over its."""
    torch.manual_seed(SEED)
    record = {
        "suite": "features",
        "case": case.name,
        "feature": case.feature.name,
        "cell": case.feature.cell,
        **{name: getattr(case, name) for name in ("B", "T", "I", "H", "tf32")},
        "dtype": str(case.dtype).removeprefix("torch."),
        "contestants": {},
        "load": [os.getloadavg()[0]],
        "clocks": [machine.clocks(DEVICE)],
    }
    with precision(case.tf32):
        problem, x, gradients = given(case)
        right = _agreeing(problem, x, gradients, broken, record["contestants"])
        _time(problem, right, x, gradients, record)
    record["load"].append(os.getloadavg()[0])
    record["clocks"].append(machine.clocks(DEVICE))
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return record


def fastrnn_call(case: FeatureCase) -> Callable[[], None]:
    """A call of fastrnn on the backend that it chooses, waited for."""
    problem, x, gradients = given(case)
    run, leaves = fused(problem, None), [x, *problem.parameters.values()]

    def timed():
        with precision(case.tf32):
            call(run, leaves, x, gradients)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return timed


def given(case: FeatureCase) -> tuple[Problem, Tensor, dict[str, Tensor]]:
    """The problem, x, and the gradients of the outputs, by name."""
    problem = Problem(case)
    x, *gradients = (
        torch.randn(case.T, case.B, size, device=DEVICE).to(case.dtype)
        for size in (case.I, problem.options.get("proj_size", case.H), case.H)
    )
    names = ("y", "c") if problem.return_cells else ("y",)
    return problem, x.requires_grad_(), dict(zip(names, gradients, strict=False))


def _agreeing(problem: Problem, x, gradients, broken, entries: dict) -> dict[str, Contestant]:
    """The contestants that compute what the float64 loop computes; the others get a reason in their entry."""
    case, twin = problem.case, problem.double()
    truth = results(twin, loop(twin, "ops"), x.detach().double().requires_grad_(), gradients)
    yardstick, right = {}, {}
    for name, build in contestants(problem).items():
        entry = entries[name] = {}
        if name in broken:
            entry["failed"] = broken[name]
            continue
        try:
            contestant = build()
            entry["note"] = f"auto takes {contestant.takes}" if name == "fastrnn" else ""
            if not name.startswith(PLAIN):
                found = agreement.errors(results(problem, contestant, x, gradients), truth)
                entry["errors"] = {key: [float(f"{e:.3g}") for e in pair] for key, pair in found.items()}
                wrong = agreement.violations(found, yardstick or found, case, ROUNDING.get(case.dtype, 1.0))
                if wrong:
                    raise ArithmeticError("wrong: " + "; ".join(wrong))
                if not name.startswith("fastrnn"):
                    worse = {key: [*map(max, pair, yardstick.get(key, pair))] for key, pair in found.items()}
                    yardstick = yardstick | worse
            right[name] = contestant
        except CannotRun as reason:
            entry |= {"cannot": str(reason), "same_as": reason.same_as}
        except Exception as error:  # one broken contestant must not hide the others; the test fails on it
            entry["failed"] = in_words(error)
            raise_if_lost(name, entry["failed"])
    return right


def _time(problem: Problem, right: dict[str, Contestant], x, gradients, record: dict) -> None:
    leaves = [x, *problem.parameters.values()]
    calls = {name: lambda k, run=run: call(run, leaves, x, gradients) for name, run in right.items()}
    slow = {name for name in right if name in LOOPS or name.endswith("reference")}
    samples = timing.interleave(calls, DEVICE, CASE_SECONDS, slow, warmup=0.0 if DEVICE == "cpu" else 0.1)
    best = min((samples[name] for name in LOOPS if name in samples), key=lambda own: own.median, default=None)
    for name, own in samples.items():
        entry = record["contestants"][name]
        seconds = [float(f"{s:.5g}") for s in own.seconds]
        entry |= {"median": own.median, "spread": own.spread, "inner": own.inner, "seconds": seconds}
        if best is not None and not name.startswith(PLAIN):
            gain = timing.ratio(*timing.common(best, own))
            entry |= {"speed_up": gain.median, "interval": [gain.low, gain.high]}
        plain = samples.get(name.replace("fastrnn:", PLAIN))
        if name == "fastrnn":
            plain = samples.get(PLAIN + right[name].takes)
        if plain is not None and name.startswith("fastrnn"):
            cost = timing.ratio(own, plain)
            entry["overhead"] = {"ratio": cost.median, "interval": [cost.low, cost.high]}
