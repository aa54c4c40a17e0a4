"""Weights of Keras and ONNX: loops in NumPy over those libraries' own definitions, and constants that they publish."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fastrnn
from fastrnn import weights

T, B, I, H = 5, 3, 4, 6
KINDS = {"lstm": 4, "gru": 3, "rnn": 1}
NETWORKS = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}
# float64: a few hundred roundings of 1e-16 in another order
CLOSE = {"rtol": 0, "atol": 1e-12}

every_kind = pytest.mark.parametrize("kind", KINDS)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def keras_layer(kind, x, kernel, recurrent_kernel, bias):
    """One direction as Keras documents its cells: x `[B, T, I]` -> `[B, T, H]`."""
    H = recurrent_kernel.shape[0]
    h, c, outputs = np.zeros((len(x), H)), np.zeros((len(x), H)), []
    for t in range(x.shape[1]):
        if kind == "rnn":
            h = np.tanh(x[:, t] @ kernel + bias + h @ recurrent_kernel)
        elif kind == "lstm":
            i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:  # reset_after=True
            input_bias, recurrent_bias = bias
            x_z, x_r, x_h = np.split(x[:, t] @ kernel + input_bias, 3, axis=1)
            h_z, h_r, h_h = np.split(h @ recurrent_kernel + recurrent_bias, 3, axis=1)
            z = sigmoid(x_z + h_z)
            h = z * h + (1 - z) * np.tanh(x_h + sigmoid(x_r + h_r) * h_h)
        outputs.append(h)
    return np.stack(outputs, axis=1)


def keras_weights(kind, rng, width=I, use_bias=True):
    rows = KINDS[kind] * H
    shape = (2, rows) if kind == "gru" else (rows,)
    bias = [rng.normal(size=shape)] if use_bias else []
    return [rng.normal(size=(width, rows)) / 2, rng.normal(size=(H, rows)) / 2, *bias]


def output(kind, state, x, **settings):
    network = NETWORKS[kind](x.shape[-1], len(state["weight_hh_l0"][0]), dtype=torch.float64, **settings)
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        return network(torch.as_tensor(x))[0].numpy()


@every_kind
def test_keras(kind):
    rng = np.random.default_rng(0)
    arrays, x = keras_weights(kind, rng), rng.normal(size=(B, T, I))
    found = output(kind, weights.from_keras(kind, *arrays), x, batch_first=True)
    np.testing.assert_allclose(found, keras_layer(kind, x, *arrays), **CLOSE)


@every_kind
def test_keras_without_bias(kind):
    rng = np.random.default_rng(1)
    arrays, x = keras_weights(kind, rng, use_bias=False), rng.normal(size=(B, T, I))
    zero = np.zeros((2, KINDS[kind] * H)) if kind == "gru" else np.zeros(KINDS[kind] * H)
    found = output(kind, weights.from_keras(kind, *arrays), x, batch_first=True, bias=False)
    np.testing.assert_allclose(found, keras_layer(kind, x, *arrays, zero), **CLOSE)


@every_kind
def test_keras_bidirectional_and_stacked(kind):
    """Bidirectional concatenates; its second half reads the sequence from the end, and its output is turned around."""
    rng, state, steps = np.random.default_rng(2), {}, None
    x = steps = rng.normal(size=(B, T, I))
    for layer in range(2):
        forward, backward = (keras_weights(kind, rng, steps.shape[-1]) for _ in range(2))
        state |= weights.from_keras(kind, *forward, layer=layer)
        state |= weights.from_keras(kind, *backward, layer=layer, reverse=True)
        ahead, back = keras_layer(kind, steps, *forward), keras_layer(kind, steps[:, ::-1], *backward)[:, ::-1]
        steps = np.concatenate((ahead, back), axis=-1)
    found = output(kind, state, x, num_layers=2, bidirectional=True, batch_first=True)
    np.testing.assert_allclose(found, steps, **CLOSE)


# What Keras's own tests expect of layers with constant weights, keras/src/layers/rnn/{lstm,gru,simple_rnn}_test.py: the
# last output on np.arange(72).reshape(3, 6, 4), kernel 0.01, recurrent kernel 0.02, bias 0.03, and 1 for the LSTM's f.
PUBLISHED = [
    ("lstm", True, True, [0.6288687, 0.86899155, 0.9460773]),
    ("lstm", True, False, [0.57019705, 0.8661914, 0.9459622]),
    ("lstm", False, False, [0.54986924, 0.86226785, 0.9443936]),
    ("gru", True, False, [0.5217289, 0.6371659, 0.39384964]),
    ("gru", False, False, [0.49988455, 0.64701194, 0.4103359]),
    ("rnn", True, False, [0.405432, 0.73605347]),  # four units, on np.arange(24).reshape(2, 3, 4)
]


@pytest.mark.parametrize("kind, use_bias, unit_forget_bias, expected", PUBLISHED)
def test_keras_published_constants(kind, use_bias, unit_forget_bias, expected):
    units, shape = (4, (2, 3, 4)) if kind == "rnn" else (3, (3, 6, 4))
    rows = KINDS[kind] * units
    bias = np.full((2, rows) if kind == "gru" else rows, 0.03)
    if unit_forget_bias:
        bias[3:6] = 1
    arrays = [np.full((4, rows), 0.01), np.full((units, rows), 0.02)] + ([bias] if use_bias else [])
    x = np.arange(np.prod(shape), dtype=float).reshape(shape)
    found = output(kind, weights.from_keras(kind, *arrays), x, batch_first=True, bias=use_bias)[:, -1]
    # the tolerance of Keras's own test
    np.testing.assert_allclose(found, np.array(expected)[:, None].repeat(units, 1), rtol=1e-5, atol=1e-5)


def onnx_direction(kind, X, W, R, B):
    """One direction as ONNX's operators define it: X `[T, B, I]` -> `[T, B, H]`; the GRU with linear_before_reset."""
    H = R.shape[-1]
    gates = len(W) // H
    W, R, (Wb, Rb) = W.reshape(gates, H, -1), R.reshape(gates, H, H), B.reshape(2, gates, H)
    h = c = np.zeros((X.shape[1], H))
    outputs = []
    for x in X:
        of_x, of_h = x @ W.transpose(0, 2, 1), h @ R.transpose(0, 2, 1)  # [G, B, H]
        of_x, of_h = of_x + Wb[:, None], of_h + Rb[:, None]
        if kind == "rnn":
            h = np.tanh(of_x[0] + of_h[0])
        elif kind == "lstm":
            i, o, f, g = of_x + of_h
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            z, r = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
            h = (1 - z) * np.tanh(of_x[2] + r * of_h[2]) + z * h
        outputs.append(h)
    return np.stack(outputs)


