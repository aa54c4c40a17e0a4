"""GradientMonitor: gains against closed forms, verdicts, every kind of call, and what it leaves behind."""

import copy
import gc
import math
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import GradientMonitor
from fastrnn.monitoring import diagnosis, monitor, plots

T, B, I, H = 12, 4, 3, 6


def watched(model, x, loss=lambda y: y.sum(), **call):
    with GradientMonitor(model) as watch:
        out = model(x, **call)
        loss(out[0]).backward()
    return watch


def linear_rnn(alpha, size=4, **options):
    """A ReLU network that stays positive is linear: dL/dh_{t-1} = alpha dL/dh_t."""
    module = fastrnn.RNN(size, size, nonlinearity="relu", bias=False, **options)
    with torch.no_grad():
        module.weight_hh_l0.copy_(alpha * torch.eye(size))
        module.weight_ih_l0.copy_(torch.eye(size))
    return module


# --------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("loss", [lambda y: y[-1].sum(), lambda y: y.sum()], ids=["last", "every"])
@pytest.mark.parametrize("alpha", [0.5, 0.97, 1.0, 1.3])
def test_a_linear_network_has_gain_alpha(alpha, loss):
    record = watched(linear_rnn(alpha), torch.rand(40, B, 4) + 0.1, loss).report()[0]
    # float32 norms, one rounding or two per step: 1e-6 is ten of them.
    torch.testing.assert_close(record.gain[:-1], torch.full((39,), alpha).double(), rtol=1e-6, atol=0)
    assert math.isnan(record.gain[-1])
    assert record.gain_median == pytest.approx(alpha, rel=1e-6)
    if alpha < 1:
        assert record.half_life == pytest.approx(math.log(2) / -math.log(alpha), rel=1e-4)
    else:
        assert record.half_life is None
    assert record.horizon == (int(math.log(0.01) / math.log(alpha)) if alpha == 0.5 else 40)
    assert record.verdict == {0.5: "vanishing", 1.3: "exploding"}.get(alpha, "healthy")


def test_an_lstm_without_w_hh_has_the_forget_gate_as_gain():
    module, b = fastrnn.LSTM(I, H), 1.3
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_ih_l0[H : 2 * H].zero_()
        module.bias_ih_l0[H : 2 * H] = b
        module.bias_hh_l0[H : 2 * H] = 0
    with GradientMonitor(module) as watch:
        module(torch.randn(T, B, I))[1][1].sum().backward()  # through c_n alone
    h, c = watch.report()
    sigma = 1 / (1 + math.exp(-b))
    torch.testing.assert_close(
        c.gain[:-1], torch.full((T - 1,), sigma).double(), rtol=1e-6, atol=0
    )  # float32, as above
    assert (h.total == 0).all() and (h.valid == 0).all() and (c.valid == B).all()
    torch.testing.assert_close(h.gain, c.gain, equal_nan=True)


def test_a_loss_at_every_step_does_not_hide_vanishing():
    record = watched(linear_rnn(0.5), torch.rand(40, B, 4) + 0.1).report()[0]
    assert record.total.min() > 0.4 * record.total.max()  # level: 1 + 0.5 + 0.25 + ..
    assert record.verdict == "vanishing" and record.horizon == 6  # 0.5^6 > 1 % > 0.5^7


def test_underflow_counts_as_vanishing_and_not_as_a_gain():
    record = watched(linear_rnn(1e-3), torch.rand(40, B, 4) + 0.1, lambda y: y[-1].sum()).report()[0]
    assert record.total[0] == 0 and record.valid[0] == 0
    assert record.gain_median == pytest.approx(1e-3, rel=1e-5)
    assert record.half_life == pytest.approx(math.log(2) / math.log(1000), rel=1e-5)
    assert record.horizon == 0 and record.verdict == "vanishing"


