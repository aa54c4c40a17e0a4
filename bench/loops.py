"""The loop that users write today where torch.nn's fused kernels lack a feature: one turn of Python per step.

It comes in two styles, each the way a careful user would write it: "ops" computes the input's product for all steps at
once and the cell in plain operations; "cells" calls torch.nn's cell, which on a GPU fuses the pointwise part. Masks are
drawn for the whole sequence at once, by the same calls in the same order as fastrnn's, so one seed gives one result.

Shapes: T steps, B batch, I input, H hidden, P projection (else H), L layers, D directions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Tensor]  # of one layer and direction, by torch.nn's names without their suffix: weight_ih, ...
State = tuple[Tensor, ...]  # h [B, P], and for the LSTM c [B, H]
Step = Callable[[Tensor, Tensor, State], State]  # (input of the step, operand of W_hh, state) -> state

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "leaky_relu": F.leaky_relu, "elu": F.elu}


# ------------------------------------------------------------------------------------------------------- the cells


def lstm_ops(p: Params) -> Step:
    w, w_hr = p["weight_hh"].t(), p.get("weight_hr")

    def step(gx, operand, state):
        i, f, g, o = torch.addmm(gx, operand, w).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if w_hr is None else F.linear(h, w_hr)), c

    return step


def layer_norm_lstm_ops(p: Params) -> Step:
    w, ln, shift = p["weight_hh"], p["ln_hh"], p["bias_hh"]
    ln_c, ln_c_bias = p["ln_c"], p["ln_c_bias"]

    def step(gx, operand, state):
        i, f, g, o = (gx + F.layer_norm(F.linear(operand, w), ln.shape, ln, shift)).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(F.layer_norm(c, ln_c.shape, ln_c, ln_c_bias)), c

    return step


def gru_ops(p: Params) -> Step:
    w, bias = p["weight_hh"], p["bias_hh"]
    H = w.shape[1]

    def step(gx, operand, state):
        gx_rz, gx_n = gx.split((2 * H, H), -1)
        gh_rz, gh_n = F.linear(operand, w, bias).split((2 * H, H), -1)
        r, z = torch.sigmoid(gx_rz + gh_rz).chunk(2, -1)
        return (torch.lerp(torch.tanh(gx_n + r * gh_n), state[0], z),)

    return step


def rnn_ops(activation: Callable[[Tensor], Tensor]) -> Callable[[Params], Step]:
    def build(p: Params) -> Step:
        w = p["weight_hh"].t()
        return lambda gx, operand, state: (activation(torch.addmm(gx, operand, w)),)

    return build


def input_product(cell: str, p: Params, x: Tensor) -> Tensor:
    """The input's part of the gates of all steps: `[T, B, G*H]`."""
    if "ln_ih" in p:
        ln = p["ln_ih"]
        return F.layer_norm(F.linear(x, p["weight_ih"]), ln.shape, ln, p["bias_ih"])
    bias = p["bias_ih"] if cell == "gru" else p["bias_ih"] + p["bias_hh"]
    return F.linear(x, p["weight_ih"], bias)


def torch_cell(cell: str, p: Params) -> Step:
    """torch.nn's cell on these weights."""
    kind, _, nonlinearity = cell.partition("_")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    module = getattr(nn, f"{kind.upper()}Cell")(
        p["weight_ih"].shape[1], p["weight_hh"].shape[1], device="meta", **options
    )
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        delattr(module, name)  # a dropped-out weight is no Parameter
        setattr(module, name, p[name])
    if cell == "lstm":
        return lambda x, operand, state: module(x, (operand, state[1]))
    return lambda x, operand, state: (module(x, operand),)


OPS = {
    "lstm": lstm_ops,
    "gru": gru_ops,
    **{f"rnn_{name}": rnn_ops(activation) for name, activation in ACTIVATIONS.items()},
}


# -------------------------------------------------------------------------------------------------- the gradients


class Norms:
    """Hooks that keep every step's dL/dh and dL/dc, total and carried; their norms are taken together at the end."""

    def __init__(self, T: int):
        self.gradients: dict[tuple[int, int], dict[int, Tensor]] = {}  # (total or carried, state) -> by step
        self.T = T

    def _keep(self, row: int, k: int, t: int, state: Tensor) -> None:
        kept = self.gradients.setdefault((row, k), {})
        state.register_hook(lambda gradient: kept.__setitem__(t, gradient))

    def watch(self, t: int, state: State) -> State:
        """The state in the form that the next step must take."""
        onward = tuple(s.view_as(s) for s in state)
        for k, (total, carried) in enumerate(zip(state, onward, strict=True)):
            self._keep(0, k, t, total)
            self._keep(1, k, t, carried)
        return onward

    def norms(self) -> Tensor:
        """`[2, S, T, B]`: total and carried, as in one layer and direction of fastrnn's tap."""
        states = 1 + max(k for _, k in self.gradients)

        def norm(row: int, k: int) -> Tensor:
            kept = self.gradients[row, k]
            zero = torch.zeros_like(next(iter(kept.values())))
            dtype = torch.promote_types(zero.dtype, torch.float32)
            return torch.stack([kept.get(t, zero) for t in range(self.T)]).to(dtype).norm(dim=-1)

        return torch.stack([torch.stack([norm(row, k) for k in range(states)]) for row in (0, 1)])


