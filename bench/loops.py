"""The loops that users write today where torch.nn's fused kernels lack a feature: one Python turn per step.

Written twice, the way a careful user would: "ops" computes the input's product for all steps at once and does the cell
in plain operations; "cells" calls torch.nn's cell, which on a GPU fuses the pointwise part. Masks are drawn for the
whole sequence at once. They are drawn by the same calls in the same order as fastrnn's, so one seed gives one result.

Shapes: T steps, B batch, I input, H hidden, P projection (else H). Parameters go by torch.nn's names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Tensor]
State = tuple[Tensor, ...]  # h [B, P], and for the LSTM c [B, H]
Step = Callable[[Tensor, Tensor, State], State]  # (input of the step, operand of W_hh, state) -> state

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "leaky_relu": F.leaky_relu, "elu": F.elu}


@dataclass(frozen=True)
class Extras:
    """What a loop does besides the cell; the names are those of fastrnn's arguments.

    `mask_dtype`: the type in which masks are drawn, so that a float64 run sees the masks of the type under test.
    """

    mask_dtype: torch.dtype
    lengths: Tensor | None = None  # [B]
    reset_mask: Tensor | None = None  # bool [T, B]
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: float = 0.0
    clip_state_grad_norm: float | None = None
    clip_state_grad_value: float | None = None
    tap: bool = False
    return_cells: bool = False


class Looped(NamedTuple):
    """y [T, B, P], h_n and c_n [1, B, .], and c [T, B, H] where asked for; `norms` gives the tap after backward."""

    outputs: tuple[Tensor, ...]
    norms: Callable[[], Tensor] | None


# ------------------------------------------------------------------------------------------------------- the cells


def lstm_ops(p: Params) -> Step:
    w, w_hr = p["weight_hh_l0"].t(), p.get("weight_hr_l0")

    def step(gx, operand, state):
        i, f, g, o = torch.addmm(gx, operand, w).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if w_hr is None else F.linear(h, w_hr)), c

    return step


def layer_norm_lstm_ops(p: Params) -> Step:
    w, ln, shift = p["weight_hh_l0"], p["ln_hh_l0"], p["bias_hh_l0"]
    ln_c, ln_c_bias = p["ln_c_l0"], p["ln_c_bias_l0"]

    def step(gx, operand, state):
        i, f, g, o = (gx + F.layer_norm(F.linear(operand, w), ln.shape, ln, shift)).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(F.layer_norm(c, ln_c.shape, ln_c, ln_c_bias)), c

    return step


def gru_ops(p: Params) -> Step:
    w, bias = p["weight_hh_l0"], p["bias_hh_l0"]
    H = w.shape[1]

    def step(gx, operand, state):
        gx_rz, gx_n = gx.split((2 * H, H), -1)
        gh_rz, gh_n = F.linear(operand, w, bias).split((2 * H, H), -1)
        r, z = torch.sigmoid(gx_rz + gh_rz).chunk(2, -1)
        return (torch.lerp(torch.tanh(gx_n + r * gh_n), state[0], z),)

    return step


def rnn_ops(activation: Callable[[Tensor], Tensor]) -> Callable[[Params], Step]:
    def build(p: Params) -> Step:
        w = p["weight_hh_l0"].t()
        return lambda gx, operand, state: (activation(torch.addmm(gx, operand, w)),)

    return build


def input_product(cell: str, p: Params, x: Tensor) -> Tensor:
    """What the input gives to all steps at once: `[T, B, G*H]`."""
    if "ln_ih_l0" in p:
        ln = p["ln_ih_l0"]
        return F.layer_norm(F.linear(x, p["weight_ih_l0"]), ln.shape, ln, p["bias_ih_l0"])
    bias = p["bias_ih_l0"] if cell == "gru" else p["bias_ih_l0"] + p["bias_hh_l0"]
    return F.linear(x, p["weight_ih_l0"], bias)


def torch_cell(cell: str, p: Params) -> Step:
    """torch.nn's LSTMCell or GRUCell on these weights."""
    kind = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}[cell]
    module = kind(p["weight_ih_l0"].shape[1], p["weight_hh_l0"].shape[1], device="meta")
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        delattr(module, name)  # a dropped-out weight is no Parameter
        setattr(module, name, p[f"{name}_l0"])
    if cell == "gru":
        return lambda x, operand, state: (module(x, operand),)
    return lambda x, operand, state: module(x, (operand, state[1]))


OPS = {
    "lstm": lstm_ops,
    "gru": gru_ops,
    **{f"rnn_{name}": rnn_ops(activation) for name, activation in ACTIVATIONS.items()},
}


# -------------------------------------------------------------------------------------------------- the gradients