def test_a_gradient_that_reaches_nothing_tells_nothing():
    watch = watched(linear_rnn(1.0), torch.rand(5, B, 4), lambda y: (y * 0).sum())
    record = watch.report()[0]
    assert record.verdict == "unknown" and (record.valid == 0).all()
    assert record.horizon is None and record.longest == 0 and "no gradient arrives" in str(watch.report())
    assert "fastrnn/rnn.l0/h/horizon" not in watch.scalars()


def test_a_step_whose_state_is_detached_tells_nothing():
    module, h, loss = fastrnn.GRU(I, H), None, 0.0
    with GradientMonitor(module) as watch:
        for _ in range(T):
            y, h = module(torch.randn(1, B, I), None if h is None else h.detach())
            loss = loss + y.sum()
        loss.backward()
    record = watch.report()[0]
    assert (record.verdict, record.horizon, record.longest) == ("unknown", None, 1)
    assert "Pass whole sequences in one call, with reset_mask=" in str(watch.report())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_exploding_and_named(bad):
    weight = torch.ones(T, 1, 1)
    weight[5] = bad
    record = watched(linear_rnn(0.9), torch.rand(T, B, 4), lambda y: (y * weight).sum()).report()[0]
    assert record.verdict == "exploding" and record.first_nonfinite == 5


def test_a_forward_that_is_not_finite_is_not_blamed_on_the_gradient():
    def finding(change, **call):
        module, x = fastrnn.GRU(I, H, batch_first=call.pop("batch_first", False)), torch.randn(T, B, I)
        with torch.no_grad():
            change(module, x)
        x = x.transpose(0, 1) if module.batch_first else x
        if call.pop("packed", False):
            x = pack_padded_sequence(x, torch.tensor([T, T, 8, 1]))
        watch = watched(module, x, lambda y: (y if torch.is_tensor(y) else y.data).sum(), **call)
        record, (found,) = watch.report()[0], watch.report().findings
        assert (record.verdict, record.horizon, record.first_nonfinite is None) == ("unknown", None, False)
        assert f"forward pass is not finite from step {record.forward_nonfinite} on" in found.summary
        assert f"from step {record.forward_nonfinite})" in str(watch.report())
        assert watch.scalars()["fastrnn/gru.l0/h/nonfinite"] == 1 and not watch.scalars()["fastrnn/gru.l0/h/exploding"]
        return record.forward_nonfinite, found.advice

    def at_step_5(module, x):
        x[5] = math.nan

    def in_one_sample(module, x):
        x[5, 2] = math.nan

    def in_the_weights(module, x):
        module.weight_hh_l0[0, 0] = math.nan

    for change, call in (
        (at_step_5, {}), (in_one_sample, {}), (in_one_sample, {"batch_first": True}), (in_one_sample, {"packed": True}),
    ):  # fmt: skip
        step, advice = finding(change, **call)
        assert step == 5 and "the weights are finite" in advice[0] and len(advice) == 1
    step, advice = finding(in_the_weights)
    assert step == 0 and "the weights are not finite" in advice[0] and len(advice) == 1


def test_gain_overflows_to_exploding():
    # 2 * 30^26 is the first norm beyond float32's 3.4e38; the input is small enough for the forward to stay within.
    record = watched(linear_rnn(30.0), 1e-10 * torch.rand(28, B, 4), lambda y: y[-1].sum()).report()[0]
    assert record.verdict == "exploding" and record.first_nonfinite == 27 - 26
    assert record.horizon is None and record.forward_nonfinite is None
    assert record.gain_median == pytest.approx(30.0, rel=1e-6)


