"""The equations once more, from the papers and not from the library: differentiation is left to autograd."""

import pytest
import torch
import torch.nn.functional as F
from setups import H, random_inputs

from fastrnn.arguments import ScanInputs
from fastrnn.cell_table import CELLS, PAD, RESET, START

T, B = 7, 4


def scan_arguments(cell, dtype, features, reverse):
    """Random arguments of one direction; the flags have every bit."""
    inputs = random_inputs(cell, features, sizes=(T, B, H), projection=3, reverse=reverse, dtype=dtype, seed=4)
    if "flags" in features:
        flags = torch.zeros(T, B, dtype=torch.uint8)
        flags[3, 0] = flags[5, 1] = flags[0, 2] = RESET
        flags[5:, 3] = PAD
        if reverse:
            flags[4, 3] = START
        inputs = inputs._replace(flags=flags)
    return inputs


def features_of(cell):
    zone = ("zone_h", "zone_c")
    names = [(), ("flags",), (*zone, "recurrent_mask"), ("layer_norm",)]
    return [*names, ("projection",), ("projection", "layer_norm", "flags", *zone)] if cell == "lstm" else names


CASES = [pytest.param(cell, f, id="-".join((cell, *f))) for cell in CELLS for f in features_of(cell)]


def hand_step(cell, gx, h, c, inputs, t):
    """One step as in the papers: the new (h, c), and the c inside the tanh, all in autograd's graph."""
    w_hr, ln_c = inputs.w_hr, inputs.ln_c_weight
    operand = h if inputs.recurrent_mask is None else h * inputs.recurrent_mask
    gh = operand @ inputs.w_hh.t()
    if inputs.ln_hh is not None:
        gh = F.layer_norm(gh, gh.shape[-1:], inputs.ln_hh, None, 1e-5)
    if inputs.b_hh is not None:
        gh = gh + inputs.b_hh
    inner = None
    if cell == "lstm":
        i, f, g, o = (gx + gh).split(H, -1)
        inner = f.sigmoid() * c + i.sigmoid() * g.tanh()
        squashed = inner if ln_c is None else F.layer_norm(inner, (H,), ln_c, inputs.ln_c_bias, 1e-5)
        new_h, new_c = o.sigmoid() * squashed.tanh(), inner
        if w_hr is not None:
            new_h = new_h @ w_hr.t()
    elif cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = gx.split(H, -1), gh.split(H, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        new_h, new_c = (1 - z) * (xn + r * hn).tanh() + z * h, c
    else:
        squash = {"tanh": torch.tanh, "relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu}
        new_h, new_c = squash[cell.removeprefix("rnn_")](gx + gh), c
    if inputs.zone_h is not None:
        new_h = inputs.zone_h[t] * h + (1 - inputs.zone_h[t]) * new_h
    if inputs.zone_c is not None:
        new_c = inputs.zone_c[t] * c + (1 - inputs.zone_c[t]) * new_c
    return new_h, new_c, inner


def hand_inputs(params, name, gx, h, c):
    """The arguments of `hand_scan` for the layer and direction `name` of a module's parameters."""
    kinds = dict(w_hh="weight_hh", b_hh="bias_hh", w_hr="weight_hr", ln_hh="ln_hh", ln_c_weight="ln_c")
    given = {field: params.get(f"{kind}_{name}") for field, kind in kinds.items()}
    return ScanInputs(gx=gx, h0=h, c0=c, ln_c_bias=params.get(f"ln_c_bias_{name}"), **given)


def hand_scan(cell, inputs, reverse):
    """y, every c, h_n, c_n."""
    h, c, ys, cs = inputs.h0, inputs.c0, {}, {}
    for t in range(T - 1, -1, -1) if reverse else range(T):
        reset = pad = torch.zeros(B, 1, dtype=torch.bool)
        if inputs.flags is not None:
            reset, pad = ((inputs.flags[t] & bit).bool().unsqueeze(-1) for bit in (RESET, PAD))
        start_h = torch.where(reset, 0.0, h)
        start_c = None if c is None else torch.where(reset, 0.0, c)
        new_h, new_c, _ = hand_step(cell, inputs.gx[t], start_h, start_c, inputs, t)
        h = torch.where(pad, h, new_h)
        ys[t] = torch.where(pad, 0.0, h)
        if c is not None:
            c = torch.where(pad, c, new_c)
            cs[t] = torch.where(pad, 0.0, c)
    ys, cs = (torch.stack([found[t] for t in range(T)]) if found else None for found in (ys, cs))
    return ys, cs, h, c
