"""Derivatives in forward mode of what torch.nn cannot run: users' cells, and the library's own features."""

import pytest
import torch
from setups import agree, random
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp
from user_cells import OWN

import fastrnn

T, B, I, H = 3, 2, 2, 4

FEATURES = {
    "lengths": ({}, {"lengths": torch.tensor([3, 1])}),
    "resets, decay": ({}, {"reset_mask": torch.eye(T, B).bool(), "decay": torch.full((T, B, 1), 0.7).double()}),
    "both directions": ({"bidirectional": True, "num_layers": 2, "residual": True}, {"lengths": torch.tensor([3, 1])}),
    "layer norm": ({"layer_norm": True, "proj_size": 2}, {}),
    "heads": ({"num_heads": 2}, {}),
    "masks": ({"zoneout": 0.3, "recurrent_dropout": 0.3, "weight_dropout": 0.2}, {}),
}


def output(module, call):
    """The output as a function of the input, with the same masks at every call."""

    def of(x, **parameters):
        torch.manual_seed(1)
        return functional_call(module, parameters, (x,), call)[0]

    return of


def check_tangents(module, call):
    x, direction = random(T, B, I, requires_grad=False), random(T, B, I, requires_grad=False)
    y = output(module, call)
    jacobian = jacrev(y)(x)
    want = torch.einsum("tbhsci,sci->tbh", jacobian, direction)
    value, tangent = jvp(y, (x,), (direction,))
    agree([value, tangent, jacfwd(y, randomness="same")(x)], [y(x), want, jacobian])
    with forward_ad.dual_level():
        agree([forward_ad.unpack_dual(y(forward_ad.make_dual(x, direction))).tangent], [want])
    # Of the parameters: against the gradient of <y, direction of y>.
    cotangent = torch.randn_like(want)
    parameters = dict(module.named_parameters())
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    moved = jvp(lambda parameters: y(x, **parameters), (parameters,), (tangents,))[1]
    gradients = torch.autograd.grad((y(x, **parameters) * cotangent).sum(), list(parameters.values()))
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents.values(), strict=True))
    agree([(moved * cotangent).sum()], [expected])


@pytest.mark.parametrize("name", OWN)
def test_of_users_cells(name):
    cell = OWN[name]
    module = fastrnn.Recurrent(cell, I, H, dtype=torch.float64)
    check_tangents(module, {one: random(B, H, requires_grad=False) for one in cell.inputs})


@pytest.mark.parametrize("name", FEATURES)
def test_with_features(name):
    settings, call = FEATURES[name]
    check_tangents(fastrnn.LSTM(I, H, dtype=torch.float64, **settings), call)


def test_hessian():
    module = fastrnn.Recurrent(OWN["three"], I, H, dtype=torch.float64)
    y = output(module, {one: random(B, H, requires_grad=False) for one in "kl"})
    x = random(T, B, I, requires_grad=False)
    agree([hessian(lambda x: y(x).square().sum())(x)], [jacrev(jacrev(lambda x: y(x).square().sum()))(x)])


def test_of_a_large_product():
    """A product that the library's own function takes elsewhere."""
    module, x = fastrnn.LSTM(64, 256, layer_norm=True), torch.randn(64, 4, 64)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(module(forward_ad.make_dual(x, x))[0]).tangent is not None


@pytest.mark.parametrize("settings", [{"clip_state_grad_value": 0.1}, {"clip_state_grad_norm": 1.0}], ids=str)
def test_what_changes_the_gradient_is_refused(settings):
    module, x = fastrnn.LSTM(I, H, **settings), torch.randn(T, B, I)
    with pytest.raises(
        NotImplementedError, match="clipping and norms of the gradient have no derivative in forward mode"
    ):
        jvp(lambda x: module(x)[0], (x,), (x,))
    with forward_ad.dual_level():  # nothing has a tangent here
        assert torch.equal(module(x)[0], module(x)[0])
