"""The Triton scan in one of its modes, as a launcher of its own: `triton` itself chooses the mode by `tiles.py`."""

import torch

from .. import tiles
from ..arguments import IncomingGradients, Kept, ScanGradients, ScanInputs, ScanOutputs, Walk
from ..cell_table import spec_of
from . import sequence, triton

BATCHES = (8, 40, 100)
"""One B of each row of `tiles.STEPWISE`, for a call whose B is not known while it is traced."""


def _only_gemm(request, mode: str | None) -> str | None:
    """The features of a call that mode gemm has and this one has not: most need all of H at once in a step."""
    alone = not spec_of(request.cell).recurrent or (request.heads > 1 and mode not in ("grouped", "stepwise"))
    features = ("layer_norm", "projection", "decay", "recurrent_dropout_per_gate")
    found = [name for name in features if name in request.features]
    found += ["clip"] if alone and "clip" in request.features else []
    return ", ".join(found) or None


def tiles_of(request, mode: str | None = None) -> dict[str, int]:
    """The kernels that a call (`dispatch.Request`) may run, each as a text of its tile, with a batch that takes it.

    Raises ValueError where the mode cannot take the call.
    """
    if _only_gemm(request, mode):
        mode = mode or "gemm"
    device = {}
    if request.device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = dict(
            shared_memory=properties.shared_memory_per_block_optin, processors=properties.multi_processor_count
        )
    found = {}
    for batch in (request.batch,) if request.batch else BATCHES:
        tile = tiles.choose(
            request.cell, request.dtype, int(request.hidden_size), batch, sequence.precision(), mode,
            heads=request.heads, **device,
        )  # fmt: skip
        numbers = "x".join(str(n) for n in tile if isinstance(n, int))
        precision = f" {sequence.precision()}" if request.dtype == torch.float32 else ""
        heads = f" in {request.heads} heads" if request.heads > 1 else ""
        found.setdefault(f"{tile.mode} {numbers}{precision}{heads}", batch)
    return found


class Mode:
    """The launcher of a mode. It has what `backends/triton.py` has."""

    def __init__(self, mode: str):
        self.mode = mode

    def why_not(self, request) -> str | None:
        reason = triton.why_not(request)
        if reason is not None:
            return reason
        found = None if self.mode == "gemm" else _only_gemm(request, self.mode)
        if found:
            return f"it has no {found} for this call; mode gemm has"
        if self.mode == "grouped" and torch.version.hip is not None:
            return "its barrier is written in PTX"
        try:
            tiles_of(request, self.mode)
        except ValueError as error:
            return str(error)
        return None

    def _tile(self, inputs: ScanInputs, walk: Walk) -> tiles.Tile | tiles.GemmTile:
        return triton.tile_of(inputs, walk, self.mode)

    def takes_directions(self, inputs: ScanInputs, walk: Walk) -> bool:
        return triton.takes_directions(inputs, walk, self._tile(inputs, walk))

    def forward(self, inputs: ScanInputs, walk: Walk, save: bool) -> ScanOutputs:
        return triton.forward(inputs, walk, save, self._tile(inputs, walk))

    def backward(
        self, incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, norms: bool
    ) -> ScanGradients:
        return triton.backward(incoming, kept, inputs, walk, norms, self._tile(inputs, walk))
