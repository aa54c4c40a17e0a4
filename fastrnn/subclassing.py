"""What subclasses of torch.nn's LSTM, GRU and RNN use in a forward of their own, under torch.nn's names.

class Mine(fastrnn.LSTM):
    def forward(self, input, hx):
        self.check_forward_args(input, hx, None)
        return torch.lstm(input, hx, self._flat_weights, self.bias, ...)
"""

from collections.abc import Sequence

from torch import Tensor


class ForSubclasses:
    """Mixin of the modules: the flat list of weights, and the checks and permutations of torch.nn.RNNBase."""

    @property
    def _all_weights(self) -> list[list[str]]:
        """`all_names` under torch.nn's private name, which the initialisation of many published models reads."""
        return self.all_names

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self.all_names for name in names]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """The weights in the order of torch's kernels; None for a computed one that does not exist yet."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None]) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if weight is not getattr(self, name, None):
                setattr(self, name, weight)

    def _update_flat_weights(self) -> None:
        """Does nothing: the list is made when it is read. Copies of torch.nn's forward call this."""

    def _init_flat_weights(self) -> None:
        """Lays the weights out anew, as `flatten_parameters` does."""
        self.flatten_parameters()

    def _weights_have_changed(self) -> bool:
        return False

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raises RuntimeError unless `input` is `[T, B, I]` or `[B, T, I]`, or with `batch_sizes` `[rows, I]`."""
        dims = 3 if batch_sizes is None else 2
        if input.dim() != dims:
            raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )

    def get_expected_hidden_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """The shape of h, `(L*D, B, P)`."""
        rows, batch, hidden_size = self.get_expected_cell_size(input, batch_sizes)
        return rows, batch, self.proj_size or hidden_size

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """The shape of the LSTM's c, `(L*D, B, H)`."""
        batch = input.shape[0 if self.batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        return len(self.all_names), batch, self.hidden_size

    def check_hidden_size(
        self, hx: Tensor, expected_hidden_size: tuple[int, int, int], msg: str = "Expected hidden size {}, got {}"
    ) -> None:
        """Raises RuntimeError with `msg` unless `hx` has the expected shape."""
        if tuple(hx.shape) != tuple(expected_hidden_size):
            raise RuntimeError(msg.format(expected_hidden_size, list(hx.shape)))

    def check_forward_args(self, input: Tensor, hidden, batch_sizes: Tensor | None) -> None:
        """Raises RuntimeError unless `input` and `hidden`, h or `(h, c)`, have their shapes."""
        self.check_input(input, batch_sizes)
        shape_h = self.get_expected_hidden_size(input, batch_sizes)
        if isinstance(hidden, Tensor):
            self.check_hidden_size(hidden, shape_h)
            return
        shapes = (shape_h, self.get_expected_cell_size(input, batch_sizes))
        for k, (state, shape) in enumerate(zip(hidden, shapes, strict=True)):
            self.check_hidden_size(state, shape, f"Expected hidden[{k}] size {{}}, got {{}}")

    def permute_hidden(self, hx, permutation: Tensor | None):
        """`hx`, h or `(h, c)`, with its sequences in the order of `permutation [B]`; None leaves it as it is."""
        if permutation is None:
            return hx
        if isinstance(hx, Tensor):
            return hx.index_select(1, permutation)
        return tuple(state.index_select(1, permutation) for state in hx)
