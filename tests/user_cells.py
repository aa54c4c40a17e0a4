"""Users' cells for the tests, and loops that run a cell's function as it is, with autograd's gradients."""

from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import sigmoid, tanh

import fastrnn
from fastrnn.cell_table import PAD, RESET


@fastrnn.cell(gates="i f g o", states="h c")
def lstm(x, u, state):
    c = sigmoid(x.f + u.f) * state.c + sigmoid(x.i + u.i) * tanh(x.g + u.g)
    return sigmoid(x.o + u.o) * tanh(c), c


@fastrnn.cell(gates="r z n")
def gru(x, u, state):
    r, z = sigmoid(x.r + u.r), sigmoid(x.z + u.z)
    n = tanh(x.n + r * u.n)
    return (n + z * (state.h - n),)


@fastrnn.cell(gates="n")
def elu(x, u, state):
    return (F.elu(x.n + u.n),)


@fastrnn.cell(gates="a b", states="h m c", parameters="q r", inputs="k l")
def three(x, u, state, p, inputs):
    """Three states, two parameters, two inputs; gradients of x and u differ."""
    a = tanh(x.a * u.a + inputs.k) * p.q + 0.5 * state.m
    c = torch.where(state.c > 0, sigmoid(x.b + u.b) * state.c, inputs.l * p.r) + a
    return tanh(c) * p.q + 0.1 * a, a, c


@fastrnn.cell(gates="f n", parameters={"w": 0.5}, inputs="k", recurrent=False)
def unconnected(x, state, p, inputs):
    """No W_hh."""
    return (sigmoid(x.f + p.w * state.h) * state.h + x.n + inputs.k,)


BUILT_IN = {"lstm": lstm, "gru": gru, "rnn_elu": elu}
OWN = {"three": three, "unconnected": unconnected, "slstm": fastrnn.cells.slstm, "leaky_rnn": fastrnn.cells.leaky_rnn}


def call(cell, x, u, states, parameters, inputs):
    """The function's results for planes side by side in the last dimension; u, parameters and inputs may be None."""
    sides = {"x": x, "u": u, "p": parameters, "inputs": inputs}
    given = []
    for name, names in cell._arguments():
        planes = states if name == "state" else sides[name].chunk(len(names), -1)
        given.append(namedtuple(name, names)(*planes))
    return cell(*given)


def hand_scan(cell, inputs, reverse):
    """y, the states beyond h at every step side by side, h_n, c_n: by a loop over the steps, for autograd.

    Also the states by step and the copies of them that the next step reads, whose gradients are total and carried.
    """
    S, T = len(cell.states), inputs.gx.shape[0]
    states = [inputs.h0, *(inputs.c0.chunk(S - 1, -1) if S > 1 else ())]
    others = inputs.zone_c.chunk(S - 1, -1) if inputs.zone_c is not None else [None for _ in range(S - 1)]
    zones, outputs, nodes = [inputs.zone_h, *others], {}, {}
    for t in range(T - 1, -1, -1) if reverse else range(T):
        carried = [s * 1 for s in states]
        reset = pad = torch.zeros(len(inputs.h0), 1, dtype=torch.bool)
        if inputs.flags is not None:
            reset, pad = ((inputs.flags[t] & bit).bool().unsqueeze(-1) for bit in (RESET, PAD))
        before = [torch.where(reset, 0.0, s) for s in carried]
        u = None
        if inputs.w_hh is not None:
            operand = before[0] if inputs.recurrent_mask is None else before[0] * inputs.recurrent_mask
            u = operand @ inputs.w_hh.t()
            if inputs.ln_hh is not None:
                u = F.layer_norm(u, u.shape[-1:], inputs.ln_hh, None, 1e-5)
            u = u if inputs.b_hh is None else u + inputs.b_hh
        step_inputs = None if inputs.step_inputs is None else inputs.step_inputs[t]
        new = call(cell, inputs.gx[t], u, before, inputs.parameters, step_inputs)
        made = [
            n if z is None else z[t] * b + (1 - z[t]) * n for n, b, z in zip(new, before, zones, strict=True)
        ]  # fmt: skip
        states = [torch.where(pad, old, n) for old, n in zip(carried, made, strict=True)]
        outputs[t] = [torch.where(pad, 0.0, s) for s in states]
        nodes[t] = (made, carried)
    y, *rest = (torch.stack([outputs[t][s] for t in range(T)]) for s in range(S))
    h_n, *c_n = states
    return y, torch.cat(rest, -1) if rest else None, h_n, torch.cat(c_n, -1) if rest else None, nodes


def network(cell, module, x, hx=None, lengths=None, reset_mask=None, **inputs):
    """A module's `(y, states)` for `x [T, B, I]`, by its cell's function: layers, directions, residual, no masks.

    inputs: `[T, B, H]`, `[B, H]` or `[L*D, T, B, H]`.
    """
    params, S, H = dict(module.named_parameters()), len(cell.states), module.hidden_size
    T, B, _ = x.shape
    D = 2 if module.bidirectional else 1
    states = [x.new_zeros(module.num_layers * D, B, H) for _ in range(S)] if hx is None else hx
    given = [inputs[name].expand(module.num_layers * D, T, B, H) for name in cell.inputs]
    finals = [[] for _ in range(S)]
    for layer in range(module.num_layers):
        ys = []
        for d, end in enumerate(("", "_reverse")[:D]):
            name, k = f"l{layer}{end}", layer * D + d
            gx = F.linear(x, params[f"weight_ih_{name}"], params.get(f"bias_ih_{name}"))
            own = [params[f"{parameter}_{name}"] for parameter in cell.parameters]
            state, y = [s[k] for s in states], {}
            for t in range(T - 1, -1, -1) if d else range(T):
                before = state
                if reset_mask is not None:
                    ahead = t + 1 if d else t
                    begins = reset_mask[ahead] if ahead < T else torch.zeros(B, dtype=torch.bool)
                    if d and lengths is not None:
                        begins = begins & (t != lengths - 1)
                    before = [torch.where(begins[:, None], 0.0, s) for s in state]
                u = None
                if cell.recurrent:
                    u = F.linear(before[0], params[f"weight_hh_{name}"], params.get(f"bias_hh_{name}"))
                side = torch.cat([one[k, t] for one in given], -1) if given else None
                new = call(cell, gx[t], u, before, torch.cat(own) if own else None, side)
                runs = torch.ones(B, 1, dtype=torch.bool) if lengths is None else (t < lengths)[:, None]
                state = [torch.where(runs, n, old) for n, old in zip(new, state, strict=True)]
                y[t] = torch.where(runs, state[0], 0.0)
            ys.append(torch.stack([y[t] for t in range(T)]))
            for s, final in enumerate(state):
                finals[s].append(final)
        y = torch.cat(ys, -1)
        x = y + x if module.residual and layer else y
    return x, tuple(torch.stack(final) for final in finals)
