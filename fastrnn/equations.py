"""The equations of the built-in cells in PyTorch: one step, pointwise; the W_hh products are left to the scan.

    forward (gx, gh, state_prev)         -> state, saved        gx = W_ih x + b_ih     gh = W_hh h_prev + b_hh
    total   (saved, state_prev, dstate)  -> dstate, with the path from c to h inside the step added
    backward(saved, state_prev, dstate)  -> dgx, dgh, dstate_prev   (without the path through W_hh)

The same three functions, in the same order, are in `kernels/cells.py` and `csrc/cells/`; tests/test_cells.py compares
them. Shapes: B batch, H hidden, G gates, K saved planes: gx, gh `[B, G*H]`, saved `[B, K*H]`, states `[B, H]`.
The arithmetic is float32 for the half types and the input's own dtype otherwise (`accumulate_dtype`).

Sources: Hochreiter & Schmidhuber 1997 and Gers et al. 2000 (LSTM); Cho et al. 2014, in cuDNN's form, where the reset
gate multiplies the product (GRU); Elman 1990 (RNN); Ba et al. 2016 (layer norm).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .adjoint import saved_backward
from .cell_table import CellSpec, spec_of
from .program import run

LN_EPS = 1e-5
"""What layer norm adds to the variance, unless it is told otherwise."""
LEAKY_SLOPE = 0.01


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and of carried states for tensors of `dtype`."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Equations(NamedTuple):
    """The functions of one cell; their arguments are described at the top of this file."""

    forward: Callable
    total: Callable  # the identity unless one state feeds another within the step
    backward: Callable  # takes dsaved, the gradient of `saved` itself, as a last argument under create_graph


class Beside(NamedTuple):
    """What a user's cell reads beside its gates and states, in place of the LSTM's layer norm."""

    parameters: tuple[Tensor, ...]  # [H] each
    inputs: tuple[Tensor, ...]  # [B, H] each: of this step


class LayerNorm(NamedTuple):
    """Weight and bias `[H]` of the layer norm on the LSTM's cell state: inside the tanh, or on the state itself."""

    weight: Tensor
    bias: Tensor
    eps: float = LN_EPS
    carried: bool = False


def normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / std over the last dimension, and 1 / std `[..., 1]`: layer norm without weight and bias."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def normalize_backward(dxhat: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of `normalize`'s input from that of its output."""
    return rstd * (dxhat - dxhat.mean(-1, keepdim=True) - xhat * (dxhat * xhat).mean(-1, keepdim=True))


def lstm_cell_state(saved: Tensor, c_prev: Tensor) -> Tensor:
    i, f, g, _ = saved.chunk(4, -1)
    return torch.sigmoid(f) * c_prev + torch.sigmoid(i) * torch.tanh(g)


def _lstm_tanh(c: Tensor, ln_c: LayerNorm | None) -> Tensor:
    return torch.tanh(c if ln_c is None else normalize(c, ln_c.eps)[0] * ln_c.weight + ln_c.bias)


def lstm_carried(c: Tensor, ln_c: LayerNorm | None) -> tuple[Tensor, LayerNorm | None]:
    """The state that the cell carries on, from the c of `lstm_cell_state`; and the layer norm left for the tanh."""
    if ln_c is None or not ln_c.carried:
        return c, ln_c
    return normalize(c, ln_c.eps)[0] * ln_c.weight + ln_c.bias, None


def lstm_output(saved: Tensor, c: Tensor, ln_c: LayerNorm | None) -> Tensor:
    return torch.sigmoid(saved.chunk(4, -1)[3]) * _lstm_tanh(c, ln_c)


def lstm_output_backward(saved: Tensor, c: Tensor, dh: Tensor, ln_c: LayerNorm | None) -> Tensor:
    """dL/d(argument of the tanh)."""
    u = _lstm_tanh(c, ln_c)
    return dh * torch.sigmoid(saved.chunk(4, -1)[3]) * (1 - u * u)


def lstm_forward(gx: Tensor, gh: Tensor, state_prev, ln_c: LayerNorm | None = None):
    """i, f, o = sigmoid; g = tanh; c = f c_prev + i g; h = o tanh(LN(c)). Carried: c = LN(f c_prev + i g)."""
    saved = gx + gh
    c, inside = lstm_carried(lstm_cell_state(saved, state_prev[1]), ln_c)
    return (lstm_output(saved, c, inside), c), saved


