"""Arguments in any dtype and container that can hold them, at values near a dtype's limits, and when empty."""

import numpy as np
import pytest
import torch
from setups import every_backend
from torch import nn
from torch.utils._pytree import tree_leaves

import fastrnn

I, H = 3, 4
KINDS = ("LSTM", "GRU", "RNN")
INTEGERS = [
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def same(got, want):
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@every_backend
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_lengths_of_any_integer_dtype(dtype, backend):
    """T = 300 exceeds int8 and uint8, whose largest values are lengths here."""
    module, x = fastrnn.GRU(I, H, backend=backend, bidirectional=True), torch.randn(300, 3, I)
    lengths = torch.tensor([0, 44, min(torch.iinfo(dtype).max, 300)])
    same(module(x, lengths=lengths.to(dtype)), module(x, lengths=lengths))


@pytest.mark.parametrize("wrong", [-1, 301])
def test_lengths_out_of_range_are_refused_in_every_dtype_that_holds_them(wrong):
    module, x = fastrnn.GRU(I, H), torch.randn(300, 1, I)
    for dtype in INTEGERS:
        if torch.iinfo(dtype).min <= wrong <= torch.iinfo(dtype).max:
            with pytest.raises(ValueError, match="lengths should lie within"):
                module(x, lengths=torch.tensor([wrong]).to(dtype))
    with pytest.raises(ValueError, match="lengths should lie within"):
        module(x, lengths=torch.tensor([2**64 - 1], dtype=torch.uint64))


@pytest.mark.parametrize("container", [list, tuple, np.array, lambda v: np.array(v, dtype=np.uint8)])
def test_lengths_and_resets_in_any_container(container):
    module, x = fastrnn.LSTM(I, H, zoneout=0.1), torch.randn(5, 3, I)
    module.eval()
    same(module(x, lengths=container([5, 0, 3])), module(x, lengths=torch.tensor([5, 0, 3])))
    resets = torch.rand(5, 3) < 0.5
    given = resets.numpy() if container is np.array else [container(row) for row in resets.tolist()]
    if container in (list, tuple, np.array):
        same(module(x, reset_mask=given), module(x, reset_mask=resets))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("steps", [1, 5, 33])
@pytest.mark.parametrize("kind", KINDS)
@every_backend
def test_an_empty_batch(backend, kind, steps, gradients, batch_first):
    pair = kind == "LSTM"
    x = torch.randn(*((0, steps) if batch_first else (steps, 0)), I)
    for settings in ({}, {"layer_norm": True, "num_layers": 2, "bidirectional": True, "zoneout": 0.1}):
        module = getattr(fastrnn, kind)(I, H, batch_first=batch_first, backend=backend, **settings)
        D = module.num_layers * (2 if module.bidirectional else 1)
        tap = torch.zeros(D, 2, 2 if pair else 1, steps, 0, requires_grad=True)
        hx = torch.zeros(D, 0, H)
        empty_mask = torch.zeros(*x.shape[:2], dtype=torch.bool)
        for options in (
            {}, {"lengths": []}, {"lengths": torch.zeros(0, dtype=torch.uint8)}, {"reset_mask": empty_mask},
            {"reset_mask": empty_mask.numpy() if batch_first else empty_mask.tolist()}, {"tap": tap},
            {"hx": (hx, hx) if pair else hx},
            {"return_cells": pair},
        ):  # fmt: skip
            with torch.set_grad_enabled(gradients):
                y, hidden, *_ = module(x, **options)
            assert y.shape == (*x.shape[:2], H * (2 if module.bidirectional else 1))
            assert all(state.shape == (D, 0, H) for state in tree_leaves(hidden))
            if gradients:
                y.sum().backward()
                assert all(p.grad.shape == p.shape and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_any_type(kind):
    build = getattr(fastrnn, kind)
    module = build(I, H, num_layers=np.int64(2), dropout=np.float32(0.5), zoneout=np.float64(0.25))
    assert type(module.num_layers) is int and type(module.dropout) is float and module.dropout == 0.5
    assert build(I, H, num_layers=2, dropout=1).dropout == build(I, H, num_layers=2, dropout=np.int64(1)).dropout == 1
    x = torch.randn(3, 2, I)
    for bound in (1, 1.5, np.int32(1), np.int64(2), np.float16(0.5), np.float32(0.5), np.float64(0.5)):
        module = build(I, H, clip_state_grad_norm=bound, clip_state_grad_value=bound)
        found = []
        for same_bound in (bound, float(bound)):
            module.clip_state_grad_norm = module.clip_state_grad_value = same_bound
            found.append(torch.autograd.grad(module(x)[0].square().sum() * 100, list(module.parameters())))
        same(*found)
    for wrong in (np.float32("nan"), np.float32("inf"), np.int64(0), np.float64(-1), True, np.bool_(True)):
        with pytest.raises(ValueError, match="clip_state_grad_value should be a positive number"):
            build(I, H, clip_state_grad_value=wrong)
    for wrong in (True, np.bool_(True), np.float32(1.5), np.float64("nan"), "0.5"):
        with pytest.raises(ValueError, match="dropout should be a number in range"):
            build(I, H, num_layers=2, dropout=wrong)


SIZES = [
    (10, 0), (0, 5), (0, 0), (-1, 3), (3, -1), (3.0, 4), (3, 4.0), (np.int64(3), np.int32(4)), ("3", 4), (None, 4),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind}Cell" for kind in KINDS)])
def test_sizes_are_taken_and_refused_as_by_torch_nn(kind, sizes):
    def outcome(library):
        try:
            module = getattr(library, kind)(*sizes)
            x = torch.randn(2, sizes[0]) if kind.endswith("Cell") else torch.randn(5, 2, sizes[0])
            results = tree_leaves(module(x))
            results[0].sum().backward()
        except Exception as error:
            return type(error)
        return [v.shape for v in (*results, *(p.grad for p in module.parameters()))]

    assert outcome(fastrnn) == outcome(nn)
