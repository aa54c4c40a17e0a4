"""Initialisation gate by gate: `torch.nn.init` on each gate's own rows of a recurrent network's weights and biases.

    rnn = fastrnn.init.orthogonal_(fastrnn.LSTM(32, 128))
    fastrnn.init.chrono_(rnn, t_max=200)

torch.nn stacks the gates of a cell in one matrix `[G*H, I]`. Drawn as a whole, it has the wrong fan-out and is
orthogonal across the gates. Every function here takes fastrnn's and torch.nn's LSTM, GRU, RNN and their cells, and
`fastrnn.Recurrent`, or any model that contains some, and initialises all of them, every layer and direction. It writes
in place, so that optimisers and shared weights see the new values, draws from torch's global generator, returns the
module, and changes only the parameters of its row:

| function       | changes                          | on            |
|----------------|----------------------------------|---------------|
| `xavier_`      | W_ih, W_hh, and W_hr             | every cell    |
| `kaiming_`     | W_ih, W_hh, and W_hr             | every cell    |
| `orthogonal_`  | W_hh                             | every cell    |
| `identity_`    | W_hh; all biases to 0            | RNN           |
| `forget_bias_` | both biases of f                 | LSTM          |
| `chrono_`      | both biases of i and f, or of z  | LSTM, GRU     |

All raise ValueError, before anything is changed, if the model contains no recurrent module, or one of another cell, or
one without the biases that the function sets, or one whose weights are parametrized or computed by hooks.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import torch_nn
from .cell_table import CELLS, spec_of
from .modules import GRU, LSTM, _Recurrent, has_computed_weights
from .single_step import GRUCell, LSTMCell, _Cell

Module = TypeVar("Module", bound=nn.Module)

RNNS = tuple(name for name in CELLS if name.startswith("rnn_"))
ACTIVATION = {"g": "tanh", "n": "tanh"} | {CELLS[name].gates[0]: CELLS[name].gates[0] for name in RNNS}
"""The activation of each gate; the logistic function of those that are not listed."""


class _Layer(NamedTuple):
    """One layer in one direction: the rows of each gate, `{gate: [H, ...]}`, as views of the parameters."""

    cell: str
    W_ih: dict[str, Tensor]
    W_hh: dict[str, tuple[Tensor, ...]]  # the blocks of the heads, or one [H, P]; empty where there is no W_hh
    b_ih: dict[str, Tensor]  # empty without biases
    b_hh: dict[str, Tensor]
    W_hr: Tensor | None  # [P, H]


def _cell(module: nn.Module) -> str | None:
    """The name in the cell table; None for a module that is not recurrent."""
    if isinstance(module, (_Recurrent, _Cell)):
        return module._cell  # of a Recurrent, its text
    if isinstance(module, torch_nn.RNNBase):
        return module.mode.lower()
    if isinstance(module, torch_nn.RNNCell):
        return f"rnn_{module.nonlinearity}"
    return "lstm" if isinstance(module, torch_nn.LSTMCell) else "gru" if isinstance(module, torch_nn.GRUCell) else None


def _layers(model: nn.Module, function: str, cells: Sequence[str] = (), biases: bool = False) -> list[_Layer]:
    """All layers and directions of all recurrent modules; raises the ValueErrors described at the top of this file.

    `cells`: those that the function is for; all, if it names none.
    """
    found = [(name, module, _cell(module)) for name, module in model.named_modules() if _cell(module)]
    if not found:
        raise ValueError(f"{function}: {type(model).__name__} holds no LSTM, GRU, RNN or cell of fastrnn or torch.nn")
    layers = []
    for name, module, cell in found:
        where = f"{function}: {name or 'the model'} ({type(module).__name__})"
        # With activations of one's own, the cell is a text.
        kind = "lstm" if isinstance(module, (LSTM, LSTMCell)) else "gru" if isinstance(module, (GRU, GRUCell)) else cell
        if cells and kind not in cells:
            raise ValueError(
                f"{where} is of cell {spec_of(cell).name!r}; this initialisation is for {', '.join(cells)}"
            )
        if biases and not module.bias:
            raise ValueError(f"{where} has no biases, which this initialisation sets: build it with bias=True")
        if is_parametrized(module):
            raise ValueError(f"{where} has parametrized weights: initialise it before you parametrize it")
        parameters, gates = dict(module.named_parameters(recurse=False)), spec_of(cell).gates
        if has_computed_weights(module):
            raise ValueError(f"{where} has weights that hooks or a wrapper compute (pruning, say): initialise first")
        for end in (key.removeprefix("weight_ih") for key in parameters if key.startswith("weight_ih")):
            split = {
                kind: dict(zip(gates, parameters[kind + end].split(module.hidden_size), strict=True))
                for kind in ("weight_ih", "bias_ih", "bias_hh")
                if parameters.get(kind + end) is not None
            }
            w_hh = parameters.get("weight_hh" + end)
            layers.append(
                _Layer(
                    cell, split["weight_ih"], {} if w_hh is None else _blocks(w_hh, gates), split.get("bias_ih", {}),
                    split.get("bias_hh", {}), parameters.get("weight_hr" + end),
                )
            )  # fmt: skip
    return layers


def _blocks(w_hh: Tensor, gates: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
    """For each gate its rows of W_hh; in heads, a block for each head."""
    if w_hh.dim() == 2:
        return {gate: (block,) for gate, block in zip(gates, w_hh.chunk(len(gates)), strict=True)}
    return {gate: rows.unbind() for gate, rows in zip(gates, w_hh.chunk(len(gates), 1), strict=True)}


def _gain(activation: str) -> float:
    """`torch.nn.init.calculate_gain`, and for the ELU, which it lacks, 1 / sqrt(E[elu(z)²]) with z from N(0, 1)."""
    if activation != "elu":
        return nn.init.calculate_gain(activation)

    def below(z: float) -> float:  # P(N(0, 1) < z)
        return (1 + math.erf(z / math.sqrt(2))) / 2

    # E[z²; z > 0] + E[(exp(z) - 1)²; z < 0]
    return 1 / math.sqrt(0.5 + math.exp(2) * below(-2) - 2 * math.exp(0.5) * below(-1) + 0.5)


def _set_bias(layer: _Layer, gate: str, value: Tensor | float) -> None:
    """b_ih + b_hh = value."""
    layer.b_ih[gate].copy_(torch.as_tensor(value))
    nn.init.zeros_(layer.b_hh[gate])


@torch.no_grad()
def xavier_(module: Module, gain: float = 1.0) -> Module:
    """Each gate's block of W_ih `[H, I]` and W_hh `[H, H]`: U(-a, a) with a = gain sqrt(6 / (fan_in + fan_out)).

    While the activations are near linear, this keeps the variance level, forward and backward. A projection's W_hr is
    drawn likewise.
    X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.
    """
    for layer in _layers(module, "xavier_"):
        for block in (*layer.W_ih.values(), *chain(*layer.W_hh.values())):
            nn.init.xavier_uniform_(block, gain)
        if layer.W_hr is not None:
            nn.init.xavier_uniform_(layer.W_hr, gain)
    return module


@torch.no_grad()
def kaiming_(module: Module) -> Module:
    """Each gate's block of W_ih `[H, I]` and W_hh `[H, H]`: U(-a, a) with a = gain sqrt(3 / fan_in).

    The gain is that of the gate's activation: logistic 1, tanh 5/3, ReLU sqrt(2), leaky ReLU sqrt(2 / (1 + 0.01²)),
    ELU 1.245 (1 / sqrt(E[elu(z)²]) over a standard normal z). A projection's W_hr has gain 1, and so have the gates of
    a user's cell, whose activations are not known. W_hh is applied T times,
    so that a gain above 1 compounds: for long sequences, call `orthogonal_` or `identity_` afterwards.
    K. He, X. Zhang, S. Ren, J. Sun, "Delving deep into rectifiers", 2015.
    """
    for layer in _layers(module, "kaiming_"):
        blocks_of_ih = {gate: (block,) for gate, block in layer.W_ih.items()}
        for gates in (blocks_of_ih, layer.W_hh):
            for gate, block in ((gate, block) for gate, blocks in gates.items() for block in blocks):
                activation = ACTIVATION.get(gate, "sigmoid") if layer.cell in CELLS else "sigmoid"
                nn.init.kaiming_uniform_(block, nonlinearity="linear").mul_(_gain(activation))
        if layer.W_hr is not None:
            nn.init.kaiming_uniform_(layer.W_hr, nonlinearity="linear")
    return module


@torch.no_grad()
def orthogonal_(module: Module, gain: float = 1.0) -> Module:
    """Each gate's block of W_hh: gain times a random orthogonal `[H, H]` matrix.

    With a projection it is `[H, P]` and has orthonormal columns. All its singular values are `gain`, so that with gain
    1 W_hh by itself keeps the norm of a gradient; the activations do not.
    A. Saxe, J. McClelland, S. Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks", 2014.
    """
    for layer in _layers(module, "orthogonal_"):
        for block in chain(*layer.W_hh.values()):
            # The QR decomposition that it uses does not exist for the half types.
            wide = block if block.dtype == torch.float64 else block.float()
            block.copy_(nn.init.orthogonal_(wide, gain))
    return module


@torch.no_grad()
def identity_(module: Module, scale: float = 1.0) -> Module:
    """RNN: W_hh = scale I and all biases 0, so that without input a ReLU keeps its state, h_t = scale h_{t-1}.

    With ReLU this is the IRNN of Q. Le, N. Jaitly, G. Hinton, "A simple way to initialize recurrent networks of
    rectified linear units", 2015. The paper also draws W_ih from N(0, 0.001), which `torch.nn.init.normal_` does and
    this function does not, and takes scale = 0.01 for tasks that need little memory.
    """
    for layer in _layers(module, "identity_", RNNS):
        for block in chain(*layer.W_hh.values()):
            nn.init.eye_(block).mul_(scale)
        for bias in (*layer.b_ih.values(), *layer.b_hh.values()):
            nn.init.zeros_(bias)
    return module


@torch.no_grad()
def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """LSTM: the bias of the forget gate, b_ih + b_hh, is `value` (in b_ih; b_hh is 0 there).

    At the start of training the cell then keeps the share sigmoid(value) of c per step, instead of a half.
    R. Jozefowicz, W. Zaremba, I. Sutskever, "An empirical exploration of recurrent network architectures", 2015,
    recommends 1, after F. Gers, J. Schmidhuber, F. Cummins, "Learning to forget", 2000.
    """
    for layer in _layers(module, "forget_bias_", ("lstm",), biases=True):
        _set_bias(layer, "f", value)
    return module


@torch.no_grad()
def chrono_(module: Module, t_max: float) -> Module:
    """LSTM, GRU: biases for memories of 2 to `t_max` steps, one draw per unit.

        LSTM   b_f = log U(1, t_max - 1),  b_i = -b_f
        GRU    b_z = log U(1, t_max - 1)

    These are the sums b_ih + b_hh: b_ih gets the draw, and b_hh is 0 there. A gate with bias b keeps the state for
    about 1 / (1 - sigmoid(b)) = 1 + exp(b) steps. The GRU's z is the share that it keeps, so its bias has the opposite
    sign of that in the paper.
    C. Tallec, Y. Ollivier, "Can recurrent neural networks warp time?", 2018.

    Args:
        module: as for all functions here.
        t_max: the longest expected dependency in steps, at least 2; the sequence length if nothing better is known.

    Raises:
        ValueError: also if t_max is below 2 or not finite.
    """
    if not 2 <= t_max < math.inf:
        raise ValueError(f"t_max should be a finite number of steps, at least 2, got {t_max}")
    for layer in _layers(module, "chrono_", ("lstm", "gru"), biases=True):
        keep = "f" if "f" in layer.b_ih else "z"
        bias = nn.init.uniform_(torch.empty_like(layer.b_ih[keep]), 1, t_max - 1).log_()
        _set_bias(layer, keep, bias)
        if keep == "f":
            _set_bias(layer, "i", -bias)
    return module
