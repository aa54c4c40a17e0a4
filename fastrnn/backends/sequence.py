"""Launches the kernels of `kernels/scan.py`: once for all steps where W_hh stays on the chip, else once per step."""

from functools import cache

import torch
from torch import Tensor

from .. import tiles
from ..arguments import (
    MASKS,
    IncomingGradients,
    Kept,
    ScanGradients,
    ScanInputs,
    ScanOutputs,
    Walk,
    empty_gradients,
    empty_outputs,
)
from ..cell_table import RESET, spec_of
from ..directions import walks_back
from ..heads import number
from .launch import Launch, interpreted, next_power_of_two, scratch
from .programs import equations

MOST_STEPS = 1 << 20  # of a grouped launch. Times the programs of a group, it is below STUCK of kernels/barrier.py.


def precision() -> str:
    """How tl.dot multiplies float32: as torch.nn's kernels do on this machine."""
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if tf32 else "ieee"


@cache
def timeout_flag() -> Tensor:
    """Set by a grouped kernel that waited too long. In pinned memory, so that reading it does not wait for the GPU."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=True)


def raise_after_timeout(x: Tensor):
    """Raises if an earlier call on the GPU of `x` waited too long."""
    if x.is_cuda and timeout_flag()[0]:
        timeout_flag().zero_()
        raise RuntimeError(
            "an earlier fastrnn call gave NaN: the programs of its Triton scan waited for each other beyond the bound "
            "of kernels/barrier.py. Did another process hold the GPU? FASTRNN_TRITON_MODE=stepwise does not wait"
        )


def grid_of(tile: tiles.Tile, h0: Tensor, recurrent: bool, heads: int = 1) -> tuple[int, int, int]:
    """The programs of a launch: by tiles of the batch, tiles of the units (in mode local by head), and direction."""
    *D, B, H = h0.shape
    H_tiles = heads if tile.mode == "local" and recurrent else tile.across(H, heads)
    return -(-B // tile.block_b), H_tiles, *(D or [1])


def step_ranges(tile: tiles.Tile, programs: int, begin: int, end: int) -> list[tuple[int, int]]:
    """The steps `[t_begin, t_end)` of each launch, in groups of so many programs. In Triton's interpreter a program
    cannot wait for another."""
    if tile.mode == "local":
        return [(begin, end)]
    steps = MOST_STEPS if tile.mode == "grouped" and (programs == 1 or not interpreted()) else 1
    return [(i, min(i + steps, end)) for i in range(begin, end, steps)]


class ScanKernel:
    """A kernel of `kernels/scan.py`, with the arguments that all launches of a call share."""

    def __init__(self, kernel, tile: tiles.Tile, walk: Walk, inputs: ScanInputs, **arguments):
        spec, w_hh = spec_of(walk.cell), inputs.w_hh
        self.kernel, (self.batch_size, H) = kernel, inputs.h0.shape[-2:]
        heads = number(w_hh, inputs.h0)
        self.grid = grid_of(tile, inputs.h0, spec.recurrent, heads)
        self.arguments = dict(
            **arguments, w_ptr=w_hh, parameters_ptr=inputs.parameters, step_inputs_ptr=inputs.step_inputs,
            **{f"{name}_ptr": getattr(inputs, name) for name in MASKS}, B=self.batch_size, reverse=int(walk.reverse),
            G=len(spec.gates), K=len(spec.saved), S=len(spec.states), Q=len(spec.parameters), N=len(spec.inputs), H=H,
            HEADS=heads, BLOCK_B=tile.block_b, BLOCK_H=tile.block_h, BLOCK_K=tile.block_k, MODE=tile.mode,
            PRECISION=precision(), arrived_ptr=None, timeout_flag_ptr=None,
            # Multiplications and additions are not fused, so that all modes round alike.
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
        self.counters = None
        if tile.mode == "grouped" and not interpreted():
            from ..kernels.barrier import LINE

            self.counters = torch.empty(
                self.grid[2], self.grid[0], heads, LINE.value, dtype=torch.int32, device=inputs.h0.device
            )
            self.arguments |= dict(
                arrived_ptr=self.counters, timeout_flag_ptr=timeout_flag(), launch_cooperative_grid=True
            )

    def between(self, **states) -> Launch:
        """The launch that reads and writes the states, or their gradients, at these pointers."""
        return Launch(self.kernel, self.grid, **self.arguments, **states)

    def run(self, launch: Launch, t_begin: int, t_end: int):
        if self.counters is not None:
            self.counters.zero_()
        if self.batch_size:
            launch(t_begin=t_begin, t_end=t_end)


def _first_operand(inputs: ScanInputs, reverse: bool) -> Tensor:
    """The operand of W_hh in the first step; in the others, it is `recurrent_operand` of kernels/products.py."""
    flags, operand = inputs.flags, inputs.h0
    if flags is not None:
        if flags.dim() == 3:
            flags = torch.stack([each[-1 if walks_back(d, reverse) else 0] for d, each in enumerate(flags)])
        else:
            flags = flags[-1 if reverse else 0]
        operand = operand.masked_fill((flags & RESET).bool()[..., None], 0)
    return operand if inputs.recurrent_mask is None else operand * inputs.recurrent_mask


def forward(inputs: ScanInputs, walk: Walk, save: bool, tile: tiles.Tile) -> ScanOutputs:
    """All tensors are contiguous."""
    from ..kernels.scan import forward_kernel

    (*D, T, _, _), (B, H), heads = inputs.gx.shape, inputs.h0.shape[-2:], number(inputs.w_hh, inputs.h0)
    outputs, operand = empty_outputs(inputs, walk, save), None
    if tile.mode != "local":
        operand = inputs.gx.new_empty(2, *D, B, H)
        operand[0] = _first_operand(inputs, walk.reverse)
    scan = ScanKernel(
        forward_kernel, tile, walk, inputs, gx_ptr=inputs.gx, b_ptr=inputs.b_hh, operand_ptr=operand, y_ptr=outputs.y,
        c_ptr=outputs.c, saved_ptr=outputs.saved, T=T, CELL_FORWARD=equations(walk.cell)[0],
    )  # fmt: skip
    states = dict(h_out_ptr=outputs.h_n, c_out_ptr=outputs.c_n)
    first = scan.between(h_in_ptr=inputs.h0, c_in_ptr=inputs.c0, **states)
    others = scan.between(h_in_ptr=outputs.h_n, c_in_ptr=outputs.c_n, **states)
    for t_begin, t_end in step_ranges(tile, tile.across(H // heads), 0, T):
        scan.run(others if t_begin else first, t_begin, t_end)
    return outputs


def backward(
    incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, norms: bool, tile: tiles.Tile
) -> ScanGradients:
    """Without `dsaved`. All tensors are contiguous."""
    from ..kernels.scan import backward_kernel

    (*D, T, B, H), spec = kept.y.shape, spec_of(walk.cell)
    G, S, heads = len(spec.gates), len(spec.states), number(inputs.w_hh, inputs.h0)
    H_tiles = tile.across(H, heads)
    beside = len(spec.parameters) + len(spec.inputs)
    groups = heads if inputs.clip_norm is None else 1  # under clipping by norm, a group has the programs of all heads
    if inputs.clip_norm is not None and tile.mode == "local" and H_tiles > 1 and (heads > 1 or not spec.recurrent):
        raise ValueError(
            "in heads or without W_hh, clipping by norm needs all of H in one program: mode gemm of the Triton scan"
        )
    _, total, cell_backward = equations(walk.cell)
    gradients = empty_gradients(kept, inputs, walk, norms)
    tile_norms = gradients.norms
    if norms and H_tiles > 1:
        tile_norms = scratch(*D, 2, S, T, H_tiles, B, like=kept.y)
    # Unless local, gate gradients are exchanged before they are clipped by norm.
    exchanged = inputs.clip_norm is not None and tile.mode != "local"
    scan = ScanKernel(
        backward_kernel, tile, walk, inputs, dy_ptr=incoming.dy, dc_ptr=incoming.dc, saved_ptr=kept.saved,
        y_ptr=kept.y, c_ptr=kept.c, h0_ptr=inputs.h0, c0_ptr=inputs.c0, clip_norm_ptr=inputs.clip_norm,
        clip_value=walk.clip_value, dgx_ptr=gradients.dgx, dgh_ptr=gradients.dgh, dcell_ptr=gradients.dcell,
        norms_ptr=tile_norms, T=T,
        CELL_TOTAL=total, CELL_BACKWARD=cell_backward, WIDTH=next_power_of_two(S * H_tiles),
        unscaled_x_ptr=scratch(2, *D, B, G * H, like=kept.y, when=exchanged),
        unscaled_h_ptr=scratch(2, *D, B, G * H, like=kept.y, when=exchanged and spec.distinct_dgh),
        unscaled_cell_ptr=scratch(2, *D, B, beside * H, like=kept.y, when=exchanged and beside),
        partial_norms_ptr=scratch(2, S * H_tiles, *D, B, like=kept.y, when=exchanged),
    )  # fmt: skip
    last, first = (incoming.dh_n, incoming.dc_n), (gradients.dh0, gradients.dc0)
    carried = (scratch(*D, B, H, like=kept.y), None if inputs.c0 is None else torch.empty_like(inputs.c0))

    def launch_between(after, before):
        return scan.between(dh_in_ptr=after[0], dc_in_ptr=after[1], dh_out_ptr=before[0], dc_out_ptr=before[1])

    begin, inner = 0 if tile.mode == "local" else -1, launch_between(carried, carried)
    for t_begin, t_end in reversed(step_ranges(tile, H_tiles // groups, begin, T)):
        launch = inner
        if t_end == T or t_begin == begin:
            launch = launch_between(last if t_end == T else carried, first if t_begin == begin else carried)
        scan.run(launch, t_begin, t_end)
    if tile_norms is not gradients.norms:
        _norms_of_rows(tile_norms, gradients.norms)
    return gradients


def _norms_of_rows(tile_norms: Tensor, norms: Tensor):
    """From the norms of the tiles `[.., T, tiles, B]` to those of the rows, `[.., T, B]`."""
    from ..kernels.norms import finish_kernel

    H_tiles, B = tile_norms.shape[-2:]
    if norms.numel():
        block = 32
        finish_kernel[(norms.numel() // B, -(-B // block))](
            partial_ptr=tile_norms, norm_ptr=norms, B=B, TILES=H_tiles, WIDTH=next_power_of_two(H_tiles),
            BLOCK_B=block, num_warps=1,
        )  # fmt: skip