def lstm_total(saved: Tensor, state_prev, dstate, ln_c: LayerNorm | None = None):
    """dc + dh o (1 - tanh²(LN(c))) LN'(c): the whole dL/dc of the step."""
    dh, dc = dstate
    c, inside = lstm_carried(lstm_cell_state(saved, state_prev[1]), ln_c)
    du = lstm_output_backward(saved, c, dh, inside)
    if inside is not None:
        du = normalize_backward(du * inside.weight, *normalize(c, inside.eps))
    return dh, dc + du


def lstm_backward(saved: Tensor, state_prev, dstate, ln_c: LayerNorm | None = None, dsaved: Tensor | None = None):
    dh, dc = dstate
    c_prev = state_prev[1]
    i, f, g, o = saved.chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    unnormalized = f * c_prev + i * g
    u = _lstm_tanh(*lstm_carried(unnormalized, ln_c))
    if ln_c is not None and ln_c.carried:
        dc = normalize_backward(dc * ln_c.weight, *normalize(unnormalized, ln_c.eps))
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


def _rnn_equations(nonlinearity: str) -> Equations:
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

    return Equations(forward, _identity_total, backward)


def _identity_total(saved: Tensor, state_prev, dstate, ln_c=None):
    return dstate


EQUATIONS: dict[str, Equations] = {
    "lstm": Equations(lstm_forward, lstm_total, lstm_backward),
    "gru": Equations(gru_forward, _identity_total, gru_backward),
    **{f"rnn_{name}": _rnn_equations(name) for name in ACTIVATIONS},
}


def equations_of(cell: str) -> Equations:
    """The equations of a built-in cell, or those that run the program of a user's cell.

    There the fourth argument is a `Beside`, gh is None where the cell is not recurrent, and `backward` returns a fourth
    result: the gradients of the cell's parameters, at this step, and of its inputs, side by side `[B, (Q+N)*H]`.
    """
    found = EQUATIONS.get(cell)
    return _program_equations(spec_of(cell)) if found is None else found


def _program_equations(spec: CellSpec) -> Equations:
    G, S, K = len(spec.gates), len(spec.states), len(spec.saved)

    def forward(gx: Tensor, gh: Tensor | None, state_prev, beside: Beside):
        state_prev = tuple(state_prev)
        acc = state_prev[0].dtype
        gates = gx.to(acc).chunk(G, -1) + (() if gh is None else gh.chunk(G, -1))
        found = run(spec.program.forward, (*gates, *state_prev, *beside.parameters, *beside.inputs))
        return tuple(found[:S]), torch.cat(found[S:], -1)

    def total(saved: Tensor, state_prev, dstate, beside: Beside):
        planes = (*saved.chunk(K, -1), *state_prev, *dstate, *beside.parameters, *beside.inputs)
        return tuple(run(spec.program.total, planes))

    def backward(saved: Tensor, state_prev, dstate, beside: Beside, dsaved: Tensor | None = None):
        before, after = (*saved.chunk(K, -1), *state_prev), (*beside.parameters, *beside.inputs)
        found = run(spec.program.backward, (*before, *dstate, *after))
        if dsaved is not None:
            more = run(saved_backward(spec), (*before, *dsaved.chunk(K, -1), *after))
            found = [a + b for a, b in zip(found, more, strict=True)]
        D = G * (1 + spec.distinct_dgh)
        dgx, dprev, dcell = torch.cat(found[:G], -1), tuple(found[D : D + S]), found[D + S :]
        dgh = torch.cat(found[G:D], -1) if spec.distinct_dgh else dgx
        return dgx, dgh, dprev, torch.cat(dcell, -1) if dcell else None

    return Equations(forward, total, backward)


def row_norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension that neither overflows nor underflows. `[B, H] -> [B]`."""
    scale = x.detach().abs().amax(-1, keepdim=True)
    # A zero row divides by one; an infinite or NaN row reports its own maximum.
    safe = torch.where((scale > 0) & scale.isfinite(), scale, torch.ones_like(scale))
    norm = safe * torch.linalg.vector_norm(x / safe, dim=-1, keepdim=True)
    return torch.where(scale.isfinite(), norm, scale).squeeze(-1)
