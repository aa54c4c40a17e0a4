"""Texts of cells written by hand, with their backward derived on paper: each has something that the others lack.
What a traced cell is to the scan, for the C++ library and for Triton.

Every cell also has its step as a function of tensors, from which autograd derives the same gradients.
"""

from typing import NamedTuple

import torch
from torch import sigmoid, tanh


class Value:
    """A value of a program that is being written: arithmetic on it writes instructions."""

    def __init__(self, program, number):
        self.program, self.number = program, number

    def __add__(self, other):
        return self.program.write("add", self, other)

    def __sub__(self, other):
        return self.program.write("sub", self, other)

    def __rsub__(self, other):
        return self.program.write("sub", other, self)

    def __mul__(self, other):
        return self.program.write("mul", self, other)

    __radd__, __rmul__ = __add__, __mul__


class Writer:
    """A program, instruction by instruction."""

    def __init__(self, inputs):
        self.inputs, self.parts = inputs, []
        self.values = [Value(self, k) for k in range(inputs)]

    def write(self, name, *operands):
        numbers = [self.number(operand) for operand in operands]
        return self.append(f"{name} {' '.join(map(str, numbers))}")

    def number(self, operand):
        return operand.number if isinstance(operand, Value) else self.append(f"const {float(operand).hex()}").number

    def append(self, part):
        self.parts.append(part)
        return Value(self, self.inputs + len(self.parts) - 1)

    def text(self, results):
        out = " ".join(str(self.number(result)) for result in results)
        return " | ".join([str(self.inputs), *self.parts, f"out {out}"])


def sig(x):
    return x.program.write("sigmoid", x)


def th(x):
    return x.program.write("tanh", x)


class HandWritten(NamedTuple):
    """A cell. step(x, u, state, p, inputs) -> new states, on lists of tensors; the text says the same."""

    text: str
    step: object


def planes(values, *counts):
    """The values as lists of these lengths."""
    found = []
    for count in counts:
        found.append(values[:count])
        values = values[count:]
    assert not values
    return found


def hand_written(name, gates, states, forward, total, backward, *, saved, step, p="", inputs="", recurrent=True):
    """forward(x, u, state, p, inputs) -> states, saved; total and backward(saved, state, dstate, p, inputs) -> results:
    backward's in one list, or a pair with dgh as the second where it differs."""
    G, S, Q, N = (len(names.split()) for names in (gates, states, p, inputs))

    def write(function, *counts):
        writer = Writer(sum(counts))
        results = function(*planes(writer.values, *counts))
        return writer.text(results)

    into = (G, G if recurrent else 0, S, Q, N)
    back = (saved, S, S, Q, N)
    programs = write(forward, *into), write(total, *back), write(backward, *back)
    distinct = len(programs[2].rpartition("out ")[2].split()) == 2 * G + S + Q + N
    lines = (
        f"cell {name}", f"gates {gates}", f"states {states}", f"parameters {p}", f"inputs {inputs}",
        f"recurrent {int(recurrent)}", f"saved {saved}", f"distinct_dgh {int(distinct)}",
        f"forward {programs[0]}", f"total {programs[1]}", f"backward {programs[2]}",
    )  # fmt: skip
    return HandWritten("\n".join(line.rstrip() for line in lines), step)


def _lstm():
    def of(saved):
        i, f, g, o = saved
        return sig(i), sig(f), th(g), sig(o)

    def forward(x, u, state, _p, _n):
        pre = [a + b for a, b in zip(x, u, strict=True)]
        i, f, g, o = of(pre)
        c = f * state[1] + i * g
        return [o * th(c), c, *pre]

    def total(saved, state, d, _p, _n):
        i, f, g, o = of(saved)
        t = th(f * state[1] + i * g)
        return [d[0], d[1] + d[0] * o * (1 - t * t)]

    def backward(saved, state, d, _p, _n):
        i, f, g, o = of(saved)
        t = th(f * state[1] + i * g)
        dh, dc = d
        gates = [dc * g * i * (1 - i), dc * state[1] * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)]
        return [*gates, 0.0, dc * f]

    def step(x, u, state, _p, _n):
        i, f, g, o = (a + b for a, b in zip(x, u, strict=True))
        c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c

    return hand_written("own_lstm", "i f g o", "h c", forward, total, backward, saved=4, step=step)


