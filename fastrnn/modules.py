"""LSTM, GRU, RNN and their single-step cells: torch.nn's modules, with the extras of `functional.py`.

Parameter names, order, shapes and default initialisation are torch.nn's, so state dicts go both ways with
`strict=True` as long as the extras that own parameters (layer norm) are off.
"""

import inspect
import math
import warnings
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import functional
from .cells import layer_shapes, network_shapes

# Constructor arguments and their defaults: torch.nn's, and ours.
PLAIN = {
    "proj_size": 0,
    "num_layers": 1,
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
}
EXTRAS = {
    "layer_norm": False,
    "residual": False,
    "locked_dropout": False,
    "recurrent_dropout": 0.0,
    "zoneout": 0.0,
    "weight_dropout": 0.0,
    "clip_state_grad_norm": None,
    "clip_state_grad_value": None,
    "backend": None,
}
_extras, _NO_EXTRAS = attrgetter(*EXTRAS), tuple(EXTRAS.values())
_FORWARDED = (
    "batch_first", "num_layers", "bidirectional", "training", "dropout",
    *(name for name in EXTRAS if name not in ("layer_norm", "backend")),
)  # fmt: skip


def _check_sizes(**sizes) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name} must be greater than zero, got {size}")


def _check_flags(**flags) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(flag).__name__}")


def _uniform(module: nn.Module, hidden_size: int) -> None:
    """torch.nn's default, U(-1/sqrt(H), 1/sqrt(H)); layer norms start as the identity."""
    bound = 1 / math.sqrt(hidden_size)
    for name, parameter in module.named_parameters(recurse=False):
        if not name.startswith("ln_"):
            nn.init.uniform_(parameter, -bound, bound)
        elif "bias" in name:
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)


def has_computed_weights(module: nn.Module) -> bool:
    """Whether somebody makes weights anew at every call, so that they are attributes and no parameters: torch.nn.utils'
    weight_norm, spectral_norm and prune; a wrapper that drops weights, whose attributes are not there before a call."""
    kinds = ("weight_", "bias_")
    if any(name.startswith(kinds) and isinstance(value, Tensor) for name, value in vars(module).items()):
        return True
    layers = getattr(module, "_all_weights", [["weight_ih", "weight_hh", "bias_ih", "bias_hh"]])  # or a cell
    return not all(name in module._parameters for names in layers for name in names)


