"""torch.nn's recurrent classes, as they were when fastrnn was imported.

Some programs set `torch.nn.LSTM = fastrnn.LSTM`. What asks for torch.nn's classes takes them from here, so that it
still gets torch's own.
"""

from torch.nn.modules.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNBase, RNNCell

KINDS = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")

__all__ = ["GRU", "KINDS", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNBase", "RNNCell"]
