"""`convert(model, to="torch")` for tools that know torch.nn alone: a copy, and the modules that take `lengths=`."""

import io

import pytest
import torch
from setups import H, I, agree, flat, make, random
from torch import nn

import fastrnn
from fastrnn.with_lengths import LSTMWithLengths, WithLengths

T, B = 6, 4
LENGTHS = torch.tensor([2, 0, 6, 3])


def test_a_copy_leaves_the_model_as_it_is():
    model = nn.Sequential(make("GRU"))
    copied = fastrnn.convert(model, to="torch", copy=True)
    assert type(model[0]) is fastrnn.GRU and type(copied[0]) is nn.GRU
    x = random(T, B, I)
    agree(copied(x), model(x))
    with torch.no_grad():
        copied[0].weight_hh_l0.zero_()
    assert model[0].weight_hh_l0.abs().min() > 0


class Tagger(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.rnn = make(kind, num_layers=2, bidirectional=True, **settings)

    def forward(self, x, lengths: torch.Tensor):
        return self.rnn(x, lengths=lengths)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_without_fastrnn(kind, batch_first):
    """Empty sequences, too; compiled by torch.jit.script, and saved."""
    model = Tagger(kind, batch_first=batch_first).eval()
    x = random(*((B, T) if batch_first else (T, B)), I, requires_grad=False)
    expected = model(x, LENGTHS)
    adapted = fastrnn.convert(model, to="torch", copy=True, lengths=True)
    assert type(adapted.rnn) is (LSTMWithLengths if kind == "LSTM" else WithLengths)
    assert not any(type(part).__module__ in ("fastrnn.modules", "fastrnn.single_step") for part in adapted.modules())
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(adapted), file)
    file.seek(0)
    for program in (adapted, torch.jit.load(file)):
        y, state = program(x, LENGTHS)
        agree((y, *flat(state)), (expected[0], *flat(expected[1])))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_lengths_with_initial_states_and_without_lengths(kind):
    model = make(kind)
    adapted = fastrnn.convert(model, to="torch", copy=True, lengths=True)
    x, h = random(T, B, I), random(1, B, H, seed=2)
    hx = (h, random(1, B, H, seed=3)) if kind == "LSTM" else h
    for lengths in (LENGTHS, None):
        (y, state), (got, got_state) = model(x, hx, lengths=lengths), adapted(x, hx, lengths=lengths)
        agree((got, *flat(got_state)), (y, *flat(state)))


def test_a_quantised_network_takes_lengths():
    model = Tagger("LSTM", dtype=torch.float32).eval()
    adapted = fastrnn.convert(model, to="torch", copy=True, lengths=True)
    quantised = torch.ao.quantization.quantize_dynamic(adapted, {nn.LSTM})
    assert "quantized" in type(quantised.rnn.rnn).__module__
    x = torch.randn(T, B, I)
    y, _ = quantised(x, LENGTHS)
    # 8 bits of weights of up to 0.45, and of activations: some 2e-3 each, over two layers and six steps
    agree([y], [model(x, LENGTHS)[0]], rtol=0, atol=0.05)


def test_torch_fx_traces_the_copy():
    model = nn.Sequential(make("GRU"))
    traced = torch.fx.symbolic_trace(fastrnn.convert(model, to="torch", copy=True))
    x = random(T, B, I)
    agree(traced(x), model(x))


def test_lengths_are_for_the_way_to_torch():
    with pytest.raises(ValueError, match="take lengths= as they are"):
        fastrnn.convert(nn.GRU(I, H), lengths=True)
    with pytest.raises(ValueError, match=r"torch\.export take the module as it is"):
        fastrnn.convert(make("GRU", layer_norm=True), to="torch", copy=True)
