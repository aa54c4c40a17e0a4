"""LSTMCell, GRUCell and RNNCell: one step of a network of one layer, in place of torch.nn's cells."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import checks, dispatch, functional
from .cell_table import layer_shapes
from .equations import LN_EPS
from .modules import (
    CELL_SETTINGS,
    EXTRAS,
    cell_of_rnn,
    set_activations,
    set_leaks,
    set_nonlinearity,
    shown,
    uniform,
)

_OF_CELLS = {name: EXTRAS[name] for name in ("layer_norm", "layer_norm_eps", "layer_norm_cell")}
"""The extras that the single-step cells take."""
_LEAKS = "leaks"  # the parameter of a cell's learnt leak; `leak` is its first value


class _Cell(nn.Module):
    """The base class of LSTMCell, GRUCell and RNNCell: a network of one layer and one step."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        layer_norm: bool | str = False,
        layer_norm_eps: float = LN_EPS,
        layer_norm_cell: str | None = "inside",
        backend: str | None = None,
        num_heads: int = 1,
    ):
        super().__init__()
        input_size, hidden_size = checks.check_cell_sizes(input_size=input_size, hidden_size=hidden_size)
        checks.check_heads(num_heads, hidden_size)
        checks.check_layer_norm(self._cell, layer_norm)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bool(bias)
        self.layer_norm, self.backend, self.num_heads = layer_norm, backend, num_heads
        self.layer_norm_eps = checks.check_eps(layer_norm_eps)
        self.layer_norm_cell = checks.check_layer_norm_cell(self._cell, layer_norm_cell)
        dispatch.forced(backend)
        shapes = layer_shapes(
            self._cell, input_size, hidden_size, 0, self.bias, layer_norm, layer_norm_cell is not None, num_heads
        )
        self._kinds = {_LEAKS if kind == "leak" else kind: kind for kind in shapes}
        self.all_names = list(self._kinds)
        for name, shape in zip(self.all_names, shapes.values(), strict=True):
            self.register_parameter(name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if not self.bias:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights and biases from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn does; in heads as the layer does."""
        uniform(self)

    def forward(self, input: Tensor, hx=None):
        """One step.

        Args:
            input: `[B, I]`, or `[I]` unbatched; of the parameters' dtype, unless autocast is on.
            hx: h `[B, H]` (`[H]` unbatched); for the LSTM a pair (h, c); None for zeros.

        Returns:
            The new h; for the LSTM `(h, c)`.

        Raises:
            ValueError, RuntimeError: an argument does not fit, or a forced backend cannot run the call.
        """
        state = functional.step(*self._call(input, hx), self.backend, **self._norms())
        if input.dim() == 1:
            state = tuple(s[0] for s in state)
        return state if len(state) > 1 else state[0]

    def __prepare_scriptable__(self):
        checks.refuse_script(self)

    def _norms(self) -> dict:
        """The settings of layer norm as keyword arguments of `checks.check`, where there is any."""
        if not self.layer_norm:
            return {}
        return {name: getattr(self, name) for name in _OF_CELLS}

    def _call(self, input: Tensor, hx):
        """The arguments of `functional.step`: cell, input `[B, I]`, states `[B, H]`, parameters."""
        stored = self._parameters
        params = {f"{kind}_l0": stored[n] if n in stored else getattr(self, n) for n, kind in self._kinds.items()}
        x, states = checks.check_cell_call(
            type(self).__name__, self._cell, self.hidden_size, params["weight_ih_l0"].dtype, input, hx
        )
        return self._cell, x, states, params

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        settings = {"bias": True, **_OF_CELLS, **CELL_SETTINGS, "nonlinearity": "tanh", "backend": None}
        for name, default in settings.items():
            if getattr(self, name, default) != default:
                parts.append(f"{name}={shown(getattr(self, name))}")
        return ", ".join(parts)


class _GatedCell(_Cell):
    """A cell whose activations can be others than torch.nn's."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str | Callable = "tanh",
        gate_activation: str | Callable = "sigmoid",
        **extras: Any,
    ) -> None:
        set_activations(self, activation=activation, gate_activation=gate_activation)
        super().__init__(input_size, hidden_size, bias, device, dtype, **extras)
        if type(self)._cell == "lstm" and self._cell != "lstm" and self.layer_norm:
            raise ValueError("layer_norm is for the LSTMCell with torch.nn's activations")


class LSTMCell(_GatedCell):
    """One step of `LSTM`, in place of torch.nn.LSTMCell. Returns `(h [B, H], c [B, H])`.

    Arguments as in torch.nn; `layer_norm`, `layer_norm_eps`, `layer_norm_cell`, `activation`, `gate_activation`,
    `num_heads` and `backend` as of `LSTM`.
    """

    _cell = "lstm"


class GRUCell(_GatedCell):
    """One step of `GRU`, in place of torch.nn.GRUCell. Returns `h [B, H]`.

    Arguments as in torch.nn; `layer_norm`, `layer_norm_eps`, `activation`, `gate_activation`, `num_heads` and
    `backend` as of `GRU`.
    """

    _cell = "gru"


class RNNCell(_Cell):
    """One step of `RNN`, in place of torch.nn.RNNCell. Returns `h [B, H]`.

    Arguments as in torch.nn; `nonlinearity` (a name or a pointwise function), `leak`, `learn_leak`, `layer_norm`,
    `layer_norm_eps`, `num_heads` and `backend` as of `RNN`. A learnt leak is the parameter `leaks [H]`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str | Callable = "tanh",
        device=None,
        dtype=None,
        *,
        leak: float | None = None,
        learn_leak: bool = False,
        **extras: Any,
    ) -> None:
        set_nonlinearity(self, nonlinearity, leak, learn_leak)
        super().__init__(input_size, hidden_size, bias, device, dtype, **extras)

    _cell = property(cell_of_rnn)

    def reset_parameters(self) -> None:
        """Draws weights and biases as the other cells do. A learnt leak starts as given."""
        super().reset_parameters()
        set_leaks(self)
