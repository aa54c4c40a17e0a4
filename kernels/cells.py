"""Forward, total and backward of each cell on tiles: the equations of `fastrnn/reference.py`, same names, same order.

    forward (gx, gh, state_prev, beside)         -> state, saved     gx = W_ih x + b_ih     gh = W_hh h_prev + b_hh
    total   (saved, state_prev, dstate, beside)  -> dstate, with the path from c to h inside the step added
    backward(saved, state_prev, dstate, beside)  -> dgx, dgh, dstate_prev, dbeside   (the W_hh path is the scan's)

Every argument and every result is a tuple of float32 tiles: one per gate, saved plane or state. `dstate_prev` is zero
where there is no path besides W_hh. `beside` has the parameters and inputs of a user's cell, whose functions
`fastrnn/backends/programs.py` writes; the cells of this file have none. No function turns a NaN or an infinity of its
input into a finite number, and none makes a NaN of a finite one. Of zeros, every function gives zeros wherever a
product or a norm reads them, so nothing has to be cleared where a tile reaches beyond H.
"""

import triton
import triton.language as tl

from .functions import sigmoid, tanh

# ----------------------------------------------------------------------------------------------------------- LSTM


# u is tanh(c), or tanh(LN(c)) where c has a layer norm. LN sums over all of H, so gemm_step.py computes u then.


@triton.jit
def lstm_pre_activations(gx, gh):
    return (gx[0] + gh[0], gx[1] + gh[1], gx[2] + gh[2], gx[3] + gh[3])


@triton.jit
def lstm_cell_state(saved, c_prev):
    return sigmoid(saved[1]) * c_prev + sigmoid(saved[0]) * tanh(saved[2])


@triton.jit
def lstm_output(saved, u):
    """h = o u."""
    return sigmoid(saved[3]) * u


@triton.jit
def lstm_output_backward(saved, u, dh):
    """dL/d(argument of the tanh in u)."""
    return dh * sigmoid(saved[3]) * (1 - u * u)


@triton.jit
def lstm_forward(gx, gh, state_prev, beside):
    """i, f, o = sigmoid; g = tanh; c = f c_prev + i g; h = o tanh(c)."""
    saved = lstm_pre_activations(gx, gh)
    c = lstm_cell_state(saved, state_prev[1])
    return (lstm_output(saved, tanh(c)), c), saved


@triton.jit
def lstm_total(saved, state_prev, dstate, beside):
    """dc + dh o (1 - tanh²(c)): all of the step's dL/dc."""
    dh, dc = dstate
    u = tanh(lstm_cell_state(saved, state_prev[1]))
    return (dh, dc + lstm_output_backward(saved, u, dh))


@triton.jit
def lstm_gates_backward(saved, c_prev, u, dstate):
    """`lstm_backward`, given u."""
    dh, dc = dstate
    i, f, g, o = sigmoid(saved[0]), sigmoid(saved[1]), tanh(saved[2]), sigmoid(saved[3])
    di = dc * g * i * (1 - i)
    df = dc * c_prev * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * u * o * (1 - o)
    dgates = (di, df, dg, do)
    return dgates, dgates, (tl.zeros_like(dh), dc * f), ()


@triton.jit
def lstm_backward(saved, state_prev, dstate, beside):
    c_prev = state_prev[1]
    return lstm_gates_backward(saved, c_prev, tanh(lstm_cell_state(saved, c_prev)), dstate)


# ------------------------------------------------------------------------------------------------------------ GRU


@triton.jit
def gru_forward(gx, gh, state_prev, beside):
    """r, z = sigmoid; n = tanh(gx_n + r gh_n); h = n + z (h_prev - n)."""
    r, z = gx[0] + gh[0], gx[1] + gh[1]
    n = gx[2] + sigmoid(r) * gh[2]
    out = tanh(n)
    h = out + sigmoid(z) * (state_prev[0] - out)
    return (h,), (r, z, n, gh[2])


@triton.jit
def gru_backward(saved, state_prev, dstate, beside):
    dh, h_prev = dstate[0], state_prev[0]
    r, z, n, gh_n = sigmoid(saved[0]), sigmoid(saved[1]), tanh(saved[2]), saved[3]
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h_prev - n) * z * (1 - z)
    dr = dn * gh_n * r * (1 - r)
    return (dr, dz, dn), (dr, dz, dn * r), (dh * z,), ()


# ------------------------------------------------------------------------------------------------------------ RNN


@triton.jit
def identity_total(saved, state_prev, dstate, beside):
    return dstate


@triton.jit
def rnn_tanh_forward(gx, gh, state_prev, beside):
    """h = tanh(gx + gh)."""
    pre = gx[0] + gh[0]
    return (tanh(pre),), (pre,)


@triton.jit
def rnn_tanh_backward(saved, state_prev, dstate, beside):
    u = tanh(saved[0])
    dpre = dstate[0] * (1 - u * u)
    return (dpre,), (dpre,), (tl.zeros_like(dpre),), ()


@triton.jit
def rnn_relu_forward(gx, gh, state_prev, beside):
    """h = max(gx + gh, 0), in a form that keeps NaN."""
    pre = gx[0] + gh[0]
    return (tl.where(pre < 0, 0.0, pre),), (pre,)


@triton.jit
def rnn_relu_backward(saved, state_prev, dstate, beside):
    dpre = dstate[0] * tl.where(saved[0] > 0, 1.0, 0.0)
    return (dpre,), (dpre,), (tl.zeros_like(dpre),), ()


@triton.jit
def rnn_leaky_relu_forward(gx, gh, state_prev, beside):
    """h = pre where pre = gx + gh is positive, else 0.01 pre."""
    pre = gx[0] + gh[0]
    return (tl.where(pre > 0, pre, 0.01 * pre),), (pre,)


@triton.jit
def rnn_leaky_relu_backward(saved, state_prev, dstate, beside):
    dpre = dstate[0] * tl.where(saved[0] > 0, 1.0, 0.01)
    return (dpre,), (dpre,), (tl.zeros_like(dpre),), ()


@triton.jit
def rnn_elu_forward(gx, gh, state_prev, beside):
    """h = pre where pre = gx + gh is positive, else exp(pre) - 1, as 2 u / (1 - u) with u = tanh(pre / 2)."""
    pre = gx[0] + gh[0]
    u = tanh(0.5 * pre)
    return (tl.where(pre > 0, pre, 2 * u / (1 - u)),), (pre,)


@triton.jit
def rnn_elu_backward(saved, state_prev, dstate, beside):
    dpre = dstate[0] * tl.where(saved[0] > 0, 1.0, tl.exp(saved[0]))
    return (dpre,), (dpre,), (tl.zeros_like(dpre),), ()


# The three functions of each cell, under the names of `fastrnn.cell_table.CELLS`.
EQUATIONS = {
    "lstm": (lstm_forward, lstm_total, lstm_backward),
    "gru": (gru_forward, identity_total, gru_backward),
    "rnn_tanh": (rnn_tanh_forward, identity_total, rnn_tanh_backward),
    "rnn_relu": (rnn_relu_forward, identity_total, rnn_relu_backward),
    "rnn_leaky_relu": (rnn_leaky_relu_forward, identity_total, rnn_leaky_relu_backward),
    "rnn_elu": (rnn_elu_forward, identity_total, rnn_elu_backward),
}
