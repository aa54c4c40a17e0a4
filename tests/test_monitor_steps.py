"""GradientMonitor through training: which steps are observed, in what units, what is remembered and passed on."""

import json
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import GradientMonitor
from fastrnn.monitoring import Report, history

T, B, I, H = 12, 4, 3, 6


def node(y):
    """The kind of node that an output came from, behind the copy that the scan hands out."""
    found = y.grad_fn
    return found.next_functions[0][0].name() if found.name() == "CloneBackward0" else found.name()


def train(module, steps, monitor, loss=lambda y: y.square().mean(), x=None):
    """That many backwards under the monitor; the kinds of node that the outputs came from."""
    nodes = []
    with monitor:
        for _ in range(steps):
            y = module(torch.randn(T, B, I) if x is None else x)[0]
            nodes.append(node(y))
            loss(y).backward()
    return nodes


def same(a, b, scale=1.0):
    """The same records up to a factor; float32 norms in another batch layout round alike to 1e-5."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        for name, factor in (("total", scale), ("carried", scale), ("gain", 1.0)):
            torch.testing.assert_close(getattr(x, name), getattr(y, name) * factor, rtol=1e-5, atol=0, equal_nan=True)
        assert (x.valid.tolist(), x.horizon, x.verdict, x.clipped) == (
            y.valid.tolist(),
            y.horizon,
            y.verdict,
            y.clipped,
        )


# ---------------------------------------------------------------------------------------------------------- every


def test_only_every_nth_step_has_a_tap():
    monitor = GradientMonitor(fastrnn.LSTM(I, H), every=3)
    nodes = train(next(iter(monitor._modules.values())), 7, monitor)
    scanned = [name in ("ScanBackward", "NetworkBackward") for name in nodes]
    assert scanned == [True, False, False, True, False, False, True]
    assert monitor.history.steps == [0, 3, 6]


@pytest.mark.parametrize("part", ["y", "h_n", "c_n", "packed", "input"])
def test_a_step_counts_by_whatever_it_came_through(part):
    module, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    if part == "input":
        module.requires_grad_(False)
        x.requires_grad_()
    call = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([T, 9, 4, 1])) if part == "packed" else x
    with GradientMonitor(module, every=2) as monitor:
        for _ in range(5):
            module(call)  # an evaluation in between is no step
            y, (h, c) = module(call)
            {"h_n": h, "c_n": c, "packed": getattr(y, "data", None)}.get(part, y).sum().backward()
    assert monitor.history.steps == [0, 2, 4]


def test_off_nothing_is_there():
    """No hook on the module, its parameters or its output; no tap; and torch's own kernel, where it was before."""
    module, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    plain = node(module(x)[0])
    monitor = GradientMonitor(module, every=2)
    monitor.log_to(print)
    train(module, 3, monitor)
    y = module(x)[0]
    assert node(y) == plain != "ScanBackward" and not y._backward_hooks
    for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_backward_hooks"):
        assert not getattr(module, hooks)
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in module.parameters())


def test_an_unobserved_step_adds_no_kernel():
    """What runs in a step that `every` leaves out is what runs without the monitor."""
    module, x = fastrnn.GRU(I, H), torch.randn(T, B, I)

    def ops():
        module.zero_grad()
        with torch.profiler.profile() as profile:
            module(x)[0].sum().backward()
        return [(event.key, event.count) for event in profile.key_averages() if event.key.startswith("aten::")]

    plain = sorted(ops())
    with GradientMonitor(module, every=2):
        observed, between = sorted(ops()), sorted(ops())
    assert between == plain != observed


def test_a_backward_that_fails_is_forgotten():
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError

    first, second, x = fastrnn.GRU(I, H), fastrnn.GRU(H, H), torch.randn(T, B, I)
    model = nn.ModuleList([first, second])
    with GradientMonitor(model, every=2) as monitor:
        with pytest.raises(ArithmeticError):
            second(Fail.apply(first(x)[0]))[0].sum().backward()
        assert monitor.report() == []
        second(first(x)[0])[0].sum().backward()
        assert {r.name for r in monitor.report()} == {"0.l0", "1.l0"}
    assert monitor.history.steps == [0] and monitor.report()[1].valid.tolist() == [B] * T


def test_a_compiled_model_is_read_every_nth_step_without_a_recompilation():
    module = fastrnn.GRU(I, H)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(module, backend=counter, fullgraph=True), torch.randn(T, B, I)
    with GradientMonitor(compiled, every=2, max_steps=T, batch=B) as monitor:
        graphs = []
        for scale in (1.0, 2.0, 4.0, 8.0):
            (scale * compiled(x)[0].sum()).backward()
            graphs.append(counter.frame_count)
    assert monitor.history.steps == [0, 2] and len(set(graphs)) == 1
    same(monitor.history.reports[1], monitor.history.reports[0], 4.0)


