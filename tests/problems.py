"""Random calls of the scan, for the tests of its kernels, and how their results are compared."""

import copy

import torch

from fastrnn.arguments import IncomingGradients, Kept, ScanGradients, ScanInputs, ScanOutputs, Walk, has_directions
from fastrnn.backends import reference
from fastrnn.backends import triton as launcher
from fastrnn.cells import CELLS, PAD, RESET, START
from fastrnn.directions import each_direction

T, B, H = 3, 3, 17
# Against float64: float32 sums of at most 4 * 130 products of order one, over few steps, each to 2**-24.
FLOAT32 = 2e-5


def make_flags(generator, T, B, reverse):
    """Lengths (one of them zero if there is room, one full) and resets, for the direction in which the scan walks."""
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0] = T
    if B > 2:
        lengths[-1] = 0
    t = torch.arange(T)[:, None]
    flags = PAD * (t >= lengths) + RESET * (torch.rand(T, B, generator=generator) < 0.25)
    if reverse:
        flags += START * (t == lengths - 1)
    return flags.to(torch.uint8)


class Problem:
    """Random arguments of one forward and one backward call. `extras`: names of what goes beyond the plain call."""

    ALL = ("flags", "recurrent_mask", "zone_h", "zone_c", "clip_norm", "clip_value", "norms")

    def __init__(self, cell, device, dtype=torch.float32, sizes=(T, B, H), reverse=False, extras=(), scale=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        (T, B, H), G, has_c = sizes, len(CELLS[cell].gates), "c" in CELLS[cell].states
        P = (H + 1) // 2 if "projection" in extras and has_c else H

        def randn(*shape, dtype=dtype):
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.cell, self.reverse, self.norms = cell, reverse, "norms" in extras
        self.gx, self.w_hh, self.b_hh = randn(T, B, G * H), randn(G * H, P) / P**0.5, randn(G * H)
        self.h0, self.c0 = randn(B, P), randn(B, H, dtype=torch.float32) if has_c else None
        self.dy, self.dh_n = randn(T, B, P) * scale, randn(B, P) * scale
        self.dc = randn(T, B, H, dtype=torch.float32) * scale if has_c else None
        self.dc_n = randn(B, H, dtype=torch.float32) * scale if has_c else None
        self.dsaved = None
        self.flags = make_flags(generator, T, B, reverse).to(device) if "flags" in extras else None
        keep = torch.rand(B, P, generator=generator) < 0.5
        self.recurrent_mask = (2.0 * keep).to(device, dtype) if "recurrent_mask" in extras else None
        zones = torch.rand(2, T, B, H, generator=generator).round(decimals=1).to(device, dtype)
        self.zone_h = zones[0, ..., :P] if "zone_h" in extras else None
        self.zone_c = zones[1] if "zone_c" in extras and has_c else None
        # Bounds that some of the gradients exceed.
        self.clip_norm = torch.tensor(0.9 * H**0.5 * scale, device=device) if "clip_norm" in extras else None
        self.clip_value = 1.1 * scale if "clip_value" in extras else None
        self.w_hr = randn(P, H) / H**0.5 if P < H else None
        self.ln_hh, self.ln_c_weight, self.ln_c_bias = 1 + 0.3 * randn(G * H), 1 + 0.3 * randn(H), 0.3 * randn(H)
        if "layer_norm" not in extras:
            self.ln_hh = None
        if "layer_norm" not in extras or not has_c:
            self.ln_c_weight = self.ln_c_bias = None

    def of(self, kind, dtype=None):
        """The named tuple `kind` of the problem's tensors, converted to `dtype`."""
        return kind._make(converted(getattr(self, name), dtype) for name in kind._fields)

    def walk(self):
        return Walk(self.cell, self.reverse, "triton", self.clip_value)

    def forward(self, backend, dtype=None, save=True, **options) -> ScanOutputs:
        inputs, walk = self.of(ScanInputs, dtype), self.walk()

        def one(inputs, reverse):
            return backend.forward(inputs, walk._replace(reverse=reverse), save, **options)

        if has_directions(inputs.gx) and not backend.takes_directions(inputs, walk, **options):
            return each_direction(one, len(inputs.gx), walk.reverse, inputs)
        return one(inputs, walk.reverse)

    def backward(self, backend, y, c, saved, dtype=None, **options) -> ScanGradients:
        incoming, inputs, walk = self.of(IncomingGradients, dtype), self.of(ScanInputs, dtype), self.walk()
        kept, inputs = Kept(y, c, saved), inputs._replace(gx=None)

        def one(incoming, kept, inputs, reverse):
            return backend.backward(incoming, kept, inputs, walk._replace(reverse=reverse), self.norms, **options)

        if has_directions(y) and not backend.takes_directions(inputs, walk, **options):
            return each_direction(one, len(y), walk.reverse, incoming, kept, inputs)
        return one(incoming, kept, inputs, walk.reverse)


def converted(x, dtype):
    return x.to(dtype) if dtype and torch.is_tensor(x) and x.is_floating_point() else x


def check(got, want, tolerance):
    """Every output within `tolerance` of the largest element of the wanted one."""
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None), k
        if a is not None:
            assert a.shape == b.shape, k
        if a is not None and a.numel():
            error = (a.double() - b.double()).abs().max().item()
            assert error <= tolerance * max(1e-30, b.double().abs().max().item()), f"output {k} is off by {error}"


def check_against_reference(problem, tile, dtype=torch.float64, tolerance=FLOAT32):
    """Forward and backward at one tile; returns all outputs. The backward starts from the reference's forward."""
    forward = problem.forward(launcher, tile=tile)
    want = problem.forward(reference, dtype)
    check(forward, want, tolerance)
    y, c, _, _, saved = want
    rounded = [
        None if x is None else x.to(like.dtype)
        for x, like in zip((y, c, saved), (forward.y, forward.c, forward.saved), strict=True)
    ]
    backward = problem.backward(launcher, *rounded, tile=tile)
    check(backward, problem.backward(reference, y, c, saved, dtype), tolerance)
    return forward + backward


def same_bits(first, second):
    """Of two lists of outputs; an output that does not exist is None in both."""
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(first, second, strict=True))


def in_one_call(problems):
    """The problem whose tensors are theirs, with a leading dimension for the directions."""
    both = copy.copy(problems[0])
    for name, x in vars(both).items():
        if torch.is_tensor(x) and x.dim():
            setattr(both, name, torch.stack([getattr(problem, name) for problem in problems]))
    return both


def everything(problem, tile):
    """Forward and backward, from the launcher's own forward."""
    forward = problem.forward(launcher, tile=tile)
    y, c, _, _, saved = forward
    return forward + problem.backward(launcher, y, c, saved, tile=tile)
