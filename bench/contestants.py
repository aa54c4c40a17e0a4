"""Who is timed, as data: torch.nn, the Python loop that users write instead, and fastrnn on every backend.

To add a contestant, write a function `(case, module) -> Model` and give it a row in `CONTESTANTS`; to add a feature,
name it in the `features` of the rows that have it.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import dispatch, functional, tiles
from fastrnn.arguments import ScanInputs, Walk
from fastrnn.backends import cuda, triton

# Bound of the state gradient's norm in the cases that clip, in units of the norm of dL/dy_t, which is sqrt(H) on
# average: low enough that most steps are clipped. What clipping costs does not depend on it.
CLIP = 0.9


class CannotRun(Exception):
    """A contestant does not take part in a case; the message says why. `same_as`: the one that does the same."""

    def __init__(self, reason: str, same_as: str | None = None):
        super().__init__(reason)
        self.same_as = same_as


class Model(NamedTuple):
    """A contestant ready for one case.

    `forward(x [T, B, I])` returns the outputs (y, h_n, and c_n for the LSTM) and, where the state gradients' norms are
    asked for, the leaf whose gradient they become. `environment` is set during forward and backward.
    """

    forward: Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor | None]]
    parameters: tuple[Tensor, ...]  # in the order of torch.nn's module
    note: str = ""
    environment: Mapping[str, str] = MappingProxyType({})


@contextmanager
def environment(values: Mapping[str, str]):
    """os.environ with these set, within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@dataclass(frozen=True)
class Contestant:
    """A row.

    Attributes:
        features: those it can compute. A contestant without a case's features does not take part, except the yardstick.
        own_way: of these, the ones where it computes something else than fastrnn: its gradients are not compared.
        brief: timed for the fewest rounds.
        yardstick: runs plain whatever the case asks for: it is what everybody is measured against.
    """

    name: str
    build: Callable
    features: frozenset[str] = frozenset()
    own_way: frozenset[str] = frozenset()
    brief: bool = False
    yardstick: bool = False

    def computes(self, case) -> frozenset[str]:
        return case.features & self.features

    def model(self, case, module: nn.Module) -> Model:
        """Raises CannotRun with the reason."""
        if self.name in case.without:
            raise CannotRun(case.without[self.name])
        missing = case.features - self.features
        if missing and not self.yardstick:
            raise CannotRun(f"has no {', '.join(sorted(missing))}")
        return self.build(case, module)


def yardstick_module(case, device: str) -> nn.Module:
    """torch.nn's module of a case, with random weights."""
    kind, *nonlinearity = case.cell.upper().split("_")
    options = {"nonlinearity": nonlinearity[0].lower()} if nonlinearity else {}
    module = getattr(nn, kind)(
        case.I, case.H, case.num_layers, bidirectional=case.bidirectional, device=device, dtype=case.dtype, **options
    )
    return module.train(case.mode == "train")


def clip_norm(case) -> float | None:
    return CLIP * case.H**0.5 if "clip" in case.features else None


def _flat(y: Tensor, hidden) -> tuple[Tensor, ...]:
    return (y, *hidden) if isinstance(hidden, tuple) else (y, hidden)


# ------------------------------------------------------------------------------------------------------- torch.nn


def torch_nn(case, module: nn.Module) -> Model:
    def forward(x):
        return _flat(*module(x)), None

    note = f"runs without {', '.join(sorted(case.features))}, which it does not have" if case.features else ""
    return Model(forward, tuple(module.parameters()), note)


# ----------------------------------------------------------------------------------------------------------- loops


def _cells(module: nn.Module) -> list[nn.Module]:
    """torch.nn's single-step cells, one per layer and direction, sharing the module's parameters."""
    kind = getattr(nn, f"{module.mode.split('_')[0]}Cell")
    options = {"nonlinearity": module.nonlinearity} if hasattr(module, "nonlinearity") else {}
    cells = []
    for names in module.all_weights:
        cell = kind(names[0].shape[1], module.hidden_size, device="meta", **options)
        for name, parameter in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), names, strict=True):
            setattr(cell, name, parameter)
        cells.append(cell)
    return cells


def _hook(state: Tensor, case, norms: list[Tensor]) -> None:
    """The norm of one step's state gradient, and its clipping, as a hook on the tensor: what users write today."""

    def hook(gradient):
        norm = gradient.norm(dim=-1, keepdim=True)
        if "tap" in case.features:
            norms.append(norm)
        return gradient * (clip_norm(case) / norm).clamp(max=1) if "clip" in case.features else None

    state.register_hook(hook)