def test_clipping_is_counted_and_undone_in_the_gain():
    module = linear_rnn(1.5, clip_state_grad_norm=3.0)
    record = watched(module, torch.rand(T, B, 4), lambda y: y[-1].sum()).report()[0]
    # Norms: 2, 3, then 4.5 before every clipping.
    assert record.total.tolist() == pytest.approx([4.5] * (T - 2) + [3.0, 2.0], rel=1e-6)
    assert record.clipped == (T - 2) * B and record.clip_rate == (T - 2) / T
    torch.testing.assert_close(record.gain[:-1], torch.full((T - 1,), 1.5).double(), rtol=1e-6, atol=0)
    assert watched(linear_rnn(1.5), torch.rand(T, B, 4)).report()[0].clipped is None


# ----------------------------------------------------------------------------------------------- kinds of calls


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


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(
    "lengths, horizon, longest, verdict",
    [
        ([40] * 10, 6, 40, "vanishing"),  # 0.5^6 > 1 % > 0.5^7
        ([40] * 4 + [5] * 6, 6, 40, "vanishing"),
        ([40] + [4] * 9, 6, 40, "vanishing"),
        ([40] * 4 + [10] * 6, 6, 40, "vanishing"),
        ([10] * 10, 6, 10, "healthy"),  # more than half of the way
        ([5] * 10, 5, 5, "healthy"),
    ],
)
def test_a_short_sequence_tells_only_of_its_own_length(lengths, horizon, longest, verdict, direction):
    module, n = linear_rnn(0.5, bidirectional=True), torch.tensor(lengths)
    module.load_state_dict({k: module.state_dict()[k.removesuffix("_reverse")] for k in module.state_dict()})
    with GradientMonitor(module) as watch:
        module(torch.rand(40, 10, 4) + 0.1, lengths=n)[1].sum().backward()
    record = watch.report()[direction == "reverse"]
    assert record.direction == direction
    assert (record.horizon, record.longest, record.verdict) == (horizon, longest, verdict)
    assert record.gain_median == pytest.approx(0.5, rel=1e-6)


def test_sequences_of_one_length_have_the_plain_median_as_horizon():
    generator = torch.Generator().manual_seed(0)
    log_gain = torch.randn(60, 9, generator=generator).double() - 0.2
    log_gain[0] = math.nan  # backward order: nothing comes back to the last step
    everywhere, nowhere = torch.ones(60, 9, dtype=torch.bool), torch.zeros(60, 9, dtype=torch.bool)
    kept = (log_gain[1:].cumsum(0) >= math.log(0.01)).cumprod(0).sum(0)
    assert int(kept.max()) < 59  # all fall
    _, horizon, longest, *_ = diagnosis._judge(log_gain, everywhere, nowhere)
    assert (horizon, longest) == (int(kept.median()), 60)


def test_short_sequences_do_not_outvote_an_explosion():
    lengths = torch.tensor([40] * 4 + [5] * 6)  # 1.2^39 is over 100, 1.2^4 is not
    record = watched(linear_rnn(1.2), torch.rand(40, 10, 4), lengths=lengths, loss=lambda y: y[-1].sum() + y[4].sum())
    record = record.report()[0]
    assert record.verdict == "exploding" and record.horizon == record.longest == 40
    assert record.growth == pytest.approx(1.2**39, rel=1e-4)


def test_a_segment_tells_only_of_its_own_length():
    resets = torch.zeros(40, B, dtype=torch.bool)
    resets[::5] = True
    record = watched(linear_rnn(0.5), torch.rand(40, B, 4) + 0.1, reset_mask=resets).report()[0]
    assert (record.horizon, record.longest, record.verdict) == (5, 5, "healthy")
    resets[::5], resets[20] = False, True
    record = watched(linear_rnn(0.5), torch.rand(40, B, 4) + 0.1, reset_mask=resets).report()[0]
    assert (record.horizon, record.longest, record.verdict) == (6, 20, "vanishing")


def test_a_loss_in_the_middle_starts_the_way_there():
    record = watched(linear_rnn(1.0), torch.rand(40, B, 4) + 0.1, lambda y: y[20].sum()).report()[0]
    assert (record.horizon, record.longest) == (21, 21)


