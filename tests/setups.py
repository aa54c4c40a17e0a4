"""What many tests set up: random arguments of a scan by name, every backend, agreement within a tolerance.

Sizes: T steps, B batch, H hidden, P projection (else H), G gates, S states.
"""

import pytest
import torch

from fastrnn.arguments import IncomingGradients, Kept, ScanInputs, ScanOutputs
from fastrnn.cells import CELLS, PAD, RESET, START
from fastrnn.dispatch import BACKENDS, Request
from fastrnn.equations import accumulate_dtype

# float64 keeps 16 digits; sums over fewer than 1e4 terms of order 1 in another order differ by some 1e-12.
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}

CPU_REASON = BACKENDS["cpu"].reason(Request("lstm", "cpu", torch.float64, 1, 1))
needs_cpu_library = pytest.mark.skipif(CPU_REASON is not None, reason=f"backend cpu: {CPU_REASON}")
every_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu_library)])
"""Every backend that runs on a CPU in every dtype."""
every_cell = pytest.mark.parametrize("cell", CELLS)

MASKS = ("flags", "recurrent_mask", "zone_h", "zone_c")
FEATURES = (*MASKS, "clip_norm", "layer_norm", "projection")


def make_flags(generator, T, B, reverse):
    """uint8 `[T, B]`: lengths (one zero if there is room, one full) and resets, for the direction of the walk."""
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0] = T
    if B > 2:
        lengths[-1] = 0
    t = torch.arange(T)[:, None]
    flags = PAD * (t >= lengths) + RESET * (torch.rand(T, B, generator=generator) < 0.25)
    if reverse:
        flags += START * (t == lengths - 1)
    return flags.to(torch.uint8)


def random_inputs(
    cell, features=(), *, sizes, projection=None, reverse=False, dtype=torch.float64, device="cpu", bias=True, seed=0
) -> ScanInputs:
    """Random arguments of one direction. features: out of FEATURES; zone_c, projection only where the cell has a c.

    sizes: (T, B, H). projection: P; H // 2, rounded up, unless given.
    """
    (T, B, H), spec, generator = sizes, CELLS[cell], torch.Generator().manual_seed(seed)
    G, acc, others = len(spec.gates) * H, accumulate_dtype(dtype), len(spec.states) - 1
    P = (projection or (H + 1) // 2) if "projection" in features and "c" in spec.states else H
    norm, norm_c = "layer_norm" in features, "layer_norm" in features and "c" in spec.states

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def zone(width):  # 0, 0.1, ... 1: kept, mixed and new states
        return torch.rand(T, B, width, generator=generator).round(decimals=1).to(device, dtype)

    keep = (torch.rand(B, P, generator=generator) < 0.5).to(device, dtype)
    return ScanInputs(
        gx=randn(T, B, G),
        w_hh=randn(G, P) / P**0.5,
        h0=randn(B, P),
        c0=randn(B, others * H, dtype=acc) if others else None,
        b_hh=randn(G) if bias else None,
        w_hr=randn(P, H) / H**0.5 if P != H else None,
        ln_hh=1 + 0.3 * randn(G) if norm else None,
        ln_c_weight=1 + 0.3 * randn(H) if norm_c else None,
        ln_c_bias=0.3 * randn(H) if norm_c else None,
        flags=make_flags(generator, T, B, reverse).to(device) if "flags" in features else None,
        recurrent_mask=2 * keep if "recurrent_mask" in features else None,
        zone_h=zone(P) if "zone_h" in features else None,
        zone_c=zone(others * H) if "zone_c" in features and others else None,
        # A bound that some of the gradients of `random_incoming` exceed.
        clip_norm=torch.tensor(0.9 * H**0.5, dtype=acc, device=device) if "clip_norm" in features else None,
    )


def random_incoming(inputs: ScanInputs, *, scale=1.0, seed=1) -> IncomingGradients:
    """Random gradients of the outputs of a scan over `inputs`."""
    generator, h0, c0 = torch.Generator().manual_seed(seed), inputs.h0, inputs.c0
    steps = inputs.gx.shape[:-1]

    def randn(like, *shape):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(like.device, like.dtype)

    return IncomingGradients(
        dy=randn(h0, *steps, h0.shape[-1]),
        dc=None if c0 is None else randn(c0, *steps, c0.shape[-1]),
        dh_n=randn(h0, *h0.shape),
        dc_n=None if c0 is None else randn(c0, *c0.shape),
    )


def kept_of(outputs: ScanOutputs) -> Kept:
    """What the backward reads; an empty tensor, which a raw op gives, is None here."""
    return Kept(outputs.y, outputs.c if outputs.c is not None and outputs.c.dim() > 1 else None, outputs.saved)


def floats_as(named, dtype):
    """A named tuple whose floating tensors have another dtype."""
    return named._make(x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in named)


def agree(got, expected, **tolerance):
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, b, **(tolerance or DOUBLE), msg=lambda m, k=k: f"value {k}: {m}")
