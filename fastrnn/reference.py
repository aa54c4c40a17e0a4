"""The equations in PyTorch: the truth that every kernel is tested against, and what runs where there is nothing else.

Two layers. First the cells: for each of them `forward`, `total` and `backward` of one step, pointwise, the W_hh
products left outside. Then one scan, forward and backward, generic over the cell; a backend that only has a faster
step (see `backends/extension.py`) passes its own `Step` and shares the loop.

    forward (gx, gh, state_prev)         -> state, saved        gx = W_ih x + b_ih     gh = W_hh h_prev + b_hh
    total   (saved, state_prev, dstate)  -> dstate, with the path from c to h inside the step added
    backward(saved, state_prev, dstate)  -> dgx, dgh, dstate_prev   (the W_hh path is the scan's)

Shapes: T steps, B batch, H hidden, P projection (else H), G gates. The arithmetic is float32 for the half types and
the input's own type otherwise (`accumulate_dtype`).

Sources: Hochreiter & Schmidhuber 1997 and Gers et al. 2000 (LSTM); Cho et al. 2014, in cuDNN's form with the reset gate
behind the product (GRU); Elman 1990 (RNN); Ba et al. 2016 (layer norm).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import CELLS, PAD, RESET, START

LN_EPS = 1e-5
LEAKY_SLOPE = 0.01


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and of carried states for tensors of `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


# ---------------------------------------------------------------------------------------------------------- cells


class LayerNorm(NamedTuple):
    """Weight and bias `[H]` of the layer norm on the LSTM's cell state inside the tanh."""

    weight: Tensor
    bias: Tensor


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x - mean) / std over the last dimension, and 1 / std `[..., 1]`: layer norm without weight and bias."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + LN_EPS)
    return centred * rstd, rstd


def normalize_backward(dxhat: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of `normalize`'s input, given that of its output."""
    return rstd * (dxhat - dxhat.mean(-1, keepdim=True) - xhat * (dxhat * xhat).mean(-1, keepdim=True))


def lstm_cell_state(saved: Tensor, c_prev: Tensor) -> Tensor:
    i, f, g, _ = saved.chunk(4, -1)
    return torch.sigmoid(f) * c_prev + torch.sigmoid(i) * torch.tanh(g)


def _lstm_tanh(c: Tensor, ln_c: LayerNorm | None) -> Tensor:
    return torch.tanh(c if ln_c is None else normalize(c)[0] * ln_c.weight + ln_c.bias)


def lstm_output(saved: Tensor, c: Tensor, ln_c: LayerNorm | None) -> Tensor:
    return torch.sigmoid(saved.chunk(4, -1)[3]) * _lstm_tanh(c, ln_c)


def lstm_output_backward(saved: Tensor, c: Tensor, dh: Tensor, ln_c: LayerNorm | None) -> Tensor:
    """dL/d(argument of the tanh)."""
    u = _lstm_tanh(c, ln_c)
    return dh * torch.sigmoid(saved.chunk(4, -1)[3]) * (1 - u * u)


def lstm_forward(gx: Tensor, gh: Tensor, state_prev, ln_c: LayerNorm | None = None):
    """i, f, o = sigmoid; g = tanh; c = f c_prev + i g; h = o tanh(LN(c))."""
    saved = gx + gh
    c = lstm_cell_state(saved, state_prev[1])
    return (lstm_output(saved, c, ln_c), c), saved


def lstm_total(saved: Tensor, state_prev, dstate, ln_c: LayerNorm | None = None):
    """dc + dh o (1 - tanh²(LN(c))) LN'(c): the whole dL/dc of the step."""
    dh, dc = dstate
    c = lstm_cell_state(saved, state_prev[1])
    du = lstm_output_backward(saved, c, dh, ln_c)
    if ln_c is not None:
        du = normalize_backward(du * ln_c.weight, *normalize(c))
    return dh, dc + du


def lstm_backward(saved: Tensor, state_prev, dstate, ln_c: LayerNorm | None = None, dsaved: Tensor | None = None):
    dh, dc = dstate
    c_prev = state_prev[1]
    i, f, g, o = saved.chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    u = _lstm_tanh(f * c_prev + i * g, ln_c)
    di = dc * g * i * (1 - i)
    df = dc * c_prev * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * u * o * (1 - o)
    dgates = torch.cat((di, df, dg, do), -1)
    if dsaved is not None:
        dgates = dgates + dsaved
    return dgates, dgates, (None, dc * f)


def gru_forward(gx: Tensor, gh: Tensor, state_prev, ln_c=None):
    """r, z = sigmoid; n = tanh(gx_n + r gh_n); h = n + z (h_prev - n)."""
    (gx_r, gx_z, gx_n), (gh_r, gh_z, gh_n) = gx.chunk(3, -1), gh.chunk(3, -1)
    r, z = gx_r + gh_r, gx_z + gh_z
    n = gx_n + torch.sigmoid(r) * gh_n
    out = torch.tanh(n)
    h = out + torch.sigmoid(z) * (state_prev[0] - out)
    return (h,), torch.cat((r, z, n, gh_n), -1)


def gru_backward(saved: Tensor, state_prev, dstate, ln_c=None, dsaved: Tensor | None = None):
    (dh,), (h_prev,) = dstate, state_prev
    r, z, n, gh_n = saved.chunk(4, -1)
    r, z, n = torch.sigmoid(r), torch.sigmoid(z), torch.tanh(n)
    extra = (0, 0, 0, 0) if dsaved is None else dsaved.chunk(4, -1)
    dn = dh * (1 - z) * (1 - n * n) + extra[2]
    dz = dh * (h_prev - n) * z * (1 - z) + extra[1]
    dr = dn * gh_n * r * (1 - r) + extra[0]
    return torch.cat((dr, dz, dn), -1), torch.cat((dr, dz, dn * r + extra[3]), -1), (dh * z,)


ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, LEAKY_SLOPE),
    "elu": F.elu,
}
SLOPES = {
    "tanh": lambda pre: 1 - torch.tanh(pre) ** 2,
    "relu": lambda pre: (pre > 0).to(pre.dtype),
    "leaky_relu": lambda pre: torch.where(pre > 0, torch.ones_like(pre), LEAKY_SLOPE),
    "elu": lambda pre: torch.exp(pre.clamp(max=0)),
}