class Norms:
    """Hooks that keep every step's dL/dh, dL/dc, total and carried; their norms are taken together at the end."""

    def __init__(self, T: int):
        self.gradients: dict[tuple[int, int], list[Tensor | None]] = {}
        self.T = T

    def _keep(self, row: int, k: int, t: int, state: Tensor) -> None:
        state.register_hook(lambda g: self.gradients.setdefault((row, k), [None] * self.T).__setitem__(t, g))

    def watch(self, t: int, state: State) -> State:
        """The state as the next step shall take it."""
        onward = tuple(s.view_as(s) for s in state)
        for k, (total, carried) in enumerate(zip(state, onward, strict=True)):
            self._keep(0, k, t, total)
            self._keep(1, k, t, carried)
        return onward

    def norms(self) -> Tensor:
        """`[1, 2, S, T, B]`, as fastrnn's tap: total and carried."""
        states = 1 + max(k for _, k in self.gradients)

        def norm(row: int, k: int) -> Tensor:
            kept = self.gradients[row, k]
            zero = torch.zeros_like(next(g for g in kept if g is not None))
            dtype = torch.promote_types(zero.dtype, torch.float32)
            return torch.stack([zero if g is None else g for g in kept]).to(dtype).norm(dim=-1)

        return torch.stack([torch.stack([norm(row, k) for k in range(states)]) for row in (0, 1)])[None]


def clip_norm(state: State, bound: float) -> State:
    """dL/dh of every sample scaled down to `bound`: the state of a GRU or RNN."""

    def hook(g):
        return g * (bound / g.norm(dim=-1, keepdim=True)).clamp(max=1)

    state[0].register_hook(hook)
    return state


def clip_value(state: State, bound: float) -> State:
    """Every element of dL/dh, and of the dL/dc that the next step sends back, clamped."""
    onward = (state[0], *(s.view_as(s) for s in state[1:]))
    for s in onward:
        s.register_hook(lambda g: g.clamp(-bound, bound))
    return onward


# --------------------------------------------------------------------------------------------------------- the loop


def _dropout(x: Tensor, p: float, extras: Extras) -> Tensor:
    if x.dtype == extras.mask_dtype:
        return F.dropout(x, p)
    return x * F.dropout(torch.ones_like(x, dtype=extras.mask_dtype), p)


def _zones(shapes, extras: Extras, device) -> list[Tensor]:
    """Where each state keeps its old value: bool `[T, B, .]` per state."""
    p = torch.full((), extras.zoneout, dtype=extras.mask_dtype, device=device)
    return [torch.bernoulli(p.expand(shape)).bool() for shape in shapes]


def run(cell: str, style: str, params: Params, x: Tensor, extras: Extras) -> Looped:
    """One layer over `x [T, B, I]` from zero states."""
    T, B, _ = x.shape
    p = dict(params)
    if extras.weight_dropout:
        p["weight_hh_l0"] = _dropout(p["weight_hh_l0"], extras.weight_dropout, extras)
    if style == "cells":
        step, steps = torch_cell(cell, p), x.unbind(0)
    else:
        step = (layer_norm_lstm_ops if "ln_hh_l0" in p else OPS[cell])(p)
        steps = input_product(cell, p, x).unbind(0)
    rows, size = p["weight_hh_l0"].shape
    state = (x.new_zeros(B, size), *([x.new_zeros(B, rows // 4)] if cell == "lstm" else []))
    mask = _dropout(torch.ones_like(state[0]), extras.recurrent_dropout, extras) if extras.recurrent_dropout else None
    zones = _zones([(T, *s.shape) for s in state], extras, x.device) if extras.zoneout else None
    active = kept = watcher = None
    if extras.lengths is not None:
        active = (torch.arange(T, device=x.device).unsqueeze(1) < extras.lengths).unsqueeze(-1)
    if extras.reset_mask is not None:
        kept = (~extras.reset_mask).to(x.dtype).unsqueeze(-1).unbind(0)
    if extras.tap:
        watcher = Norms(T)
    ys, cs = [], []
    for t, x_t in enumerate(steps):
        if kept is not None:
            state = tuple(s * kept[t] for s in state)
        new = step(x_t, state[0] if mask is None else state[0] * mask, state)
        if zones is not None:
            new = tuple(torch.where(z[t], old, fresh) for z, old, fresh in zip(zones, state, new, strict=True))
        if active is not None:
            new = tuple(torch.where(active[t], fresh, old) for old, fresh in zip(state, new, strict=True))
        ys.append(new[0])
        if extras.return_cells:
            cs.append(new[1])
        if watcher is not None:
            new = watcher.watch(t, new)
        elif extras.clip_state_grad_norm is not None:
            new = clip_norm(new, extras.clip_state_grad_norm)
        elif extras.clip_state_grad_value is not None:
            new = clip_value(new, extras.clip_state_grad_value)
        state = new
    y = torch.stack(ys)
    outputs = (y if active is None else y * active, *(s.unsqueeze(0) for s in state))
    return Looped(outputs + ((torch.stack(cs),) if cs else ()), None if watcher is None else watcher.norms)
