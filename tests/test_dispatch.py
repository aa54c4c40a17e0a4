"""Which backend `auto` takes, and what it says of the others."""

import json
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from setups import needs_cpu_library
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import aten, dispatch, functional
from fastrnn.dispatch import BACKENDS, CPU_FIRST, MOST_ELEMENTS, WIDE_STEP, Request

# What torch runs step by step: an LSTM with projection, and packed batches of different lengths.
BY_STEPS = [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {})]


def packed(*lengths):
    return pack_padded_sequence(torch.randn(max(lengths), len(lengths), 2), torch.tensor(lengths), enforce_sorted=False)


def chosen(module, x, **call):
    return fastrnn.explain(module, x, **call).chosen


with_and_without_gradients = pytest.mark.parametrize("gradients", [False, True], ids=["infer", "train"])


@with_and_without_gradients
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@needs_cpu_library
def test_plain_calls_of_what_torch_runs_step_by_step_go_to_the_scan(kind, gradients):
    module = getattr(fastrnn, kind)(2, 3)
    fewest = CPU_FIRST[False, gradients][module._cell]
    with torch.set_grad_enabled(gradients):
        assert chosen(module, torch.randn(fewest, 1, 2)) == "cpu"
        assert chosen(module, torch.randn(fewest - 1, 1, 2)) == "aten"
        assert chosen(module.double(), torch.randn(fewest, 1, 2).double()) == "aten"


@needs_cpu_library
def test_no_backward_follows_where_nothing_requires_grad():
    module = fastrnn.GRU(2, 3)
    fewest = CPU_FIRST[False, True]["gru"]
    assert fewest < CPU_FIRST[False, False]["gru"]
    x = torch.randn(fewest, 1, 2)
    assert chosen(module, x) == "cpu"
    assert chosen(module.requires_grad_(False), x) == "aten"
    assert chosen(module, x.requires_grad_()) == "cpu"


@with_and_without_gradients
@pytest.mark.parametrize("cell", CPU_FIRST[False, False])
@pytest.mark.parametrize("filled", [None, 0.25])
def test_wide_batches_of_a_large_network_stay_with_torch(cell, filled, gradients):
    most = MOST_ELEMENTS[filled is not None, gradients] // 128
    for batch, first in ((most, "cpu"), (most + 1, "aten")):
        projection = 64 * (cell == "lstm")
        request = Request(cell, "cpu", torch.float32, 128, projection, steps=128, batch=batch, packed=filled)
        assert dispatch.ranked(request._replace(gradients=gradients))[0].name == first


@with_and_without_gradients
@needs_cpu_library
def test_the_rest_of_the_plain_calls_and_short_packed_ones_stay_with_torch(gradients):
    with torch.set_grad_enabled(gradients):
        assert chosen(fastrnn.LSTM(2, 3), torch.randn(200, 1, 2)) == "aten"
        assert chosen(fastrnn.LSTM(2, 3), packed(200, 200)) == "aten"
        for module in (fastrnn.LSTM(2, 3), fastrnn.LSTM(2, 3, proj_size=1), fastrnn.GRU(2, 3), fastrnn.RNN(2, 3)):
            fewest = CPU_FIRST[True, gradients][module._cell]
            assert chosen(module, packed(fewest, 1)) == "cpu"
            assert chosen(module, packed(fewest - 1, 1)) == "aten"


@pytest.mark.parametrize("cell", fastrnn.cell_table.CELLS)
@pytest.mark.parametrize("projection", [0, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@with_and_without_gradients
def test_what_goes_to_torch_directly_is_what_choose_leaves_to_torch(cell, projection, device, gradients):
    """`gradients` as a plain call knows it, by the mode alone: then nothing may require one."""
    most_steps = dispatch.most_steps_of_torch(cell, projection, gradients)
    for steps in (1, 7, 8, 15, 16, 31, 32, 1000):
        if steps <= most_steps:
            for batch, dtype in product((1, 1000), (torch.float32, torch.float64, torch.bfloat16)):
                request = Request(cell, device, dtype, 8, projection, steps=steps, batch=batch)
                assert {dispatch.choose(request._replace(gradients=g)) for g in {gradients, False}} == {"aten"}
    assert (most_steps >= 1) == (cell in aten.KNOWN_CELLS)


SMALL = {"input_size": 3, "hidden_size": 4}
PLAIN = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 2}),
    ("LSTM", {"bias": False}),
    ("GRU", {}),
    ("RNN", {"nonlinearity": "relu"}),
]
LAYOUTS = [
    {}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "dropout": 0.5},
]  # fmt: skip


@pytest.fixture
def directly(monkeypatch):
    """What a call gets from torch's kernels before `functional` checks anything; None where it goes on to that."""

    def call(module, x, hx=None):
        with monkeypatch.context() as patch:
            patch.setattr(functional, "recurrent", lambda *args, **options: None)
            return module(x, hx)

    return call


