"""The C++ library's product over the rows of all steps: its values, its derivatives, its bits."""

import pytest
import torch
import torch.nn.functional as F

from fastrnn import linear as module
from fastrnn.backends import cpu

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=f"csrc: {cpu.MISSING}")
PANEL = module.PANEL


def operands(M, K, N):
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=rng) for shape in ((M, K), (N, K), (N,)))


def own(x, weight, bias=None):
    return torch.ops.fastrnn_c.linear(x, weight, bias)


# 1,025 terms are packed in two parts, 129 are summed in two, and rows come in blocks of 48 and tiles of 3, 2 and 1.
@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 32), (53, 129, 64), (49, 1025, 32), (5, 0, 32), (0, 3, 32)])
def test_values_in_any_layout_within_twice_torchs_error(M, K, N):
    x, weight, bias = operands(M, K, N)
    exact = F.linear(x.double(), weight.double(), bias.double())
    allowed = 2 * (F.linear(x, weight, bias) - exact).abs().amax() if M else 0
    expected = own(x, weight, bias)
    assert expected.shape == (M, N)
    assert ((expected - exact).abs() <= allowed + 8 * 2**-24 * exact.abs().max()).all() if M else True
    by_columns = x.t().contiguous().t(), weight.t().contiguous().t(), bias
    spread = (
        torch.stack((x, x), 2)[..., 0],
        torch.stack((weight, weight), 2)[..., 1],
        torch.stack((bias, bias), 1)[:, 0],
    )
    for layout in (by_columns, spread):
        assert torch.equal(own(*layout), expected)


def test_infinities_and_nan_stay_in_their_rows():
    x, weight, _ = operands(50, 40, 32)
    x[3, 5], x[7, 2] = float("nan"), float("inf")
    finite = own(x, weight).isfinite().all(1)
    assert not finite[3]
    assert not finite[7]
    assert finite.sum() == 48


def test_wrong_arguments_are_refused():
    x, weight, bias = operands(4, 5, 32)
    for args, words in (
        ((x[:, :4], weight, None), "as many columns"),
        ((x, weight[:31], None), "multiple of 32"),
        ((x.double(), weight, None), "float32"),
        ((x, weight, bias[:3]), "bias"),
    ):
        with pytest.raises(RuntimeError, match=words):
            own(*args)


@pytest.fixture
def always_own(monkeypatch):
    monkeypatch.setattr(module, "LEAST_WORK", 1)
    monkeypatch.setattr(module, "ONEDNN", True)
    monkeypatch.setattr(module, "has_own", lambda: True)


@pytest.mark.usefixtures("always_own")
def test_gradients_are_torchs():
    leaves = [t.requires_grad_() for t in operands(70, 64, 96)]
    dy = operands(70, 96, 1)[0]
    y = module.linear(*leaves)
    assert "Linear" in y.grad_fn.next_functions[0][0].name() or "Linear" in y.grad_fn.name()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(F.linear(*exact), exact, dy.double())
    for ours, right in zip(torch.autograd.grad(y, leaves, dy), truth, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-4)


def test_same_bits_on_any_number_of_threads():
    x, weight, bias = operands(700, 130, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((own(x, weight, bias), own(x.t(), x[:, :32].t().contiguous())))
    finally:
        torch.set_num_threads(threads)
    for more in results[1:]:
        assert all(map(torch.equal, more, results[0]))
