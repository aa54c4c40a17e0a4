"""The contestants, as data: torch.nn, the Python loop that users write instead, and fastrnn on every backend.

To add one, write a function `Problem -> Model` and give it a row in `THROUGHPUT` or in `features`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import dispatch, tiles
from fastrnn.backends import triton

from . import loops
from .cases import DEVICE
from .feature_cases import P
from .problem import Model, Outcome, Problem, call, environment


class CannotRun(Exception):
    """A contestant does not take part in a case; the message says why. `same_as`: the one that does the same."""

    def __init__(self, reason: str, same_as: str | None = None):
        super().__init__(reason)
        self.same_as = same_as


@dataclass(frozen=True)
class Contestant:
    """A row.

    Attributes:
        build: Problem -> Model; raises CannotRun.
        brief: timed for the fewest rounds.
        yardstick: its errors are the measure of the 2x rule.
        plain: runs without the case's features.
        own_way: features that it computes differently from fastrnn; with "clip" its gradients are not compared.
        checked: whether its results are compared.
    """

    name: str
    build: Callable[[Problem], Model]
    brief: bool = False
    yardstick: bool = False
    plain: bool = False
    own_way: frozenset[str] = frozenset()
    checked: bool = True


# ------------------------------------------------------------------------------------------------------- torch.nn


def _torch_module(problem: Problem) -> nn.Module:
    """torch.nn's module with the problem's parameters."""
    case, names = problem.case, ("num_layers", "bidirectional", "nonlinearity", "proj_size")
    options = {name: problem.options[name] for name in names if name in problem.options}
    module = getattr(nn, problem.kind)(case.I, case.H, **options, device="meta").train(case.mode == "train")
    for name, parameter in problem.parameters.items():
        setattr(module, name, parameter)
    module.flatten_parameters()
    return module


def _flat(y, hidden, *c) -> tuple:
    return (y, *(hidden if isinstance(hidden, tuple) else (hidden,)), *c)


def torch_nn(problem: Problem) -> Model:
    """The plain call, whatever the case asks for."""
    module, features = _torch_module(problem), problem.case.features
    note = f"runs without {', '.join(sorted(features))}, which it does not have" if features else ""
    return Model(lambda x: Outcome(_flat(*module(x))), note)


def torch_nn_with_feature(problem: Problem) -> Model:
    """The features that can be had with torch.nn's fused kernels."""
    case = problem.case
    if case.feature.name not in ("lengths", "weight dropout", "projection"):
        raise CannotRun("torch.nn does not have it")
    module = _torch_module(problem)
    lengths = None if problem.lengths is None else problem.lengths.cpu()  # where packing expects them

    def packed(x):
        y, hidden = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return _flat(pad_packed_sequence(y, total_length=case.T)[0], hidden)

    def dropped(x):
        weight = F.dropout(module.weight_hh_l0, P)
        return _flat(*torch.func.functional_call(module, {"weight_hh_l0": weight}, (x,)))

    forward = {"lengths": packed, "weight dropout": dropped}.get(case.feature.name, lambda x: _flat(*module(x)))
    return Model(lambda x: Outcome(forward(x)))


# ----------------------------------------------------------------------------------------------------------- loops


def loop(style: str) -> Callable[[Problem], Model]:
    def build(problem: Problem) -> Model:
        if style == "cells" and problem.case.suite == "features" and not problem.case.feature.cells:
            raise CannotRun("torch.nn's cells do not have it")

        network = loops.build(problem, style)

        def run(x):
            outputs, norms = network(x)
            return Outcome(outputs, norms=norms)

        return Model(run)

    return build


# --------------------------------------------------------------------------------------------------------- fastrnn


def fused(problem: Problem, backend: str | None, plain: bool = False) -> Model:
    """fastrnn, on the backend that it chooses or on a given one. `plain`: without clipping and the call's arguments."""
    case, module = problem.case, copy.copy(problem.module)
    if plain:
        module.clip_state_grad_norm = module.clip_state_grad_value = None
    keywords = dict if plain else problem.keywords
    probe = torch.empty(case.T, case.B, case.I, device=DEVICE, dtype=problem.dtype, requires_grad=case.mode == "train")
    with torch.set_grad_enabled(case.mode == "train"):
        explained = fastrnn.explain(module, probe, **keywords())
    if backend is not None:
        reason = next(row[1] for row in explained.rows if row[0] == backend)
        if reason != "yes":
            raise CannotRun(reason)
    module.backend = backend

    def run(x):
        arguments = keywords()
        return Outcome(_flat(*module(x, **arguments)), arguments.get("tap"))

    return Model(run, takes=explained.chosen)


