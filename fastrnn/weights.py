"""Weights of Keras's and ONNX's recurrent layers as state dicts of `fastrnn.LSTM`, `GRU` and `RNN` (and torch.nn's).

    state = fastrnn.weights.from_keras("lstm", *layer.get_weights())
    fastrnn.LSTM(input_size, hidden_size).load_state_dict(state)

Each function converts one layer: join the dictionaries of several, `from_onnx(.., layer=0) | from_onnx(.., layer=1)`.
They take NumPy arrays, tensors and nested lists, of which they make copies. The gates of H rows each are reordered, and
matrices transposed where the other library multiplies from the right:

| library | matrices           | LSTM      | GRU     | biases                                       |
|---------|--------------------|-----------|---------|----------------------------------------------|
| torch   | `[G*H, I]`         | i f g o   | r z n   | b_ih, b_hh `[G*H]`                           |
| Keras   | `[I, G*H]`         | i f c o   | z r h   | one `[G*H]`; `[2, G*H]` in a GRU             |
| ONNX    | `[D, G*H, I]`      | i o f c   | z r h   | W_b, then R_b, `[D, 2*G*H]`                  |

Sources: keras.io/api/layers/recurrent_layers, keras/src/layers/rnn; onnx.ai/onnx/operators (LSTM, GRU, RNN).
"""

import torch
from torch import Tensor

# For each gate in torch's order, its place in the other library's.
_KERAS = {"lstm": (0, 1, 2, 3), "gru": (1, 0, 2), "rnn": (0,)}
_ONNX = {"lstm": (0, 2, 3, 1), "gru": (1, 0, 2), "rnn": (0,)}


def from_keras(
    kind: str, kernel, recurrent_kernel, bias=None, *, reset_after: bool = True, layer: int = 0, reverse: bool = False
) -> dict[str, Tensor]:
    """The weights of a Keras LSTM, GRU or SimpleRNN, in the order of its `get_weights()`.

    Args:
        kind: "lstm", "gru" or "rnn" (SimpleRNN).
        kernel: `[I, G*H]`.
        recurrent_kernel: `[H, G*H]`.
        bias: `[G*H]`, for a GRU `[2, G*H]`; None for a layer without. A single bias becomes b_ih, and b_hh is zero.
        reset_after: the GRU's own setting. With False, Keras's GRU multiplies the state by r before its product, which
            is another function than torch's, so that is refused.
        layer: the layer that the names are for.
        reverse: name the weights as those of the reverse direction: the second half of a Bidirectional's.

    Raises:
        ValueError: `kind` is unknown, a shape does not fit, or reset_after is False.
    """
    order = _order(_KERAS, kind)
    if kind == "gru" and not reset_after:
        raise ValueError("a GRU with reset_after=False is another function than torch's: there is nothing to convert")
    weight_ih, weight_hh = _tensor(kernel).T, _tensor(recurrent_kernel).T
    if bias is None:
        biases = None
    else:
        bias = _tensor(bias)
        biases = bias if kind == "gru" else torch.stack((bias, torch.zeros_like(bias)))
    return _state(f"from_keras, {kind}", order, weight_ih, weight_hh, biases, layer, reverse)


def from_onnx(
    kind: str, W, R, B=None, P=None, *, linear_before_reset: int = 0, reverse: bool = False, layer: int = 0
) -> dict[str, Tensor]:
    """The weights of an ONNX LSTM, GRU or RNN operator, all its directions.

    Args:
        kind: "lstm", "gru" or "rnn".
        W: `[D, G*H, I]`.
        R: `[D, G*H, H]`.
        B: `[D, 2*G*H]`, or None for a layer without.
        P: the LSTM's peepholes `[D, 3*H]`, which torch's LSTM has not: None or zeros.
        linear_before_reset: the GRU's attribute. It must be 1: with 0, ONNX's default, the state is multiplied by r
            before its product, which is another function than torch's.
        reverse: of an operator with direction="reverse", D = 1: name the weights as those of the reverse direction.
        layer: the layer that the names are for.

    Raises:
        ValueError: `kind` is unknown, a shape does not fit, there are peepholes, or linear_before_reset is 0.
    """
    order = _order(_ONNX, kind)
    if kind == "gru" and not linear_before_reset:
        raise ValueError("a GRU with linear_before_reset=0 is another function than torch's: nothing to convert")
    if P is not None and _tensor(P).any():
        raise ValueError("torch's LSTM has no peepholes: P should be None or zeros")
    W, R = _tensor(W), _tensor(R)
    B = None if B is None else _tensor(B)
    if W.dim() != 3 or W.shape[0] not in (1, 2) or R.dim() != 3 or len(R) != len(W) or (reverse and len(W) > 1):
        raise ValueError(f"W and R should be [D, {len(order)}*H, ..], got {list(W.shape)} and {list(R.shape)}")
    if B is not None and B.shape != (len(W), 2 * W.shape[1]):
        raise ValueError(f"B should have shape {[len(W), 2 * W.shape[1]]}, got {list(B.shape)}")
    state = {}
    for d in range(len(W)):
        biases = None if B is None else B[d].reshape(2, -1)
        state |= _state(f"from_onnx, {kind}", order, W[d], R[d], biases, layer, reverse or d == 1)
    return state


def _tensor(array) -> Tensor:
    return array.detach() if isinstance(array, Tensor) else torch.as_tensor(array)


def _order(orders: dict[str, tuple[int, ...]], kind: str) -> tuple[int, ...]:
    if kind not in orders:
        raise ValueError(f"kind should be one of {', '.join(map(repr, orders))}, got {kind!r}")
    return orders[kind]


def _state(where: str, order, weight_ih: Tensor, weight_hh: Tensor, biases: Tensor | None, layer: int, reverse: bool):
    """The state dict of one layer in one direction: `[G*H, I]`, `[G*H, H]` and `[2, G*H]`, gates to be reordered."""
    hidden_size = weight_hh.shape[-1]
    rows = len(order) * hidden_size
    if weight_hh.shape != (rows, hidden_size) or weight_ih.dim() != 2 or len(weight_ih) != rows:
        found = f"{list(weight_ih.shape)} and {list(weight_hh.shape)}"
        raise ValueError(f"{where} has G = {len(order)} gates: expected matrices [G*H, I] and [G*H, H], got {found}")
    if biases is not None and biases.shape != (2, rows):
        raise ValueError(f"{where}: the biases should be {rows} values each, got shape {list(biases.shape)}")
    end = f"_l{layer}" + ("_reverse" if reverse else "")
    values = {"weight_ih": weight_ih, "weight_hh": weight_hh}
    if biases is not None:
        values |= {"bias_ih": biases[0], "bias_hh": biases[1]}
    state = {}
    for name, value in values.items():
        gates = value.split(hidden_size)
        state[name + end] = torch.cat([gates[place] for place in order])
    return state