def onnx_weights(kind, rng, D, width=I):
    rows = KINDS[kind] * H
    return (
        rng.normal(size=(D, rows, width)) / 2,
        rng.normal(size=(D, rows, H)) / 2,
        rng.normal(size=(D, 2 * rows)),
    )


def from_onnx(kind, *arrays, **where):
    return weights.from_onnx(kind, *arrays, linear_before_reset=1, **where)


@every_kind
@pytest.mark.parametrize("with_bias", [True, False])
def test_onnx(kind, with_bias):
    rng = np.random.default_rng(3)
    W, R, bias = onnx_weights(kind, rng, 1)
    X = rng.normal(size=(T, B, I))
    found = output(kind, from_onnx(kind, W, R, *([bias] if with_bias else [])), X, bias=with_bias)
    expected = onnx_direction(kind, X, W[0], R[0], bias[0] if with_bias else np.zeros_like(bias[0]))
    np.testing.assert_allclose(found, expected, **CLOSE)


@every_kind
def test_onnx_bidirectional_and_stacked(kind):
    """Y is `[T, D, B, H]`; between layers, exporters bring the directions side by side."""
    rng, state = np.random.default_rng(4), {}
    x = steps = rng.normal(size=(T, B, I))
    for layer in range(2):
        arrays = W, R, bias = onnx_weights(kind, rng, 2, steps.shape[-1])
        state |= from_onnx(kind, *arrays, layer=layer)
        ahead = onnx_direction(kind, steps, W[0], R[0], bias[0])
        back = onnx_direction(kind, steps[::-1], W[1], R[1], bias[1])[::-1]
        steps = np.concatenate((ahead, back), axis=-1)
    found = output(kind, state, x, num_layers=2, bidirectional=True)
    np.testing.assert_allclose(found, steps, **CLOSE)


@every_kind
def test_onnx_in_two_operators_of_one_direction_each(kind):
    W, R, bias = onnx_weights(kind, np.random.default_rng(5), 2)
    both = from_onnx(kind, W, R, bias)
    apart = from_onnx(kind, W[:1], R[:1], bias[:1]) | from_onnx(kind, W[1:], R[1:], bias[1:], reverse=True)
    assert list(both) == list(apart) and all(torch.equal(both[name], apart[name]) for name in both)


