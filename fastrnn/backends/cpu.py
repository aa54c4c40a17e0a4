"""The reference scan over csrc's fused C++ step: CPU, every feature, when the library is built."""

from functools import partial

from . import extension
from . import reference as launcher

MISSING = extension.load("cpu")


def why_not(request) -> str | None:
    return extension.why_not(request, "cpu", MISSING)


scan_forward = partial(launcher.scan_forward, step=extension.Step)
scan_backward = partial(launcher.scan_backward, step=extension.Step)