@pytest.mark.parametrize(("kind", "settings"), PLAIN, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3), (5, 3)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_short_plain_calls_go_to_torch_directly_and_come_to_the_same(kind, settings, layout, shape, given, directly):
    module, x = getattr(fastrnn, kind)(**SMALL, **settings, **layout), torch.randn(shape)
    hx = None
    if given:
        hx = module(x)[1]
    torch.manual_seed(0)
    direct = directly(module, x, hx)
    assert direct is not None
    torch.manual_seed(0)
    general = functional.recurrent(module._cell, x, hx, module._parameters_by_name(), **module._arguments())
    for got, want in zip(tree_leaves(direct), tree_leaves(general), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("settings", [
    {"layer_norm": True}, {"zoneout": 0.1}, {"recurrent_dropout": 0.1}, {"weight_dropout": 0.1}, {"backend": "aten"},
    {"clip_state_grad_norm": torch.ones(())}, {"clip_state_grad_value": 1.0}, {"num_layers": 2, "residual": True},
    {"num_layers": 2, "dropout": 0.1, "locked_dropout": True},
], ids=str)  # fmt: skip
def test_a_call_with_anything_else_does_not_go_there(settings, directly, monkeypatch):
    plain, other, x = fastrnn.GRU(**SMALL), fastrnn.GRU(**SMALL, **settings), torch.randn(2, 5, 3)
    assert directly(plain, x) is not None
    assert directly(other, x) is None
    with fastrnn.backend("reference"):
        assert directly(plain, x) is None
    monkeypatch.setenv("FASTRNN_BACKEND", "aten")
    assert directly(plain, x) is None


@pytest.mark.parametrize("hx", [
    torch.zeros(2, 1, 4),  # of an LSTM: one tensor with two rows
    (torch.zeros(1, 4),), (torch.zeros(1, 1, 4),) * 2, (torch.zeros(1, 4), torch.zeros(1, 5)),
    (torch.zeros(1, 4), torch.zeros(1, 4).double()),
], ids=str)  # fmt: skip
def test_what_does_not_fit_does_not_go_there_either(hx, directly):
    module, x = fastrnn.LSTM(**SMALL), torch.randn(5, 3)
    assert directly(module, x, hx) is None
    with pytest.raises(RuntimeError):
        module(x, hx)


@needs_cpu_library
def test_a_single_wide_step_goes_to_the_reference():
    for batch, hidden_size, name in ((1, WIDE_STEP, "reference"), (1, WIDE_STEP - 1, "cpu"), (2, WIDE_STEP, "cpu")):
        module = fastrnn.RNN(1, hidden_size, layer_norm=True)
        assert chosen(module, torch.randn(1, batch, 1)) == name


@needs_cpu_library
def test_a_single_wide_step_of_another_dtype_or_with_a_projection_does_not():
    """There auto-cpu.json has nothing that would speak for it."""
    x = torch.randn(1, 1, 1)
    assert chosen(fastrnn.LSTM(1, WIDE_STEP, layer_norm=True, proj_size=8), x) == "cpu"
    for dtype in (torch.bfloat16, torch.float16):
        assert chosen(fastrnn.GRU(1, WIDE_STEP, layer_norm=True, dtype=dtype), x.to(dtype)) == "cpu"


@needs_cpu_library
@pytest.mark.parametrize("kind, settings", BY_STEPS, ids=str)
def test_long_packed_batches_and_projections_are_torch_nns_within_rounding(kind, settings):
    torch.manual_seed(0)
    torchs = getattr(torch.nn, kind)(2, 5, num_layers=2, bidirectional=True, **settings)
    ours = fastrnn.convert(torchs)
    inputs = [packed(40, 70, 65)] + [torch.randn(70, 3, 2)] * bool(settings)
    for x in inputs:
        assert chosen(ours, x) == "cpu"
        results = []
        for module in (ours, torchs):
            y, hidden = module(x)
            y = y if torch.is_tensor(y) else y.data
            found = [y, *(hidden if isinstance(hidden, tuple) else (hidden,))]
            results.append([*found, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
        for got, want in zip(*results, strict=True):
            # 70 steps of some ten float32 roundings each, contracting; gradients are sums of 175 terms of order one.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_auto_takes_the_scan_only_where_it_was_measured_to_take_less_time():
    """By `python -m bench.auto bench/results/auto-cpu.json`: beyond noise, which a busy machine widens."""
    calls = json.loads((Path(__file__).parents[1] / "bench/results/auto-cpu.json").read_text())["calls"]
    taken, slower = 0, []
    for row in calls:
        B, T, H = row["B"], row["T"], row["H"]
        projection = H // 2 if row["projected"] else 0
        features, rival = ({"layer_norm"}, "reference") if row["layer_norm"] else ((), "aten")
        request = Request(
            row["cell"],
            "cpu",
            torch.float32,
            H,
            projection,
            frozenset(features),
            T,
            B,
            row["packed"],
            row["mode"] == "train",
        )
        if next(r.name for r in dispatch.ranked(request) if r.name in (rival, "cpu")) == "cpu":
            taken += 1
            if row["ratio"]["interval"][1] >= 1:
                slower.append(row)
    assert taken > len(calls) / 2
    assert not slower


@needs_cpu_library
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "batch_first": True}], ids=str)
def test_a_long_plain_calls_output_may_be_changed_in_place(kind, settings):
    module, x = getattr(fastrnn, kind)(3, 4, **settings), torch.randn(70, 2, 3)
    x = x.transpose(0, 1) if settings else x
    assert chosen(module, x) == "cpu"
    (once,) = torch.autograd.grad(module(x)[0].sum(), module.weight_hh_l0)
    (twice,) = torch.autograd.grad(module(x)[0].mul_(2).sum(), module.weight_hh_l0)
    assert torch.equal(twice, 2 * once)