def _rnn_functions(nonlinearity: str):
    activation, slope = ACTIVATIONS[nonlinearity], SLOPES[nonlinearity]

    def forward(gx: Tensor, gh: Tensor, state_prev, ln_c=None):
        """h = activation(gx + gh)."""
        saved = gx + gh
        return (activation(saved),), saved

    def backward(saved: Tensor, state_prev, dstate, ln_c=None, dsaved: Tensor | None = None):
        dpre = dstate[0] * slope(saved)
        if dsaved is not None:
            dpre = dpre + dsaved
        return dpre, dpre, (None,)

    return forward, _identity_total, backward


def _identity_total(saved: Tensor, state_prev, dstate, ln_c=None):
    return dstate


EQUATIONS = {
    "lstm": (lstm_forward, lstm_total, lstm_backward),
    "gru": (gru_forward, _identity_total, gru_backward),
    **{f"rnn_{name}": _rnn_functions(name) for name in ACTIVATIONS},
}


def row_norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension that neither overflows nor underflows. `[B, H] -> [B]`."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    # A zero row divides by one; an infinite or NaN row reports its own maximum.
    safe = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    norm = safe * torch.linalg.vector_norm(x / safe, dim=-1, keepdim=True)
    return torch.where(scale.isfinite(), norm, scale).squeeze(-1)


class Step:
    """One step of one cell: what a backend may replace while it shares the scan below."""

    def __init__(self, cell: str):
        self.forward, self.total, self.backward = EQUATIONS[cell]

    row_norm = staticmethod(row_norm)


# ----------------------------------------------------------------------------------------------------------- scan


