"""fastrnn: recurrent networks that train fast and show what the gradient does on its way back through time."""

import importlib
from typing import TYPE_CHECKING

from . import functional, init
from .convert import convert, explain
from .dispatch import backend
from .modules import GRU, LSTM, RNN, RNNBase
from .recurrent import Recurrent
from .single_step import GRUCell, LSTMCell, RNNCell
from .user_cells import cell

if TYPE_CHECKING:
    from . import cells, compat, integrations, penalties, weights
    from .monitoring import GradientMonitor, doctor, prescribe
    from .tuning import tune

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "RNNBase",
    "Recurrent",
    "GradientMonitor",
    "backend",
    "cell",
    "cells",
    "compat",
    "convert",
    "doctor",
    "explain",
    "functional",
    "init",
    "integrations",
    "penalties",
    "prescribe",
    "tune",
    "weights",
]

# Imported when first asked for, so that `import fastrnn` stays light.
_MODULES = {"cells", "compat", "integrations", "penalties", "weights"}


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "tune":
        return importlib.import_module(".tuning", __name__).tune
    if name in ("GradientMonitor", "doctor", "prescribe"):
        return getattr(importlib.import_module(".monitoring", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
