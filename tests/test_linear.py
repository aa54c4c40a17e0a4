"""`linear` is torch's product: its values, its derivatives, in any layout and from any number of threads."""

import time

import pytest
import torch
import torch.nn.functional as F

from fastrnn import aten
from fastrnn.linear import LEAST_WORK, LONGEST_SUM, ONEDNN, linear

M = 259
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="oneDNN takes no float32 products on this processor")


@pytest.fixture
def small_products_too(monkeypatch):
    monkeypatch.setattr("fastrnn.linear.LEAST_WORK", 1)


def operands(M, K, N, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype) for shape in ((M, K), (N, K), (N,)))


def is_onednns(y):
    return "Linear" in y.grad_fn.next_functions[0][0].name()


@needs_onednn
@pytest.mark.usefixtures("small_products_too")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("K", [1, 3, 17, 65, LONGEST_SUM, 3000])
def test_values_and_gradients_within_twice_torchs_error(K, bias):
    """In float32 against float64; the floor is eight roundings of the largest element."""
    leaves = operands(M, K, 33)
    exact = [t.double().requires_grad_() for t in leaves]
    dy = operands(M, 33, 1)[0]

    def results(function, x, weight, b):
        x, weight, b = (t.detach().clone().requires_grad_() for t in (x, weight, b))
        y = function(x.unsqueeze(0), weight, b if bias else None)
        assert function is not linear or is_onednns(y) == (K <= LONGEST_SUM)
        wanted = (x, weight, b) if bias else (x, weight)
        return (y.squeeze(0), *torch.autograd.grad(y, wanted, dy.to(y.dtype).unsqueeze(0)))

    for ours, torchs, truth in zip(
        results(linear, *leaves), results(F.linear, *leaves), results(F.linear, *exact), strict=True
    ):
        error, allowed = ((y - truth).abs().max() for y in (ours, torchs))
        assert error <= 2 * allowed + 8 * 2**-24 * truth.abs().max()


@needs_onednn
@pytest.mark.usefixtures("small_products_too")
def test_second_derivatives():
    """Exact in the numbers used here: small integers, whose sums float32 holds."""
    x, weight, _ = (t.mul(2).round().requires_grad_() for t in operands(M, 4, 5))
    y = linear(x, weight)
    assert is_onednns(y)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.equal(dx, 2 * y @ weight)
    (ddw,) = torch.autograd.grad(dx.sum(), weight)
    w = weight.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad((2 * (x.detach() @ w.t()) @ w).sum(), w)
    assert torch.equal(ddw, expected)


@needs_onednn
@pytest.mark.usefixtures("small_products_too")
def test_same_bits_from_any_layout_and_any_number_of_threads():
    x, weight, bias = operands(333, 250, 130)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = linear(x, weight, bias)
        torch.set_num_threads(2)
        assert torch.equal(linear(x, weight, bias), expected)
    finally:
        torch.set_num_threads(threads)
    wide = x.new_zeros(333, 500)
    wide[:, ::2] = x
    # oneDNN reads other layouts in another order: equal within its sums' rounding (250 terms of order one).
    for layout in ((x.t().contiguous().t(), weight), (wide[:, ::2], weight.t().contiguous().t())):
        torch.testing.assert_close(linear(*layout, bias), expected, rtol=0, atol=1e-4)
    alike = linear(x[:1].expand(M, 250), weight, bias)
    torch.testing.assert_close(alike, expected[:1].expand(M, 130), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((300, 400), torch.float64), ((3, 4), torch.float32), ((300, 400), torch.bfloat16), ((0, 4), torch.float32)],
    ids=str,
)
def test_torchs_own_for_other_types_and_little_work(monkeypatch, shape, dtype):
    monkeypatch.setattr("fastrnn.linear.HALVES_WITHOUT_ONEDNN", ())
    x, weight, bias = (t.requires_grad_() for t in operands(*shape, 60, dtype))
    y = linear(x, weight, bias)
    assert torch.equal(y, F.linear(x, weight, bias)) and y.grad_fn.name() == "AddmmBackward0"


@needs_onednn
def test_onednn_takes_much_work_of_short_sums():
    rows = LEAST_WORK // LONGEST_SUM // 16
    for M, K, taken in ((rows, LONGEST_SUM, True), (rows - 1, LONGEST_SUM, False), (rows, LONGEST_SUM + 1, False)):
        x, weight, _ = (t.requires_grad_() for t in operands(M, K, 16))
        assert is_onednns(linear(x, weight)) == taken


@needs_onednn
@pytest.mark.usefixtures("small_products_too")
def test_no_layout_of_the_weight_takes_far_longer():
    """The fastest of three in processor time; a layout that oneDNN has no kernel for took a hundred times as long."""

    x = torch.randn(M, 256)

    def seconds(weight):
        found = []
        for _ in range(3):
            begin = time.process_time()
            linear(x, weight)
            found.append(time.process_time() - begin)
        return min(found)

    weight = torch.randn(512, 256)
    wide = torch.randn(512, 512)
    usual = seconds(weight)
    for other in (weight.t().contiguous().t(), wide[:, :256], wide[:, ::2]):
        assert seconds(other) < 10 * usual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_that_the_processor_does_not_multiply_go_by_way_of_float32(monkeypatch, dtype):
    monkeypatch.setattr("fastrnn.linear.HALVES_WITHOUT_ONEDNN", {torch.bfloat16, torch.float16})
    leaves = [t.to(dtype).requires_grad_() for t in (torch.randn(4, 3, 300), torch.randn(40, 300), torch.randn(40))]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    y, exact = linear(*leaves), linear(*wide)
    dy = torch.randn(4, 3, 40).to(dtype)
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    for ours, right in zip(found, [exact, *torch.autograd.grad(exact, wide, dy.float())], strict=True):
        assert ours.dtype == dtype and torch.equal(ours, right.to(dtype))


def test_without_onednn_no_half_type_is_asked_for(monkeypatch):
    """Builds without oneDNN, as those for macOS, have no operation that could be asked."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert aten._halves_without_onednn() == frozenset()
