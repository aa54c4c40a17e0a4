"""GradientMonitor sees every call, however a module is called, wrapped, copied or saved, and ends no training."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import GradientMonitor

T, B, I, H = 12, 4, 3, 6
CELLS = {
    "LSTM": (fastrnn.LSTM, {}),
    "LSTM, both directions": (fastrnn.LSTM, {"bidirectional": True, "num_layers": 2}),
    "GRU": (fastrnn.GRU, {}),
    "RNN": (fastrnn.RNN, {"nonlinearity": "elu"}),
}
cells = pytest.mark.parametrize("cell", CELLS)


def make(cell, kind=None):
    torch.manual_seed(0)
    base, settings = CELLS[cell]
    return (kind(base) if kind else base)(I, H, **settings)


def seen(module, run, **settings):
    """The report on a training step whose loss is the sum of what `run` returns."""
    with GradientMonitor(module, **settings) as monitor:
        run().sum().backward()
    return monitor.report()


def same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert (x.layer, x.direction, x.state) == (y.layer, y.direction, y.state)
        assert (x.verdict, x.horizon, x.valid.tolist()) == (y.verdict, y.horizon, y.valid.tolist())
        for name in ("total", "carried", "gain"):
            # float32 norms, in another batch layout at most: ten roundings
            torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=1e-5, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------- ways to call


@cells
@pytest.mark.parametrize("returned", ["tensor", "dict", "state", "nothing of it"])
def test_a_subclass_may_return_what_it_likes(cell, returned):
    def kind(base):
        class Own(base):
            def forward(self, x):
                y, state = super().forward(x)
                h = state[0] if isinstance(state, tuple) else state
                return {"tensor": y, "dict": {"out": y}, "state": h, "nothing of it": [y.sum()]}[returned]

        return Own

    x, module = torch.randn(T, B, I), make(cell, kind)
    plain, monitor = make(cell), GradientMonitor(module, every=2)
    with monitor:
        for _ in range(6):
            out = module(x)
            out = out["out"] if returned == "dict" else out[0] if returned == "nothing of it" else out
            out.sum().backward()
    assert monitor.history.steps == [0, 2, 4]

    def result():
        y, h = plain(x)
        return y if returned != "state" else h[0] if isinstance(h, tuple) else h

    expected = seen(plain, result)
    for got, want in zip(monitor.report(), expected, strict=True):
        torch.testing.assert_close(got.total, want.total, rtol=1e-5, atol=0)  # float32, ten roundings


@pytest.mark.parametrize("steps", [1, T])
@pytest.mark.parametrize("change", [lambda out: out[0], lambda out: {"out": out[0]}, lambda out: out[0][-1:]])
def test_a_hook_may_change_the_outputs(change, steps):
    module = make("GRU")
    module.register_forward_hook(lambda module, args, out: change(out))
    module.register_forward_pre_hook(lambda module, args: tuple(a * 1.0 for a in args))
    with GradientMonitor(module, every=2) as monitor:
        for _ in range(6):
            out = module(torch.randn(steps, B, I))
            (out["out"] if isinstance(out, dict) else out).sum().backward()
    assert monitor.history.steps == [0, 2, 4]


@cells
def test_a_wrapper_that_calls_forward_is_seen(cell):
    class WeightDrop(nn.Module):
        """As AWD-LSTM's: W_hh is an attribute that is made anew before every call."""

        def __init__(self, module):
            super().__init__()
            self.module = module
            weight = module._parameters.pop("weight_hh_l0")
            self.raw = nn.Parameter(weight.data)

        def forward(self, x):
            self.module.weight_hh_l0 = self.raw * 1.0
            return self.module.forward(x)

    plain, module, x = make(cell), WeightDrop(make(cell)), torch.randn(T, B, I)
    got, want = seen(module, lambda: module(x)[0]), seen(plain, lambda: plain(x)[0])
    for a, b in zip(got, want, strict=True):
        assert a.module == "module"
        torch.testing.assert_close(a.total, b.total, rtol=1e-5, atol=0)  # float32, ten roundings


@cells
def test_weights_that_somebody_else_computes(cell):
    module, x = make(cell), torch.randn(T, B, I)
    made = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    for name in made:
        del module._parameters[name]
    plain = make(cell)

    def run():
        for name, leaf in made.items():
            setattr(module, name, leaf * 1.0)
        return module(x)[0]

    same(seen(module, run), seen(plain, lambda: plain(x)[0]))


def test_other_calls_that_reach_forward():
    module, x = make("LSTM"), torch.randn(T, B, I)
    expected = seen(module, lambda: module(x)[0])
    params = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    same(seen(module, lambda: module.forward(x)[0]), expected)
    same(seen(module, lambda: type(module).forward(module, input=x)[0]), expected)
    same(seen(module, lambda: torch.func.functional_call(module, params, (x,))[0]), expected)
    parametrize.register_parametrization(module, "weight_hh_l0", nn.Identity())
    same(seen(module, lambda: module(x)[0]), expected)


