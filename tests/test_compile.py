"""Modules under torch.compile, torch.export and torch.jit.trace."""

import pytest
import torch
from setups import H, I, agree, flat, make, needs_cpu_library, random
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

T, B = 4, 3
# float32 keeps 7 digits; a compiler fuses and reorders sums of up to 1e2 terms over a handful of steps.
SINGLE = {"rtol": 1e-4, "atol": 1e-5}


class Tagger(nn.Module):
    """A model around the network, so that there is something to fuse with."""

    def __init__(self, name="LSTM", **settings):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(I, I)
        self.rnn = getattr(fastrnn, name)(I, H, **settings)
        self.outer = nn.LazyLinear(2)

    def forward(self, x, **call):
        y, *others = self.rnn(self.inner(x).tanh(), **call)
        cells = others[1].square().mean() if len(others) > 1 else 0
        return self.outer(y).square().mean() + cells


def tagger(name="LSTM", **settings):
    model = Tagger(name, **settings)
    model(torch.zeros(1, 1, I))
    return model


def loss_and_gradients(function, model, x, tap=None, **call):
    model.zero_grad()
    leaves = {"x": x.clone().requires_grad_()}
    if tap is not None:
        leaves["tap"] = call["tap"] = torch.zeros(tap, requires_grad=True)
    loss = function(leaves["x"], **call)
    loss.backward()
    return [loss.detach(), *(v.grad for v in leaves.values()), *(p.grad.clone() for p in model.parameters())]


CALLS = {
    "plain": ({}, {}),
    "tap": ({"num_layers": 2, "bidirectional": True}, {"tap": True}),
    "lengths": ({"bidirectional": True}, {"lengths": torch.tensor([4, 1, 2])}),
    "features": ({"layer_norm": True, "zoneout": 0.3, "clip_state_grad_norm": 0.1}, {"tap": True}),
    "clip tensor": ({"clip_state_grad_norm": torch.tensor(0.01)}, {}),
    "projection": ({"proj_size": 2}, {}),
    "cells": ({}, {"return_cells": True}),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_equals_eager(compiler, name, case, training=False, **more):
    settings, call = CALLS[case]
    # zoneout draws: its masks may come in another order from a compiler, so they are compared in eval mode
    model = tagger(name, **settings, **more).train(training)
    call, x = dict(call), torch.randn(T, B, I)
    if call.pop("tap", False):
        rows = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
        call["tap"] = (rows, 2, 2 if name == "LSTM" else 1, T, B)
    expected = loss_and_gradients(model, model, x, **call)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    agree(loss_and_gradients(compiled, model, x, **call), expected, **SINGLE)
    assert all(v.abs().sum() > 0 for v in expected)


# On what `auto` takes; the test of one backend has the other cases.
@pytest.mark.parametrize("name, case", [("LSTM", "tap"), ("LSTM", "cells"), ("GRU", "features"), ("RNN", "lengths")])
def test_fullgraph_compile_equals_eager(name, case):
    compiled_equals_eager("aot_eager", name, case)


@pytest.mark.slow
def test_inductor_equals_eager():
    compiled_equals_eager("inductor", "LSTM", "tap")


@pytest.mark.slow
@needs_cpu_library
@pytest.mark.parametrize(
    "compiler, name, case, training",
    [
        ("aot_eager", "GRU", "tap", False),
        ("aot_eager", "LSTM", "plain", True),
        ("aot_eager", "RNN", "lengths", True),
        *(("aot_eager", "LSTM", case, True) for case in ("clip tensor", "projection", "cells")),
        ("inductor", "LSTM", "features", False),
        ("inductor", "GRU", "lengths", True),
    ],
)
def test_a_compiled_step_takes_the_backend_of_the_eager_one(compiler, name, case, training, monkeypatch):
    """So do forward and backward; a gradient that never arrives stays absent, and costs no zeros."""
    calls, launcher = [], fastrnn.dispatch.launcher

    class Spy:
        def __init__(self, backend):
            self.backend = backend

        def forward(self, *arguments):
            calls.append(("forward", self.backend))
            return launcher(self.backend).forward(*arguments)

        def backward(self, incoming, *rest):
            calls.append(("backward", self.backend, incoming.dc is not None, incoming.dsaved is not None))
            return launcher(self.backend).backward(incoming, *rest)

    monkeypatch.setattr("fastrnn.dispatch.launcher", Spy)
    compiled_equals_eager(compiler, name, case, training, backend="cpu")
    assert set(calls) == {("forward", "cpu"), ("backward", "cpu", case == "cells", False)}


def test_compile_under_no_grad():
    model = tagger()
    x = torch.randn(T, B, I)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert not got.requires_grad
    agree([got], [model(x).detach()], **SINGLE)


@pytest.mark.parametrize("backend, num_layers", [pytest.param("cpu", 2, marks=needs_cpu_library), ("reference", 1)])
def test_a_compiled_call_of_a_packed_batch(backend, num_layers):
    """It takes more than one graph, because PyTorch does not compile packing."""
    model = make("GRU", backend, num_layers=num_layers)
    packed = pack_padded_sequence(random(T, B, I), torch.tensor([4, 2, 1]))
    torch._dynamo.reset()
    results = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        y, h_n = call(packed)
        results.append((y.data, h_n, *torch.autograd.grad(y.data.square().sum(), tuple(model.parameters()))))
    agree(*results)


@pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="torch 2.10 compiles no autograd.Function under torch.func; it says so"
)
def test_a_second_derivative_in_a_compiled_function_is_right_or_refused():
    model, x = make("LSTM-proj", backend="reference"), random(T, B, I, requires_grad=False)
    first = grad(lambda x: model(x)[0].sum())
    second = grad(lambda x: first(x).square().sum())
    expected = second(x)
    assert expected.abs().max() > 1e-4
    agree([torch.compile(first, fullgraph=True, backend="aot_eager")(x)], [first(x)])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="second derivative"):
        torch.compile(second, fullgraph=True, backend="aot_eager")(x)
    agree([torch.compile(second, backend="aot_eager")(x)], [expected])