def _gru():
    def forward(x, u, state, _p, _n):
        r, z = x[0] + u[0], x[1] + u[1]
        n = x[2] + sig(r) * u[2]
        out = th(n)
        return [out + sig(z) * (state[0] - out), r, z, n, u[2]]

    def total(_saved, _state, d, _p, _n):
        return d

    def backward(saved, state, d, _p, _n):
        r, z, n = sig(saved[0]), sig(saved[1]), th(saved[2])
        dn = d[0] * (1 - z) * (1 - n * n)
        dz = d[0] * (state[0] - n) * z * (1 - z)
        dr = dn * saved[3] * r * (1 - r)
        return [dr, dz, dn, dr, dz, dn * r, d[0] * z]

    def step(x, u, state, _p, _n):
        r, z = sigmoid(x[0] + u[0]), sigmoid(x[1] + u[1])
        n = tanh(x[2] + r * u[2])
        return (n + z * (state[0] - n),)

    return hand_written("own_gru", "r z n", "h", forward, total, backward, saved=4, step=step)


def _leaky():
    """A rate network: two states, a parameter and a noise. W_hh multiplies the rate, which `total` links to v."""

    def forward(x, u, state, p, inputs):
        v = state[1] + p[0] * (x[0] + u[0] + inputs[0] - state[1])
        return [th(v), v, x[0] + u[0]]

    def total(saved, state, d, p, inputs):
        r = th(state[1] + p[0] * (saved[0] + inputs[0] - state[1]))
        return [d[0], d[1] + d[0] * (1 - r * r)]

    def backward(saved, state, d, p, inputs):
        dgate = d[1] * p[0]
        return [dgate, 0.0, d[1] * (1 - p[0]), d[1] * (saved[0] + inputs[0] - state[1]), dgate]

    def step(x, u, state, p, inputs):
        v = (1 - p[0]) * state[1] + p[0] * (x[0] + u[0] + inputs[0])
        return tanh(v), v

    return hand_written(
        "leaky", "x", "r v", forward, total, backward, saved=1, step=step, p="alpha", inputs="noise"
    )  # fmt: skip


def _three():
    """Three states, of which two change places: h = p a', a' = b, b' = a + x u."""

    def forward(x, u, state, p, _n):
        _, a, b = state
        return [b * p[0], b, a + x[0] * u[0], x[0], u[0]]

    def total(_saved, _state, d, p, _n):
        return [d[0], d[1] + d[0] * p[0], d[2]]

    def backward(saved, state, d, p, _n):
        return [d[2] * saved[1], d[2] * saved[0], 0.0, d[2], d[1], d[0] * state[2]]

    def step(x, u, state, p, _n):
        _, a, b = state
        return b * p[0], b, a + x[0] * u[0]

    return hand_written("three", "x", "h a b", forward, total, backward, saved=2, step=step, p="p")


def _four():
    """Four states; the new h feeds the others, so that `total` changes dh; the last state never changes."""

    def forward(x, u, state, p, inputs):
        _, a, b, k = state
        h = th(x[0] + u[0] * p[0])
        return [h, a + h * p[1], b * sig(x[1] + u[1]) + h * inputs[0], k, x[0] + u[0] * p[0], x[1] + u[1], u[0]]

    def total(_saved, _state, d, p, inputs):
        return [d[0] + d[1] * p[1] + d[2] * inputs[0], d[1], d[2], d[3]]

    def backward(saved, state, d, p, _inputs):
        h, s = th(saved[0]), sig(saved[1])
        dpre = d[0] * (1 - h * h)
        dgate = d[2] * state[2] * s * (1 - s)
        return [dpre, dgate, dpre * p[0], dgate, 0.0, d[1], d[2] * s, d[3], dpre * saved[2], d[1] * h, d[2] * h]

    def step(x, u, state, p, inputs):
        _, a, b, k = state
        h = tanh(x[0] + u[0] * p[0])
        return h, a + h * p[1], b * sigmoid(x[1] + u[1]) + h * inputs[0], k

    return hand_written(
        "four", "x y", "h a b k", forward, total, backward, saved=3, step=step, p="p q", inputs="n"
    )  # fmt: skip


def _minimal_gated():
    """No W_hh: h = (1 - z) h + z candidate."""

    def forward(x, _u, state, _p, _n):
        z = sig(x[0])
        return [state[0] + z * (x[1] - state[0]), x[0], x[1]]

    def total(_saved, _state, d, _p, _n):
        return d

    def backward(saved, state, d, _p, _n):
        z = sig(saved[0])
        return [d[0] * (saved[1] - state[0]) * z * (1 - z), d[0] * z, d[0] * (1 - z)]

    def step(x, _u, state, _p, _n):
        z = sigmoid(x[0])
        return ((1 - z) * state[0] + z * x[1],)

    return hand_written("min_gru", "z c", "h", forward, total, backward, saved=2, step=step, recurrent=False)


