"""torch.jit.trace of networks that torch.nn has not: with gradients and without, saved, loaded and trained."""

import io
import warnings

import pytest
import torch
from setups import loss_of, needs_cpu_library

import fastrnn

T, B, I, H = 4, 2, 3, 4
NETWORKS = {
    "layer norm": lambda: fastrnn.LSTM(I, H, layer_norm="sum", layer_norm_cell="carried"),
    "layers": lambda: fastrnn.GRU(I, H, num_layers=2, bidirectional=True, zoneout=0.2),
    "heads": lambda: fastrnn.GRU(I, H, num_heads=2),
    "own": lambda: fastrnn.Recurrent(fastrnn.cells.slstm, I, H),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def traced(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are looked at
        return torch.jit.trace(module, x)


def results(network, x):
    x = x.clone().requires_grad_()
    y = network(x)[0]
    parameters = dict(sorted(network.named_parameters()))
    gradients = torch.autograd.grad(loss_of([y]), [x, *parameters.values()])
    return dict(zip(["y", "x", *parameters], [y, *gradients], strict=True))


@needs_cpu_library
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_trace_runs_trains_and_is_saved(kind):
    torch.manual_seed(0)
    module, x = NETWORKS[kind]().eval(), torch.randn(T, B, I)
    want, network = results(module, x), traced(module, x)
    torch.testing.assert_close(results(network, x), want)
    file = io.BytesIO()
    torch.jit.save(network, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(results(loaded, x), want)
    longer = torch.randn(T + 3, B + 1, I)
    with torch.no_grad():
        without = traced(module, x)
        for each in (network, loaded, without):
            torch.testing.assert_close(each(longer)[0], module(longer)[0])


@needs_cpu_library
def test_a_frozen_network():
    module, x = NETWORKS["layer norm"]().requires_grad_(False), torch.randn(T, B, I)
    torch.testing.assert_close(traced(module, x)(x)[0], module(x)[0])