@every_kind
def test_there_and_back_from_torch_nn_names(kind):
    """The gates of torch.nn's documentation, named: a weight that is 1 in one gate only lands in that gate."""
    names = {"lstm": ("ifgo", "ifgo", "iofg"), "gru": ("rzn", "zrn", "zrn"), "rnn": ("h", "h", "h")}
    torchs, keras, onnx = names[kind]
    for gate in torchs:
        marked = np.repeat([float(name == gate) for name in keras], H)
        state = weights.from_keras(kind, np.outer(np.ones(I), marked), np.outer(np.ones(H), marked))
        want = torch.as_tensor(np.repeat([float(name == gate) for name in torchs], H))
        assert torch.equal(state["weight_ih_l0"][:, 0], want) and torch.equal(state["weight_hh_l0"][:, 0], want)
        marked = np.repeat([float(name == gate) for name in onnx], H)[None, :, None]
        state = from_onnx(kind, marked.repeat(I, 2), marked.repeat(H, 2))
        assert torch.equal(state["weight_ih_l0"][:, 0], want) and torch.equal(state["weight_hh_l0"][:, 0], want)


def test_tensors_and_lists_are_taken_and_copied():
    kernel, recurrent = torch.zeros(2, 8, requires_grad=True), torch.zeros(2, 8)
    state = weights.from_keras("lstm", kernel, recurrent, [0.0] * 8)
    for name, value in state.items():
        assert not value.requires_grad and value.is_contiguous(), name
        value.add_(1)
    assert not kernel.any() and not recurrent.any()
    rnn = torch.zeros(1, 3, 2), torch.zeros(1, 3, 3)
    weights.from_onnx("rnn", *rnn)["weight_ih_l0"].add_(1)
    assert not rnn[0].any()


def test_bad_input():
    rng = np.random.default_rng(6)
    keras, onnx = keras_weights("gru", rng), onnx_weights("gru", rng, 1)
    with pytest.raises(ValueError, match="kind should be one of 'lstm', 'gru', 'rnn', got 'LSTM'"):
        weights.from_keras("LSTM", *keras)
    with pytest.raises(ValueError, match="reset_after=False"):
        weights.from_keras("gru", *keras, reset_after=False)
    with pytest.raises(ValueError, match="linear_before_reset=0"):
        weights.from_onnx("gru", *onnx)
    with pytest.raises(ValueError, match="G = 4 gates"):
        weights.from_keras("lstm", *keras)
    with pytest.raises(ValueError, match="G = 4 gates"):
        weights.from_onnx("lstm", *onnx)
    with pytest.raises(ValueError, match="biases should be 18 values"):
        weights.from_keras("gru", *keras[:2], keras[2][0])
    with pytest.raises(ValueError, match="B should have shape"):
        from_onnx("gru", *onnx[:2], onnx[2][:, :-1])
    with pytest.raises(ValueError, match="W and R should be"):
        from_onnx("gru", onnx[0][0], onnx[1][0])
    with pytest.raises(ValueError, match="W and R should be"):
        from_onnx("gru", *onnx_weights("gru", rng, 2), reverse=True)
    with pytest.raises(ValueError, match="peepholes"):
        weights.from_onnx("lstm", *onnx_weights("lstm", rng, 1), np.ones((1, 3 * H)))
    assert weights.from_onnx("lstm", *onnx_weights("lstm", rng, 1), np.zeros((1, 3 * H)))


def test_the_converter_for_haiku_in_the_docs():
    """hk.LSTM: one linear layer of x and h, its gates in the order i g f o, and 1 added to f at every step."""
    page = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
    names = {"torch": torch}
    exec(page[page.index("def from_haiku") : page.index("fastrnn.LSTM(8, 16).load_state_dict(from_haiku")], names)
    rng = np.random.default_rng(7)
    w, b, x = rng.normal(size=(I + H, 4 * H)), rng.normal(size=4 * H), rng.normal(size=(T, B, I))
    h = c = np.zeros((B, H))
    expected = []
    for step in x:
        i, g, f, o = np.split(np.concatenate((step, h), axis=1) @ w + b, 4, axis=1)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        expected.append(h)
    np.testing.assert_allclose(output("lstm", names["from_haiku"](w, b, I), x), np.stack(expected), **CLOSE)
