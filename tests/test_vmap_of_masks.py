"""Masks that are drawn under vmap: the same for all samples or each its own, as vmap's `randomness` says."""

import pytest
import torch
from setups import H, I, every_backend

import fastrnn

T, B, SAMPLES = 4, 2, 3
NETWORKS = {
    "LSTM": lambda **settings: fastrnn.LSTM(I, H, **settings),
    "GRU-heads": lambda **settings: fastrnn.GRU(I, H, num_heads=5, **settings),
    "RNN": lambda **settings: fastrnn.RNN(I, H, leak=0.5, **settings),
    "janet": lambda **settings: fastrnn.Recurrent(fastrnn.cells.janet, I, H, **settings),
}
DROPOUTS = {
    "recurrent_dropout": {"recurrent_dropout": 0.5},
    "zoneout": {"zoneout": 0.5},
    "between layers": {"num_layers": 2, "dropout": 0.5, "locked_dropout": True},
    "weight_dropout": {"weight_dropout": 0.5},
}
every_network = pytest.mark.parametrize("network", NETWORKS)
every_dropout = pytest.mark.parametrize("dropout", DROPOUTS)


def setup(network, dropout, backend):
    torch.manual_seed(0)
    module = NETWORKS[network](dtype=torch.float64, backend=backend, **DROPOUTS[dropout])
    return module, torch.randn(T, B, I, dtype=torch.float64)


def gradients(module, several, randomness):
    """The gradients of the parameters for each of `several` inputs."""

    def loss(params, x):
        return torch.func.functional_call(module, params, (x,))[0].square().sum()

    torch.manual_seed(7)
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness=randomness)
    return mapped(dict(module.named_parameters()), several)


@every_backend
@every_dropout
@every_network
def test_the_same_masks_for_all_samples(network, dropout, backend):
    """Each sample's gradient is that of a call of its own with the same seed."""
    module, x = setup(network, dropout, backend)
    several = torch.stack([x, -x, 2 * x])
    found = gradients(module, several, "same")
    for k, one in enumerate(several):
        torch.manual_seed(7)
        want = torch.autograd.grad(module(one)[0].square().sum(), list(module.parameters()))
        for (name, _), gradient in zip(module.named_parameters(), want, strict=True):
            torch.testing.assert_close(found[name][k], gradient, msg=lambda m, name=name: f"{name}: {m}")


@every_backend
@every_dropout
@every_network
def test_masks_of_their_own(network, dropout, backend):
    """Of equal samples, the results differ."""
    module, x = setup(network, dropout, backend)
    found = gradients(module, x.expand(SAMPLES, T, B, I), "different")["weight_ih_l0"]
    assert found.isfinite().all()
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not torch.allclose(found[a], found[b])


@pytest.mark.parametrize("network", ["LSTM", "GRU-heads"])
def test_without_a_choice_vmap_refuses(network):
    module, x = setup(network, "zoneout", None)
    with pytest.raises(RuntimeError, match="randomness"):
        gradients(module, x.expand(SAMPLES, T, B, I), "error")
