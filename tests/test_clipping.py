"""Clipping of the states' gradients against a hand-written backward, step by step."""

import pytest
import torch
from by_hand import B, T, hand_step, scan_arguments
from setups import MASKS, H, I, agree, every_backend, every_kind, make, random

import fastrnn
from fastrnn.arguments import ScanInputs, Walk
from fastrnn.cell_table import CELLS, RESET
from fastrnn.scan import scan

WEIGHTS = ("w_hh", "b_hh", "w_hr", "ln_hh", "ln_c_weight", "ln_c_bias")


def clipped_by_hand(cell, inputs, reverse, dy, theta, value):
    """The gradients by name, one hand-written step at a time: clamp, scale the joint norm, pass on."""
    order = list(range(T - 1, -1, -1) if reverse else range(T))
    inputs = ScanInputs(*(x if x is None else x.detach() for x in inputs))
    weights = {n: getattr(inputs, n).requires_grad_() for n in WEIGHTS if getattr(inputs, n) is not None}
    records, h, c = {}, inputs.h0, inputs.c0
    for t in order:
        reset = torch.zeros(B, 1, dtype=torch.bool)
        if inputs.flags is not None:
            reset = (inputs.flags[t] & RESET).bool().unsqueeze(-1)
        h, c = (None if s is None else s.detach().requires_grad_() for s in (h, c))
        g = inputs.gx[t].clone().requires_grad_()
        start = [None if s is None else torch.where(reset, 0.0, s) for s in (h, c)]
        new_h, new_c, inner = hand_step(cell, g, *start, inputs, t)
        records[t] = (g, h, c, new_h, new_c, inner)
        h, c = new_h, new_c
    dh, dc = torch.zeros_like(h), None if c is None else torch.zeros_like(c)
    dgx = torch.zeros_like(inputs.gx)
    dweights = {n: torch.zeros_like(w) for n, w in weights.items()}
    for t in reversed(order):
        g, h, c, new_h, new_c, inner = records[t]
        dh = dh + dy[t]
        if value is not None:
            dh = dh.clamp(-value, value)
            dc = None if dc is None else dc.clamp(-value, value)
        if theta is not None:
            parts = [dh]
            if dc is not None:  # the whole dL/dc: from the next step, and through this step's h
                parts.append(dc + torch.autograd.grad(new_h, inner, dh, retain_graph=True)[0])
            n = torch.cat(parts, -1).norm(dim=-1, keepdim=True)
            scale = torch.where(n > theta, theta / n, 1.0)
            dh, dc = dh * scale, None if dc is None else dc * scale
        ends = [(new_h, dh)] + ([] if dc is None else [(new_c, dc)])
        leaves = [v for v in (g, h, c, *weights.values()) if v is not None]
        outputs, cotangents = zip(*ends, strict=True)
        found = iter(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True))
        dgx[t], dh = next(found), next(found)
        dc = None if c is None else next(found)
        for name in weights:
            if (more := next(found)) is not None:
                dweights[name] += more
    states = {"h0": dh} if dc is None else {"h0": dh, "c0": dc}
    return {"gx": dgx, **states, **dweights}


CLIP_FEATURES = [(), ("layer_norm",), ("projection",)]
CLIP_CASES = [
    pytest.param(cell, f, id="-".join((cell, *f)))
    for cell in CELLS
    for f in CLIP_FEATURES
    if cell == "lstm" or f != ("projection",)
]


@every_backend
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("theta, value", [(0.7, None), (None, 0.3), (1.2, 0.4)], ids=["norm", "value", "both"])
@pytest.mark.parametrize("cell, features", CLIP_CASES)
def test_clipping_equals_a_hand_written_backward(cell, features, theta, value, reverse, backend):
    inputs = scan_arguments(cell, torch.float64, (*features, "flags"), reverse)
    inputs = inputs._replace(flags=inputs.flags & RESET)  # test_lengths.py has padding
    leaves = [v.requires_grad_() for n, v in inputs._asdict().items() if v is not None and n not in MASKS]
    bound = None if theta is None else torch.tensor(theta, dtype=torch.float64)
    out = scan(inputs._replace(clip_norm=bound), Walk(cell, reverse, backend, clip_value=value))
    dy = random(*out.y.shape, seed=9).detach()
    got = torch.autograd.grad(out.y, leaves, dy)
    expected = clipped_by_hand(cell, inputs, reverse, dy, theta, value)
    agree(got, [expected[n] for n, v in inputs._asdict().items() if v is not None and n not in MASKS])
    free = scan(inputs, Walk(cell, reverse, backend))
    plain = torch.autograd.grad(free.y, leaves, dy)
    assert not torch.allclose(plain[0], got[0]), "the bound must clip something, or the test shows nothing"
    assert torch.equal(out.y, free.y), "clipping leaves the forward alone"


@every_backend
@every_kind
def test_clip_bounds_as_float_and_as_tensor(kind, backend):
    """A float, a 0-d tensor of any float dtype, and AMP's scaling: S times loss and bound give S times the gradient."""
    x, S = random(T, B, I), 64.0

    def found(bound, loss_scale=1.0):
        ours = make(kind, backend, num_layers=2, clip_state_grad_norm=bound)
        y, _ = ours(x)
        return torch.autograd.grad((y.square().sum()) * loss_scale, (x, *ours.parameters()))

    expected = found(0.25)
    agree(found(torch.tensor(0.25)), expected)
    agree(found(torch.tensor(0.25, dtype=torch.float64)), expected)
    agree([g / S for g in found(torch.tensor(0.25 * S), S)], expected)
    unbounded = found(None)
    agree(found(1e30), unbounded)
    assert not torch.allclose(expected[0], unbounded[0])


@every_backend
def test_clipping_bounds_the_norms_that_the_next_step_receives(backend):
    """An exploding linear network (W = 2 I): every dL/dx_t has the norm of the bound."""
    ours = fastrnn.RNN(H, H, nonlinearity="relu", bias=False, clip_state_grad_norm=1.5, backend=backend)
    with torch.no_grad():
        ours.weight_ih_l0.copy_(torch.eye(H))
        ours.weight_hh_l0.copy_(2 * torch.eye(H))
    x = torch.ones(T, B, H, requires_grad=True)
    ours(x)[0][-1].sum().backward()
    # float32: one square root and one division, 1e-6 relative
    torch.testing.assert_close(x.grad.norm(dim=-1), torch.full((T, B), 1.5), rtol=1e-6, atol=0)


@every_backend
def test_nan_stays_nan_through_clipping(backend):
    ours = make("LSTM", backend, clip_state_grad_norm=1.0, clip_state_grad_value=1.0)
    x = random(T, B, I)
    dy = torch.zeros(T, B, H, dtype=torch.float64)
    dy[-1, 1, 0] = float("nan")
    (dx,) = torch.autograd.grad(ours(x)[0], x, dy)
    assert dx[:, 1].isnan().all(), "it stays visible"
    assert not dx[:, [0, 2, 3]].isnan().any(), "and in its own sample"