def clip_norm(state: State, bound: float) -> None:
    """Scales dL/dh, and dL/dc on its own, of every sample down to `bound`."""
    for s in state:
        s.register_hook(lambda g: g * (bound / g.norm(dim=-1, keepdim=True)).clamp(max=1))


def clip_value(state: State, bound: float) -> State:
    """Clamps every element of dL/dh, and of the dL/dc that the next step sends back; not beside a tap."""
    onward = (state[0], *(s.view_as(s) for s in state[1:]))
    for s in onward:
        s.register_hook(lambda g: g.clamp(-bound, bound))
    return onward


# --------------------------------------------------------------------------------------------------------- the loop


def _dropout(x: Tensor, p: float, mask_dtype: torch.dtype) -> Tensor:
    if x.dtype == mask_dtype:
        return F.dropout(x, p)
    return x * F.dropout(torch.ones_like(x, dtype=mask_dtype), p)


class Walk(NamedTuple):
    """One layer in one direction. `cell`: torch.nn's, made once, in the style "cells" where the weights stay."""

    params: Params
    reverse: bool
    cell: Step | None


def _walk(problem, style: str, walk: Walk, x: Tensor):
    """y and c of every step over `x [T, B, .]` from zero states, the last state, and the norms.

    Masks are drawn in the dtype of the case, so that a run in float64 sees the same ones.
    """
    cell, option, mask_dtype, p = problem.case.cell, problem.options.get, problem.case.dtype, walk.params
    T, B, _ = x.shape
    if option("weight_dropout"):
        p = p | {"weight_hh": _dropout(p["weight_hh"], option("weight_dropout"), mask_dtype)}
    if style == "cells":
        step, steps = walk.cell or torch_cell(cell, p), x.unbind(0)
    else:
        step = (layer_norm_lstm_ops if "ln_hh" in p else OPS[cell])(p)
        steps = input_product(cell, p, x).unbind(0)
    rows, size = p["weight_hh"].shape
    state = (x.new_zeros(B, size), *([x.new_zeros(B, rows // 4)] if cell == "lstm" else []))
    mask = zones = active = kept = watcher = None
    if option("recurrent_dropout"):
        mask = _dropout(torch.ones_like(state[0]), option("recurrent_dropout"), mask_dtype)
    if option("zoneout"):
        chance = torch.full((), option("zoneout"), dtype=mask_dtype, device=x.device)
        zones = [torch.bernoulli(chance.expand(T, *s.shape)).bool() for s in state]
    if problem.lengths is not None:
        active = (torch.arange(T, device=x.device).unsqueeze(1) < problem.lengths).unsqueeze(-1)
    if problem.reset_mask is not None:
        kept = (~problem.reset_mask).to(x.dtype).unsqueeze(-1).unbind(0)
    if "tap" in problem.case.call:
        watcher = Norms(T)
    norm_bound, value_bound = option("clip_state_grad_norm"), option("clip_state_grad_value")
    ys, cs = {}, {}
    for t in reversed(range(T)) if walk.reverse else range(T):
        if kept is not None:
            state = tuple(s * kept[t] for s in state)
        new = step(steps[t], state[0] if mask is None else state[0] * mask, state)
        if zones is not None:
            new = tuple(torch.where(z[t], old, s) for z, old, s in zip(zones, state, new, strict=True))
        if active is not None:
            new = tuple(torch.where(active[t], s, old) for old, s in zip(state, new, strict=True))
        ys[t], cs[t] = new[0], new[-1]
        state = new if watcher is None else watcher.watch(t, new)
        if norm_bound is not None:
            clip_norm(new, norm_bound)
        if value_bound is not None:
            state = clip_value(state, value_bound)
    y = torch.stack([ys[t] for t in range(T)])
    return y if active is None else y * active, cs, state, watcher


def build(problem, style: str) -> Callable[[Tensor], tuple[tuple[Tensor, ...], Callable[[], Tensor] | None]]:
    """A problem's network as a function of `x [T, B, I]`; lengths and resets are for the forward direction only.

    The function returns y `[T, B, D*P]`, h_n and c_n `[L*D, B, .]`, and where it is asked for c `[T, B, H]` of every
    step; and a function that returns the norms after the backward, or None.
    """
    case, layers = problem.case, []
    for layer in range(case.num_layers):
        layers.append([])
        for reverse in (False, True)[: 1 + case.bidirectional]:
            suffix = f"_l{layer}" + "_reverse" * reverse
            p = {name.removesuffix(suffix): v for name, v in problem.parameters.items() if name.endswith(suffix)}
            made_once = style == "cells" and not problem.options.get("weight_dropout")
            layers[-1].append(Walk(p, reverse, torch_cell(case.cell, p) if made_once else None))

    def run(x):
        final, watchers = [], []
        for walks in layers:
            ys, cs, states, watched = zip(*(_walk(problem, style, walk, x) for walk in walks), strict=True)
            final += states
            watchers += watched
            x = torch.cat(ys, -1) if len(ys) > 1 else ys[0]
        outputs = (x, *map(torch.stack, zip(*final, strict=True)))
        if "return_cells" in case.call:
            outputs += (torch.stack([cs[0][t] for t in range(case.T)]),)
        return outputs, None if watchers[0] is None else lambda: torch.stack([w.norms() for w in watchers])

    return run
