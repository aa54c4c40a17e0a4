"""Calls of one step without gradients read the weights in place, as `step` does."""

import pytest
import torch

import fastrnn
from fastrnn import network
from fastrnn.backends import cpu

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=f"the C++ library is missing: {cpu.MISSING}")


def tensors(result):
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


@pytest.fixture
def used(monkeypatch):
    """The calls that ran by the operation of `step`, which small networks take, too."""
    monkeypatch.setattr(network, "LEAST_WEIGHTS", 0)
    calls, run = [], network._one_step

    def noted(*arguments):
        calls.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(network, "_one_step", noted)
    return calls


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_equals_a_call_with_gradients(used, kind, options, batched):
    torch.manual_seed(0)
    module = getattr(fastrnn, kind)(5, 7, backend="cpu", **options)
    shape = (3, 1, 5) if options.get("batch_first") else (1, 3, 5)
    x = torch.randn(shape if batched else (1, 5))
    state = None
    for step in (1, 2):
        expected = tensors(module(x, state))
        with torch.no_grad():
            result = module(x, state)
        assert len(used) == step
        for found, wanted in zip(tensors(result), expected, strict=True):
            assert found.shape == wanted.shape and not found._is_view()
            torch.testing.assert_close(found, wanted.detach())
        state = result[1]


@pytest.mark.parametrize(
    ("shape", "options", "dtype"),
    [
        ((2, 3, 5), {}, torch.float32),
        ((1, 3, 5), {"bidirectional": True}, torch.float32),
        ((1, 33, 5), {}, torch.float32),
        ((1, 3, 5), {}, torch.bfloat16),
        ((1, 3, 5), {"clip_state_grad_value": 1.0}, torch.float32),
    ],
    ids=str,
)
def test_other_calls_do_not(used, shape, options, dtype):
    """More steps, more sequences than pay, other dtypes, other modules."""
    module = fastrnn.LSTM(5, 7, backend="cpu", dtype=dtype, **options)
    with torch.no_grad():
        module(torch.randn(shape, dtype=dtype))
    assert not used


def test_small_networks_with_more_than_few_sequences_do_not(used, monkeypatch):
    monkeypatch.setattr(network, "LEAST_WEIGHTS", 3 * 7 * 7 + 1)
    few, more = torch.randn(1, network.FEW_ROWS, 5), torch.randn(1, network.FEW_ROWS + 1, 5)
    with torch.no_grad():
        fastrnn.GRU(5, 7, backend="cpu")(more)
        assert not used
        fastrnn.GRU(5, 8, backend="cpu")(more)
        fastrnn.GRU(5, 7, backend="cpu")(few)
    assert len(used) == 2


def test_weights_changed_by_any_means_count(used):
    module, x = fastrnn.GRU(5, 7, backend="cpu"), torch.randn(1, 2, 5)
    with torch.no_grad():
        before, _ = module(x)
        module.weight_hh_l0.data.mul_(2)
        module.weight_ih_l0.data.mul_(2)
        after, _ = module(x)
    assert len(used) == 2 and not torch.allclose(before, after)
