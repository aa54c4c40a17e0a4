"""fastrnn: recurrent networks that train fast and show what the gradient does on its way back through time."""

from . import compat, functional, init, penalties, weights
from .convert import convert, explain
from .dispatch import backend
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNBase, RNNCell
from .monitoring import GradientMonitor

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "RNNBase",
    "GradientMonitor",
    "backend",
    "compat",
    "convert",
    "explain",
    "functional",
    "init",
    "penalties",
    "weights",
]