@needs_cpu_library
def test_forward_mode_goes_to_torch():
    module, x = fastrnn.GRU(3, 4), torch.randn(70, 2, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert chosen(module, dual) == "aten"
        assert torch.autograd.forward_ad.unpack_dual(module(dual)[0]).tangent is not None


@needs_cpu_library
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@pytest.mark.parametrize("least_work", [1, 1 << 22])
def test_batched_gradients_of_a_long_plain_call(kind, least_work, monkeypatch):
    monkeypatch.setattr("fastrnn.linear.LEAST_WORK", least_work)
    module, x = getattr(fastrnn, kind)(3, 4), torch.randn(70, 5, 3, requires_grad=True)
    y, leaves = module(x)[0], [x, *module.parameters()]
    dy = torch.randn(2, *y.shape)
    batched = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in dy]
    for got, want in zip(batched, zip(*singly, strict=True), strict=True):
        # Sums of up to 350 float32 terms of order one, in another order.
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-4)


@needs_cpu_library
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_a_long_plain_call_is_torch_nns_within_rounding(kind):
    torch.manual_seed(0)
    torchs = getattr(torch.nn, kind)(3, 5, num_layers=2, bidirectional=True)
    ours = fastrnn.convert(torchs)
    x = torch.randn(70, 4, 3)
    assert chosen(ours, x) == "cpu"
    for got, want in zip(ours(x), torchs(x), strict=True):
        # 70 steps of some ten float32 roundings each, contracting.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_explain_ranks_as_choose_does():
    request = Request("gru", "cpu", torch.float32, 8, steps=100, batch=1)
    names = [row.name for row in dispatch.ranked(request)]
    assert names[0] == "cpu" and sorted(names) == sorted(BACKENDS)
    assert [row[0] for row in dispatch.explanation(request).rows] == names


NOT_BUILT = replace(BACKENDS["cpu"], why_not=lambda request: "it was not built")


def test_the_slow_loop_is_announced_once_where_nobody_asked_for_it(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cpu", NOT_BUILT)
    monkeypatch.setattr(dispatch, "_warned", set())
    module, x = fastrnn.LSTM(2, 3, layer_norm=True), torch.randn(5, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.explain(module, x)
        fastrnn.LSTM(2, 3)(x)
        module(x[:1])
        module.double()(x.double())
        with fastrnn.backend("reference"):
            module.float()(x)
    with pytest.warns(UserWarning, match="Python loop.*cpu: it was not built") as caught:
        module(x)
        module(x)
    assert len(caught) == 1


def test_torchs_slow_kernels_are_announced_once_where_the_library_is_missing(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cpu", NOT_BUILT)
    monkeypatch.setattr(dispatch.cpu, "MISSING", "it is missing; to build it: pip install")
    monkeypatch.setattr(dispatch, "_warned", set())
    module, x = fastrnn.GRU(2, 3), torch.randn(64, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.explain(module, x)
        fastrnn.LSTM(2, 3)(x)
        module(x[:1])
        with fastrnn.backend("aten"):
            module(x)
    with pytest.warns(UserWarning, match="this gru runs on torch's kernels.*to build it: pip install") as caught:
        module(x)
        fastrnn.RNN(2, 3)(x)
    assert len(caught) == 1


def test_on_a_gpu_the_announcement_names_the_kernels_that_have_to_be_asked_for(monkeypatch):
    able = replace(BACKENDS["triton"], auto=(), measured="not yet", why_not=lambda request: None)
    monkeypatch.setitem(BACKENDS, "triton", able)
    monkeypatch.setattr(dispatch, "_warned", set())
    request = Request("lstm", "cuda", torch.bfloat16, 8, features=frozenset({"layer_norm"}), steps=5)
    with pytest.warns(UserWarning, match="triton: not yet"):
        assert dispatch.choose(request) == "reference"