# ------------------------------------------------------------------------- accumulation, scaling, checkpointing, clip


def test_the_backwards_of_one_accumulated_step_are_pooled():
    module, x = fastrnn.RNN(I, H), torch.randn(T, 6, I)
    whole = GradientMonitor(module)
    train(module, 1, whole, torch.sum, x)
    with GradientMonitor(module, accumulate=3, every=2) as monitor:
        for _ in range(3):
            for part in x.split(2, 1):
                assert len(monitor.history) == len(monitor.history.steps)
                module(part)[0].sum().backward()
    assert monitor.history.steps == [0, 2]
    for seen in monitor.history.reports:
        same(seen, whole.report())


@pytest.mark.parametrize("scaler", [65536.0, torch.amp.GradScaler("cpu", init_scale=65536.0)], ids=["float", "scaler"])
def test_a_loss_scale_is_divided_out(scaler):
    module, x = fastrnn.LSTM(I, H), torch.randn(T, B, I)
    plain, monitor = GradientMonitor(module), GradientMonitor(module, loss_scale=scaler)
    train(module, 1, plain, torch.sum, x)
    bound = float(plain.report()[0].total.median())  # of h alone, so that some pairs are over it, or all
    for watch, scale in ((plain, 1.0), (monitor, 65536.0)):
        module.clip_state_grad_norm = bound * scale
        train(module, 1, watch, lambda y, scale=scale: y.sum() * scale, x)
    assert plain.report()[0].clipped > 0
    same(monitor.report(), plain.report())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_seen_once(reentrant, every):
    lower, upper, x = fastrnn.LSTM(I, H), fastrnn.GRU(H, H), torch.randn(T, B, I, requires_grad=True)
    model = nn.ModuleList([lower, upper])
    with GradientMonitor(model) as plain:
        upper(lower(x)[0])[0].sum().backward()
    with GradientMonitor(model, every=every) as monitor:
        for _ in range(3):
            y = x
            for module in (lower, upper):
                y = checkpoint(lambda x, module=module: module(x)[0], y, use_reentrant=reentrant)
            y.sum().backward()
    assert monitor.history.steps == [0, 1, 2][::every]
    for seen in monitor.history.reports:
        same(seen, plain.report())


def test_the_bound_is_that_of_the_backward():
    """An adaptive bound that moves on afterwards does not change what was clipped."""
    bound = torch.tensor(1.0)
    module = fastrnn.RNN(I, H, clip_state_grad_norm=bound)
    monitor = GradientMonitor(module)
    train(module, 1, monitor, torch.sum)
    before = monitor.report()[0].clipped
    bound.fill_(1e9)
    assert monitor.report()[0].clipped == before > 0


# -------------------------------------------------------------------------------------------------------- history


def test_history_holds_maps_and_curves_of_the_observed_steps():
    module = fastrnn.LSTM(I, H, bidirectional=True)
    monitor = GradientMonitor(module)
    with monitor:
        for steps in (T, 5, T):
            module(torch.randn(steps, B, I))[0].sum().backward()
    past = monitor.history
    assert len(past) == 3 and past.names == ["lstm.l0", "lstm.l0_reverse"] and past.states("lstm.l0") == ["h", "c"]
    table = past.map("lstm.l0", "c")
    assert table.shape == (3, T) and table[1, 5:].isnan().all() and (table[0] > 0).all()
    torch.testing.assert_close(table[2], monitor.report()[1].total, rtol=0, atol=0)
    assert past.curve("lstm.l0", "h")[2] == monitor.report()[0].gain_median
    assert all(math.isnan(v) for v in past.curve("lstm.l0", "h", "clip_rate"))
    kept = json.loads(json.dumps(past.as_list(), allow_nan=False))
    assert [k["step"] for k in kept] == [0, 1, 2] and kept[1]["records"][0]["horizon"] == past.reports[1][0].horizon
    for wrong in (("nobody", "h"), ("lstm.l0", "z")):
        with pytest.raises(ValueError, match=r"there are \[\('lstm.l0', 'c'\), "):
            past.curve(*wrong)
        with pytest.raises(ValueError, match="no record"):
            past.map(*wrong)
    assert history.History().curve("nobody", "h") == []


