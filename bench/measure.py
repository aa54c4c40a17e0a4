"""One case from start to end: build all contestants on the same weights, hold them to each other, time them."""

import copy
import gc
import os
import statistics
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import agreement, machine, timing
from .cases import CASE_SECONDS, DEVICE
from .contestants import CONTESTANTS, CannotRun, Contestant, Model, chosen, environment, on_backend, yardstick_module
from .limit import device_model, floor
from .worker import raise_if_lost

SEED = 2013
NAMES = ("y", "h_n", "c_n")


@dataclass(frozen=True)
class Inputs:
    """x [T, B, I], and the gradients of y [T, B, D*H] and of the final states [L*D, B, H]."""

    x: Tensor
    gradients: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(_leaf(self.x.to(dtype), self.x.requires_grad), tuple(g.to(dtype) for g in self.gradients))


def _leaf(x: Tensor, requires_grad: bool) -> Tensor:
    return x.detach().requires_grad_(requires_grad)


def random_inputs(case) -> Inputs:
    directions = 2 if case.bidirectional else 1
    states = [(case.num_layers * directions, case.B, case.H)] * (2 if case.cell == "lstm" else 1)
    shapes = [(case.T, case.B, case.I), (case.T, case.B, directions * case.H), *states]
    x, *gradients = (torch.randn(shape, device=DEVICE).to(case.dtype) for shape in shapes)
    return Inputs(_leaf(x, case.mode == "train"), tuple(gradients))


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


def call(case, model: Model, inputs: Inputs, outputs_used: int):
    """Forward, and in training the gradients of x, all parameters and the tap, from those of the first outputs."""
    with environment(model.environment):
        if case.mode != "train":
            with torch.no_grad():
                return model.forward(inputs.x)[0], ()
        outputs, tap = model.forward(inputs.x)
        leaves = (inputs.x, *model.parameters) if tap is None else (inputs.x, *model.parameters, tap)
        return outputs, torch.autograd.grad(outputs[:outputs_used], leaves, inputs.gradients[:outputs_used])


def results(case, model: Model, module: torch.nn.Module, inputs: Inputs) -> agreement.Tensors:
    """All outputs and gradients, by name."""
    outputs, gradients = call(case, model, inputs, len(inputs.gradients))
    names = ["dx", *(f"d {name}" for name, _ in module.named_parameters()), "norms"]
    outputs = [value.detach() for value in outputs]
    return dict(zip(NAMES, outputs, strict=False)) | dict(zip(names, gradients, strict=False))


def truth(case, module: torch.nn.Module, inputs: Inputs, features: frozenset[str]) -> agreement.Tensors:
    """The float64 results: torch.nn's for a plain call, else the reference backend's with these features."""
    case = replace(case, features=features, without={})
    module, inputs = copy.deepcopy(module).double(), inputs.to(torch.float64)
    build = on_backend("reference") if features else CONTESTANTS[0].build
    return results(case, build(case, module), module, inputs)


# ------------------------------------------------------------------------------------------------------- one case


def measure(case, broken: Mapping[str, str], contestants: tuple[Contestant, ...] = CONTESTANTS) -> dict:
    """The record of a case; see `bench/report.py` for what is made of it. The first contestant is the yardstick.

    `broken`: contestants that are not tried, each with the reason. Raises GpuLost where another one has to be.
    """
    torch.manual_seed(SEED)
    with precision(case.tf32):
        module = yardstick_module(case, DEVICE)
        inputs = random_inputs(case)
        record = _describe(case, module, inputs)
        models = _build(case, module, contestants, broken, record["contestants"])
        models = _agree(case, module, inputs, models, record["contestants"])
        _time(case, inputs, models, {row.name for row in contestants if row.brief}, record)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return record


