"""Launches the Triton scan: one launch for all steps where W_hh stays on the chip, else one per step.

What runs in mode "rows", as do layer norm and projection, goes to `rows.py`.
"""

import os
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .. import tiles
from ..arguments import (
    IncomingGradients,
    Kept,
    ScanGradients,
    ScanInputs,
    ScanOutputs,
    Walk,
    contiguous,
    empty_gradients,
    empty_outputs,
)
from ..cells import CELLS, RESET
from ..directions import walks_back
from . import rows
from .launch import Launch


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


INSTALLED = find_spec("triton") is not None
KERNELS = find_spec("fastrnn.kernels") is not None  # not so in a checkout that is imported without being installed


def why_not(request) -> str | None:
    if not INSTALLED:
        return "triton is not installed"
    if not KERNELS:
        return f"fastrnn.kernels is not installed with {Path(__file__).parents[1]} (see README)"
    if request.device != "cuda" and not _interpreted():
        return (
            f"Triton needs a GPU and the tensors are on {request.device} (TRITON_INTERPRET=1 runs it on a CPU, slowly)"
        )
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels compute in float32, which is too coarse for {request.dtype}"
    return None


def _precision() -> str:
    """How tl.dot multiplies float32: what torch.nn's kernels do on this machine."""
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if tf32 else "ieee"


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else tiles.PROCESSORS_H100


def _tile(cell: str, w_hh: Tensor, batch_size: int, whole_rows: bool = False) -> tiles.Tile | tiles.RowTile:
    """The tile of `tiles.py`, in the mode that the environment's FASTRNN_TRITON_MODE asks for, if it does.

    `whole_rows`: layer norm and projection reduce over all of H in the middle of a step, and only one mode can.
    """
    device = {}
    if w_hh.is_cuda:
        properties = torch.cuda.get_device_properties(w_hh.device)
        device = dict(shared_memory=properties.shared_memory_per_block_optin, processors=_processors(w_hh))
    mode = "rows" if whole_rows else os.environ.get("FASTRNN_TRITON_MODE") or None
    if mode == "grouped" and torch.version.hip is not None:
        raise ValueError("mode 'grouped' of the Triton scan runs on NVIDIA GPUs only: its barrier is written in PTX")
    hidden_size = w_hh.shape[-2] // len(CELLS[cell].gates)
    return tiles.choose(cell, w_hh.dtype, hidden_size, batch_size, _precision(), mode, **device)


