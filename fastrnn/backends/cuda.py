"""The reference scan over csrc's fused CUDA step and cuBLAS: NVIDIA GPUs, every feature, when the library is built."""

from functools import partial

import torch

from . import extension
from . import reference as launcher

# A CUDA library beside a torch without CUDA cannot be loaded.
MISSING = extension.load("cuda") if torch.version.cuda else "this torch is built without CUDA"


def why_not(request) -> str | None:
    return extension.why_not(request, "cuda", MISSING)


scan_forward = partial(launcher.scan_forward, step=extension.Step)
scan_backward = partial(launcher.scan_backward, step=extension.Step)
