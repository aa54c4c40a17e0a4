"""Autocast and the half types on a CPU: torch.nn's dtypes, and how far results are from float64."""

import pytest
import torch
from half_lstm import under_autocast
from setups import CPU_REASON, H, I, agree, every_backend, every_kind, flat, make, random, twin
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

T, B = 4, 3


NOT_PLAIN = {
    "plain": {},
    "tap": {"tap": True},
    "lengths": {"lengths": torch.tensor([4, 2, 1])},
    "packed": {"tap": True},
}


@pytest.mark.parametrize("call", NOT_PLAIN)
@every_kind
def test_autocast_gives_torch_nns_dtypes(kind, call):
    """bfloat16 autocast on the CPU: outputs, states and gradients have torch.nn's dtypes, plain call or not."""
    ours = make(kind, dtype=torch.float32)
    theirs = twin(kind, ours, dtype=torch.float32)
    x, options = random(T, B, I, dtype=torch.float32), dict(NOT_PLAIN[call])
    if options.pop("tap", False):
        options["tap"] = torch.zeros(1, 2, 2 if kind.startswith("LSTM") else 1, T, B, requires_grad=True)
    source = pack_padded_sequence(x, torch.tensor([4, 2, 1])) if call == "packed" else x
    expected, expected_state = under_autocast(theirs, torch.bfloat16, source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, state = ours(source, **options)
    expected, got = (y.data if call == "packed" else y for y in (expected, got))
    pairs = zip((got, *flat(state)), (expected, *flat(expected_state)), strict=True)
    assert [a.dtype for a, _ in pairs] == [b.dtype for b in (expected, *flat(expected_state))]
    got.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all() and x.grad.any()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
    if call != "lengths":
        # bfloat16 keeps 8 bits, 4e-3 relative; four steps of states below 1
        torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=2e-2)
    if "tap" in options:
        assert options["tap"].grad.dtype == torch.float32 and options["tap"].grad.any()


@pytest.mark.parametrize("steps", [5, 70])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_autocast_gives_torch_nns_dtypes_for_a_state_of_another_dtype(kind, steps):
    torchs = getattr(torch.nn, kind)(3, 4)
    ours, x, h = fastrnn.convert(torchs), torch.randn(steps, 2, 3), torch.randn(1, 2, 4).bfloat16()
    hx = (h, h.clone()) if kind == "LSTM" else h
    want = under_autocast(torchs, torch.bfloat16, x, hx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("auto", "reference"):
            with fastrnn.backend(backend):
                y, _ = ours(x, hx)
            assert y.dtype == want[0].dtype, backend


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_autocast_gives_the_dtypes_of_torch_nns_cells(kind, half, state, backend):
    if backend == "cpu" and CPU_REASON is not None:
        pytest.skip(f"backend cpu: {CPU_REASON}")
    torchs, x = getattr(nn, kind)(I, H), random(B, I, dtype=torch.float32)
    ours = fastrnn.convert(torchs)
    h, c = (None if state is None else random(B, H, seed=k, requires_grad=False).to(state) for k in (2, 3))
    hx = (h, c) if kind == "LSTMCell" and state is not None else h
    with torch.autocast("cpu", dtype=half), fastrnn.backend(backend):
        want, got = flat(torchs(x, hx)), flat(ours(x, hx))
    assert [v.dtype for v in got] == [v.dtype for v in want]
    # bfloat16 keeps 8 bits, 4e-3 relative: gates of some ten terms of order one
    agree([v.float() for v in got], [v.float() for v in want], rtol=0, atol=2e-2)


@every_backend
def test_autocast_leaves_the_cell_state_alone(backend):
    """c0 = 4 + 2^-6 is 4 in bfloat16. Gates that take 1 off it at each of 4 steps leave the 2^-6 to be seen."""
    ours = fastrnn.LSTM(I, H, backend=backend)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
        ours.bias_ih_l0.view(4, H).copy_(torch.tensor([[100.0], [100.0], [-100.0], [100.0]]))  # i, f, o = 1, g = -1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c0 = torch.full((1, B, H), 4 + 2.0**-6)
        _, (_, c_n) = ours(torch.zeros(4, B, I), (torch.zeros(1, B, H), c0))
    assert c_n.dtype == torch.bfloat16 and torch.equal(c_n, torch.full_like(c_n, 2.0**-6))


@every_backend
@every_kind
def test_autocast_is_the_bfloat16_module(kind, backend):
    """It gives the same bits, forward and backward: autocast does not reach into the scan, whose sums are float32."""
    ours, x = make(kind, backend, dtype=torch.float32), random(T, B, I, dtype=torch.float32)
    half, x_half = make(kind, backend, dtype=torch.float32).bfloat16(), x.detach().bfloat16().requires_grad_()
    lengths = torch.tensor([4, 2, 3])
    expected, _ = half(x_half, lengths=lengths)
    expected_gradients = torch.autograd.grad(expected.sum(), (x_half, *half.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = ours(x, lengths=lengths)
        gradients = torch.autograd.grad(got.sum(), (x, *ours.parameters()))
    assert torch.equal(got.bfloat16(), expected)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(gradients, expected_gradients, strict=True))


@every_backend
@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
@every_kind
def test_dtypes_on_the_cpu(kind, dtype, atol, backend):
    """Against the same weights in float64. atol: four roundings of states below 1 (2^-8, 2^-11, 2^-24)."""
    ours = make(kind, backend, dtype=dtype)
    exact = make(kind, "reference").requires_grad_()
    exact.load_state_dict(ours.state_dict())
    x = random(T, B, I).detach().to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, state = ours(x)
    expected, _ = exact(wide)
    assert {v.dtype for v in (y, *flat(state))} == {dtype}
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)
    y.sum().backward()
    expected.sum().backward()
    assert x.grad.dtype == dtype and {p.grad.dtype for p in ours.parameters()} == {dtype}
    # gradients sum up to T*B = 12 rounded terms of order 1
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=4 * atol)
    torch.testing.assert_close(ours.weight_hh_l0.grad.double(), exact.weight_hh_l0.grad, rtol=0, atol=12 * atol)