class Masks(NamedTuple):
    """What happens to the states besides the cell; each None when it does not.

    flags: uint8 `[T, B]`, the bits of `cells.py`. recurrent: `[B, P]`, multiplies the operand of W_hh.
    zone_h `[T, B, P]`, zone_c `[T, B, H]`: the share of the previous state that is kept (0, 1, or the expectation).
    """

    flags: Tensor | None = None
    recurrent: Tensor | None = None
    zone_h: Tensor | None = None
    zone_c: Tensor | None = None


def _bit(flags: Tensor | None, bit: int) -> Tensor | None:
    """`[..., 1]` bool of one bit of the flags."""
    return None if flags is None else (flags & bit).bool().unsqueeze(-1)


def _by_step(flags: Tensor | None, bit: int, T: int, look: bool = True) -> list[Tensor | None]:
    """Per step the rows `[B, 1]` that carry the bit; None where none do, as far as one can look without waiting."""
    if flags is None:
        return [None] * T
    rows = _bit(flags, bit)
    if not look or flags.device.type != "cpu":
        return list(rows.unbind())
    return [row if some else None for row, some in zip(rows.unbind(), rows.flatten(1).any(1).tolist(), strict=True)]


def previous_state(states: Tensor, initial: Tensor, flags: Tensor | None, reverse: bool) -> Tensor:
    """The state before every step, `[T, B, H]`, from the states after it and the initial one `[B, H]`."""
    before = torch.cat((states[1:], initial[None]) if reverse else (initial[None], states[:-1]))
    if flags is not None:
        before = torch.where(_bit(flags, START), initial, before)
        before = torch.where(_bit(flags, RESET), torch.zeros_like(before), before)
    return before


def _order(T: int, reverse: bool):
    return range(T - 1, -1, -1) if reverse else range(T)


class _Rows:
    """A `[T, ...]` tensor written step by step: in place, or kept and stacked where autograd has to follow."""

    def __init__(self, T: int, dtype: torch.dtype, differentiable: bool = False):
        self.kept = [None] * T if differentiable else None
        self.T, self.dtype, self.written = T, dtype, None

    def __setitem__(self, t: int, row: Tensor):
        if self.kept is not None:
            self.kept[t] = row
            return
        if self.written is None:
            self.written = row.new_empty((self.T, *row.shape), dtype=self.dtype)
        self.written[t] = row

    def tensor(self) -> Tensor:
        return self.written if self.kept is None else torch.stack(self.kept).to(self.dtype)


def scan_forward(gx, w_hh, b_hh, h0, c0, w_hr, ln_hh, ln_c, masks: Masks, reverse: bool, save: bool, step: Step):
    """One layer in one direction. See `ops.scan_forward` for shapes and meaning."""
    T, acc = gx.shape[0], accumulate_dtype(gx.dtype)
    w_t = w_hh.to(acc).t()
    bias, ln_hh = (None if p is None else p.to(acc) for p in (b_hh, ln_hh))
    state = (h0,) if c0 is None else (h0, c0)
    has_c = c0 is not None
    y, c, saved = _Rows(T, gx.dtype), _Rows(T, acc), _Rows(T, gx.dtype)
    pad, reset = _by_step(masks.flags, PAD, T), _by_step(masks.flags, RESET, T)
    for t in _order(T, reverse):
        carried = state
        if reset[t] is not None:
            state = tuple(s.masked_fill(reset[t], 0) for s in state)
        operand = state[0].to(acc)
        if masks.recurrent is not None:
            operand = operand * masks.recurrent
        if ln_hh is not None:
            gh = F.layer_norm(operand @ w_t, ln_hh.shape, ln_hh, bias, LN_EPS)
        else:
            gh = operand @ w_t if bias is None else torch.addmm(bias, operand, w_t)
        new, saved_t = step.forward(gx[t], gh, (state[0].to(acc), *state[1:]), ln_c)
        if w_hr is not None:
            new = (new[0] @ w_hr.to(acc).t(), *new[1:])
        for k, zone in enumerate((masks.zone_h, masks.zone_c)[: len(new)]):
            if zone is not None:
                mixed = torch.lerp(new[k], state[k].to(acc), zone[t].to(acc))
                new = (*new[:k], mixed, *new[k + 1 :])
        new = (new[0].to(gx.dtype), *new[1:])
        if pad[t] is not None:
            new = tuple(torch.where(pad[t], old, fresh) for old, fresh in zip(carried, new, strict=True))
        state = new
        output = state if pad[t] is None else tuple(s.masked_fill(pad[t], 0) for s in state)
        y[t] = output[0]
        if save:
            saved[t] = saved_t
        if save and has_c:
            c[t] = output[1]
    return (
        y.tensor(),
        c.tensor() if has_c and save else gx.new_empty(0, dtype=acc),
        state[0].clone(),
        state[1].clone() if has_c else gx.new_empty(0, dtype=acc),
        saved.tensor() if save else gx.new_empty(0),
    )