def _grid(tile: tiles.Tile, hidden_size: int, batch_size: int, directions: int) -> tuple[int, int, int]:
    """The programs of a launch: by tiles of the batch, of the hidden units, and by direction."""
    return -(-batch_size // tile.block_b), 1 if tile.mode == "local" else -(-hidden_size // tile.block_h), directions


def _tile_of(inputs: ScanInputs, walk: Walk) -> tiles.Tile | tiles.RowTile:
    whole_rows = any(x is not None for x in (inputs.w_hr, inputs.ln_hh, inputs.ln_c_weight))
    return _tile(walk.cell, inputs.w_hh, inputs.h0.shape[-2], whole_rows)


def takes_directions(inputs: ScanInputs, walk: Walk) -> bool:
    """Whether one grid takes both directions."""
    tile, w_hh = _tile_of(inputs, walk), inputs.w_hh
    if tile.mode == "rows":
        return False
    # The programs of a grouped launch must all run at once.
    fits = prod(_grid(tile, w_hh.shape[-1], inputs.h0.shape[-2], len(w_hh))) <= _processors(w_hh)
    return tile.mode != "grouped" or fits


def _launcher(kernel, cell: str, w_hh: Tensor, batch_size: int, tile: tiles.Tile, reverse: bool):
    """A function of `kernel`'s pointers that returns one of a range of steps, `(t_begin, t_end)`, which launches it.

    Both may be called again and again; what all launches of a call share is in them."""
    spec, hidden_size = CELLS[cell], w_hh.shape[-1]
    grid = _grid(tile, hidden_size, batch_size, len(w_hh) if w_hh.dim() == 3 else 1)
    shared = dict(
        B=batch_size, reverse=int(reverse), G=len(spec.gates), K=len(spec.saved), S=len(spec.states), H=hidden_size,
        BLOCK_B=tile.block_b, BLOCK_H=tile.block_h, BLOCK_K=tile.block_k, MODE=tile.mode,
        PRECISION=_precision(),
        # Multiplications and additions stay apart, so that all modes round alike.
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if tile.mode == "grouped" and not _interpreted():
        from ..kernels.barrier import LINE

        counters = torch.empty(grid[2], grid[0], LINE.value, dtype=torch.int32, device=w_hh.device)
        shared.update(arrived_ptr=counters, report_ptr=_report(), launch_cooperative_grid=True)
    else:
        shared.update(arrived_ptr=None, report_ptr=None)

    def prepare(**arguments):
        launch = Launch(kernel, grid, **arguments, **shared)

        def run(t_begin: int, t_end: int):
            if shared["arrived_ptr"] is not None:
                shared["arrived_ptr"].zero_()
            if batch_size:
                launch(t_begin=t_begin, t_end=t_end)

        return run

    return prepare


MOST_STEPS = 1 << 20  # of a grouped launch: times the programs of a group, below STUCK of kernels/barrier.py


def _ranges(tile: tiles.Tile, hidden_size: int, begin: int, end: int) -> list[tuple[int, int]]:
    """The steps `[t_begin, t_end)` of each launch. In Triton's interpreter a program cannot wait for another."""
    if tile.mode == "local":
        return [(begin, end)]
    alone = hidden_size <= tile.block_h
    steps = MOST_STEPS if tile.mode == "grouped" and (alone or not _interpreted()) else 1
    return [(i, min(i + steps, end)) for i in range(begin, end, steps)]


@cache
def _report() -> Tensor:
    """Set by a grouped kernel that waited too long. In pinned memory, so that reading it does not wait for the GPU."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=True)


def _raise_if_stuck(x: Tensor):
    if x.is_cuda and _report()[0]:
        _report().zero_()
        raise RuntimeError(
            "an earlier fastrnn call gave NaN: the programs of its Triton scan waited for each other beyond the bound "
            "of kernels/barrier.py. Did another process hold the GPU? FASTRNN_TRITON_MODE=stepwise does not wait"
        )


def _device(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _first_operand(h0: Tensor, flags: Tensor | None, recurrent_mask: Tensor | None, reverse: bool) -> Tensor:
    """What W_hh multiplies in the first step; in the others, `recurrent_operand` of kernels/products.py."""
    if flags is not None and flags.dim() == 3:
        flags = torch.stack([own[-1 if walks_back(d, reverse) else 0] for d, own in enumerate(flags)])
    elif flags is not None:
        flags = flags[-1 if reverse else 0]
    operand = h0 if flags is None else h0.masked_fill((flags & RESET).bool()[..., None], 0)
    return operand if recurrent_mask is None else operand * recurrent_mask


def forward(inputs: ScanInputs, walk: Walk, save: bool, tile=None) -> ScanOutputs:
    """`tile` overrides the choice of `tiles.py`."""
    from ..kernels.cells import EQUATIONS
    from ..kernels.scan import forward_kernel

    inputs, cell, reverse = contiguous(inputs), walk.cell, walk.reverse
    gx, w_hh, h0, c0, flags, recurrent_mask = (
        inputs.gx, inputs.w_hh, inputs.h0, inputs.c0, inputs.flags, inputs.recurrent_mask
    )  # fmt: skip
    _raise_if_stuck(gx)
    (*D, T, B, _), H = gx.shape, w_hh.shape[-1]
    tile = tile or _tile_of(inputs, walk)
    if tile.mode == "rows":
        with _device(gx):
            return rows.forward(inputs, walk, save, tile)
    outputs = empty_outputs(inputs, walk, save)
    sent = None if tile.mode == "local" else gx.new_empty(2, *D, B, H)
    if sent is not None:
        sent[0] = _first_operand(h0, flags, recurrent_mask, reverse)
    prepare = _launcher(forward_kernel, cell, w_hh, B, tile, reverse)

    def steps(before, after):
        return prepare(
            gx_ptr=gx, w_ptr=w_hh, b_ptr=inputs.b_hh, flags_ptr=flags, recurrent_ptr=recurrent_mask,
            zone_h_ptr=inputs.zone_h, zone_c_ptr=inputs.zone_c, h_in_ptr=before[0], c_in_ptr=before[1],
            h_out_ptr=after[0], c_out_ptr=after[1], sent_ptr=sent, y_ptr=outputs.y, c_ptr=outputs.c,
            saved_ptr=outputs.saved, T=T, CELL_FORWARD=EQUATIONS[cell][0],
        )  # fmt: skip

    last = outputs.h_n, outputs.c_n
    first, others = steps((h0, c0), last), steps(last, last)
    with _device(gx):
        for t_begin, t_end in _ranges(tile, H, 0, T):
            (others if t_begin else first)(t_begin, t_end)
    return outputs


def backward(
    incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, norms: bool, tile=None
) -> ScanGradients:
    """`tile` overrides the choice of `tiles.py`."""
    from ..kernels.cells import EQUATIONS
    from ..kernels.scan import backward_kernel

    if incoming.dsaved is not None:
        raise NotImplementedError("the triton backend has no gradient of dsaved; the reference runs double backward")
    incoming, kept, inputs = contiguous(incoming), contiguous(kept), contiguous(inputs)
    (y, c, saved), cell, reverse = kept, walk.cell, walk.reverse
    w_hh, h0, c0 = inputs.w_hh, inputs.h0, inputs.c0
    _raise_if_stuck(saved)
    clip_norm = None if inputs.clip_norm is None else inputs.clip_norm.to(saved.device)
    inputs = inputs._replace(clip_norm=clip_norm)
    (*D, T, B, H), spec = y.shape, CELLS[cell]
    S, GH = len(spec.states), w_hh.shape[-2]
    tile = tile or _tile_of(inputs, walk)
    if tile.mode == "rows":
        with _device(saved):
            return rows.backward(incoming, kept, inputs, walk, norms, tile)
    count = -(-H // tile.block_h)
    apart = clip_norm is not None and tile.mode != "local"  # gate gradients travel before they are scaled

    def scratch(*shape, when=True):
        return torch.empty(shape, dtype=torch.float32, device=saved.device) if when else None

    found = empty_gradients(kept, inputs, walk, norms=False)
    parted = scratch(*D, 2, S, T, count, B, when=norms)
    sent_x, sent_h = scratch(2, *D, B, GH, when=apart), scratch(2, *D, B, GH, when=apart and spec.distinct_dgh)
    parts = scratch(2, S * count, *D, B, when=apart)
    prepare = _launcher(backward_kernel, cell, w_hh, B, tile, reverse)
    _, total, backward = EQUATIONS[cell]

    def steps(after, before):
        return prepare(
            dy_ptr=incoming.dy, dc_ptr=incoming.dc, saved_ptr=saved, y_ptr=y, c_ptr=c, h0_ptr=h0, c0_ptr=c0, w_ptr=w_hh,
            flags_ptr=inputs.flags, recurrent_ptr=inputs.recurrent_mask, zone_h_ptr=inputs.zone_h,
            zone_c_ptr=inputs.zone_c, bound_ptr=clip_norm, clip_value=walk.clip_value, dh_in_ptr=after[0],
            dc_in_ptr=after[1], dh_out_ptr=before[0], dc_out_ptr=before[1], dgx_ptr=found.dgx, dgh_ptr=found.dgh,
            norms_ptr=parted, sent_x_ptr=sent_x, sent_h_ptr=sent_h, parts_ptr=parts, T=T,
            CELL_TOTAL=total, CELL_BACKWARD=backward, WIDTH=1 << (S * count - 1).bit_length(),
        )  # fmt: skip

    last, first = (incoming.dh_n, incoming.dc_n), (found.dh0, found.dc0)
    rest = (scratch(*D, B, H), scratch(*D, B, H, when=c0 is not None))
    begin, between = 0 if tile.mode == "local" else -1, steps(rest, rest)
    with _device(saved):
        for t_begin, t_end in reversed(_ranges(tile, H, begin, T)):
            launch = between
            if t_end == T or t_begin == begin:
                launch = steps(last if t_end == T else rest, first if t_begin == begin else rest)
            launch(t_begin, t_end)
        return found._replace(norms=_whole_norms(parted) if norms else None)


def _whole_norms(parted: Tensor) -> Tensor:
    """[.., T, tiles, B] -> [.., T, B]."""
    from ..kernels.norms import finish_kernel

    *lead, count, B = parted.shape
    if count == 1:
        return parted.squeeze(-2)
    whole = parted.new_empty(*lead, B)
    if whole.numel():
        rows, block = whole.numel() // B, 32
        width = 1 << (count - 1).bit_length()
        finish_kernel[(rows, -(-B // block))](
            partial_ptr=parted, norm_ptr=whole, B=B, TILES=count, WIDTH=width, BLOCK_B=block, num_warps=1
        )
    return whole
