"""Recurrent: a network of any cell that `fastrnn.cell` made, with all that surrounds the built-in ones."""

from typing import Any

import torch
from torch import Tensor, nn

from . import checks, functional
from .modules import _ARGUMENTS, _Recurrent
from .user_cells import Cell


class Recurrent(_Recurrent):
    __doc__ = (
        """A recurrent network of a cell of your own, or of `fastrnn.cells`.

        model = fastrnn.Recurrent(peephole, 64, 128, num_layers=2, bidirectional=True)
        y, (h_n, c_n) = model(x, lengths=lengths)

    Input and output `[T, B, I] -> [T, B, D*H]`, states `[L*D, B, H]` each: `(y, h_n)` for a cell with one state,
    `(y, (h_n, c_n, ...))` with more, in the cell's order, which is also that of `hx`. Beside `weight_ih_l0 [G*H, I]`,
    `weight_hh_l0 [G*H, H]` (unless the cell is not recurrent) and the biases, the parameters are the cell's own, `[H]`,
    under their names: `alpha_l0`, `alpha_l0_reverse`, `alpha_l1`, ...

    `cell`: made by `fastrnn.cell`. `zoneout`: one probability, or one for each state in the cell's order.
    `layer_norm`: of W_ih x and of W_hh h, not of a state.
"""
        + _ARGUMENTS
    )

    def __init__(self, cell: Cell, input_size: int, hidden_size: int, *args: Any, **kwargs: Any) -> None:
        if not isinstance(cell, Cell):
            raise TypeError(f"cell should be made by fastrnn.cell, or be one of fastrnn.cells, got {cell!r}")
        self.cell = cell
        args = checks.without_projection((input_size, hidden_size, *args), kwargs, "LSTM, not a cell of your own")
        super().__init__(*args, **kwargs)
        if not cell.recurrent and (self.recurrent_dropout or self.weight_dropout or self.num_heads > 1):
            raise ValueError(f"recurrent_dropout, weight_dropout and num_heads act on W_hh, which {cell.name} has not")

    @property
    def _cell(self) -> str:
        return self.cell.text

    @property
    def mode(self) -> str:
        """The cell's name."""
        return self.cell.name

    def reset_parameters(self) -> None:
        """Weights and biases from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn's; the cell's parameters likewise, or as the
        cell says."""
        super().reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            first = self.cell.initial.get(name.rpartition("_l")[0])
            if first is not None:
                nn.init.constant_(parameter, first)

    def forward(
        self, input, hx=None, *defaults, lengths=None, reset_mask=None, decay=None, tap=None, return_cells=False,
        return_layers=False, **inputs: Tensor,
    ):  # fmt: skip
        """Runs the network.

        Args:
            input, lengths, reset_mask, decay, tap, return_cells, return_layers: as of `fastrnn.LSTM.forward`.
                `return_cells` returns the state after the first, at every step of the last layer; a tuple of them if
                there are more. `decay` multiplies every state.
            hx: initial states `[L*D, B, H]`: one tensor, or a tuple for a cell with several states; None for zeros.
            inputs: the cell's inputs, by name: `[T, B, H]` (`[B, T, H]` with batch_first; `[T, H]` unbatched), `[B, H]`
                constant in time, or `[L*D, T, B, H]`. With a PackedSequence, another of the same lengths, or padded.

        Returns:
            `(y, h_n)`, or `(y, (h_n, ...))` for a cell with several states, and what was asked for.

        Raises:
            ValueError, RuntimeError, TypeError: an argument does not fit, or a forced backend cannot run the call.
        """
        if isinstance(input, torch.fx.Proxy):  # before `inputs` is read, which is a proxy, too
            checks.refuse_proxy(self._cell)
        if defaults:
            checks.check_defaults(self, defaults)
        return functional.recurrent(
            self._cell, input, hx, self._parameters_by_name(), self.backend, lengths=lengths, reset_mask=reset_mask,
            decay=decay, tap=tap, return_cells=return_cells, return_layers=return_layers, watch=self._watch, **inputs,
            **self._arguments(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.cell.name}, {super().extra_repr()}"