def clip_scale(norms, threshold: Tensor) -> Tensor:
    """`[B, 1]`: min(1, threshold / joint norm). A NaN norm gives NaN, so that it stays visible."""
    joint = row_norm(torch.stack(norms, -1))
    return (threshold / torch.maximum(joint, threshold)).unsqueeze(-1)


def layer_norm_gradients(dgh: Tensor, gh_hat: Tensor) -> tuple[Tensor, Tensor]:
    """Of b_hh and of the layer norm before it, `[B, G*H]` acc each: of every sequence, over its steps."""
    return dgh.sum(0, dtype=gh_hat.dtype), (dgh * gh_hat).sum(0)


def layer_norm_c_gradients(dh_new, saved, c_prev, w_hr, ln_c: LayerNorm) -> tuple[Tensor, Tensor]:
    """Of weight and bias of the layer norm on c, `[B, H]` each: of every sequence, over its steps."""
    acc = c_prev.dtype
    saved, dh = saved.to(acc), dh_new.to(acc)
    c = lstm_cell_state(saved, c_prev)
    du = lstm_output_backward(saved, c, dh if w_hr is None else dh @ w_hr.to(acc), ln_c)
    return (du * normalize(c)[0]).sum(0), du.sum(0)


def scan_backward(
    dy, dc, dh_n, dc_n, dsaved, saved, y, c, h0, c0, w_hh, w_hr, ln_hh, ln_c,
    masks: Masks, clip_norm, clip_value, cell: str, reverse: bool, norms: bool, step: Step,
    differentiable: bool = False,
):  # fmt: skip
    """The reverse scan. See `ops.scan_backward` for shapes and meaning.

    `differentiable`: autograd shall be able to follow, in every float argument (norms excepted).
    """
    T, acc, spec = saved.shape[0], accumulate_dtype(saved.dtype), CELLS[cell]
    w, w_r = w_hh.to(acc), None if w_hr is None else w_hr.to(acc)
    # Of all cells only the GRU's backward reads h_prev; for the others y stands in its place.
    h_prev = previous_state(y, h0, masks.flags, reverse) if spec.split or ln_hh is not None else y
    c_prev = None if c0 is None else previous_state(c, c0, masks.flags, reverse)
    pad, reset = (_by_step(masks.flags, bit, T, look=not differentiable) for bit in (PAD, RESET))
    carry_h = torch.zeros_like(h0, dtype=acc) if dh_n is None else dh_n.to(acc)
    carry_c = None if c0 is None else (torch.zeros_like(c0) if dc_n is None else dc_n.to(acc))
    if ln_hh is not None:
        operand = h_prev.to(acc) if masks.recurrent is None else h_prev.to(acc) * masks.recurrent
        gh_hat, gh_rstd = normalize(operand @ w.t())
    dgx, dgh, dh_new, draw = (_Rows(T, saved.dtype, differentiable) for _ in range(4))
    report = saved.new_empty((2, len(spec.states), T, saved.shape[1]) if norms else 0, dtype=acc)

    for t in _order(T, not reverse):
        zone_h, zone_c = (None if z is None else z[t].to(acc) for z in (masks.zone_h, masks.zone_c))
        state_prev = (h_prev[t].to(acc),) if c_prev is None else (h_prev[t].to(acc), c_prev[t])
        saved_t = saved[t].to(acc)
        dh = carry_h if dy is None else carry_h + dy[t].to(acc)
        dcell = carry_c if dc is None or carry_c is None else carry_c + dc[t].to(acc)

        def through_cell(dh, dcell, t=t, zone_h=zone_h, zone_c=zone_c, saved_t=saved_t, state_prev=state_prev):
            """The gradients of the cell's own outputs, behind zoneout and projection, with `total` added."""
            fresh = dh if zone_h is None else dh * (1 - zone_h)
            cell_h = fresh if w_r is None else fresh @ w_r
            cell_c = dcell if zone_c is None else dcell * (1 - zone_c)
            dstate = (cell_h,) if dcell is None else (cell_h, cell_c)
            return fresh, step.total(saved_t, state_prev, dstate, ln_c)

        fresh, total = through_cell(dh, dcell)
        if norms:
            for k, (whole, carried) in enumerate(zip((dh, *total[1:]), (carry_h, carry_c), strict=False)):
                report[0, k, t], report[1, k, t] = step.row_norm(whole), step.row_norm(carried)
        if clip_value is not None:
            dh = dh.clamp(-clip_value, clip_value)
            dcell = None if dcell is None else dcell.clamp(-clip_value, clip_value)
            fresh, total = through_cell(dh, dcell)
        if clip_norm is not None:
            scale = clip_scale([step.row_norm(g) for g in (dh, *total[1:])], clip_norm.to(acc))
            dh, fresh, total = dh * scale, fresh * scale, tuple(g * scale for g in total)
            dcell = None if dcell is None else dcell * scale

        extra = () if dsaved is None else (dsaved[t].to(acc),)
        dgx_t, dgh_t, dprev = step.backward(saved_t, state_prev, total, ln_c, *extra)
        draw_t = dgh_t if ln_hh is None else normalize_backward(dgh_t * ln_hh, gh_hat[t], gh_rstd[t])
        back_h = draw_t @ w if masks.recurrent is None else (draw_t @ w) * masks.recurrent
        back_c = dprev[-1]
        if dprev[0] is not None:
            back_h = back_h + dprev[0]
        if zone_h is not None:
            back_h = back_h + dh * zone_h
        if zone_c is not None and dcell is not None:
            back_c = back_c + dcell * zone_c
        if reset[t] is not None:
            back_h = back_h.masked_fill(reset[t], 0)
            back_c = back_c if carry_c is None else back_c.masked_fill(reset[t], 0)
        if pad[t] is not None:
            back_h = torch.where(pad[t], carry_h, back_h)
            back_c = back_c if carry_c is None else torch.where(pad[t], carry_c, back_c)
            dgx_t, dgh_t, draw_t, fresh = (g.masked_fill(pad[t], 0) for g in (dgx_t, dgh_t, draw_t, fresh))
        carry_h, carry_c = back_h, None if carry_c is None else back_c
        dgx[t] = dgx_t
        if spec.split:
            dgh[t] = dgh_t
        if ln_hh is not None:
            draw[t] = draw_t
        if w_hr is not None or ln_c is not None:
            dh_new[t] = fresh

    dgx = dgx.tensor()
    dgh = dgh.tensor() if spec.split else saved.new_empty(0)
    db_hh, dln_hh, dln_c_weight, dln_c_bias = (saved.new_empty(0, dtype=acc) for _ in range(4))
    if ln_hh is not None:
        db_hh, dln_hh = layer_norm_gradients(dgh if spec.split else dgx, gh_hat)
        dgh = draw.tensor()
    if ln_c is not None:
        dln_c_weight, dln_c_bias = layer_norm_c_gradients(dh_new.tensor(), saved, c_prev, w_hr, ln_c)
    return (
        dgx,
        dgh,
        carry_h.to(h0.dtype),
        saved.new_empty(0, dtype=acc) if carry_c is None else carry_c,
        dh_new.tensor() if w_hr is not None else saved.new_empty(0),
        db_hh,
        dln_hh,
        dln_c_weight,
        dln_c_bias,
        report.masked_fill(_bit(masks.flags, PAD).squeeze(-1), 0) if norms and masks.flags is not None else report,
    )
