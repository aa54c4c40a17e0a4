"""csrc's C++ scan: CPU, every feature, when the library is built."""

import torch

from ..arguments import IncomingGradients, Kept, ScanGradients, ScanInputs, ScanOutputs, Walk
from . import extension

MISSING = extension.load("cpu")


def why_not(request) -> str | None:
    return extension.why_not(request, "cpu", MISSING)


def forward(inputs: ScanInputs, walk: Walk, save: bool) -> ScanOutputs:
    """An empty tensor, as in the raw ops, stands for an output that does not exist."""
    return ScanOutputs(*torch.ops.fastrnn_c.scan_forward(*inputs, *walk, save))


def backward(incoming: IncomingGradients, kept: Kept, inputs: ScanInputs, walk: Walk, norms: bool) -> ScanGradients:
    """As in `forward`. `dsaved`, which only double backward brings, is for the reference."""
    return ScanGradients(*torch.ops.fastrnn_c.scan_backward(*incoming, *kept, *inputs, *walk, norms))