def test_the_first_training_step_that_is_not_finite():
    module, x = fastrnn.GRU(I, H), torch.randn(T, B, I)
    monitor = GradientMonitor(module, every=2)
    assert monitor.history.first_nonfinite() is None
    with monitor:
        for k in range(6):
            (module(x)[0].sum() * (math.inf if k == 4 else 1.0)).backward()
    assert monitor.history.first_nonfinite() == 4


def test_history_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr(history, "ROOM", 8)
    past = history.History()
    for step in range(100):
        past.append(step, Report())
        assert len(past) < 8
        assert len({b - a for a, b in zip(past.steps, past.steps[1:], strict=False)}) <= 1
    assert past.steps == [0, 16, 32, 48, 64, 80, 96]


# --------------------------------------------------------------------------------------------------- passing it on


class Writer:
    """TensorBoard's SummaryWriter, as far as it is used."""

    def __init__(self):
        self.written = []

    def add_scalar(self, name, value, step):
        self.written.append((name, value, step))


def test_scalars_go_to_every_sink_at_observed_steps():
    monitor, dicts, writer = GradientMonitor(fastrnn.LSTM(I, H), every=2), [], Writer()
    monitor.log_to(dicts.append)
    monitor.log_to(writer)
    train(next(iter(monitor._modules.values())), 5, monitor)
    assert [d.pop("fastrnn/step") for d in dicts] == [0, 2, 4]
    assert dicts[-1] == monitor.scalars()
    assert writer.written == [(k, v, step) for step, d in zip((0, 2, 4), dicts, strict=True) for k, v in d.items()]
    with pytest.raises(TypeError, match="callable or a SummaryWriter, got dict"):
        monitor.log_to({})


def test_tensorboard_takes_it(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        monitor = GradientMonitor(fastrnn.GRU(I, H))
        monitor.log_to(writer)
        train(next(iter(monitor._modules.values())), 2, monitor)
    assert list(tmp_path.iterdir())


def test_norms_go_on_as_they_are():
    module, got = fastrnn.LSTM(I, H, 2), []
    monitor = GradientMonitor(module, every=2)
    monitor.norms_to(lambda name, norms: got.append((name, norms)))
    train(module, 3, monitor)
    assert [(name, tuple(n.shape), n.dtype) for name, n in got] == [("lstm", (2, 2, 2, T, B), torch.float32)] * 2


def test_the_report_as_a_dict_is_strict_json():
    module = fastrnn.LSTM(I, H, bidirectional=True, clip_state_grad_norm=0.1)
    monitor = GradientMonitor(module)
    train(module, 1, monitor, lambda y: y[-1].sum())
    report = monitor.report()
    back = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert [(r["name"], r["state"]) for r in back["records"]] == [(r.name, r.state) for r in report]
    assert back["records"][0]["total"] == report[0].total.tolist()
    assert back["records"][0]["gain"][-1] is None and back["records"][0]["clip_rate"] == report[0].clip_rate
    assert [f["summary"] for f in back["findings"]] == [f.summary for f in report.findings]


def test_a_picture_per_layer_and_direction(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    module = fastrnn.LSTM(I, H, 2, bidirectional=True)
    monitor = GradientMonitor(module)
    train(module, 3, monitor)
    paths = monitor.plot_layers(tmp_path / "new")
    names = ["lstm.l0", "lstm.l0_reverse", "lstm.l1", "lstm.l1_reverse"]
    assert [p.name for p in paths] == [f"{n}.png" for n in names]
    assert all(min(image.imread(p).shape[:2]) > 200 for p in paths)


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf])
def test_pictures_of_nothing_and_of_what_is_not_finite(tmp_path, factor):
    pytest.importorskip("matplotlib")
    module = fastrnn.GRU(I, H)
    monitor = GradientMonitor(module)
    train(module, 2, monitor, lambda y: y.sum() * factor)
    assert monitor.plot_layers(tmp_path)[0].exists()
    with pytest.raises(ValueError, match="no gradient to plot"):
        GradientMonitor(module).plot_layers(tmp_path)


def test_counts_are_checked():
    for wrong in ({"every": 0}, {"accumulate": -1}, {"max_steps": 0, "batch": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is a count and at least 1"):
            GradientMonitor(fastrnn.GRU(I, H), **wrong)
    for wrong in ({"every": 1.5}, {"accumulate": True}, {"batch": "8", "max_steps": 1}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} should be of type int"):
            GradientMonitor(fastrnn.GRU(I, H), **wrong)
    for wrong in (0, -1.0, math.nan, math.inf, torch.tensor(0.0)):
        with pytest.raises(ValueError, match="loss_scale should be a positive number"):
            GradientMonitor(fastrnn.GRU(I, H), loss_scale=wrong)
