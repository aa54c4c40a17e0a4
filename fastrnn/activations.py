"""The built-in cells with other activations: traced, as a user's cells are."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .user_cells import Cell, cell

ACTIVATIONS: dict[str, Callable] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "softsign": F.softsign,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
}
"""The activations that have a name, all of torch and torch.nn.functional; any pointwise function can be passed."""

_made: dict[tuple, Cell] = {}
"""The cells by kind and activations: an attribute of a module asks for its cell again at every call."""


def cell_of(kind: str, **activations: str | Callable) -> Cell:
    """The cell "lstm", "gru" or "rnn" with these activations, by name or as functions."""
    key = (kind, *activations.values())
    if key not in _made:
        found = {argument: _function(argument, activation) for argument, activation in activations.items()}
        _made[key] = _CELLS[kind](**found)
    return _made[key]


def leaky_cell_of(nonlinearity: str | Callable, leak: float, learnt: bool) -> Cell:
    """An RNN's cell that moves to its new state by `leak`; where `learnt`, that is the first value of a parameter."""
    key = ("leaky", nonlinearity, leak, learnt)
    if key not in _made:
        _made[key] = _leaky_rnn(_function("nonlinearity", nonlinearity), leak, learnt)
    return _made[key]


def _function(argument: str, activation: str | Callable) -> Callable:
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    if not callable(activation):
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"Unknown {argument} {activation!r}. Select from {names}, or pass a pointwise function.")
    return activation


def _named(kind: str, step: Callable, *activations: Callable) -> Callable:
    """`step` with a name that tells its activations."""
    step.__name__ = f"{kind}({', '.join(getattr(f, '__name__', type(f).__name__) for f in activations)})"
    return step


def _lstm(activation: Callable, gate_activation: Callable) -> Cell:
    def step(x, u, state):
        i, f, o = (gate_activation(getattr(x, gate) + getattr(u, gate)) for gate in "ifo")
        c = f * state.c + i * activation(x.g + u.g)
        return o * activation(c), c

    return cell(gates="i f g o", states="h c")(_named("lstm", step, activation, gate_activation))


def _gru(activation: Callable, gate_activation: Callable) -> Cell:
    def step(x, u, state):
        r, z = gate_activation(x.r + u.r), gate_activation(x.z + u.z)
        n = activation(x.n + r * u.n)
        return (n + z * (state.h - n),)

    return cell(gates="r z n")(_named("gru", step, activation, gate_activation))


def _rnn(nonlinearity: Callable) -> Cell:
    def step(x, u, state):
        return (nonlinearity(x.n + u.n),)

    return cell(gates="n")(_named("rnn", step, nonlinearity))


def _leaky_rnn(nonlinearity: Callable, leak: float, learnt: bool) -> Cell:
    def step(x, u, state, *p):
        a = p[0].leak if learnt else leak
        return ((1 - a) * state.h + a * nonlinearity(x.n + u.n),)

    return cell(gates="n", parameters={"leak": leak} if learnt else ())(_named("leaky_rnn", step, nonlinearity))


_CELLS = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}
