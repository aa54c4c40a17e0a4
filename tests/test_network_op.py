"""The whole-network operation of the C++ library against torch.nn, and what must not show that it ran."""

import pytest
import torch
from setups import needs_cpu_library
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import functional, network

pytestmark = needs_cpu_library
KINDS = [("LSTM", {}), ("GRU", {}), ("RNN", {"nonlinearity": "tanh"}), ("RNN", {"nonlinearity": "relu"})]
LAYOUTS = [
    {}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "batch_first": True, "bias": False},
]  # fmt: skip
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)


def twins(kind, dtype=torch.float64, **options):
    """torch.nn's module and ours, with the same weights."""
    torch.manual_seed(1)
    theirs = getattr(torch.nn, kind)(3, 5, dtype=dtype, **options)
    ours = getattr(fastrnn, kind)(3, 5, dtype=dtype, backend="cpu", **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture
def only_the_operation(monkeypatch):
    """Makes the general path fail."""
    monkeypatch.setattr(functional, "recurrent", None)


def states_of(module, batch):
    walks = module.num_layers * (1 + module.bidirectional)
    shape = (walks, 5) if batch is None else (walks, batch, 5)
    h, c = (torch.randn(shape, dtype=module.weight_ih_l0.dtype, requires_grad=True) for _ in "hc")
    return (h, c) if isinstance(module, torch.nn.LSTM) else h


@kinds
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.usefixtures("only_the_operation")
def test_outputs_and_all_gradients_are_torch_nns(kind, options, layout, batch, given):
    theirs, ours = twins(kind, **options, **layout)
    shape = (4, 3) if batch is None else (2, 4, 3) if theirs.batch_first else (4, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    hx = states_of(theirs, batch) if given else None
    found = []
    for module in (theirs, ours):
        outputs = tree_leaves(module(x, hx))
        loss = sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outputs)
        inputs = [x, *(tree_leaves(hx) if given else ()), *module.parameters()]
        found.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        for want, got in zip(tree_leaves(theirs(x, hx)), tree_leaves(ours(x, hx)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.usefixtures("only_the_operation")
def test_other_dtypes(monkeypatch, kind, dtype, tolerance, large):
    """Of all sizes where the C++ library's product is the fastest."""
    if large:
        monkeypatch.setattr(network, "takes_long_calls", lambda: True)
        monkeypatch.setattr(network, "LARGEST_PRODUCT", 0)
    _, ours = twins(kind, dtype)
    exact, _ = twins(kind, torch.float64)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, 3).to(dtype)
    outputs = [tree_leaves(ours(x)), tree_leaves(exact(x.double()))]
    grads = [torch.autograd.grad(out[0].sum(), m.parameters()) for out, m in zip(outputs, (ours, exact), strict=True)]
    for got, want in zip((*outputs[0], *grads[0]), (*outputs[1], *grads[1]), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@kinds
@pytest.mark.usefixtures("only_the_operation")
def test_only_one_output_has_a_gradient(kind, options):
    for k in range(3 if kind == "LSTM" else 2):
        theirs, ours = twins(kind, num_layers=2, **options)
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        found = [torch.autograd.grad(tree_leaves(m(x))[k].sum(), m.parameters()) for m in (theirs, ours)]
        torch.testing.assert_close(found[1], found[0])


@pytest.mark.usefixtures("only_the_operation")
def test_the_user_may_change_the_outputs_but_not_a_weight_before_the_backward():
    _, ours = twins("GRU", num_layers=2)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    want = torch.autograd.grad(ours(x)[0].sum(), ours.parameters())
    y, h_n = ours(x)
    loss = y.sum()
    with torch.no_grad():
        y.zero_(), h_n.zero_()
    for got, one in zip(torch.autograd.grad(loss, ours.parameters()), want, strict=True):
        assert torch.equal(got, one)
    loss = ours(x)[0].sum()
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("only_the_operation")
def test_gradients_of_biases_do_not_share_memory():
    _, ours = twins("LSTM")
    ours(torch.randn(4, 2, 3, dtype=torch.float64))[0].sum().backward()
    assert ours.bias_ih_l0.grad.data_ptr() != ours.bias_hh_l0.grad.data_ptr()


@pytest.mark.usefixtures("only_the_operation")
def test_frozen_weights_and_nan():
    _, ours = twins("LSTM")
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    assert ours.requires_grad_(False)(x)[0].grad_fn is None
    ours.weight_hh_l0.requires_grad_(True)
    ours(x)[0].sum().backward()
    assert ours.weight_hh_l0.grad is not None and ours.weight_ih_l0.grad is None
    x[1, 0, 0] = float("nan")
    y, _ = ours(x)
    assert y[1:, 0].isnan().all() and not y[:, 1].isnan().any() and not y[0].isnan().any()


@pytest.mark.usefixtures("only_the_operation")
def test_threads_give_the_same_bits():
    _, ours = twins("LSTM", torch.float32)
    x, threads = torch.randn(20, 40, 3), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y, _ = ours(x)
            found.append([y, *torch.autograd.grad(y.sum(), ours.parameters())])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@kinds
def test_second_derivatives(kind, options):
    _, ours = twins(kind, num_layers=2, bidirectional=True, **options)
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def penalty(backend):
        ours.backend = backend
        (dx,) = torch.autograd.grad(ours(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, ours.weight_hh_l0, ours.weight_ih_l1])

    for got, want in zip(penalty("cpu"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_what_the_operation_leaves_to_the_general_path(monkeypatch):
    _, ours = twins("GRU", torch.float32)
    x = torch.randn(4, 2, 3)
    monkeypatch.setattr(network, "run", None)

    class Own(fastrnn.GRU):
        backend = property(lambda self: "cpu", lambda self, name: None)

    Own(3, 5)(x)
    with torch.autocast("cpu", torch.bfloat16):
        ours(x)
    ours(x, lengths=torch.tensor([4, 0]))
    fastrnn.GRU(3, 5, dtype=torch.bfloat16)(x.bfloat16(), lengths=torch.tensor([4, 2]))
    torch.func.functional_call(ours, dict(ours.named_parameters()), (x,), {"decay": torch.ones(4, 2)})
    torch.vmap(ours)(x.unsqueeze(0))
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        ours(torch.autograd.forward_ad.make_dual(x, x))
    with pytest.raises(RuntimeError, match=r"input\.size"):
        ours(torch.randn(4, 2, 7))


LONG = [
    ("LSTM", {"num_layers": 2, "bidirectional": True}, 70, 16, 48, 96),
    ("LSTM", {"bias": False, "batch_first": True}, 90, 13, 33, 130),
    ("GRU", {"bidirectional": True}, 300, 7, 40, 72),
    ("GRU", {}, 1, 700, 64, 72),
    ("RNN", {"num_layers": 2}, 2000, 1, 64, 72),
]


@pytest.mark.parametrize(("kind", "options", "steps", "batch", "input_size", "hidden_size"), LONG, ids=str)
@pytest.mark.usefixtures("only_the_operation")
def test_a_long_call_goes_in_chunks_of_steps(monkeypatch, kind, options, steps, batch, input_size, hidden_size):
    """With the products that only some processors take, on any. Not a multiple of the panels' width, nor of a chunk."""
    monkeypatch.setattr(network, "takes_long_calls", lambda: True)
    torch.manual_seed(2)
    ours = getattr(fastrnn, kind)(input_size, hidden_size, backend="cpu", **options)
    exact = getattr(torch.nn, kind)(input_size, hidden_size, dtype=torch.float64, **options)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn((batch, steps, input_size) if ours.batch_first else (steps, batch, input_size))
    shape = (ours.num_layers * (1 + ours.bidirectional), batch, hidden_size)
    states = [torch.randn(shape) for _ in range(1 + (kind == "LSTM"))]
    found = []
    for module, dtype in ((ours, torch.float32), (exact, torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in (x, *states)]
        outputs = tree_leaves(module(inputs[0], tuple(inputs[1:]) if kind == "LSTM" else inputs[1]))
        generator = torch.Generator().manual_seed(3)
        loss = sum((out * torch.randn(out.shape, dtype=torch.float64, generator=generator)).sum() for out in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, [*inputs, *module.parameters()])])
        if module is ours:
            with torch.no_grad():
                again = tree_leaves(module(inputs[0], tuple(inputs[1:]) if kind == "LSTM" else inputs[1]))
            assert all(torch.equal(one, other) for one, other in zip(again, outputs, strict=True))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 2e-6 * want.norm()


def test_the_operation_refuses_what_it_would_misread():
    weights = [torch.zeros(20, 3), torch.zeros(20, 5)]
    shape, x = ("lstm", 1, False, False, False, False), torch.zeros(4, 2, 3)
    forward, backward = torch.ops.fastrnn_c.network_forward, torch.ops.fastrnn_c.network_backward
    with pytest.raises(RuntimeError, match="at least one step"):
        forward(x[:0], None, None, None, None, weights, *shape, True)
    with pytest.raises(RuntimeError, match=r"h0 must have shape \[1, 2, 5\]"):
        forward(x, None, None, torch.zeros(1, 2, 4), None, weights, *shape, True)
    y, h_n, _, kept = forward(x, None, None, None, None, weights, *shape, True)
    for bad, message in (
        ({"kept": kept[1:]}, "kept must be"),
        ({"dy": y[1:]}, "dy must be"),
        ({"dh_n": h_n[0]}, r"dh_n must have shape \[1, 2, 5\]"),
        ({"dc_n": h_n.double()}, "dc_n must"),
    ):
        given = {"dy": y, "dh_n": None, "dc_n": None, "kept": kept, **bad}
        of = given["dy"], given["dh_n"], given["dc_n"]
        with pytest.raises(RuntimeError, match=message):
            backward(*of, x, None, None, None, None, weights, given["kept"], *shape, None, None, False, True)
