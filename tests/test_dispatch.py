"""Which backend `auto` takes, and what it says of the others."""

import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
from setups import fewest_steps, needs_cpu_library
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import aten, dispatch, functional, network
from fastrnn.dispatch import BACKENDS, Request

# What torch runs step by step: an LSTM with projection, and packed batches of different lengths.
BY_STEPS = [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {})]


def packed(*lengths):
    return pack_padded_sequence(torch.randn(max(lengths), len(lengths), 2), torch.tensor(lengths), enforce_sorted=False)


def chosen(module, x, **call):
    return fastrnn.explain(module, x, **call).chosen


with_and_without_gradients = pytest.mark.parametrize("gradients", [False, True], ids=["infer", "train"])


def plain(cell, **settings):
    return Request(cell, "cpu", torch.float32, **{"hidden_size": 8, "batch": 1, "steps": 100, **settings})


@with_and_without_gradients
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@needs_cpu_library
def test_plain_calls_of_what_torch_runs_step_by_step_go_to_the_scan(kind, gradients):
    module = getattr(fastrnn, kind)(2, 3)
    fewest = fewest_steps(module._cell, gradients, batch=1, hidden=3)
    assert 8 <= fewest <= 128
    with torch.set_grad_enabled(gradients):
        assert chosen(module, torch.randn(fewest, 1, 2)) == "cpu"
        assert chosen(module, torch.randn(fewest - 1, 1, 2)) == "aten"
        assert chosen(module.double(), torch.randn(fewest, 1, 2).double()) == "aten"


@needs_cpu_library
def test_no_backward_follows_where_nothing_requires_grad(recorded):
    module = fastrnn.GRU(2, 3)
    recorded(plain("gru", gradients=True, steps=8), "cpu", 0.5)
    x = torch.randn(8, 1, 2)
    assert chosen(module, x) == "cpu"
    assert chosen(module.requires_grad_(False), x) == "aten"
    assert chosen(module, x.requires_grad_()) == "cpu"


@needs_cpu_library
def test_the_rest_of_the_plain_calls_stays_with_torch():
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert chosen(fastrnn.LSTM(2, 3), torch.randn(200, 1, 2)) == "aten"
            for module in (fastrnn.LSTM(2, 3), fastrnn.LSTM(2, 3, proj_size=1), fastrnn.GRU(2, 3), fastrnn.RNN(2, 3)):
                assert chosen(module, packed(2, 1)) == "aten"


@pytest.mark.parametrize("cell", fastrnn.cell_table.CELLS)
@pytest.mark.parametrize("projection", [0, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@with_and_without_gradients
def test_what_goes_to_torch_directly_is_what_choose_leaves_to_torch(cell, projection, device, gradients):
    """`gradients` as a plain call knows it, by the mode alone: then nothing may require one."""
    features = frozenset({"projection"} if projection else ())
    for dtype, batch, hidden_size in product((torch.float32, torch.float64, torch.bfloat16), (1, 20, 1000), (8, 300)):
        sizes = (projection, gradients, dtype, device, hidden_size, batch)
        most_steps = dispatch.most_steps_of_torch(cell, *sizes)
        for steps in (1, 7, 8, 15, 16, 31, 32, 1000):
            if steps <= most_steps:
                request = Request(cell, device, dtype, hidden_size, projection, features, steps, batch)
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
    monkeypatch.setattr(network, "takes", lambda *call: False)  # which clips, too
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
@pytest.mark.parametrize("kind, settings", BY_STEPS, ids=str)
def test_long_packed_batches_and_projections_are_torch_nns_within_rounding(kind, settings, recorded):
    torch.manual_seed(0)
    torchs = getattr(torch.nn, kind)(2, 5, num_layers=2, bidirectional=True, **settings)
    ours = fastrnn.convert(torchs)
    inputs = [packed(40, 70, 65)] + [torch.randn(70, 3, 2)] * bool(settings)
    for x in inputs:
        recorded(fastrnn.explain(ours, x).request, "cpu", 0.5)
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


def test_explain_ranks_as_choose_does(recorded):
    request = plain("gru")
    recorded(request, "cpu", 0.5)
    explained = dispatch.explanation(request)
    assert [row[0] for row in explained.rows][:3] == ["cpu", "aten", "reference"]
    assert sorted(row[0] for row in explained.rows) == sorted(BACKENDS)
    assert explained.rows[0][2].startswith("1: measured here") and explained.rows[0][2].endswith(
        "0.50 of torch.nn's time"
    )


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
    able = replace(BACKENDS["triton"], auto=(), about="not yet", why_not=lambda request: None)
    monkeypatch.setitem(BACKENDS, "triton", able)
    monkeypatch.setattr(dispatch, "_warned", set())
    request = Request("lstm", "cuda", torch.bfloat16, 8, features=frozenset({"layer_norm"}), steps=5)
    with pytest.warns(UserWarning, match="triton: not yet"):
        assert dispatch.choose(request) == "reference"
