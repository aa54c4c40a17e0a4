"""LSTM, GRU and RNN: torch.nn's modules, with further options. `single_step.py` has their cells.

Parameter names, order, shapes and default initialisation are torch.nn's, so state dicts go both ways with
`strict=True` as long as the extras that own parameters (layer norm) are off.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import aten, checks, dispatch, functional, network
from .activations import cell_of, leaky_cell_of
from .cell_table import CELLS, network_shapes, spec_of
from .equations import LN_EPS
from .linear import tracing
from .subclassing import ForSubclasses

MODES = tuple(name.upper() for name in CELLS)  # as torch.nn calls them
# Constructor arguments and their defaults: torch.nn's, and fastrnn's own.
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
    "layer_norm_eps": LN_EPS,
    "layer_norm_cell": "inside",
    "residual": False,
    "locked_dropout": False,
    "recurrent_dropout": 0.0,
    "recurrent_dropout_per_gate": False,
    "zoneout": 0.0,
    "weight_dropout": 0.0,
    "clip_state_grad_norm": None,
    "clip_state_grad_value": None,
    "backend": None,
}
ACTIVATIONS = {"activation": "tanh", "gate_activation": "sigmoid"}
"""Of an LSTM and a GRU, torch.nn's."""
CELL_SETTINGS = {**ACTIVATIONS, "leak": None, "learn_leak": False, "num_heads": 1}
"""What changes the cell of an LSTM, GRU or RNN; torch.nn has none of it."""
_WITHOUT_BACKEND = {name: default for name, default in EXTRAS.items() if name != "backend"}
_OF_FORWARD = {name: default for name, default in _WITHOUT_BACKEND.items() if not name.startswith("clip_")}
_extras, _NO_EXTRAS = itemgetter(*_OF_FORWARD, "num_heads"), (*_OF_FORWARD.values(), 1)
_FORWARDED = ("batch_first", "num_layers", "bidirectional", "training", "dropout", *_WITHOUT_BACKEND)

_OF_SEQUENCES = ("lengths", "reset_mask", "decay", "tap", "return_cells", "return_layers")
"""Arguments of `forward` that `step` refuses."""


def _has_no_extras(module: nn.Module) -> bool:
    """Whether a call, but for the clipping of gradients, is torch.nn's."""
    try:
        return _extras(module.__dict__) == _NO_EXTRAS  # getattr of a module takes several times as long
    except KeyError:  # a subclass has one of them as a property
        return False


def shown(value) -> str:
    """A setting as it is shown: a function by its name."""
    return getattr(value, "__name__", str(value))


def uniform(module: nn.Module) -> None:
    """torch.nn's default, U(-1/sqrt(H), 1/sqrt(H)), for W_hh with the units of a head; layer norms start as the
    identity."""

    def bound(units: int) -> float:
        return 1 / math.sqrt(units) if units > 0 else 0.0

    usual, of_head = bound(module.hidden_size), bound(module.hidden_size // module.num_heads)
    for name, parameter in module.named_parameters(recurse=False):
        if not name.startswith("ln_"):
            most = of_head if name.startswith("weight_hh") else usual
            nn.init.uniform_(parameter, -most, most)
        elif "bias" in name:
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)


def has_computed_weights(module: nn.Module) -> bool:
    """Whether a hook or a wrapper computes weights at every call, so that they are attributes instead of parameters.

    weight_norm, spectral_norm and prune of torch.nn.utils do; so does a wrapper that drops weights, whose attributes do
    not exist before the first call.
    """
    kinds = ("weight_", "bias_")
    if any(name.startswith(kinds) and isinstance(value, Tensor) for name, value in vars(module).items()):
        return True
    layers = getattr(module, "_all_weights", [["weight_ih", "weight_hh", "bias_ih", "bias_hh"]])  # or a cell
    return not all(name in module._parameters for names in layers for name in names)


