"""GradientMonitor on every kind of call, and what remains of it."""

import copy
import gc
import math
import weakref

import pytest
import torch
from setups import linear_rnn, watched
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import GradientMonitor
from fastrnn.monitoring import monitor

T, B, I, H = 12, 4, 3, 6


def same(a, b):
    """The same records; float32 scans over the same numbers in another batch layout round alike to 1e-5."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        for name in ("total", "carried", "gain"):
            torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=1e-5, atol=0, equal_nan=True)
        assert (x.valid.tolist(), x.horizon, x.verdict) == (y.valid.tolist(), y.horizon, y.verdict)


def test_layouts_agree():
    x, module = torch.randn(T, 1, I), fastrnn.GRU(I, H, 2)
    first = fastrnn.GRU(I, H, 2, batch_first=True)
    first.load_state_dict(module.state_dict())
    expected = watched(module, x).report()
    same(watched(first, x.transpose(0, 1)).report(), expected)
    same(watched(module, x[:, 0]).report(), expected)
    with GradientMonitor(module) as watch:
        module(input=x)[0].sum().backward()
    same(watch.report(), expected)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_does_not_count(bidirectional):
    module, x, lengths = fastrnn.LSTM(I, H, bidirectional=bidirectional), torch.randn(T, B, I), [5, T, 1, 9]
    report = watched(module, x, lengths=torch.tensor(lengths)).report()
    for record in report:
        assert record.valid.tolist() == [sum(n > t for n in lengths) for t in range(T)]
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    same(watched(module, packed, lambda y: y.data.sum()).report(), report)
    # One sequence alone is that sequence cut to its length.
    alone = watched(module, x[:, :1], lengths=torch.tensor([5])).report()
    cut = watched(module, x[:5, :1]).report()
    for a, b in zip(alone, cut, strict=True):
        torch.testing.assert_close(a.gain[:5], b.gain, rtol=1e-5, atol=0, equal_nan=True)
        assert a.verdict == b.verdict


def test_directions_are_told_apart():
    report = watched(fastrnn.GRU(I, H, bidirectional=True), torch.randn(T, B, I)).report()
    assert [r.name for r in report] == ["gru.l0", "gru.l0_reverse"]
    assert math.isnan(report[0].gain[-1]) and math.isnan(report[1].gain[0])
    assert (report[0].carried[:-1] > 0).all() and (report[1].carried[1:] > 0).all()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_resets_are_not_vanishing(bidirectional, batch_first):
    module = linear_rnn(1.0, bidirectional=bidirectional, batch_first=batch_first)
    if bidirectional:
        module.load_state_dict({n: module.state_dict()[n.removesuffix("_reverse")] for n in module.state_dict()})
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[4] = resets[9] = True
    x = torch.rand(T, B, 4)
    if batch_first:
        resets, x = resets.t(), x.transpose(0, 1)
    for record in watched(module, x, reset_mask=resets).report():
        reverse = record.direction == "reverse"
        missing = {0, 4, 9} if reverse else {3, 8, T - 1}
        assert {t for t in range(T) if math.isnan(record.gain[t])} == missing
        assert record.verdict == "healthy"


def test_several_calls_are_pooled():
    module, x = fastrnn.RNN(I, H), torch.randn(T, 6, I)
    expected = watched(module, x).report()
    with GradientMonitor(module) as watch:
        (module(x[:, :2])[0].sum() + module(x[:, 2:])[0].sum()).backward()
    same(watch.report(), expected)
    with GradientMonitor(module) as watch:
        (module(x)[0].sum() + module(x[:5])[0].sum()).backward()
    assert watch.report()[0].valid.tolist() == [12] * 5 + [6] * 7


def test_the_report_is_about_the_last_backward():
    module, x = fastrnn.RNN(I, H), torch.randn(T, B, I)
    with GradientMonitor(module) as watch:
        for scale in (1.0, 8.0):
            (module(x)[0].sum() * scale).backward()
            module(x)  # never goes backward
    same(watch.report(), watched(module, x, lambda y: 8 * y.sum()).report())


def test_modules_inside_a_model_are_named():
    model = nn.ModuleDict({"encoder": fastrnn.LSTM(I, H, 2), "decoder": fastrnn.GRU(H, H), "head": nn.Linear(H, 1)})
    with GradientMonitor(model) as watch:
        model["head"](model["decoder"](model["encoder"](torch.randn(T, B, I))[0])[0]).sum().backward()
    names = [(r.module, r.layer, r.state) for r in watch.report()]
    assert names == [*(("encoder", layer, s) for layer in (0, 1) for s in "hc"), ("decoder", 0, "h")]


def test_calls_without_gradient_are_left_alone():
    module, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    with GradientMonitor(module) as watch:
        with torch.no_grad():
            assert not module(x)[0].requires_grad
        module.requires_grad_(False)
        assert not module(x)[0].requires_grad
        assert watch.report() == []
        module(x.requires_grad_())[0].sum().backward()
        assert len(watch.report()) == 2


def test_a_tap_of_the_caller_is_read_along():
    module, x = fastrnn.GRU(I, H), torch.randn(T, B, I)
    tap = torch.zeros(1, 2, 1, T, B, requires_grad=True)
    report = watched(module, x, tap=tap).report()
    same(report, watched(module, x).report())
    torch.testing.assert_close(tap.grad[0, 0, 0].double().nanmedian(-1).values, report[0].total, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    report = watched(fastrnn.LSTM(I, H, dtype=dtype), torch.randn(T, B, I, dtype=dtype)).report()
    assert len(report) == 2 and (report[0].total > 0).all()


def test_the_gradients_are_not_changed():
    module, x = fastrnn.LSTM(I, H, 2), torch.randn(T, B, I)
    module(x)[0].sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    watched(module, x)
    for p, e in zip(module.parameters(), expected, strict=True):
        # torch's own kernel without the monitor, the scan with it: float32 sums over T * B terms, of order 1 to 10.
        torch.testing.assert_close(p.grad, e, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_with_taps_allocated_beforehand():
    module = fastrnn.GRU(I, H)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(T, B, I)
    with GradientMonitor(compiled, max_steps=20, batch=8) as watch:
        for _ in range(2):  # norms of two backwards must not add up
            compiled(x)[0].sum().backward()
    same(watch.report(), watched(module, x).report())
    with GradientMonitor(module, max_steps=3, batch=8), pytest.raises(ValueError, match="room for T = 3"):
        module(x)


def test_names_are_those_of_the_model_wherever_it_is_compiled():
    model = torch.nn.ModuleDict({"encoder": torch.compile(fastrnn.GRU(I, H), backend="aot_eager")})
    with GradientMonitor(model, max_steps=T, batch=B) as watch:
        model["encoder"](torch.randn(T, B, I))[0].sum().backward()
    assert [record.name for record in watch.report()] == ["encoder.l0"]


def test_a_graph_in_one_piece_asks_for_its_sizes():
    module, x = fastrnn.GRU(I, H), torch.randn(T, B, I)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with GradientMonitor(compiled), pytest.raises(RuntimeError, match="needs max_steps= and batch="):
        compiled(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager")  # which breaks the graph there
    with GradientMonitor(compiled) as watch:
        compiled(x)[0].sum().backward()
    same(watch.report(), watched(module, x).report())


# ------------------------------------------------------------------------------------------------- housekeeping


def test_nothing_is_left_behind():
    module, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    watch = GradientMonitor(module)
    before = dict(vars(module))
    watch.enable()
    watch.enable()
    assert len(module._watch.watches) == 1 and not module._forward_pre_hooks
    watch.disable()
    assert before == vars(module)
    module(x)[0].sum().backward()
    assert watch.report() == []
    with pytest.raises(KeyError), GradientMonitor(module):
        raise KeyError
    assert before == vars(module)


def test_memory_does_not_grow(monkeypatch):
    """Every tap dies with its graph, whether it went backward or not; one backward's norms are kept."""
    taps, create = [], torch.zeros

    def counted(*args, **kwargs):
        tap = create(*args, **kwargs)
        taps.append(weakref.ref(tap))
        return tap

    module, x = fastrnn.RNN(1, 2), torch.randn(3, 1, 1)
    with GradientMonitor(module) as watch:
        monkeypatch.setattr(monitor.torch, "zeros", counted)
        for _ in range(50):
            module(x)
            module(x)[0].sum().backward()
        monkeypatch.undo()
        gc.collect()
        assert len(taps) >= 100
        assert sum(tap() is not None for tap in taps) == 0
        assert len(watch._norms["rnn"]) == 1


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(ValueError, match=r"fastrnn\.convert"):
        GradientMonitor(nn.LSTM(I, H))
    with pytest.raises(ValueError, match=r"LSTMCell holds no .* its single-step cells have no norms"):
        GradientMonitor(fastrnn.LSTMCell(I, H))
    with pytest.raises(ValueError, match="go together"):
        GradientMonitor(fastrnn.LSTM(I, H), max_steps=5)


def test_an_empty_batch_is_no_sample():
    model = fastrnn.LSTM(3, 4)
    with fastrnn.GradientMonitor(model) as monitor:
        model(torch.randn(5, 0, 3))[0].sum().backward()
    assert not monitor.report()


def test_a_copy_made_inside_is_not_watched():
    model = fastrnn.LSTM(3, 4)
    with fastrnn.GradientMonitor(model) as monitor:
        copy.deepcopy(model)(torch.randn(5, 2, 3))[0].sum().backward()
        assert not monitor.report()
        model(torch.randn(5, 2, 3))[0].sum().backward()
    assert len(monitor.report()) == 2
