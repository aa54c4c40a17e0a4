"""A backend by argument, context or environment, and what `explain` says of each."""

import pytest
import torch
from torch import nn

import fastrnn

T, B, I, H = 5, 3, 4, 6


def x(*shape):
    return torch.zeros(*(shape or (T, B, I)))


def test_context_and_environment_refuse_unknown_names(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"fastrnn.backend: unknown backend 'fast'; known are auto"),
        fastrnn.backend("fast"),
    ):
        pass
    monkeypatch.setenv("FASTRNN_BACKEND", "fast")
    with pytest.raises(ValueError, match="FASTRNN_BACKEND: unknown backend 'fast'"):
        fastrnn.GRU(I, H)(x())


def test_argument_goes_before_context_before_environment(monkeypatch):
    def chosen(**settings):
        return fastrnn.explain(fastrnn.LSTM(I, H, **settings), x()).chosen

    assert chosen() == "aten"
    monkeypatch.setenv("FASTRNN_BACKEND", "reference")
    assert chosen() == "reference"
    with fastrnn.backend("aten"):
        assert chosen() == "aten" and chosen(backend="reference") == "reference"
        with fastrnn.backend("auto"):
            assert chosen(backend="aten") == "aten"
    assert chosen() == "reference"
    monkeypatch.setenv("FASTRNN_BACKEND", "aten")
    with pytest.raises(RuntimeError, match="backend 'aten' cannot run this call"):
        fastrnn.LSTM(I, H, zoneout=0.1)(x())


def test_a_context_ends_with_an_exception():
    with pytest.raises(KeyError), fastrnn.backend("reference"):
        raise KeyError
    assert fastrnn.explain(fastrnn.LSTM(I, H), x()).chosen == "aten"


def test_explain_names_every_backend_with_its_reason():
    explanation = fastrnn.explain(fastrnn.LSTM(I, H, zoneout=0.1), x(), lengths=torch.tensor([5, 3, 1]))
    text = str(explanation)
    assert all(name in text for name in ("aten", "triton", "cpu", "reference"))
    assert "lengths, zoneout" in text and f"runs on {explanation.chosen}" in text
    with pytest.raises(TypeError, match=r"explain takes a fastrnn.* got torch\.nn\.modules\.rnn\.LSTM"):
        fastrnn.explain(nn.LSTM(I, H), x())


def test_explain_takes_cells():
    for name, hx in (("LSTMCell", (x(B, H), x(B, H))), ("GRUCell", None)):
        cell = getattr(fastrnn, name)(I, H, backend="reference")
        assert fastrnn.explain(cell, x(B, I), hx).chosen == "reference"
        assert fastrnn.explain(getattr(fastrnn, name)(I, H), x(I)).request.cell == cell._cell
