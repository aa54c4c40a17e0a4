"""`fastrnn.tune` and `python -m fastrnn tune`: this machine is asked which backend is right and fast."""

from .search import Results, tune

__all__ = ["Results", "tune"]
