"""Same input, same bits: call after call, thread beside thread, whatever the allocator hands out."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from setups import every_backend, flat

import fastrnn

# Odd sizes, more than one vector register wide, so that tails and partial sums are there.
T, B, I, H = 17, 9, 7, 33
MODELS = {
    "LSTM": lambda **s: fastrnn.LSTM(I, H, 2, bidirectional=True, **s),
    "LSTM-all": lambda **s: fastrnn.LSTM(
        I, H, 2, dropout=0.3, layer_norm=True, residual=True, zoneout=(0.2, 0.1), recurrent_dropout=0.2,
        weight_dropout=0.1, locked_dropout=True, clip_state_grad_norm=0.5, clip_state_grad_value=0.2, **s,
    ),
    "LSTM-proj": lambda **s: fastrnn.LSTM(I, H, proj_size=11, **s),
    "GRU": lambda **s: fastrnn.GRU(I, H, layer_norm=True, **s),
    "RNN": lambda **s: fastrnn.RNN(I, H, 2, nonlinearity="elu", **s),
}  # fmt: skip


def model(name, backend):
    torch.manual_seed(0)
    return MODELS[name](backend=backend)


def everything(module, x, lengths, reset):
    """Output, states, tap and every gradient of one training step from one seed."""
    torch.manual_seed(1)
    states = 2 if isinstance(module, fastrnn.LSTM) else 1
    rows = module.num_layers * (2 if module.bidirectional else 1)
    tap = torch.zeros(rows, 2, states, T, B, requires_grad=True)
    x = x.clone().requires_grad_()
    y, state = module(x, lengths=lengths, reset_mask=reset, tap=tap)
    grads = torch.autograd.grad(y.square().sum(), (x, tap, *module.parameters()))
    return [y.detach(), *(s.detach() for s in flat(state)), *grads]


def data():
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(T, B, I, generator=rng)
    lengths = torch.randint(0, T + 1, (B,), generator=rng)
    return x, lengths, torch.rand(T, B, generator=rng) < 0.2


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@every_backend
@pytest.mark.parametrize("name", MODELS)
def test_the_same_call_gives_the_same_bits(name, backend):
    module, call = model(name, backend), data()
    first = everything(module, *call)
    assert all(v.isfinite().all() for v in first)
    litter = []
    for k in range(4):
        litter.append(torch.full((k * 977 + 1,), float("nan")))  # other addresses, and memory that is not zero
        assert same(everything(module, *call), first)
    assert same(everything(model(name, backend), *call), first), "another module of the same weights"


@pytest.mark.parametrize("name", ["LSTM", "LSTM-proj"])
def test_a_plain_call_gives_the_same_bits(name):
    module, (x, _, _) = model(name, None), data()
    outputs = [module(x)[0] for _ in range(3)]
    assert same(outputs[:-1], outputs[1:])


@every_backend
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_the_scan_does_not_depend_on_its_neighbours_in_time(name, backend):
    """Causality, bit for bit: what comes after step t does not change the outputs up to t."""
    torch.manual_seed(0)
    module = getattr(fastrnn, name)(I, H, backend=backend)
    x, _, _ = data()
    other = x.clone()
    other[10:] = torch.randn_like(other[10:])
    a, b = module(x)[0], module(other)[0]
    assert torch.equal(a[:10], b[:10]) and not torch.equal(a[10:], b[10:])


@every_backend
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_two_threads_give_the_bits_of_one(name, backend):
    """Threads share a module and run forward and backward at the same time."""
    torch.manual_seed(0)
    module = getattr(fastrnn, name)(I, H, 2, bidirectional=True, backend=backend)
    inputs = [torch.randn(T, B, I) for _ in range(4)]

    def work(x):
        x = x.clone().requires_grad_()
        y, _ = module(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))]

    expected = [work(x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, inputs * 5))
    assert all(same(got, want) for got, want in zip(found, expected * 5, strict=True))


def test_a_forced_backend_belongs_to_its_thread():
    module = fastrnn.LSTM(I, H)
    x = torch.randn(T, B, I)
    with ThreadPoolExecutor(1) as pool, fastrnn.backend("reference"):
        here = fastrnn.explain(module, x).chosen
        there = pool.submit(lambda: fastrnn.explain(module, x).chosen).result()
    assert here == "reference" and there == fastrnn.explain(module, x).chosen == "aten"


@every_backend
@pytest.mark.parametrize("name", MODELS)
def test_deterministic_algorithms_are_enough(name, backend):
    """Nothing in the library asks for an operation that PyTorch's strict mode refuses, nor for unfilled memory."""
    module, call = model(name, backend), data()
    expected = everything(module, *call)
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    try:
        assert same(everything(module, *call), expected)
    finally:
        torch.use_deterministic_algorithms(False)