@pytest.mark.parametrize("reverse", [0, 1])
def test_a_gain_of_zero_is_no_end_of_a_sequence(reverse):
    """W_hh = 0, and a loss where each direction ends: nothing of it is carried on, though there is a way to go."""
    module = linear_rnn(0.0, bidirectional=True)
    with torch.no_grad():
        module.weight_hh_l0_reverse.zero_()

    def loss(y):
        return y[0, :, 4:].sum() + y[-1, :, :4].sum()

    record = watched(module, torch.rand(T, B, 4) + 0.1, loss).report()[reverse]
    assert (record.verdict, record.horizon, record.longest, record.gain_median) == ("vanishing", 0, T, 0)


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


# ------------------------------------------------------------------------------------------------------ output


def test_report_prints_as_a_table():
    watch = watched(fastrnn.LSTM(I, H, bidirectional=True, clip_state_grad_norm=1.0), torch.randn(T, B, I))
    assert watch.report().records[0].name == "lstm.l0"
    table, *findings = str(watch.report()).split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 5 and lines[0].startswith("layer")
    assert [f.splitlines()[0].split(":")[0] for f in findings] == ["lstm.l0", "lstm.l0_reverse"]
    assert [line.split()[:2] for line in lines[1:]] == [[f"lstm.l0{d}", s] for d in ("", "_reverse") for s in "hc"]
    assert all(line.endswith(("healthy", "vanishing", "exploding")) for line in lines[1:])
    assert "no gradient recorded" in str(GradientMonitor(fastrnn.LSTM(I, H)).report())


def test_scalars_are_flat_and_numbers():
    scalars = watched(linear_rnn(0.5), torch.rand(40, B, 4) + 0.1).scalars()
    assert all(type(v) is float and k.startswith("fastrnn/rnn.l0/h/") for k, v in scalars.items())
    assert scalars["fastrnn/rnn.l0/h/gain_median"] == pytest.approx(0.5, rel=1e-6)
    assert scalars["fastrnn/rnn.l0/h/vanishing"] == 1.0 and scalars["fastrnn/rnn.l0/h/horizon"] == 6.0
    assert "fastrnn/rnn.l0/h/clipped" not in scalars


def is_picture(path):
    image = pytest.importorskip("matplotlib.image").imread(path)  # decodes the PNG
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and min(image.shape[:2]) > 200 and image.std() > 0.01


def test_plot_writes_a_picture(tmp_path):
    watch = watched(fastrnn.LSTM(I, H, bidirectional=True), torch.randn(T, B, I), lambda y: y[-1].sum())
    watch.plot(tmp_path / "new" / "norms.png")
    assert is_picture(tmp_path / "new" / "norms.png")
    watch.plot(tmp_path / "norms.epoch3")
    assert is_picture(tmp_path / "norms.epoch3")
    watch.plot(tmp_path / "norms.pdf")
    assert (tmp_path / "norms.pdf").read_bytes()[:5] == b"%PDF-"
    with pytest.raises(ValueError, match="no gradient to plot"):
        GradientMonitor(fastrnn.LSTM(I, H)).plot(tmp_path / "none.png")


def test_plot_copes_with_zeros_and_nan(tmp_path):
    for factor in (0.0, math.nan):
        watch = watched(linear_rnn(0.9), torch.rand(T, B, 4), lambda y, factor=factor: (y * factor).sum())
        watch.plot(tmp_path / "norms.png")
        assert is_picture(tmp_path / "norms.png")


def test_learning_curves_write_a_picture(tmp_path):
    row = {"train_loss": 2.0, "test_loss": 2.1, "train_accuracy": 0.3, "test_accuracy": 0.25}
    plots.learning_curves(tmp_path / "curves.png", [row, row], "title")
    assert is_picture(tmp_path / "curves.png")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install fastrnn\[plots\]"):
        watched(fastrnn.RNN(I, H), torch.randn(T, B, I)).plot(tmp_path / "norms.png")


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
