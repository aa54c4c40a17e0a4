"""What a network or a cell returns is the user's: it may be changed in place and detached, whatever ran the call."""

import pytest
import torch
from setups import every_backend

import fastrnn
from fastrnn import cells

T, B, I, H = 3, 2, 3, 4
SOURCES = {
    "LSTM": lambda **s: fastrnn.LSTM(I, H, zoneout=0.1, **s),
    "slstm": lambda **s: fastrnn.Recurrent(cells.slstm, I, H, bidirectional=True, **s),
    "LSTMCell": lambda **s: fastrnn.LSTMCell(I, H, layer_norm=True, **s),
    "GRUCell": lambda **s: fastrnn.GRUCell(I, H, layer_norm="sum", **s),
}


def flat(value):
    return [value] if torch.is_tensor(value) else [x for part in value for x in flat(part)]


@pytest.mark.parametrize("source", SOURCES)
@every_backend
def test_every_result(source, backend):
    torch.manual_seed(0)
    module = SOURCES[source](backend=backend)
    x = torch.randn(*((B, I) if source.endswith("Cell") else (T, B, I)))
    for k in range(len(flat(module(x)))):
        found = flat(module(x))
        found[k].mul_(2)
        sum(one.sum() for one in found).backward()
        assert flat(module(x))[k].detach_().grad_fn is None


@every_backend
def test_a_cell_without_units(backend):
    fastrnn.GRUCell(I, 0, layer_norm=True, backend=backend)(torch.randn(B, I)).sum().backward()


@every_backend
def test_symbolic_sizes_outside_of_a_compiler(backend):
    from torch.fx.experimental.proxy_tensor import make_fx

    module = fastrnn.GRU(I, H, layer_norm=True, backend=backend)
    weights = dict(module.named_parameters())

    def run(x):
        return torch.func.functional_call(module, weights, (x,))[0]

    x = torch.randn(T, B, I)
    written = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(written(x), run(x))
