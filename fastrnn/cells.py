"""Cells from the literature, each written once in PyTorch; `fastrnn.Recurrent` makes a network of one.

    model = fastrnn.Recurrent(fastrnn.cells.peephole_lstm, 64, 128)

In the equations a gate's name means its pre-activation, W_ih x + b_ih + W_hh h + b_hh, or W_ih x + b_ih where the
cell is not recurrent. They are examples, too: `docs/cells.md` shows how to write your own.
"""

import torch
import torch.nn.functional as F
from torch import relu, sigmoid, tanh

from .user_cells import Cell, cell

__all__ = [
    "coupled_lstm",
    "ea_lstm",
    "ind_rnn",
    "janet",
    "leaky",
    "leaky_rnn",
    "li_gru",
    "min_gru",
    "min_lstm",
    "peephole_lstm",
    "slstm",
]


@cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
def peephole_lstm(x, u, state, p):
    """LSTM whose gates see the cell state.

        i', f' = sigmoid(i + p_i c), sigmoid(f + p_f c),  c' = f' c + i' tanh(g),  h' = sigmoid(o + p_o c') tanh(c')

    F. Gers, J. Schmidhuber, "Recurrent nets that time and count", 2000.
    """
    i = sigmoid(x.i + u.i + p.p_i * state.c)
    f = sigmoid(x.f + u.f + p.p_f * state.c)
    c = f * state.c + i * tanh(x.g + u.g)
    return sigmoid(x.o + u.o + p.p_o * c) * tanh(c), c


@cell(gates="f g o", states="h c")
def coupled_lstm(x, u, state):
    """LSTM whose input gate is what the forget gate leaves: three gates instead of four.

        c' = sigmoid(f) c + (1 - sigmoid(f)) tanh(g),  h' = sigmoid(o) tanh(c')

    K. Greff et al., "LSTM: a search space odyssey", 2017 (there CIFG).
    """
    f = sigmoid(x.f + u.f)
    c = f * state.c + (1 - f) * tanh(x.g + u.g)
    return sigmoid(x.o + u.o) * tanh(c), c


def leaky(alpha: float = 0.2, *, learnable: bool = True, noise: bool = True, activation=relu) -> Cell:
    """A leaky rate network in its state form; `leaky_rnn` is the one with all defaults.

        v' = (1 - a) v + a (W_ih x + b_ih + W_hh r + b_hh + noise),  r' = activation(v')

    Its states are r, the rates, which are the output and what W_hh multiplies, and v. With dt / tau = a it is Euler's
    step of tau dv/dt = -v + W r + W_ih x + b + noise. F. Song, G. Yang, X.-J. Wang, "Training excitatory-inhibitory
    recurrent neural networks for cognitive tasks", 2016.

    Args:
        alpha: a, or where `learnable` the first value of the parameter `alpha [H]`.
        noise: whether every call gives `noise=`, scaled by its user.
        activation: a pointwise function.
    """

    def leaky_rnn(x, u, state, *beside):  # beside: p, inputs
        a, drive = beside[0].alpha if learnable else alpha, x.v + u.v
        if noise:
            drive = drive + beside[-1].noise
        v = (1 - a) * state.v + a * drive
        return activation(v), v

    parameters, inputs = {"alpha": alpha} if learnable else (), "noise" if noise else ()
    return cell(gates="v", states="r v", parameters=parameters, inputs=inputs)(leaky_rnn)


leaky_rnn = leaky()


@cell(gates="z n")
def li_gru(x, u, state):
    """Light GRU: no reset gate, and ReLU. The paper's batch norm is of the input product, so it is outside of the cell.

        h' = sigmoid(z) h + (1 - sigmoid(z)) relu(n)

    M. Ravanelli et al., "Light gated recurrent units for speech recognition", 2018.
    """
    z = sigmoid(x.z + u.z)
    return (z * state.h + (1 - z) * relu(x.n + u.n),)


@cell(gates="n", parameters={"w": 1.0}, recurrent=False)
def ind_rnn(x, state, p):
    """Independently recurrent network: each unit sees its own state only, times w, which starts as 1.

        h' = relu(n + w h)

    S. Li et al., "Independently recurrent neural network (IndRNN)", 2018.
    """
    return (relu(x.n + p.w * state.h),)


@cell(gates="f g")
def janet(x, u, state):
    """LSTM with a forget gate only.

        h' = sigmoid(f) h + (1 - sigmoid(f - 1)) tanh(g)

    J. van der Westhuizen, J. Lasenby, "The unreasonable effectiveness of the forget gate", 2018 (there beta = 1).
    """
    f = x.f + u.f
    return (sigmoid(f) * state.h + (1 - sigmoid(f - 1)) * tanh(x.g + u.g),)


@cell(gates="z n", recurrent=False)
def min_gru(x, state):
    """GRU whose gates see the input only.

        h' = (1 - sigmoid(z)) h + sigmoid(z) n

    L. Feng et al., "Were RNNs all we needed?", 2024.
    """
    z = sigmoid(x.z)
    return ((1 - z) * state.h + z * x.n,)


@cell(gates="f i n", recurrent=False)
def min_lstm(x, state):
    """LSTM whose gates see the input only, and are scaled to sum to 1.

        h' = (sigmoid(f) h + sigmoid(i) n) / (sigmoid(f) + sigmoid(i))

    L. Feng et al., "Were RNNs all we needed?", 2024.
    """
    f, i = sigmoid(x.f), sigmoid(x.i)
    return (f / (f + i) * state.h + i / (f + i) * x.n,)


@cell(gates="i f z o", states="h c n m")
def slstm(x, u, state):
    """LSTM with an exponential input gate, a normaliser n and a stabiliser m; the paper's heads are `num_heads`.

        m' = max(log sigmoid(f) + m, i),  i' = exp(i - m'),  f' = exp(log sigmoid(f) + m - m')
        c' = f' c + i' tanh(z),  n' = f' n + i',  h' = sigmoid(o) c' / n'

    At the start, where n is 0, m' = i: the result is the same, and n' is 1 instead of something that may underflow.
    M. Beck et al., "xLSTM: extended long short-term memory", 2024.
    """
    i, log_f = x.i + u.i, F.logsigmoid(x.f + u.f) + state.m
    m = torch.where(state.n == 0, i, torch.maximum(log_f, i))
    i, f = torch.exp(i - m), torch.exp(torch.where(state.n == 0, 0.0, log_f - m))
    c = f * state.c + i * tanh(x.z + u.z)
    n = f * state.n + i
    return sigmoid(x.o + u.o) * c / n, c, n, m


@cell(gates="f g o", states="h c", inputs="static")
def ea_lstm(x, u, state, inputs):
    """Entity-aware LSTM: the input gate comes from what does not change over the sequence.

        c' = sigmoid(f) c + sigmoid(static) tanh(g),  h' = sigmoid(o) tanh(c')

    `static [B, H]` is W_i s + b_i of the static features s: the result of a `torch.nn.Linear` outside of the cell.
    F. Kratzert et al., "Towards learning universal, regional, and local hydrological behaviors via machine learning
    applied to large-sample datasets", 2019.
    """
    c = sigmoid(x.f + u.f) * state.c + sigmoid(inputs.static) * tanh(x.g + u.g)
    return sigmoid(x.o + u.o) * tanh(c), c


WITHOUT_INPUTS: dict[str, Cell] = {
    one.name: one for one in map(globals().get, __all__) if isinstance(one, Cell) and not one.inputs
} | {"leaky_rnn": leaky(noise=False)}
"""The cells that read nothing but the network's input, by name; `leaky_rnn` without its noise."""