def counting(model, **options):
    counter = CompileCounterWithBackend("aot_eager")
    return counter, torch.compile(model, fullgraph=True, backend=counter, **options)


@pytest.mark.slow
def test_one_compilation_serves_every_length_and_batch_size():
    model = tagger("LSTM", bidirectional=True)
    counter, compiled = counting(model)
    for steps, batch in ((5, 3), (9, 3), (4, 7), (31, 5)):
        x, shape = torch.randn(steps, batch, I), (2, 2, 2, steps, batch)
        expected = loss_and_gradients(model, model, x, tap=shape)

        def marked(x, tap):
            torch._dynamo.mark_dynamic(x, (0, 1))
            torch._dynamo.mark_dynamic(tap, (3, 4))
            return compiled(x, tap=tap)

        agree(loss_and_gradients(marked, model, x, tap=shape), expected, **SINGLE)
    # T = 2 would need one more: PyTorch compiles sizes of one apart, and h_prev is then a slice of one step.
    assert counter.frame_count == 1, f"{counter.frame_count} compilations for four shapes"


def test_automatic_dynamic_shapes_settle_after_two_compilations():
    """Without mark_dynamic the first shape is compiled as it is, the second makes T and B symbols, then nothing."""
    model = tagger("GRU", bidirectional=True)
    counter, compiled = counting(model)
    for steps, batch in ((5, 3), (9, 4), (6, 7), (31, 5)):
        x = torch.randn(steps, batch, I)
        agree(loss_and_gradients(compiled, model, x), loss_and_gradients(model, model, x), **SINGLE)
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_export(name):
    """A program that torch.export has written runs on other lengths."""
    model = tagger(name, num_layers=2, layer_norm=True).eval()
    steps, batch = torch.export.Dim("steps", min=2, max=64), torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(T, B, I),), dynamic_shapes=({0: steps, 1: batch},))
        x = torch.randn(9, 5, I)
        agree([program.module()(x)], [model(x)], **SINGLE)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_traced_cell_takes_another_batch(kind):
    """As torch.nn's does; the zeros of a state that was not given are of the input's batch."""
    cell = getattr(fastrnn, kind)(I, H).requires_grad_(False)
    traced = torch.jit.trace(cell, (torch.randn(B, I),), check_trace=False)
    x = torch.randn(B + 2, I)
    agree(flat(traced(x)), flat(cell(x)))


def test_an_exported_program_says_that_it_has_no_gradient():
    model = make("GRU")
    program = torch.export.export(model, (random(T, B, I, requires_grad=False),)).module()
    y, _ = program(random(T, B, I))
    with pytest.raises(RuntimeError, match="has no gradient by itself"):
        y.sum().backward()
