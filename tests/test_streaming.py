"""`step`: one step after another gives what one call gives, with the weights as they are now."""

import pytest
import torch
from setups import needs_cpu_library
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

import fastrnn

pytestmark = needs_cpu_library


def streamed(module, xs, state=None):
    ys = []
    for x in xs:
        y, state = module.step(x, state)
        ys.append(y)
    return torch.stack(ys), state


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bias": False}, {"layer_norm": True}], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_steps_are_the_modules_call(kind, options):
    torch.manual_seed(0)
    module, xs = getattr(fastrnn, kind)(3, 5, **options).double(), torch.randn(4, 2, 3, dtype=torch.float64)
    want, got = module(xs), streamed(module, xs)
    for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
        assert not one.requires_grad
    module.batch_first = True
    torch.testing.assert_close(streamed(module, xs)[0], want[0], rtol=1e-11, atol=1e-12)


def test_steps_of_a_cell_with_inputs_and_of_a_projection():
    torch.manual_seed(0)
    module = fastrnn.LSTM(3, 5, proj_size=2)
    xs = torch.randn(4, 2, 3)
    torch.testing.assert_close(streamed(module, xs)[0], module(xs)[0])
    module = fastrnn.Recurrent(fastrnn.cells.leaky(), 3, 5)
    noise = torch.randn(2, 5)
    want = module(xs, noise=noise)[0]
    state, ys = None, []
    for x in xs:
        y, state = module.step(x, state, noise=noise)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys), want)


def _step_of_optimizer(module):
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), 0.1).step()


CHANGES = {
    "optimizer": _step_of_optimizer,
    "load_state_dict": lambda m: m.load_state_dict(fastrnn.GRU(3, 5).state_dict()),
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "replaced": lambda m: setattr(m, "weight_hh_l0", torch.nn.Parameter(torch.randn(15, 5))),
    "data": lambda m: m.weight_hh_l0.data.mul_(3),
    "parametrized": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_never_stale(change):
    torch.manual_seed(0)
    module, xs = fastrnn.GRU(3, 5), torch.randn(3, 2, 3)
    streamed(module, xs)
    CHANGES[change](module)
    xs = xs.to(next(module.parameters()).dtype)
    tolerance = 1e-2 if xs.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(streamed(module, xs)[0], module(xs)[0].detach(), rtol=tolerance, atol=tolerance)


def test_what_step_refuses():
    with pytest.raises(ValueError, match="bidirectional"):
        fastrnn.LSTM(3, 5, bidirectional=True).step(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"\[B, I\]"):
        fastrnn.LSTM(3, 5).step(torch.randn(3))
    with pytest.raises(RuntimeError):
        fastrnn.LSTM(3, 5).step(torch.randn(2, 4))
    with fastrnn.backend("reference"):
        assert fastrnn.LSTM(3, 5).step(torch.randn(2, 3))[0].shape == (2, 5)
