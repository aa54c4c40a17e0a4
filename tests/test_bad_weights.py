"""Weights that were replaced, moved or taken away since the constructor: refused, or followed."""

import pytest
import torch

import fastrnn

T, B, I, H = 5, 3, 4, 6


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("steps", [4, 40])
@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_hh_l0", "weight_ih_l1"])
def test_weights_that_were_left_on_another_device_or_taken_away(kind, steps, name):
    """As after a load_state_dict(assign=True) that lacks some: no uninitialised memory is read."""
    module, x = getattr(fastrnn, kind)(I, H, 2), torch.zeros(steps, B, I)
    setattr(module, name, torch.nn.Parameter(getattr(module, name).to("meta")))
    for call in ({}, {"lengths": torch.full((B,), steps)}):
        with pytest.raises(RuntimeError, match="device"):
            module(x, **call)
    setattr(module, name, None)
    for call in ({}, {"lengths": torch.full((B,), steps)}):
        with pytest.raises((TypeError, AttributeError)):
            module(x, **call)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("steps", [4, 40])
@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_hh_l1", "weight_ih_l1", "bias_ih_l0"])
def test_weights_of_a_wrong_shape(kind, steps, name):
    """torch's kernels would read beyond them."""
    module = getattr(fastrnn, kind)(I, H, 2)
    setattr(module, name, torch.nn.Parameter(getattr(module, name)[:-1].detach().clone()))
    with pytest.raises(RuntimeError, match="should have shape"):
        module(torch.zeros(steps, B, I))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_module_whose_weights_were_all_made_wider(kind):
    """The weights decide how large the network is, as when pruning makes them narrower."""
    wide, module = getattr(torch.nn, kind)(I, 2 * H), getattr(fastrnn, kind)(I, H)
    for name, parameter in wide.named_parameters():
        setattr(module, name, torch.nn.Parameter(parameter.detach()))
    x = torch.randn(4, B, I)
    torch.testing.assert_close(module(x)[0], wide(x)[0])