def _without_memory():
    """No W_hh and nothing of the state before: its gradient is zero."""

    def forward(x, _u, _state, _p, _n):
        return [th(x[0]), x[0]]

    def total(_saved, _state, d, _p, _n):
        return d

    def backward(saved, _state, d, _p, _n):
        h = th(saved[0])
        return [d[0] * (1 - h * h), 0.0]

    def step(x, _u, _state, _p, _n):
        return (tanh(x[0]),)

    return hand_written("feed", "x", "h", forward, total, backward, saved=1, step=step, recurrent=False)


def _independent():
    """No W_hh, and a parameter: h' = tanh(x + w h)."""

    def forward(x, _u, state, p, _n):
        return [th(x[0] + p[0] * state[0]), x[0] + p[0] * state[0]]

    def total(_saved, _state, d, _p, _n):
        return d

    def backward(saved, state, d, p, _n):
        h = th(saved[0])
        dpre = d[0] * (1 - h * h)
        return [dpre, dpre * p[0], dpre * state[0]]

    def step(x, _u, state, p, _n):
        return (tanh(x[0] + p[0] * state[0]),)

    return hand_written("ind", "g", "h", forward, total, backward, saved=1, step=step, p="w", recurrent=False)


def _memory():
    """No W_hh, two states and an input: m' = z m + x_n, h' = m' e."""

    def forward(x, _u, state, _p, inputs):
        m = sig(x[0]) * state[1] + x[1]
        return [m * inputs[0], m, x[0], m]

    def total(_saved, _state, d, _p, inputs):
        return [d[0], d[1] + d[0] * inputs[0]]

    def backward(saved, state, d, _p, _n):
        z = sig(saved[0])
        return [d[1] * state[1] * z * (1 - z), d[1], 0.0, d[1] * z, d[0] * saved[1]]

    def step(x, _u, state, _p, inputs):
        m = sigmoid(x[0]) * state[1] + x[1]
        return m * inputs[0], m

    return hand_written(
        "memory", "z n", "h m", forward, total, backward, saved=2, step=step, inputs="e", recurrent=False
    )  # fmt: skip


def _width():
    """h' = pre / sqrt(pre² + w²) with pre = x + u: NaN where w and pre are 0, as they are beyond H."""

    def root(pre, w):
        square = pre * pre + w * w
        return square, square.program.write("sqrt", square)

    def forward(x, u, _state, p, _n):
        pre = x[0] + u[0]
        return [pre.program.write("div", pre, root(pre, p[0])[1]), pre]

    def total(_saved, _state, d, _p, _n):
        return d

    def backward(saved, _state, d, p, _n):
        pre, w = saved[0], p[0]
        square, length = root(pre, w)
        e = d[0].program.write("div", d[0], length * square)
        return [e * (w * w), 0.0, 0.0 - e * (pre * w)]

    def step(x, u, _state, p, _n):
        pre = x[0] + u[0]
        return (pre / (pre * pre + p[0] * p[0]).sqrt(),)

    return hand_written("width", "g", "h", forward, total, backward, saved=1, step=step, p="w")


HAND_WRITTEN = {
    "lstm": _lstm(), "gru": _gru(), "leaky": _leaky(), "three": _three(), "four": _four(), "min_gru": _minimal_gated(),
    "feed": _without_memory(), "ind": _independent(), "memory": _memory(), "width": _width(),
}  # fmt: skip
TEXTS = {name: cell.text for name, cell in HAND_WRITTEN.items()}


def pointwise(write, inputs=2, name="pointwise"):
    """A cell with the gates a, b, ... whose h is write(a, b, ...), without a W_hh; its gradients are zero."""
    names = " ".join("abcdefgh"[:inputs])
    zeros = [0.0 for _ in range(inputs + 1)]
    return hand_written(
        name, names, "h", lambda x, _u, _s, _p, _n: [write(*x), 0.0], lambda _k, _s, d, _p, _n: d,
        lambda *_: zeros, saved=1, step=None, recurrent=False,
    ).text  # fmt: skip


def loop(step, inputs, sizes, reverse=False):
    """y of a cell over all steps, as a Python loop that autograd follows. sizes: S, Q, N."""
    S, Q, N = sizes
    H = inputs.h0.shape[1]
    state = [inputs.h0, *(() if S == 1 else inputs.c0.split(H, 1))]
    p = inputs.parameters.split(H) if Q else ()
    y = [None for _ in inputs.gx]
    for t in range(len(y) - 1, -1, -1) if reverse else range(len(y)):
        u = None
        if inputs.w_hh is not None:
            u = (state[0] @ inputs.w_hh.T + (0 if inputs.b_hh is None else inputs.b_hh)).split(H, 1)
        state = step(inputs.gx[t].split(H, 1), u, state, p, inputs.step_inputs[t].split(H, 1) if N else ())
        y[t] = state[0]
    return torch.stack(y), state[0], torch.cat(state[1:], 1) if S > 1 else None
