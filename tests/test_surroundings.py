"""Modules inside larger programs: checkpointing, parametrized and tied weights, meta and fake tensors."""

import pytest
import torch
import torch.nn.functional as F
from setups import H, I, agree, every_backend, make, random
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn

T, B = 4, 3


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, backend):
    """Recomputing gives the same gradients and the same tap, the zoneout masks redrawn from the stored generator."""
    ours = make("LSTM", backend, num_layers=2, zoneout=0.3)

    def found(call):
        torch.manual_seed(5)
        x, tap = random(T, B, I), torch.zeros(2, 2, 2, T, B, dtype=torch.float64, requires_grad=True)
        ours.zero_grad()
        y = call(lambda x, tap: ours(x, tap=tap)[0], x, tap)
        y.square().sum().backward()
        return [x.grad, tap.grad, *(p.grad.clone() for p in ours.parameters())]

    expected = found(lambda f, *a: f(*a))
    got = found(lambda f, *a: checkpoint(f, *a, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert expected[1].any()


@every_backend
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_parametrized_weights(name, backend):
    """weight_norm and orthogonal on W_hh: torch's own functional form of the same network is the oracle."""
    torch.manual_seed(0)
    ours = getattr(fastrnn, name)(I, H, dtype=torch.float64, backend=backend)
    nn.utils.parametrizations.weight_norm(ours, "weight_ih_l0")
    nn.utils.parametrizations.orthogonal(ours, "weight_hh_l0") if name == "RNN" else None
    theirs, x = getattr(nn, name)(I, H, dtype=torch.float64), random(T, B, I)
    weights = {key: getattr(ours, key) for key, _ in theirs.named_parameters()}
    leaves = list(ours.parameters())
    expected = torch.autograd.grad(functional_call(theirs, weights, (x,))[0].square().sum(), leaves)
    got = torch.autograd.grad(ours(x)[0].square().sum(), leaves)
    agree(got, expected)
    if name == "RNN":
        w = ours.weight_hh_l0
        agree([w @ w.t()], [torch.eye(H, dtype=torch.float64)])
    ours.flatten_parameters()
    optimiser = torch.optim.SGD(ours.parameters(), lr=0.1)
    before = ours(x)[0].detach()
    ours(x)[0].square().sum().backward()
    optimiser.step()
    assert not torch.allclose(ours(x)[0], before), "a step reaches the weights that the call uses"


def test_swapped_and_tied_weights():
    """Parameters are read by name at the call: a tied or exchanged one takes effect."""
    ours = make("RNN")
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(H, H, dtype=torch.float64))
    x = random(T, B, I)
    agree([ours(x)[0]], [F.linear(x, ours.weight_ih_l0, ours.bias_ih_l0 + ours.bias_hh_l0).tanh()])
    ours.weight_ih_l0.data = ours.weight_ih_l0.data * 2
    agree([ours(x)[0]], [F.linear(x, ours.weight_ih_l0, ours.bias_ih_l0 + ours.bias_hh_l0).tanh()])


@pytest.mark.parametrize("extra", [{}, {"lengths": torch.tensor([4, 2])}], ids=["plain", "lengths"])
def test_meta_tensors_give_shapes(extra):
    """A model on the meta device can be traced for its shapes, as torch.nn's can."""
    model = fastrnn.LSTM(3, 5, 2, bidirectional=True, device="meta")
    y, (h, c) = model(torch.empty(4, 2, 3, device="meta"), **extra)
    assert (y.shape, h.shape, c.shape) == ((4, 2, 10), (4, 2, 5), (4, 2, 5))


@pytest.mark.parametrize("extra", [{}, {"reset_mask": torch.zeros(70, 32, dtype=torch.bool)}], ids=["plain", "resets"])
def test_fake_tensors_go_forward_and_back(extra):
    """Memory estimators use them outside of any compiler."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fastrnn.GRU(256, 256)
        model(torch.randn(70, 32, 256), **extra)[0].sum().backward()
    assert model.weight_hh_l0.grad.shape == (768, 256)


@pytest.mark.parametrize("call", ["packed", "lengths"])
def test_the_default_device_is_for_new_tensors_only(call):
    model, x, lengths = fastrnn.GRU(3, 4), torch.randn(70, 3, 3), torch.tensor([70, 5, 2])
    packed = pack_padded_sequence(x, lengths)
    expected = model(packed)[0].data
    with torch.device("meta"):
        got = model(packed)[0].data if call == "packed" else model(x, lengths=lengths)[0]
    if call == "lengths":
        got = pack_padded_sequence(got, lengths).data
    torch.testing.assert_close(got, expected)