def loop(case, module: nn.Module) -> Model:
    """torch.nn's cell once per step, in Python; norms and clipping by hooks, on h and on c each on its own."""
    cells, directions = _cells(module), 2 if module.bidirectional else 1
    lstm = case.cell == "lstm"

    def walk(cell, steps: list[Tensor], reverse: bool, norms: list[Tensor]):
        h = steps[0].new_zeros(steps[0].shape[0], module.hidden_size)
        state, ys = ((h, h) if lstm else h), [None] * len(steps)
        for t in reversed(range(len(steps))) if reverse else range(len(steps)):
            state = cell(steps[t], state)
            if case.features:
                for s in state if lstm else (state,):
                    _hook(s, case, norms)
            ys[t] = state[0] if lstm else state
        return ys, state

    def forward(x):
        steps, final, norms = x.unbind(0), [], []
        for layer in range(module.num_layers):
            walked = [walk(cells[layer * directions + d], steps, bool(d), norms) for d in range(directions)]
            final += [state for _, state in walked]
            steps = [torch.cat(ys, -1) for ys in zip(*(ys for ys, _ in walked), strict=True)]
        last = tuple(map(torch.stack, zip(*final, strict=True))) if lstm else (torch.stack(final),)
        return (torch.stack(steps), *last), None

    note = "norms and clipping by tensor hooks, on h and c separately" if case.features else ""
    return Model(forward, tuple(module.parameters()), note)


# --------------------------------------------------------------------------------------------------------- fastrnn


def _tap(case, x: Tensor) -> Tensor | None:
    if "tap" not in case.features:
        return None
    rows, states = case.num_layers * (2 if case.bidirectional else 1), 2 if case.cell == "lstm" else 1
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.zeros(rows, 2, states, *x.shape[:2], dtype=dtype, device=x.device, requires_grad=True)


def chosen(case, module: nn.Module, x: Tensor, backend: str | None = None) -> str:
    """The backend that runs a case. Raises CannotRun where a forced one cannot."""
    twin, tap = _twin(case, module, backend), _tap(case, x)
    with torch.set_grad_enabled(case.mode == "train"):
        arguments = {**twin._arguments(), "tap": tap}
        request = functional.check(twin._cell, x, None, twin._parameters_by_name(), **arguments).request
    reason = dispatch.BACKENDS[backend].reason(request) if backend else None
    if reason is not None:
        raise CannotRun(reason)
    return dispatch.choose(request, backend)


def _twin(case, module: nn.Module, backend: str | None) -> nn.Module:
    """fastrnn's module with the parameters of torch.nn's."""
    twin = fastrnn.convert(module)
    twin.backend, twin.clip_state_grad_norm = backend, clip_norm(case)
    return twin


def on_backend(backend: str | None) -> Callable:
    def build(case, module: nn.Module) -> Model:
        twin = _twin(case, module, backend)
        probe = torch.empty(case.T, case.B, case.I, device=twin.weight_ih_l0.device, dtype=twin.weight_ih_l0.dtype)
        name = chosen(case, module, probe.requires_grad_(case.mode == "train"), backend)
        if backend and name == chosen(case, module, probe):
            raise CannotRun(f"auto takes {name}: the same as fastrnn", same_as="fastrnn")

        def forward(x):
            tap = _tap(case, x)
            return _flat(*twin(x, tap=tap)), tap

        return Model(forward, tuple(twin.parameters()), f"auto takes {name}" if backend is None else "")

    return build


def triton_mode(mode: str) -> Callable:
    """The Triton backend in one of its modes, where it would not take that by itself."""
    settings = {"FASTRNN_TRITON_MODE": mode}

    def build(case, module: nn.Module) -> Model:
        model, weight = on_backend("triton")(case, module), module.weight_hh_l0
        own = triton.choose_tile(case.cell, weight, case.B)
        try:
            with environment(settings):
                triton.choose_tile(case.cell, weight, case.B)
        except ValueError as reason:
            raise CannotRun(str(reason)) from reason
        if own.mode == mode:
            raise CannotRun(f"{mode} is what it takes by itself", same_as="fastrnn:triton")
        return model._replace(note=f"mode {mode}", environment=settings)

    return build


def cuda_mode(mode: str) -> Callable:
    """The CUDA backend with one way to exchange."""
    settings = {"FASTRNN_CUDA_MODE": mode}

    def build(case, module: nn.Module) -> Model:
        model = on_backend("cuda")(case, module)
        clip, w_hh = None if clip_norm(case) is None else torch.tensor(clip_norm(case)), module.weight_hh_l0
        inputs = ScanInputs(None, w_hh, w_hh.new_empty(case.B, w_hh.shape[-1]), clip_norm=clip)
        with environment(settings):
            reason = cuda.why_not_tensors(inputs, Walk(case.cell, False, "cuda"))
        if reason is not None:
            raise CannotRun(reason)
        return model._replace(note=f"mode {mode}", environment=settings)

    return build


EVERYTHING = frozenset({"tap", "clip"})

# fastrnn itself (auto) before its backends one by one. The first row is the yardstick.
CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("torch.nn", torch_nn, yardstick=True),
    Contestant("loop", loop, EVERYTHING, own_way=frozenset({"clip"}), brief=True),
    Contestant("fastrnn", on_backend(None), EVERYTHING),
    *(
        Contestant(f"fastrnn:{name}", on_backend(name), EVERYTHING, brief=name in ("cpu", "reference"))
        for name in dispatch.BACKENDS
    ),
    *(Contestant(f"fastrnn:triton {mode}", triton_mode(mode), EVERYTHING) for mode in tiles.MODES if mode != "local"),
    *(Contestant(f"fastrnn:cuda {mode}", cuda_mode(mode), EVERYTHING) for mode in ("cluster", "grid")),
)
