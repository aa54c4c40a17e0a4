"""The PyTorch reference as a backend: everything, everywhere, in real numbers."""

from ..reference import backward, forward

__all__ = ["backward", "forward", "why_not"]


def why_not(request) -> str | None:
    return f"it has no {request.dtype}" if request.dtype.is_complex else None