def on_backend(backend: str | None) -> Callable[[Problem], Model]:
    def build(problem: Problem) -> Model:
        model = fused(problem, backend)
        if backend is None:
            return model
        if model.takes == backend:
            raise CannotRun(f"auto takes {backend}: the same as fastrnn", same_as="fastrnn")
        return model._replace(takes="")

    return build


def _tried(problem: Problem, model: Model) -> Model:
    """The model, unless its backend refuses the call only when it runs: the CUDA kernels do where W_hh does not fit."""
    try:
        call(problem, model, problem.inputs())
    except RuntimeError as error:
        if "cannot run this call" not in str(error):
            raise
        raise CannotRun(str(error)) from error
    return model


def plain_call(backend: str) -> Callable[[Problem], Model]:
    return lambda problem: _tried(problem, fused(problem, backend, plain=True)._replace(takes=""))


def reference(problem: Problem) -> Model:
    return fused(problem, "reference")


def triton_mode(mode: str) -> Callable[[Problem], Model]:
    """The Triton backend in one of its modes, where it would not take that by itself."""
    settings = {"FASTRNN_TRITON_MODE": mode}

    def build(problem: Problem) -> Model:
        model, case, weight = on_backend("triton")(problem), problem.case, problem.module.weight_hh_l0
        sizes = (case.cell, weight, weight.shape[1], case.B)
        own = triton.choose_tile(*sizes)
        try:
            with environment(settings):
                triton.choose_tile(*sizes)
        except ValueError as reason:
            raise CannotRun(str(reason)) from reason
        if own.mode == mode:
            raise CannotRun(f"{mode} is what it takes by itself", same_as="fastrnn:triton")
        return model._replace(note=f"mode {mode}", environment=settings)

    return build


def cuda_mode(mode: str) -> Callable[[Problem], Model]:
    """The CUDA backend with one of its means of exchange, or with all."""
    settings = {"FASTRNN_CUDA_MODE": mode}

    def build(problem: Problem) -> Model:
        model = on_backend("cuda")(problem)
        return _tried(problem, model._replace(note=f"mode {mode}", environment=settings))

    return build


# ------------------------------------------------------------------------------------------------------- the lists

# fastrnn itself (auto) comes before its backends one by one.
BACKENDS = {name: cuda_mode("all") if name == "cuda" else on_backend(name) for name in dispatch.BACKENDS}
THROUGHPUT: tuple[Contestant, ...] = (
    Contestant("torch.nn", torch_nn, yardstick=True, plain=True),
    Contestant("loop", loop("cells"), brief=True, own_way=frozenset({"tap", "clip"})),
    Contestant("fastrnn", on_backend(None)),
    *(Contestant(f"fastrnn:{name}", way, brief=name in ("cpu", "reference")) for name, way in BACKENDS.items()),
    *(Contestant(f"fastrnn:triton {mode}", triton_mode(mode)) for mode in tiles.MODES if mode != "local"),
    *(Contestant(f"fastrnn:cuda {mode}", cuda_mode(mode)) for mode in ("cluster", "grid")),
)

LOOPS = ("loop", "loop of cells")
PLAIN = "plain "  # before a backend's name: its plain call


def features(case) -> tuple[Contestant, ...]:
    own = [name for name in BACKENDS if name != "aten"]
    overhead = [name for name in own if name != "reference" and case.feature.overhead]
    return (
        Contestant("loop", loop("ops"), brief=True, yardstick=True),
        Contestant("loop of cells", loop("cells"), brief=True, yardstick=True),
        Contestant("torch.nn", torch_nn_with_feature, yardstick=True),
        Contestant("fastrnn", on_backend(None)),
        *(Contestant(f"fastrnn:{name}", BACKENDS[name], brief=name == "reference") for name in own),
        *(Contestant(f"{PLAIN}{name}", plain_call(name), plain=True, checked=False) for name in overhead),
    )
