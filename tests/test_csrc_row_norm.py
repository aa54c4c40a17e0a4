"""The norms of the C++ scan: right over the whole range of their dtype with denormals; inf and NaN come through."""

import pytest
import torch

from fastrnn.arguments import IncomingGradients, Kept, ScanInputs, Walk
from fastrnn.backends import cpu

if cpu.MISSING is not None:
    pytest.skip(f"csrc: {cpu.MISSING}", allow_module_level=True)


def row_norm(x):
    """Norms over the rows of x: those of dL/dh in one step of a network, carried from the next step and in total."""
    B, H = x.shape
    nothing = x.new_zeros(1, B, H)
    inputs = ScanInputs(None, x.new_zeros(H, H), x.new_zeros(B, H))
    found = cpu.backward(
        IncomingGradients(dh_n=x), Kept(nothing, None, nothing), inputs, Walk("rnn_tanh", False, "cpu"), norms=True
    )
    total, carried = found.norms[:, 0, 0]
    assert torch.equal(total.nan_to_num(nan=-1), carried.nan_to_num(nan=-1))
    return total


# Two roundings at the end (square root, cast), so one unit of the last place; denormals have a unit of 2^-149.
@pytest.mark.parametrize("exponent", range(-44, 38))
def test_row_norm_over_the_range_of_float32(exponent):
    x = torch.randn(5, 33, dtype=torch.float64) * 10.0**exponent / 20
    x = x.float()
    norm = row_norm(x)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), x.double().norm(dim=1), rtol=1.2e-7, atol=2.0**-149)


# 33 squares add up in some order: at most 33 roundings of 1.1e-16, and the unit of float64's denormals.
@pytest.mark.parametrize("exponent", (-1074, -1040, -1000, -500, 0, 500, 1000, 1018))
def test_row_norm_over_the_range_of_float64(exponent):
    x = torch.randint(-9, 10, (5, 33)).double()
    x[:, 0] = 1  # no zero row
    expected = x.norm(dim=1)
    norm = row_norm(torch.ldexp(x, torch.tensor(exponent)))
    torch.testing.assert_close(norm, torch.ldexp(expected, torch.tensor(exponent)), rtol=4e-15, atol=2.0**-1074)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_row_norm_of_zero_inf_and_nan(dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0, 0, 0], [1, -inf, 2], [1, nan, 2], [inf, nan, 1], [1e-30, 0, 0], [-3e38, 0, 0]], dtype=dtype)
    expected = torch.tensor([0, inf, nan, nan, 1e-30, 3e38], dtype=dtype)
    assert torch.equal(row_norm(x).nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
