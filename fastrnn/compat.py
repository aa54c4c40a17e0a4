"""fastrnn's modules that are instances of torch.nn's classes, too: for programs that ask `isinstance(m, nn.LSTM)`.

    model = fastrnn.convert(model, keep_type=True)  # these classes in place of torch.nn's
    isinstance(fastrnn.compat.LSTM(32, 64), torch.nn.LSTM)  # True

They compute what `fastrnn.LSTM`, `GRU`, `RNN` and the cells compute, and take the same arguments. They are not the
default, because `torch.compile` breaks the graph at every instance of torch.nn's LSTM, GRU and RNN, and
`fullgraph=True` refuses them, unless `torch._dynamo.config.allow_rnn` is set.
"""

from torch import nn

from . import modules, single_step, torch_nn


class _PlainModule(nn.Module):
    """nn.Module's own methods, before those of torch.nn.RNNBase, which keep a second list of the weights.

    That list is `_flat_weights` with its weak references. Here it is computed when it is read, so that nothing has to
    be updated when a weight is set, moved, replicated or pickled.
    """

    __init__ = nn.Module.__init__
    __setattr__ = nn.Module.__setattr__
    __setstate__ = nn.Module.__setstate__
    _apply = nn.Module._apply
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def __getstate__(self) -> dict:
        return self.__dict__


class LSTM(modules.LSTM, _PlainModule, torch_nn.LSTM):
    """`fastrnn.LSTM` that is an instance of torch.nn.LSTM, too."""


class GRU(modules.GRU, _PlainModule, torch_nn.GRU):
    """`fastrnn.GRU` that is an instance of torch.nn.GRU, too."""


class RNN(modules.RNN, _PlainModule, torch_nn.RNN):
    """`fastrnn.RNN` that is an instance of torch.nn.RNN, too."""


class LSTMCell(single_step.LSTMCell, _PlainModule, torch_nn.LSTMCell):
    """`fastrnn.LSTMCell` that is an instance of torch.nn.LSTMCell, too."""


class GRUCell(single_step.GRUCell, _PlainModule, torch_nn.GRUCell):
    """`fastrnn.GRUCell` that is an instance of torch.nn.GRUCell, too."""


class RNNCell(single_step.RNNCell, _PlainModule, torch_nn.RNNCell):
    """`fastrnn.RNNCell` that is an instance of torch.nn.RNNCell, too."""
