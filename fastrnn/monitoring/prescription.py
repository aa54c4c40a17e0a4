"""Advice as actions: `prescribe(report)` gives what may help, in order, and each prescription changes a model.

`REMEDIES` holds the actions by name. The rules in `advice.py` say when each of them applies, in which words, and on
which number it rests.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from .. import init, modules
from ..convert import HOOKS
from ..modules import GRU, LSTM, RNN, _Recurrent
from .diagnosis import Finding, Report

if TYPE_CHECKING:
    from .advice import Facts

SEVERITY = ("unknown", "exploding", "vanishing", "healthy")
"""The order of the prescriptions by verdict: what overflows has to end before anything else can be judged."""
LARGER_BOUND = 10.0
"""The factor for a bound that clips throughout."""


class Remedy(NamedTuple):
    """An action on one recurrent module.

    Attributes:
        in_place: whether `act` changes the module itself, and keeps its parameters.
        act: the module and the facts about it -> the module, or the one to put in its place.
    """

    in_place: bool
    act: "Callable[[_Recurrent, Facts], _Recurrent]"


@dataclass(frozen=True)
class Prescription:
    """One change to a model that its gradient asks for.

    Attributes:
        name: of the action, a key of `REMEDIES`.
        advice: the sentence of the report, with its numbers.
        quantity: which number it rests on, a field of `fastrnn.monitoring.advice.Facts`.
        number: its value in the first of the layers.
        layers: names (`Record.name`) of the layers that asked for it.
        in_place: whether `apply` changes the model itself. Then it returns the same object, with the same parameters,
            so an optimiser goes on as it was. Otherwise it returns a copy with other parameters, which needs an
            optimiser of its own.
    """

    name: str
    advice: str
    quantity: str
    number: float
    layers: tuple[str, ...]
    in_place: bool
    _facts: "dict[str, Facts]" = field(repr=False)  # by the module's name in the monitor

    def apply(self, model: nn.Module) -> nn.Module:
        """Applies the action to every module that asked for it, all of its layers together.

        Args:
            model: the one that the monitor watched, or one with recurrent modules of the same names (a copy, say).

        Returns:
            `model` itself where the action works in place. Otherwise a deep copy, with the new modules in the places of
            the old ones; where `model` itself is the recurrent module, the new module. `model` is then unchanged.

        Raises:
            ValueError: the model has no such recurrent module; or it has to be replaced and is of a subclass of
                fastrnn's; or an initialisation does not fit its weights (see `fastrnn.init`).
        """
        places = watched(model)
        if missing := self._facts.keys() - places.keys():
            raise ValueError(
                f"{self.name}: the model has no {', '.join(sorted(missing))}; there are {', '.join(places)}"
            )
        if not self.in_place:
            for name in self._facts:
                kind = type(places[name])
                if kind not in (LSTM, GRU, RNN):
                    raise ValueError(
                        f"{self.name}: {name} is a {kind.__module__}.{kind.__qualname__}, which is not replaced: only "
                        "fastrnn.LSTM, GRU and RNN themselves are"
                    )
            model = copy.deepcopy(model)
            places = watched(model)
        act = REMEDIES[self.name].act
        for name, facts in self._facts.items():
            old = places[name]
            new = act(old, facts)
            if new is not old:
                model = replaced(model, old, new)
        return model

    def __str__(self) -> str:
        where = ", ".join(self.layers)
        return f"{self.name} ({where}): {self.advice}"


def prescribe(report: Report) -> list[Prescription]:
    """What to change in the model that a report is about, the most promising first.

        for prescription in fastrnn.prescribe(monitor.report()):
            print(prescription)
        model = prescription.apply(model)

    The prescriptions are those lines of the report's advice that are an action on the model: a lower learning rate or
    smaller inputs are not. Layers that ask for the same action share a prescription. What is not finite comes first,
    then explosions, then vanishing gradients, and within these the order is that of `REMEDIES`.

    Args:
        report: of `GradientMonitor.report()`.

    Returns:
        A list of `Prescription`, empty where nothing is wrong or nothing can be done.

    Raises:
        TypeError: `report` is none.
    """
    if not isinstance(report, Report):
        raise TypeError(f"prescribe takes what GradientMonitor.report() returns, got {report!r}")
    modules_of = {record.name: record.module for record in report}
    asked: dict[str, list[tuple[Finding, int]]] = {}
    for finding in sorted(report.findings, key=lambda found: SEVERITY.index(found.verdict)):
        for i, remedy in enumerate(finding.remedies):
            if remedy and all(other is not finding for other, _ in asked.get(remedy, ())):
                asked.setdefault(remedy, []).append((finding, i))
    prescriptions = []
    for remedy, places in sorted(asked.items(), key=lambda item: _rank(item[0], item[1][0][0])):
        finding, i = places[0]
        facts = {}
        for other, _ in places:
            facts.setdefault(modules_of[other.name], other.facts)
        prescriptions.append(
            Prescription(
                remedy,
                finding.advice[i],
                finding.quantities[i],
                getattr(finding.facts, finding.quantities[i]),
                tuple(other.name for other, _ in places),
                REMEDIES[remedy].in_place,
                facts,
            )
        )
    return prescriptions


def _rank(remedy: str, finding: Finding) -> tuple[int, int]:
    return SEVERITY.index(finding.verdict), list(REMEDIES).index(remedy)


def watched(model: nn.Module) -> dict[str, _Recurrent]:
    """The recurrent modules inside a model by their names in a report, without the layers that torch.compile adds."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _Recurrent):
            name = ".".join(part for part in name.split(".") if part != "_orig_mod")
            found[name or type(module).__name__.lower()] = module
    return found


def replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The model with `new` in every place of `old`; `new` itself where the model is `old`."""
    if model is old:
        return new
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model


def rebuilt(module: _Recurrent, kind: type[_Recurrent], **changes) -> _Recurrent:
    """A new module of the same sizes, options, mode, device and dtype, with weights drawn as torch.nn draws them.

    Args:
        module: an LSTM, GRU or RNN.
        kind: the class of the new one.
        changes: arguments of its constructor that differ.
    """
    names = ["num_layers", "bias", "batch_first", "dropout", "bidirectional", *modules.EXTRAS]
    if kind is type(module):
        names += ["nonlinearity", "proj_size"] if kind is LSTM else ["nonlinearity"]
        names += modules.CELL_SETTINGS
    settings = {name: getattr(module, name) for name in names if hasattr(module, name)}
    settings |= {"device": module.weight_hh_l0.device, "dtype": module.weight_hh_l0.dtype} | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about options that do nothing in one layer: the old module has told
        new = kind(module.input_size, module.hidden_size, **settings).train(module.training)
    for name in HOOKS:
        setattr(new, name, getattr(module, name))
    return new


def extended(module: _Recurrent, **changes) -> _Recurrent:
    """`rebuilt` of the same class, with the parameter objects of the old module beside new ones: what is tied to them,
    or frozen, remains so."""
    new = rebuilt(module, type(module), **changes)
    new._parameters.update(module._parameters)
    new.flatten_parameters()
    return new


# ------------------------------------------------------------------------------------------------------- the actions


def _orthogonal(module, facts):
    return init.orthogonal_(module)


def _identity(module, facts):
    return init.identity_(module)


def _chrono(module, facts):
    return init.chrono_(module, max(2, facts.T))


def _gated(module, facts):
    return init.chrono_(rebuilt(module, GRU, bias=True), max(2, facts.T))


def _biased(module, facts):
    return init.chrono_(extended(module, bias=True), max(2, facts.T))


def _normed(module, facts):
    return init.chrono_(_layer_norm(module, facts), max(2, facts.T))


def _layer_norm(module, facts):
    return extended(module, layer_norm=True)


def _clip(module, facts):
    module.clip_state_grad_norm = facts.start
    return module


@torch.no_grad()
def _smaller_norm(module, facts):
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("ln_hh"):
            parameter.mul_(1 / max(facts.gain, 1))
    return module


def _larger_bound(module, facts):
    module.clip_state_grad_norm = LARGER_BOUND * module.clip_state_grad_norm
    return module


REMEDIES = {
    "clip": Remedy(True, _clip),  # clip_state_grad_norm at the norm where the backward starts
    "biased": Remedy(False, _biased),  # the same weights, with biases by chrono
    "normed": Remedy(False, _normed),  # the same weights, with layer_norm=True and biases by chrono
    "chrono": Remedy(True, _chrono),  # the biases of the gates, with t_max the longest way back
    "layer_norm": Remedy(False, _layer_norm),  # the same weights, with layer_norm=True
    "gated": Remedy(False, _gated),  # a GRU of the same sizes, with chrono
    "orthogonal": Remedy(True, _orthogonal),  # W_hh of every layer
    "identity": Remedy(True, _identity),  # W_hh, and biases 0
    "smaller_norm": Remedy(True, _smaller_norm),  # ln_hh divided by the gain
    "larger_bound": Remedy(True, _larger_bound),  # clip_state_grad_norm
}
"""By name, in the order in which `prescribe` gives them, by what cured the trainings of docs/clinic.md: there a GRU
cures more plain RNNs than another W_hh does, and layer norm with chrono more gated cells than chrono alone."""
