"""Random calls of the scan, for the tests of its kernels, and how their results are compared."""

import copy

import torch
from setups import MASKS, random_incoming, random_inputs

from fastrnn.arguments import IncomingGradients, Kept, ScanGradients, ScanInputs, ScanOutputs, Walk, has_directions
from fastrnn.backends import reference
from fastrnn.backends import triton as launcher
from fastrnn.cell_table import spec_of
from fastrnn.directions import each_direction
from fastrnn.tiles import GemmTile, Tile

T, B, H = 3, 3, 17
SMALL = {mode: Tile(mode, 16, 16, 16, 4, 1) for mode in ("local", "stepwise", "grouped")}
GEMM = GemmTile(2, 4)
MODES = {**SMALL, "gemm": GEMM}
# Against the reference in the same type, several units in the last place (8 bits in bfloat16, 11 in float16): some
# roundings may fall to the other side of a tie, and the interpreter truncates where hardware rounds.
HALF = {torch.bfloat16: 2**-5, torch.float16: 2**-8}
# Against float64: float32 sums of at most 4 * 130 products of order one, over few steps, each to 2**-24.
FLOAT32 = 2e-5


class Problem:
    """Random arguments of one forward and one backward call. extras: FEATURES of setups.py, "clip_value", "norms".

    kinds: fields of `Walk` for other layer norms. With "gate_masks" among the extras each gate has a recurrent mask.
    """

    ALL = (*MASKS, "clip_norm", "clip_value", "norms")

    def __init__(
        self, cell, device, dtype=torch.float32, sizes=(T, B, H), reverse=False, extras=(), scale=1.0, seed=0, **kinds
    ):  # fmt: skip
        inputs = random_inputs(cell, extras, sizes=sizes, reverse=reverse, dtype=dtype, device=device, seed=seed)
        if "gate_masks" in extras:
            inputs = inputs._replace(recurrent_mask=gate_masks(cell, inputs, seed))
        if inputs.clip_norm is not None:
            inputs = inputs._replace(clip_norm=inputs.clip_norm * scale)
        vars(self).update(inputs._asdict())
        vars(self).update(random_incoming(inputs, scale=scale, seed=seed + 100)._asdict())
        self.cell, self.reverse, self.norms, self.kinds = cell, reverse, "norms" in extras, kinds
        self.clip_value = 1.1 * scale if "clip_value" in extras else None  # a bound that some of the gradients exceed

    def of(self, kind, dtype=None):
        """The named tuple `kind` of the problem's tensors, converted to `dtype`."""
        return kind._make(converted(getattr(self, name), dtype) for name in kind._fields)

    def walk(self):
        return Walk(self.cell, self.reverse, "triton", self.clip_value, **self.kinds)

    def forward(self, backend, dtype=None, save=True, **options) -> ScanOutputs:
        inputs, walk = self.of(ScanInputs, dtype), self.walk()

        def one(inputs, reverse):
            return backend.forward(inputs, walk._replace(reverse=reverse), save, **options)

        if has_directions(inputs.gx) and not backend.takes_directions(inputs, walk, **options):
            return each_direction(one, len(inputs.gx), walk.reverse, inputs)
        return one(inputs, walk.reverse)

    def backward(self, backend, y, c, saved, dtype=None, **options) -> ScanGradients:
        incoming, inputs, walk = self.of(IncomingGradients, dtype), self.of(ScanInputs, dtype), self.walk()
        kept = Kept(y, c, saved)
        if walk.ln_of == "separate":
            inputs = inputs._replace(gx=None)

        def one(incoming, kept, inputs, reverse):
            return backend.backward(incoming, kept, inputs, walk._replace(reverse=reverse), self.norms, **options)

        if has_directions(y) and not backend.takes_directions(inputs, walk, **options):
            return each_direction(one, len(y), walk.reverse, incoming, kept, inputs)
        return one(incoming, kept, inputs, walk.reverse)


def gate_masks(cell, inputs: ScanInputs, seed=0) -> torch.Tensor:
    """A random mask of recurrent dropout for each gate, side by side `[B, G*P]`."""
    generator, (B, P) = torch.Generator().manual_seed(seed), inputs.h0.shape
    keep = torch.rand(B, len(spec_of(cell).gates) * P, generator=generator) < 0.6
    return keep.to(inputs.h0.device, inputs.h0.dtype) / 0.6


WHOLE = (*Problem.ALL, "layer_norm", "projection")


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