class _Recurrent(nn.Module):
    """What LSTM, GRU and RNN share: the constructor, the parameters, the call."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        residual: bool = False,
        locked_dropout: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        clip_state_grad_norm: float | Tensor | None = None,
        clip_state_grad_value: float | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        _check_sizes(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        _check_flags(
            bias=bias, batch_first=batch_first,
            layer_norm=layer_norm, residual=residual, locked_dropout=locked_dropout,
        )  # fmt: skip
        if proj_size < 0:
            raise ValueError("proj_size should be a positive integer or zero to disable projections")
        if proj_size >= hidden_size:
            raise ValueError(f"proj_size has to be smaller than hidden_size, got {proj_size} and {hidden_size}")
        dropout = functional.check_probability("dropout", dropout)
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={dropout} and num_layers={num_layers}",
                stacklevel=3,
            )
        for name, on in (("residual", residual), ("locked_dropout", locked_dropout)):
            if on and num_layers == 1:
                warnings.warn(f"{name} acts between layers, and does nothing with num_layers=1", stacklevel=3)
        functional.check_probability("recurrent_dropout", recurrent_dropout)
        functional.check_probability("weight_dropout", weight_dropout)
        functional.check_zoneout(self._cell, zoneout)
        functional.check_bound("clip_state_grad_norm", clip_state_grad_norm, tensor=True)
        functional.check_bound("clip_state_grad_value", clip_state_grad_value)
        functional.dispatch.forced(backend)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        self.bidirectional, self.proj_size = bool(bidirectional), proj_size
        self.layer_norm, self.residual, self.locked_dropout = layer_norm, residual, locked_dropout
        self.recurrent_dropout, self.zoneout, self.weight_dropout = recurrent_dropout, zoneout, weight_dropout
        self.clip_state_grad_norm, self.clip_state_grad_value = clip_state_grad_norm, clip_state_grad_value
        self.backend = backend
        self.all_names: list[list[str]] = []
        for shapes in self._shapes():
            self.all_names.append([name for name, _ in shapes])
            for name, shape in shapes:
                self.register_parameter(name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()
        self.flatten_parameters()

    @property
    def _cell(self) -> str:
        """The row of the cell table."""
        raise TypeError("instantiate LSTM, GRU or RNN")

    def _shapes(self):
        return network_shapes(
            self._cell, self.input_size, self.hidden_size, self.proj_size, self.bias, self.layer_norm,
            self.num_layers, self.bidirectional,
        )  # fmt: skip

    @property
    def mode(self) -> str:
        """The cell as torch.nn names it: LSTM, GRU, RNN_TANH, ..."""
        return self._cell.upper()

    @property
    def _all_weights(self) -> list[list[str]]:
        """torch.nn's name for the names, which initialisation in many a published model reads."""
        return self.all_names

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters per layer and direction, as in torch.nn."""
        return [[getattr(self, name) for name in names] for names in self.all_names]

    def reset_parameters(self) -> None:
        """Draws all weights and biases from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn does."""
        _uniform(self, self.hidden_size)

    def flatten_parameters(self) -> None:
        """Lays the weights out in the one chunk that cuDNN wants; matters only to the `aten` backend on a GPU."""
        # Only what is stored: a computed weight may not be there yet, or change by being looked at (spectral norm).
        weights = [self._parameters.get(name) for row in self.all_names for name in row]
        first = weights[0]
        if self.layer_norm or self._cell not in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return
        if not all(type(w) is Parameter and w.is_cuda and w.dtype == first.dtype for w in weights):
            return
        if not torch.backends.cudnn.is_acceptable(first) or len({w.data_ptr() for w in weights}) != len(weights):
            return
        mode = torch.backends.cudnn.rnn.get_cudnn_mode(self.mode)
        per_layer = len(self.all_names[0])
        with torch.cuda.device_of(first), torch.no_grad():
            torch._cudnn_rnn_flatten_weight(
                weights, per_layer, self.input_size, mode, self.hidden_size, self.proj_size,
                self.num_layers, self.batch_first, self.bidirectional,
            )  # fmt: skip

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        self.flatten_parameters()
        return result

    def _arguments(self) -> dict:
        """The module's settings as keyword arguments of the functional form."""
        return {name: getattr(self, name) for name in _FORWARDED}

    def _parameters_by_name(self) -> dict[str, Tensor]:
        stored = self._parameters  # parametrized weights are not in it, but attributes
        names = (name for row in self.all_names for name in row)
        return {name: stored[name] if name in stored else getattr(self, name) for name in names}

    def _directly(self, input, hx):
        """A plain call that is correct, and that `dispatch.choose` would leave to torch, by torch's kernels at once.

        None of any other call. `functional` would come to the same, but what it checks and prepares for all kinds of
        calls takes as long as a short one itself.
        """
        cell, stored = self._cell, self._parameters
        if (
            functional.tracing()
            or _extras(self) != _NO_EXTRAS
            or not isinstance(input, Tensor)
            or input.dim() not in (2, 3)
        ):
            return None
        states = () if hx is None else hx if cell == "lstm" else (hx,)
        lstm, batched, batch_dim = cell == "lstm", input.dim() == 3, 0 if self.batch_first else 1
        if lstm and not isinstance(states, (tuple, list)):
            return None
        if not batched:
            if any(state.dim() != 2 for state in states):
                return None
            input, states = input.unsqueeze(batch_dim), [state.unsqueeze(1) for state in states]
        steps, batch = input.shape[1 - batch_dim], input.shape[batch_dim]
        if not functional.dispatch.is_torchs(cell, steps, self.proj_size, torch.is_grad_enabled()):
            return None
        if input.is_cuda and functional.refused_by_cudnn(input, self.training):
            return None
        weights, rows = [], self._shapes()
        for names in rows:
            for name, shape in names:
                weight = stored.get(name)  # none where it is computed at every call, and no parameter
                if weight is None or weight.shape != shape:
                    return None
                weights.append(weight)
        dtype, device, stacked = weights[0].dtype, weights[0].device, len(rows)
        # That all weights are on one device, torch's kernels ask themselves.
        if input.shape[2] != self.input_size or input.dtype != dtype or input.device != device:
            return None
        shapes = [(stacked, batch, self.proj_size or self.hidden_size), (stacked, batch, self.hidden_size)]
        shapes = shapes if lstm else shapes[:1]
        if hx is None:
            states = [input.new_zeros(shape) for shape in shapes]
        elif len(states) != len(shapes):
            return None
        else:
            for state, shape in zip(states, shapes, strict=True):
                if state.shape != shape or state.dtype != dtype or state.device != device:
                    return None
        y, *states = getattr(torch, cell)(
            input, states if lstm else states[0], weights, self.bias, self.num_layers, self.dropout, self.training,
            self.bidirectional, self.batch_first,
        )  # fmt: skip
        if not batched:
            y, states = y.squeeze(batch_dim), [state.squeeze(1) for state in states]
        return y, tuple(states) if lstm else states[0]

    def forward(self, input, hx=None, *, lengths=None, reset_mask=None, tap=None, return_cells=False):
        """Runs the network.

        Args:
            input: `[T, B, I]`, `[B, T, I]` with batch_first, `[T, I]` unbatched, or a PackedSequence.
            hx: initial states as for torch.nn, or None for zeros.
            lengths: integer tensor `[B]`; beyond its length a sequence's state is carried unchanged and its output is
                zero, as with a PackedSequence. Zeros allowed. Read back nowhere: on a GPU it is clamped to [0, T].
            reset_mask: bool `[T, B]` (`[B, T]` with batch_first), a tensor or what torch.as_tensor takes; True where a
                step starts a new segment: the state before it is zero, no gradient crosses.
            tap: zeros `[L*D, 2, S, T, B]`, float32 (float64 for float64 input), requiring grad; after `.backward()` its
                `.grad` holds ||dL/ds_t||: `[:, 0]` total (before clipping), `[:, 1]` the part carried back from the
                next step. S = 2 (h, c) for the LSTM, else 1. A report, not a derivative.
            return_cells: also return c of every step of the last layer (LSTM).

        Returns:
            What torch.nn's module returns; with `return_cells` c `[T, B, D*H]` as a third value.

        Raises:
            ValueError, RuntimeError: as torch.nn for its arguments, and for the others naming what was expected.
        """
        if lengths is None and reset_mask is None and tap is None and not return_cells:
            result = self._directly(input, hx)
            if result is not None:
                return result
        return functional._recurrent(
            self._cell, input, hx, self._parameters_by_name(), self.backend, lengths=lengths, reset_mask=reset_mask,
            tap=tap, return_cells=return_cells, **self._arguments(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        for name, default in {**PLAIN, **EXTRAS}.items():
            value = getattr(self, name)
            if isinstance(value, Tensor) or value != default:
                parts.append(f"{name}={value}")
        return ", ".join(parts)


_ARGUMENTS = """
    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.
        layer_norm: LN on W_ih x and on W_hh h, each over all gates (weight only; the biases are the shifts), and for
            the LSTM on c inside the tanh. Ba et al. 2016.
        residual: from the second layer on, a layer's output is h + its input.
        locked_dropout: hold the mask of `dropout` over time. Gal & Ghahramani 2016.
        recurrent_dropout: probability of one mask per sequence on the h that W_hh multiplies. Gal & Ghahramani 2016.
        zoneout: probability that a unit keeps its state; for the LSTM one for both states or (p_c, p_h).
            Krueger et al. 2017.
        weight_dropout: DropConnect on W_hh, one mask per call. Merity et al. 2018.
        clip_state_grad_norm: a float or 0-d tensor, positive (a tensor on a GPU is not read back, so nobody checks it);
            at every step the joint norm of dL/dh_t and dL/dc_t of each sample is scaled down to it before it passes
            through the cell. Changes the gradient on purpose.
        clip_state_grad_value: the same by element, applied first.
        backend: a name out of the backend table; None chooses the best that can.
"""


class LSTM(_Recurrent):
    __doc__ = (
        """Long short-term memory, in place of torch.nn.LSTM (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  g = tanh(..),  c' = f c + i g,  h' = o tanh(c')

    Input and output `[T, B, I] -> [T, B, D*P]`, states `h [L*D, B, P]`, `c [L*D, B, H]`; P = proj_size or H.
    `proj_size`: h' is replaced by W_hr h' (Sak et al. 2014).
"""
        + _ARGUMENTS
    )
    _cell = "lstm"


class GRU(_Recurrent):
    __doc__ = (
        """Gated recurrent unit, in place of torch.nn.GRU (Cho et al. 2014, in cuDNN's form).

        r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  n = tanh(W_in x + b_in + r (W_hn h + b_hn)),  h' = n + z (h - n)

    Input and output `[T, B, I] -> [T, B, D*H]`, state `h [L*D, B, H]`.
"""
        + _ARGUMENTS
    )
    _cell = "gru"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection("proj_size" in kwargs)
        super().__init__(*_skip_projection(args), **kwargs)


class RNN(_Recurrent):
    __doc__ = (
        """Elman network, in place of torch.nn.RNN (Elman 1990; Le et al. 2015 for ReLU).

        h' = nonlinearity(W_ih x + b_ih + W_hh h + b_hh)

    Input and output `[T, B, I] -> [T, B, D*H]`, state `h [L*D, B, H]`. `nonlinearity` (the fourth positional argument,
    as in torch.nn): "tanh", "relu", "leaky_relu" (slope 0.01) or "elu" (alpha 1).
"""
        + _ARGUMENTS
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection("proj_size" in kwargs)
        if len(args) > 3:
            self.nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        super().__init__(*_skip_projection(args), **kwargs)

    @property
    def _cell(self) -> str:
        return functional.rnn_cell(self.nonlinearity)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity}")


def _show_arguments() -> None:
    """GRU and RNN take what torch.nn's take, in two orders; who asks for their signature sees the documented one."""
    arguments = list(inspect.signature(_Recurrent.__init__).parameters.values())
    arguments = [one for one in arguments if one.name != "proj_size"]
    GRU.__init__.__signature__ = inspect.Signature(arguments)
    fourth = inspect.Parameter("nonlinearity", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="tanh", annotation=str)
    arguments.insert([one.name for one in arguments].index("bias"), fourth)
    RNN.__init__.__signature__ = inspect.Signature(arguments)


_show_arguments()


def _refuse_projection(asked: bool) -> None:
    if asked:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def _skip_projection(args: tuple) -> tuple:
    """Positional arguments with proj_size in its place: torch.nn's GRU and RNN document none, but take a 0 there."""
    if len(args) <= 7:
        return args
    if isinstance(args[7], int):
        _refuse_projection(args[7] != 0)
        return args
    return (*args[:7], 0, *args[7:])


class _Cell(nn.Module):
    """What LSTMCell, GRUCell and RNNCell share: a network of one layer that walks one step."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        _check_sizes(input_size=input_size, hidden_size=hidden_size)
        _check_flags(layer_norm=layer_norm)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bool(bias)
        self.layer_norm, self.backend = layer_norm, backend
        functional.dispatch.forced(backend)
        shapes = layer_shapes(self._cell, input_size, hidden_size, 0, self.bias, layer_norm)
        self.all_names = list(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        if not self.bias:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights and biases from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn does."""
        _uniform(self, self.hidden_size)

    def forward(self, input: Tensor, hx=None):
        """One step: `input [B, I]` or `[I]`, states `[B, H]` or `[H]` -> the new h; `(h, c)` for the LSTM."""
        state = functional._step(*self._call(input, hx), self.backend)
        state = state if input.dim() == 2 else tuple(s[0] for s in state)
        return state if self._cell == "lstm" else state[0]

    def _call(self, input: Tensor, hx):
        """Cell, input `[B, I]`, states `[B, H]` and the parameters as of a network with one layer."""
        name = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        lstm, stored = self._cell == "lstm", self._parameters
        params = {f"{n}_l0": stored[n] if n in stored else getattr(self, n) for n in self.all_names}
        states = () if hx is None else hx if isinstance(hx, (tuple, list)) else (hx,)
        if lstm and hx is not None and (states is not hx or len(hx) != 2):
            came = f"{len(hx)} states" if states is hx else type(hx).__name__
            raise RuntimeError(f"{name}: hx should be a pair (h, c), got {came}")
        dtype = params["weight_ih_l0"].dtype
        if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"{name}: input has dtype {input.dtype}, but the weights have {dtype}")
        x = input if input.dim() == 2 else input.unsqueeze(0)  # not by torch.atleast_2d, which a small cell would feel
        shape, rows = (x.shape[0], self.hidden_size), []
        for k, state in enumerate(states):
            if state.dim() not in (1, 2):
                raise ValueError(f"{name}: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead")
            rows.append(state if state.dim() == 2 else state.unsqueeze(0))
            if rows[k].shape != shape:
                expected = [*input.shape[:-1], self.hidden_size]
                raise RuntimeError(f"{name}: Expected hx[{k}] of shape {expected}, got {list(state.shape)}")
        return self._cell, x, tuple(rows), params

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        for name, default in (("bias", True), ("layer_norm", False), ("nonlinearity", "tanh"), ("backend", None)):
            if getattr(self, name, default) != default:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts)


class LSTMCell(_Cell):
    """One step of `LSTM`, in place of torch.nn.LSTMCell; `layer_norm` as there. Returns `(h [B, H], c [B, H])`."""

    _cell = "lstm"


class GRUCell(_Cell):
    """One step of `GRU`, in place of torch.nn.GRUCell; `layer_norm` as there. Returns `h [B, H]`."""

    _cell = "gru"


class RNNCell(_Cell):
    """One step of `RNN`, in place of torch.nn.RNNCell; `layer_norm` as there. Returns `h [B, H]`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device=None,
        dtype=None,
        **extras: Any,
    ) -> None:
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias, device, dtype, **extras)

    @property
    def _cell(self) -> str:
        return functional.rnn_cell(self.nonlinearity)