def _describe(case, module, inputs: Inputs) -> dict:
    return {
        "suite": "throughput",
        "case": case.name,
        "cell": case.cell,
        **{name: getattr(case, name) for name in ("B", "T", "I", "H", "num_layers", "bidirectional", "mode", "tf32")},
        "dtype": str(case.dtype).removeprefix("torch."),
        "features": sorted(case.features),
        "fp32_precision": {
            "cudnn.rnn": torch.backends.cudnn.rnn.fp32_precision,
            "cuda.matmul": torch.backends.cuda.matmul.fp32_precision,
        },
        "torch.nn runs": machine.torch_algorithm(case, DEVICE),
        "auto takes": chosen(case, module, inputs.x),
        "contestants": {},
    }


def _build(case, module, contestants, broken, entries: dict) -> dict[str, tuple[Contestant, Model]]:
    models = {}
    for row in contestants:
        entry = entries[row.name] = {}
        if row.name in broken:
            entry["failed"] = broken[row.name]
            continue
        try:
            models[row.name] = row, row.model(case, module)
            entry["note"] = models[row.name][1].note
        except CannotRun as reason:
            entry |= {"cannot": str(reason), "same_as": reason.same_as}
        except Exception as error:  # one broken contestant must not hide the others; the test fails on it
            entry["failed"] = in_words(error)
            raise_if_lost(row.name, entry["failed"])
    return models


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _agree(case, module, inputs, models, entries):
    """Those whose results are right; the others get a `failed` in their entry."""
    truths = {frozenset(): truth(case, module, inputs, frozenset())}
    yardstick, right = {}, {}
    for name, (row, model) in models.items():
        features = row.computes(case)
        own_way = features & row.own_way
        target = frozenset() if own_way else features
        try:
            if target not in truths:
                truths[target] = truth(case, module, inputs, target)
            found = agreement.errors(results(case, model, module, inputs), truths[target])
        except Exception as error:
            entries[name]["failed"] = in_words(error)
            raise_if_lost(name, entries[name]["failed"])
            continue
        if own_way:
            found = {key: pair for key, pair in found.items() if key in NAMES}
            entries[name]["note"] += f"; {', '.join(own_way)} differs, so only its outputs are compared"
        yardstick = yardstick or found
        entries[name]["errors"] = {key: [float(f"{e:.3g}") for e in pair] for key, pair in found.items()}
        broken = agreement.violations(found, yardstick, case)
        if broken:
            entries[name]["failed"] = "wrong: " + "; ".join(broken)
        else:
            right[name] = model
    return right


def _peak_bytes(run) -> int:
    """What one call allocates on the GPU at its height, beyond what was there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _time(case, inputs: Inputs, models: dict[str, Model], brief: set[str], record: dict) -> None:
    bytes_per_set = inputs.x.nbytes + inputs.gradients[0].nbytes
    sets = [inputs, *(random_inputs(case) for _ in range(timing.input_sets(bytes_per_set, DEVICE) - 1))]

    def timed(model):
        return lambda k: call(case, model, sets[k % len(sets)], 1)

    load, clocks = os.getloadavg()[0], machine.clocks(DEVICE)
    calls = {name: timed(model) for name, model in models.items()}
    samples = timing.interleave(calls, DEVICE, CASE_SECONDS, brief - {bound.contestant for bound in case.bounds})
    record |= {"input_sets": len(sets), "load": [load, os.getloadavg()[0]], "clocks": [clocks, machine.clocks(DEVICE)]}
    least = record["limit"] = floor(device_model(machine.device_name(DEVICE)), case)
    yardstick = samples.get(CONTESTANTS[0].name)
    for name, own in samples.items():
        entry = record["contestants"][name]
        entry |= {
            "median": own.median,
            "spread": own.spread,
            "inner": own.inner,
            "seconds": [float(f"{s:.5g}") for s in own.seconds],
            "rounds": own.rounds,
        }
        if yardstick:
            found = timing.ratio(own, yardstick)
            entry |= {"ratio": found.median, "interval": [found.low, found.high]}
        if least:
            entry["ratio_to_limit"] = statistics.median(own.seconds) / least["seconds"]
        if DEVICE == "cuda":
            entry["peak_bytes"] = _peak_bytes(calls[name])