def test_a_packed_batch_in_any_order():
    module, x, lengths = make("GRU"), torch.randn(T, B, I), torch.tensor([3, T, 1, 7])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    got = []
    with GradientMonitor(module) as monitor:
        monitor.norms_to(lambda name, norms: got.append(norms))
        module(packed)[0].data.sum().backward()
    assert [int((norm != 0).sum()) for norm in got[0][0, 0, 0].unbind(-1)] == lengths.tolist()
    same(monitor.report(), seen(module, lambda: module(x, lengths=lengths)[0]))


def test_two_monitors_see_the_same():
    module, x = make("LSTM"), torch.randn(T, B, I)
    with GradientMonitor(module) as first, GradientMonitor(nn.ModuleList([module]), every=2) as second:
        for _ in range(3):
            module(x)[0].sum().backward()
        first.disable()
        for _ in range(2):
            module(x)[0].sum().backward()
    assert first.history.steps == [0, 1, 2] and second.history.steps == [0, 2, 4]
    assert "_watch" not in vars(module)
    for a, b in zip(first.report(), second.report(), strict=True):
        torch.testing.assert_close(a.total, b.total, rtol=0, atol=0)


def test_the_penalty_is_no_call_of_the_model():
    module, x = make("GRU"), torch.randn(T, B, I)
    with GradientMonitor(module) as monitor:
        loss = module(x)[0].sum() + fastrnn.penalties.omega(module, x, lambda y: y.sum())
        loss.backward()
    assert monitor.report()[0].valid.tolist() == [B] * T and monitor.history.steps == [0]


def test_compiled_subclasses_are_seen():
    class Outputs(fastrnn.GRU):
        def forward(self, x):
            return super().forward(x)[0]

    torch.manual_seed(0)
    module, x = Outputs(I, H), torch.randn(T, B, I)
    expected = seen(module, lambda: module(x))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()  # compiled before the monitor comes, too
    for _ in range(2):
        got = seen(compiled, lambda: compiled(x), max_steps=20, batch=8)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.total, b.total, rtol=1e-5, atol=0)  # float32, ten roundings
    assert not module._watch


# -------------------------------------------------------------------------------------------------- copies and files


@cells
@pytest.mark.parametrize("every", [1, 2])
def test_copies_carry_no_monitor(cell, every):
    net, x = nn.Sequential(make(cell)), torch.randn(T, B, I)
    with GradientMonitor(net, every=every) as monitor:
        net(x)[0].sum().backward()
        averaged = torch.optim.swa_utils.AveragedModel(net)
        averaged.update_parameters(net)
        copies = [copy.deepcopy(net), averaged.module, nn.Sequential(copy.copy(net[0]))]
        for each in copies:
            assert each[0]._watch is None
            each(x)[0].sum().backward()
        assert monitor.history.steps == [0]
        net(x)[0].sum().backward()
    assert monitor._backwards == 2
    for each in copies:
        pickle.loads(pickle.dumps(each))


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_deep_copy_of_the_attributes_carries_none(parametrized):
    module = make("GRU")
    if parametrized:  # torch copies the dictionary of its attributes then
        parametrize.register_parametrization(module, "weight_hh_l0", nn.Identity())
    with GradientMonitor(module):
        twin = copy.deepcopy(module)
        assert twin._watch is None and module._watch is not None
        assert copy.deepcopy(vars(module))["_watch"] is None


@cells
def test_a_model_saved_inside_is_the_model(cell):
    net, x = nn.Sequential(make(cell)), torch.randn(T, B, I)
    with GradientMonitor(net) as monitor:
        net(x)[0].sum().backward()
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        back = torch.load(file, weights_only=False)
        assert "_watch" not in vars(back[0])
        back(x)[0].sum().backward()
        assert monitor._backwards == 1
    torch.testing.assert_close(back(x)[0], net(x)[0], rtol=0, atol=0)
    assert list(net.state_dict()) == list(back.state_dict())


def test_a_subclass_that_pickles_its_attributes():
    module = Pickled(I, H)
    with GradientMonitor(module):
        back = pickle.loads(pickle.dumps(module))
    assert back._watch is None


class Pickled(fastrnn.GRU):
    def __getstate__(self):
        return dict(vars(self))


def test_a_twin_converted_inside_carries_none():
    module = make("LSTM")
    with GradientMonitor(module):
        assert not hasattr(fastrnn.convert(module, to="torch"), "_watch")


def test_replicas_are_pooled():
    """DataParallel's replicas of a module, which on a CPU only their threads tell apart."""
    module, x = make("LSTM"), torch.randn(T, B, I)
    expected = seen(module, lambda: module(x)[0])
    names = [name for name, _ in module.named_parameters()]

    def replicas():
        for _ in range(2):
            replica = module._replicate_for_data_parallel()
            for name in names:  # as torch.nn.parallel.replicate does with the copies on each device
                setattr(replica, name, getattr(module, name) * 1.0)
            yield replica

    def run():
        parts = zip(replicas(), x.split(2, 1), strict=True)
        return torch.cat([replica(part)[0] for replica, part in parts], 1)

    same(seen(module, run), expected)
