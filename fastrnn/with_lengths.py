"""torch.nn's recurrent modules under a call with `lengths=`: what `convert(model, to="torch", lengths=True)` puts in.

They pack and unpack, so that a model that passes lengths runs without fastrnn, and torch.jit.script can compile it.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def _packed(input: Tensor, lengths: Tensor, batch_first: bool) -> PackedSequence:
    """A packed sequence has at least one step: `_padded` and `_final` take the one of an empty sequence away."""
    return pack_padded_sequence(input, lengths.to("cpu").clamp(min=1), batch_first=batch_first, enforce_sorted=False)


def _padded(output: PackedSequence, input: Tensor, lengths: Tensor, batch_first: bool) -> Tensor:
    padded, _ = pad_packed_sequence(output, batch_first=batch_first, total_length=input.size(1 if batch_first else 0))
    empty = (lengths == 0).to(input.device).unsqueeze(1 if batch_first else 0).unsqueeze(2)
    return padded.masked_fill(empty, 0)


def _final(state: Tensor, initial: Tensor | None, lengths: Tensor) -> Tensor:
    """The final state `[L*D, B, H]`, which is the initial one where a sequence is empty."""
    empty = (lengths == 0).to(state.device).unsqueeze(0).unsqueeze(2)
    return torch.where(empty, torch.zeros_like(state) if initial is None else initial, state)


class WithLengths(nn.Module):
    """A torch.nn GRU or RNN, `.rnn`, that is called with `lengths=`, as `fastrnn.GRU` is.

    Args:
        rnn: the module.
    """

    def __init__(self, rnn: nn.Module):
        super().__init__()
        self.rnn = rnn
        self.batch_first: bool = rnn.batch_first

    def forward(self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`input [T, B, I]` (`[B, T, I]` with batch_first), `lengths [B]`; returns the output and h_n `[L*D, B, H]`."""
        if lengths is None:
            return self.rnn(input, hx)
        output, h_n = self.rnn(_packed(input, lengths, self.batch_first), hx)
        return _padded(output, input, lengths, self.batch_first), _final(h_n, hx, lengths)


class LSTMWithLengths(nn.Module):
    """`WithLengths` for an LSTM, whose state is a pair."""

    def __init__(self, rnn: nn.Module):
        super().__init__()
        self.rnn = rnn
        self.batch_first: bool = rnn.batch_first

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`input [T, B, I]` (`[B, T, I]` with batch_first), `lengths [B]`; returns the output and `(h_n, c_n)`."""
        if lengths is None:
            return self.rnn(input, hx)
        output, (h_n, c_n) = self.rnn(_packed(input, lengths, self.batch_first), hx)
        h0: Tensor | None = None
        c0: Tensor | None = None
        if hx is not None:
            h0, c0 = hx
        padded = _padded(output, input, lengths, self.batch_first)
        return padded, (_final(h_n, h0, lengths), _final(c_n, c0, lengths))
