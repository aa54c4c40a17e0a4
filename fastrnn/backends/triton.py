"""The Triton backend: chooses a tile, and with it the way to run the scan.

Modes local, grouped and stepwise run the kernels of `kernels/scan.py` (`sequence.py` launches them). Mode gemm runs
those of `kernels/gemm_step.py` (launched by `gemm_step.py`); only they have layer norm, projection, decay, and
recurrent masks for each gate.
"""

import os
from contextlib import nullcontext
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .. import tiles
from ..arguments import IncomingGradients, Kept, ScanGradients, ScanInputs, ScanOutputs, Walk, contiguous
from ..cell_table import spec_of
from ..heads import number
from . import gemm_step, sequence
from .launch import interpreted

GPUS = ("cuda", "xpu")  # the device types that Triton drives; AMD's are "cuda", too
INSTALLED = find_spec("triton") is not None
KERNELS = find_spec("fastrnn.kernels") is not None  # false in a checkout that is imported without being installed


def why_not(request) -> str | None:
    if not INSTALLED:
        return "triton is not installed"
    if not KERNELS:
        return f"fastrnn.kernels is not installed with {Path(__file__).parents[1]} (see README)"
    if request.device not in GPUS and not interpreted():
        return (
            f"Triton needs a GPU and the tensors are on {request.device} (TRITON_INTERPRET=1 runs it on a CPU, slowly)"
        )
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels compute in float32, which is too coarse for {request.dtype}"
    return tiles.why_not_mode(request.cell, _asked_mode())


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else tiles.PROCESSORS_H100


def _asked_mode() -> str | None:
    return os.environ.get("FASTRNN_TRITON_MODE") or None


def choose_tile(
    cell: str, like: Tensor, hidden_size: int, batch_size: int, mode: str | None = None, heads: int = 1
) -> tiles.Tile | tiles.GemmTile:
    """The tile of `tiles.py` for tensors like this one, in this mode, or in the one that the environment's
    FASTRNN_TRITON_MODE asks for."""
    mode, device = mode or _asked_mode(), {}
    if mode == "grouped" and torch.version.hip is not None:
        raise ValueError("mode 'grouped' of the Triton scan runs on NVIDIA GPUs only: its barrier is written in PTX")
    if like.is_cuda:
        properties = torch.cuda.get_device_properties(like.device)
        device = dict(shared_memory=properties.shared_memory_per_block_optin, processors=_processors(like))
    return tiles.choose(cell, like.dtype, hidden_size, batch_size, sequence.precision(), mode, heads=heads, **device)


def only_gemm(inputs: ScanInputs) -> str | None:
    """What only mode gemm has of what the call asks for. Layer norm and projection reduce over H within a step."""
    present = {
        "projection": inputs.w_hr is not None,
        "layer norm": inputs.ln_hh is not None or inputs.ln_c_weight is not None,
        "decay": inputs.decay_h is not None,
        "recurrent masks for each gate": gemm_step.count_masks(inputs) > 1,
    }
    return ", ".join(name for name, there in present.items() if there) or None


def _refuse(inputs: ScanInputs, walk: Walk, tile: tiles.Tile | tiles.GemmTile):
    """What the kernels would ignore or misread, where a raw op is called without `why_not`."""
    lacking = None if tile.mode == "gemm" else only_gemm(inputs)
    if lacking:
        raise RuntimeError(f"mode {tile.mode!r} of the Triton scan has no {lacking}; mode 'gemm' has it")
    if walk.ln_of != "separate" and inputs.ln_hh is None:
        raise RuntimeError(f"ln_of={walk.ln_of!r} names a layer norm, and ln_hh, its weight, is None")
    mask, gates = inputs.recurrent_mask, len(spec_of(walk.cell).gates)
    if mask is None:
        return
    width, P = mask.shape[-1], inputs.h0.shape[-1]
    if width not in (P, gates * P):
        raise RuntimeError(f"recurrent_mask should have {P} columns, or {gates * P}, one mask a gate; got {width}")
    if width != P and number(inputs.w_hh, inputs.h0) > 1:
        raise RuntimeError("recurrent masks for each gate are for a W_hh without heads")


def tile_of(inputs: ScanInputs, walk: Walk, mode: str | None = None) -> tiles.Tile | tiles.GemmTile:
    """The tile of a call, in this mode, or in the one that suits it."""
    # Clipping by norm reduces over H, too: modes grouped and stepwise have the norms from the programs that exchange
    # gradients. In mode local the programs of heads, and those of a cell without W_hh, exchange nothing.
    heads = number(inputs.w_hh, inputs.h0)
    alone = heads > 1 or not spec_of(walk.cell).recurrent
    clips_alone = alone and inputs.clip_norm is not None and _asked_mode() not in ("grouped", "stepwise")
    hidden_size = (inputs.h0 if inputs.w_hr is None else inputs.w_hr).shape[-1]
    if mode is None and (only_gemm(inputs) or clips_alone):
        mode = "gemm"
    return choose_tile(walk.cell, inputs.h0, hidden_size, inputs.h0.shape[-2], mode, heads)


def takes_directions(inputs: ScanInputs, walk: Walk, tile: tiles.Tile | tiles.GemmTile | None = None) -> bool:
    """Whether one grid takes both directions."""
    tile = tile or tile_of(inputs, walk)
    _refuse(inputs, walk, tile)
    if tile.mode != "grouped":
        return tile.mode != "gemm"
    # The programs of a grouped launch must all run at once.
    return prod(sequence.grid_of(tile, inputs.h0, True, number(inputs.w_hh, inputs.h0))) <= _processors(inputs.h0)


def _device(x: Tensor):
    return torch.get_device_module(x.device).device(x.device) if x.device.type in GPUS else nullcontext()


def forward(inputs: ScanInputs, walk: Walk, save: bool, tile: tiles.Tile | tiles.GemmTile | None = None) -> ScanOutputs:
    """`tile` overrides the choice of `tiles.py`."""
    sequence.raise_after_timeout(inputs.gx)
    tile = tile or tile_of(inputs, walk)
    _refuse(inputs, walk, tile)
    run = gemm_step.forward if tile.mode == "gemm" else sequence.forward
    with _device(inputs.gx):
        return run(contiguous(inputs), walk, save, tile)


def backward(
    incoming: IncomingGradients,
    kept: Kept,
    inputs: ScanInputs,
    walk: Walk,
    norms: bool,
    tile: tiles.Tile | tiles.GemmTile | None = None,
) -> ScanGradients:
    """`tile` overrides the choice of `tiles.py`."""
    if incoming.dsaved is not None:
        raise NotImplementedError("the triton backend has no gradient of dsaved; the reference runs double backward")
    sequence.raise_after_timeout(kept.y)
    if inputs.clip_norm is not None:
        inputs = inputs._replace(clip_norm=inputs.clip_norm.to(kept.y.device))
    tile = tile or tile_of(inputs, walk)
    _refuse(inputs, walk, tile)
    run = gemm_step.backward if tile.mode == "gemm" else sequence.backward
    with _device(kept.y):
        return run(contiguous(incoming), contiguous(kept), contiguous(inputs), walk, norms, tile)