class _Recurrent(ForSubclasses, nn.Module):
    """The base class of LSTM, GRU and RNN: the constructor, the parameters, the call."""

    _watch = None
    """Inside a GradientMonitor an instance has its `Watches` here, which `forward` tells of every call."""

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
        layer_norm: bool | str = False,
        layer_norm_eps: float = LN_EPS,
        layer_norm_cell: str | None = "inside",
        residual: bool = False,
        locked_dropout: bool = False,
        recurrent_dropout: float = 0.0,
        recurrent_dropout_per_gate: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        clip_state_grad_norm: float | Tensor | None = None,
        clip_state_grad_value: float | None = None,
        backend: str | None = None,
        num_heads: int = 1,
    ):
        super().__init__()
        checks.check_sizes(input_size=input_size, hidden_size=hidden_size)
        num_layers = checks.check_layers(num_layers)
        checks.check_flags(
            bias=bias, batch_first=batch_first,
            residual=residual, locked_dropout=locked_dropout,
            recurrent_dropout_per_gate=recurrent_dropout_per_gate,
        )  # fmt: skip
        checks.check_projection(proj_size, hidden_size)
        checks.check_heads(num_heads, hidden_size, proj_size, recurrent_dropout_per_gate)
        options = checks.check_options(
            self._cell, num_layers, bool(bidirectional), dropout, True, residual, locked_dropout, recurrent_dropout,
            zoneout, weight_dropout, clip_state_grad_norm, clip_state_grad_value, layer_norm_eps, layer_norm_cell,
            layer_norm, recurrent_dropout_per_gate,
        )  # fmt: skip
        dispatch.forced(backend)
        if options.dropout > 0 and num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
                f"num_layers greater than 1, but got dropout={options.dropout} and num_layers={num_layers}",
                stacklevel=3,
            )
        for name, on in (("residual", residual), ("locked_dropout", locked_dropout)):
            if on and num_layers == 1:
                warnings.warn(f"{name} acts between layers, and does nothing with num_layers=1", stacklevel=3)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, options.dropout
        self.bidirectional, self.proj_size = options.bidirectional, proj_size
        self.layer_norm, self.residual, self.locked_dropout = layer_norm, residual, locked_dropout
        self.layer_norm_eps, self.layer_norm_cell = options.layer_norm_eps, layer_norm_cell
        self.recurrent_dropout_per_gate = recurrent_dropout_per_gate
        self.recurrent_dropout, self.zoneout, self.weight_dropout = recurrent_dropout, zoneout, weight_dropout
        self.clip_state_grad_norm, self.clip_state_grad_value = clip_state_grad_norm, clip_state_grad_value
        self.backend, self.num_heads = backend, num_heads
        self.all_names: list[list[str]] = []
        for shapes in self._shapes():
            self.all_names.append([name for name, _ in shapes])
            for name, shape in shapes:
                self.register_parameter(name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()
        self.flatten_parameters()

    @property
    def _cell(self) -> str:
        """The name in the cell table."""
        raise TypeError("instantiate LSTM, GRU or RNN")

    def _shapes(self):
        return network_shapes(
            self._cell, self.input_size, self.hidden_size, self.proj_size, self.bias, self.layer_norm,
            self.num_layers, self.bidirectional, self.layer_norm_cell is not None, self.num_heads,
        )  # fmt: skip

    @property
    def mode(self) -> str:
        """The cell as torch.nn names it: LSTM, GRU, RNN_TANH, ..."""
        return spec_of(self._cell).name.upper()

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The parameters per layer and direction, as in torch.nn."""
        return [[getattr(self, name) for name in names] for names in self.all_names]

    def reset_parameters(self) -> None:
        """Draws all weights and biases from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn does.

        In heads, W_hh is drawn with the units of a head, H/N in place of H: each block is what torch.nn draws for a
        network of that size, and W_hh h is as large as without heads.
        """
        uniform(self)

    def flatten_parameters(self) -> None:
        """Lays the weights out in the one chunk that cuDNN wants. It matters only to the `aten` backend on a GPU."""
        aten.flatten_weights(self)

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        self.flatten_parameters()
        return result

    def __getstate__(self):
        """What a copy and a pickle are made of: without the monitor."""
        state = self.__dict__.copy()
        state.pop("_watch", None)
        return state

    def _arguments(self) -> dict:
        """The module's settings as keyword arguments of the functional form."""
        return {name: getattr(self, name) for name in _FORWARDED}  # torch.compile cannot follow an attrgetter

    def _parameters_by_name(self) -> dict[str, Tensor]:
        stored = self._parameters  # parametrized weights are not in it: they are attributes
        return {name: stored[name] if name in stored else getattr(self, name) for row in self.all_names for name in row}

    def __prepare_scriptable__(self):
        checks.refuse_script(self)  # torch.jit.script asks here for what to compile

    def forward(
        self, input, hx=None, *defaults, lengths=None, reset_mask=None, decay=None, tap=None, return_cells=False,
        return_layers=False,
    ):  # fmt: skip
        """Runs the network.

        Args:
            input: `[T, B, I]`, `[B, T, I]` with batch_first, `[T, I]` unbatched, or a PackedSequence; of the
                parameters' dtype, unless autocast is on.
            hx: initial states as for torch.nn, or None for zeros: `h0 [L*D, B, H]`; for the LSTM
                `(h0 [L*D, B, P], c0 [L*D, B, H])`.
            lengths: integer tensor `[B]`, each in [0, T]. After the end of a sequence its state is carried unchanged
                and its output is zero, as with a PackedSequence. On a GPU the values are not read back but clamped.
            reset_mask: bool `[T, B]` (`[B, T]` with batch_first), a tensor or anything that torch.as_tensor takes.
                True where a step starts a new segment: the state before it is zero, and no gradient crosses.
            decay: `[T, B]`, or without projection `[T, B, H]` (`[B, T]`, `[B, T, H]` with batch_first; without B when
                unbatched; also a PackedSequence beside a packed input), of any layers and directions: the factor on
                every state, h and c, before each step, also on the initial ones before step 0. It has a gradient. In
                the backward direction `decay[t + 1]` is the factor between t + 1 and t; its initial states have none.
            tap: zeros `[L*D, 2, S, T, B]`, float32 (float64 for float64 input), requiring grad. After `.backward()`
                its `.grad` holds the norms ||dL/ds_t||: `[:, 0]` the total (before clipping), `[:, 1]` the part
                carried back from the next step. S is the number of states: 2 (h, c) for the LSTM, otherwise 1. The
                norms are a report, not a derivative.
            return_cells: also return c of every step of the last layer (LSTM).
            return_layers: also return the outputs of all layers, before the dropout that follows each.

        Returns:
            What torch.nn's module returns; with `return_cells`, c `[T, B, D*H]` as a third value; with `return_layers`,
            as the last value, a tuple of L outputs `[T, B, D*P]`, each in the layout of the output, which is its last.

        Raises:
            ValueError, RuntimeError: an argument does not fit; of the type that torch.nn raises, where it does. Also
                where a forced backend cannot run the call.
        """
        if type(defaults) is not tuple or defaults:  # torch.fx makes something else of it
            checks.check_defaults(self, defaults)
        watch = self._watch
        if (
            decay is None and not return_cells and not return_layers
            and not tracing() and _has_no_extras(self) and type(self.dropout) is float
        ):  # fmt: skip
            active = None if watch is None or watch.is_idle() else watch
            extras = None
            if not (
                reset_mask is None and tap is None and active is None
                and self.clip_state_grad_norm is None and self.clip_state_grad_value is None
            ):  # fmt: skip
                extras = network.Extras(reset_mask, tap, active)
            if lengths is None:
                result = network.directly(self, input, hx, dispatch.chosen_for_plain, extras)
            else:
                result = network.with_lengths(self, input, hx, lengths, dispatch.chosen_for_plain, extras)
            if result is None and extras is None and lengths is None and self.backend is None:
                result = aten.directly(self, input, hx, dispatch.most_steps_of_torch)
            if result is not None:
                if watch is not None and active is None:
                    watch.count(result)
                return result
        return functional.recurrent(
            self._cell, input, hx, self._parameters_by_name(), self.backend, lengths=lengths, reset_mask=reset_mask,
            decay=decay, tap=tap, return_cells=return_cells, return_layers=return_layers, watch=watch,
            **self._arguments(),
        )  # fmt: skip

    def step(self, x: Tensor, state=None, **inputs: Tensor):
        """One step of all layers, without gradients: for a stream whose next input is not known yet.

        A plain LSTM, GRU or RNN on a CPU runs as one operation, which reads the parameters where they are: a change of
        them, by whatever means, counts from the next step on. It needs no memory beyond its results, and other Python
        threads run meanwhile.

        Args:
            x: `[B, I]`.
            state: as `hx` of the module's call, or as the last step returned it; None for zeros.
            inputs: those of the cell of a `Recurrent`, `[B, H]` each.

        Returns:
            `(y [B, P], state)`, new tensors: `state` was not changed, and nothing else uses their memory.

        Raises:
            ValueError: the network is bidirectional, or x has other dimensions.
            TypeError: an argument that describes a sequence, such as lengths.
            RuntimeError: of the module's call; or a forward hook leaves no state.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional network has no steps: it needs the whole sequence")
        if x.dim() != 2:
            raise ValueError(f"x should have shape [B, I], got {list(x.shape)}")
        for name in inputs:
            if name in _OF_SEQUENCES:
                raise TypeError(
                    f"step takes no {name}: it is one step of every sequence, from the state that it is given"
                )
        if not inputs and not tracing() and _has_no_extras(self):
            found = network.step(self, x, state, dispatch.chosen_for_step)
            if found is not None:
                return found
        time = 1 if self.batch_first else 0
        with torch.no_grad():
            result = self(x.unsqueeze(time), state, **inputs)
            if not isinstance(result, tuple) or len(result) != 2:
                raise RuntimeError(
                    f"step needs the output and the state of the module's call, and got a {type(result).__name__} from "
                    "its forward hook or its subclass"
                )
            return result[0].squeeze(time), result[1]

    # Without `defaults`: only torch.onnx.export with dynamo=False hands the options' defaults over by position.
    forward.__signature__ = inspect.Signature([
        one for one in inspect.signature(forward).parameters.values() if one.kind != inspect.Parameter.VAR_POSITIONAL
    ])  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        for name, default in {**PLAIN, **EXTRAS, **CELL_SETTINGS, "nonlinearity": "tanh"}.items():
            value = getattr(self, name, default)
            if isinstance(value, Tensor) or value != default:
                parts.append(f"{name}={shown(value)}")
        return ", ".join(parts)


_ARGUMENTS = """
    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.
        layer_norm: True or "separate": layer norm of W_ih x and of W_hh h, each over all gates (weight only: the biases
            are the shifts), and for the LSTM of c (Ba et al. 2016). "sum": one norm of W_ih x + W_hh h; "gates": the
            same, each gate by itself; their weight is `ln_hh`.
        layer_norm_eps: what layer norm adds to the variance, a positive float.
        layer_norm_cell: for the LSTM with layer_norm: "inside" normalises c in the tanh only, "carried" also the c
            that is carried on to the next step, None not at all.
        residual: from the second layer on, a layer's output is h + its input.
        locked_dropout: the mask of `dropout` is the same at every step (Gal & Ghahramani 2016).
        recurrent_dropout: probability that a unit of the h that W_hh multiplies is dropped, by one mask per sequence
            (Gal & Ghahramani 2016).
        recurrent_dropout_per_gate: a mask for each gate's rows of W_hh, as Keras has it.
        zoneout: probability that a unit keeps its state; for the LSTM one for both states or (p_c, p_h)
            (Krueger et al. 2017).
        weight_dropout: probability that an entry of W_hh is dropped, by one mask per call (Merity et al. 2018).
        clip_state_grad_norm: a positive float or 0-d tensor (on a GPU its value is not read back, so not checked). At
            every step, where the joint norm of dL/dh_t and dL/dc_t of a sample exceeds it, both are scaled down to it
            before they pass through the cell. This changes the gradient on purpose.
        clip_state_grad_value: a bound on each element of dL/dh_t and dL/dc_t, applied first.
        backend: a name of the backend table (`fastrnn.dispatch.BACKENDS`); None chooses.
        num_heads: a divisor N of H. With more than one, W_hh is block-diagonal: `weight_hh_l0 [N, G*H/N, H/N]`, the
            rows of each head its gates in order. Head n reads and writes units n*H/N to (n+1)*H/N of h. Without
            proj_size. A layer norm is still over all gates of all heads. W_hh is drawn from U(-sqrt(N/H), sqrt(N/H)),
            as torch.nn draws that of a network of H/N units.

    Raises:
        ValueError, TypeError: an argument does not fit; of the type that torch.nn raises, where it does.
"""


class RNNBase(_Recurrent):
    """The base class of `LSTM`, `GRU` and `RNN`, in place of torch.nn.RNNBase: to derive from, or to ask for.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU", as in torch.nn; also "RNN_LEAKY_RELU" and "RNN_ELU".
        args, kwargs: as of `LSTM`, with fastrnn's options.

    Raises:
        ValueError, TypeError: an argument does not fit; of the type that torch.nn raises, where it does.
    """

    def __init__(self, mode: str, *args: Any, **kwargs: Any) -> None:
        if mode not in MODES:
            raise ValueError(f"Unrecognized RNN mode: {mode}; it should be one of {', '.join(MODES)}")
        self._mode = mode
        if mode != "LSTM" and kwargs.get("proj_size") == 0:
            del kwargs["proj_size"]
        super().__init__(*(args if mode == "LSTM" else checks.without_projection(args, kwargs)), **kwargs)

    @property
    def _cell(self) -> str:
        return self._mode.lower()


def set_activations(module: nn.Module, **activations) -> None:
    """Before its constructor. A module among them is not to become a submodule."""
    for name, activation in activations.items():
        object.__setattr__(module, name, activation)
    if activations != ACTIVATIONS:
        module._cell = cell_of(type(module)._cell, **activations).text


def set_nonlinearity(module: nn.Module, nonlinearity: str | Callable, leak: float | None, learn_leak: bool) -> None:
    """Before the constructor of an RNN or its cell."""
    checks.check_leak(leak, learn_leak)
    object.__setattr__(module, "nonlinearity", nonlinearity)  # which is no submodule, even if it is a module
    module.leak, module.learn_leak = leak, learn_leak


def cell_of_rnn(module: nn.Module) -> str:
    if module.leak is not None:
        return leaky_cell_of(module.nonlinearity, module.leak, module.learn_leak).text
    return checks.rnn_cell(module.nonlinearity)


def set_leaks(module: nn.Module) -> None:
    """Gives the parameters of a learnt leak their first value."""
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("leak"):
            nn.init.constant_(parameter, module.leak)


class LSTM(RNNBase):
    __doc__ = (
        """Long short-term memory, in place of torch.nn.LSTM (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  g = tanh(..),  c' = f c + i g,  h' = o tanh(c')

    Input and output `[T, B, I] -> [T, B, D*P]`, states `h [L*D, B, P]`, `c [L*D, B, H]`; P = proj_size or H.
    `proj_size`: h' is replaced by W_hr h' (Sak et al. 2014). `activation`, `gate_activation`: in place of the two tanh
    and of sigmoid, a name of `fastrnn.activations.ACTIVATIONS` or a pointwise function; without layer norm and
    projection.
"""
        + _ARGUMENTS
    )
    _cell = "lstm"

    def __init__(self, *args: Any, activation="tanh", gate_activation="sigmoid", **kwargs: Any) -> None:
        set_activations(self, activation=activation, gate_activation=gate_activation)
        _Recurrent.__init__(self, *args, **kwargs)
        if self._cell != "lstm" and (self.layer_norm or self.proj_size):
            raise ValueError("layer_norm and proj_size are for the LSTM with torch.nn's activations")


class GRU(RNNBase):
    __doc__ = (
        """Gated recurrent unit, in place of torch.nn.GRU (Cho et al. 2014, in cuDNN's form).

        r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  n = tanh(W_in x + b_in + r (W_hn h + b_hn)),  h' = n + z (h - n)

    Input and output `[T, B, I] -> [T, B, D*H]`, state `h [L*D, B, H]`. `activation`, `gate_activation`: in place of
    tanh and sigmoid, a name of `fastrnn.activations.ACTIVATIONS` or a pointwise function.
"""
        + _ARGUMENTS
    )
    _cell = "gru"

    def __init__(self, *args: Any, activation="tanh", gate_activation="sigmoid", **kwargs: Any) -> None:
        set_activations(self, activation=activation, gate_activation=gate_activation)
        _Recurrent.__init__(self, *checks.without_projection(args, kwargs), **kwargs)


class RNN(RNNBase):
    __doc__ = (
        """Elman network, in place of torch.nn.RNN (Elman 1990; Le et al. 2015 for ReLU).

        h' = nonlinearity(W_ih x + b_ih + W_hh h + b_hh)

    Input and output `[T, B, I] -> [T, B, D*H]`, state `h [L*D, B, H]`. `nonlinearity` (the fourth positional argument,
    as in torch.nn): "tanh", "relu", "leaky_relu" (slope 0.01), "elu" (alpha 1), or a pointwise function.
    `leak`: a number a in (0, 1]; h' = (1 - a) h + a nonlinearity(..), a leaky integrator (Jaeger et al. 2007). With
    `learn_leak` it is the first value of a parameter `leak_l0 [H]`, ..., which nothing keeps in that range.
"""
        + _ARGUMENTS
    )

    def __init__(self, *args: Any, leak: float | None = None, learn_leak: bool = False, **kwargs: Any) -> None:
        if len(args) > 3:
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        set_nonlinearity(self, nonlinearity, leak, learn_leak)
        _Recurrent.__init__(self, *checks.without_projection(args, kwargs), **kwargs)

    _cell = property(cell_of_rnn)

    def reset_parameters(self) -> None:
        """Draws weights and biases as the other networks do. A learnt leak starts as given."""
        super().reset_parameters()
        set_leaks(self)


def _show_arguments() -> None:
    """Gives GRU and RNN the signature that is documented. Their constructors take two orders, as torch.nn's do."""
    arguments = list(inspect.signature(_Recurrent.__init__).parameters.values())
    first = [one for one in arguments if one.kind is not one.KEYWORD_ONLY]
    last = arguments[len(first) :]
    activations = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v) for n, v in ACTIVATIONS.items()]
    LSTM.__init__.__signature__ = inspect.Signature([*first, *activations, *last])
    arguments = [one for one in arguments if one.name != "proj_size"]
    first = [one for one in first if one.name != "proj_size"]
    GRU.__init__.__signature__ = inspect.Signature([*first, *activations, *last])
    fourth = inspect.Parameter("nonlinearity", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="tanh", annotation=str)
    arguments.insert([one.name for one in arguments].index("bias"), fourth)
    leak = inspect.signature(RNN.__init__).parameters
    RNN.__init__.__signature__ = inspect.Signature([*arguments, leak["leak"], leak["learn_leak"]])


_show_arguments()
