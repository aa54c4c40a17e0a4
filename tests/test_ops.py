"""The raw ops under torch.library's own checks, and the modules under everything that transforms programs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from half_lstm import under_autocast
from setups import CPU_REASON, MASKS, agree, every_backend, kept_of, needs_cpu_library, random_inputs
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn.arguments import IncomingGradients, ScanInputs, ScanOutputs, Walk
from fastrnn.cells import CELLS
from fastrnn.scan import scan

KINDS = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 2}),
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {"nonlinearity": "tanh"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
# float32 keeps 7 digits; a compiler fuses and reorders sums of up to 1e2 terms over a handful of steps.
SINGLE = {"rtol": 1e-4, "atol": 1e-5}
T, B, I, H = 4, 3, 3, 4


def make(kind, backend=None, **settings):
    name, extra = KINDS[kind]
    torch.manual_seed(0)
    return getattr(fastrnn, name)(I, H, **{"dtype": torch.float64, **extra, **settings}, backend=backend)


def twin(kind, ours, **settings):
    name, extra = KINDS[kind]
    theirs = getattr(nn, name)(I, H, **{"dtype": torch.float64, **extra, **settings})
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs


def random(*shape, seed=1, dtype=torch.float64, requires_grad=True):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=dtype, requires_grad=requires_grad)


def flat(state):
    return state if isinstance(state, tuple) else (state,)


# -------------------------------------------------------------------------------------------------------------- raw ops


OP_CASES = [
    *((cell, (), torch.float32) for cell in CELLS),
    *((cell, (*MASKS, "clip_norm"), torch.float64) for cell in ("lstm", "gru", "rnn_tanh")),
    ("lstm", ("layer_norm", "projection", "flags", "clip_norm"), torch.float32),
    ("gru", ("layer_norm",), torch.float32),
    ("lstm", ("projection",), torch.bfloat16),
    ("gru", ("flags",), torch.bfloat16),
]


@every_backend
@pytest.mark.parametrize(
    "cell, features, dtype", OP_CASES, ids=lambda v: "-".join(v) if isinstance(v, tuple) else str(v)
)
def test_opcheck_of_the_raw_ops(cell, features, dtype, backend):
    """Schema, fake tensors with static and dynamic shapes, aliasing: torch.library's own examination."""
    # The ops have no autograd of their own (scan.py holds it), so the gradient part of the examination is left out.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    bias, clipped = "layer_norm" not in features, "clip_norm" in features
    inputs = random_inputs(cell, features, sizes=(T, B, H), dtype=dtype, bias=bias)
    walk = Walk(cell, False, backend, clip_value=0.5 if clipped else None)
    for save in (True, False):
        arguments = (*inputs, *walk, save)
        torch.library.opcheck(torch.ops.fastrnn.scan_forward.default, arguments, test_utils=tests)
        torch.library.opcheck(
            torch.ops.fastrnn.scan_forward.default, arguments, test_utils=("test_aot_dispatch_dynamic",)
        )
    kept = kept_of(ScanOutputs(*torch.ops.fastrnn.scan_forward(*inputs, *walk, True)))
    incoming = IncomingGradients(dy=torch.ones_like(kept.y))
    if clipped and kept.c is not None:
        incoming = incoming._replace(dc=torch.ones_like(kept.c))
    arguments = (*incoming, *kept, *inputs._replace(gx=None), *walk, clipped)
    torch.library.opcheck(
        torch.ops.fastrnn.scan_backward.default, arguments, test_utils=(*tests, "test_aot_dispatch_dynamic")
    )


@needs_cpu_library
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layer_norm_takes_no_pass_over_the_gates_beside_the_scan(cell):
    """The backward of the scan calls the same ops on tensors as large as the gates, with layer norm and without."""
    steps, G = 300, len(CELLS[cell].gates)

    class Large(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if any(torch.is_tensor(x) and x.numel() >= steps * B * G * H for x in (*args, *tree_leaves(found))):
                self.ops.append(str(function))
            return found

    def ops(norm):
        features = ("layer_norm",) if norm else ()
        inputs = random_inputs(cell, features, sizes=(steps, B, H), bias=False)
        leaves = ScanInputs(*(x if x is None else x.requires_grad_() for x in inputs))
        y = scan(leaves, Walk(cell, False, "cpu")).y
        with Large() as large:
            y.sum().backward()
        return large.ops

    plain, normed = ops(False), ops(True)
    assert plain.count("fastrnn.scan_backward.default") == 1
    assert normed == plain


# --------------------------------------------------------------------------------------------------- compile and export


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
    # zoneout draws: its masks may come in another order from a compiler, so it is held in eval mode
    model = tagger(name, **settings, **more).train(training)
    call, x = dict(call), torch.randn(T, B, I)
    if call.pop("tap", False):
        rows = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
        call["tap"] = (rows, 2, 2 if name == "LSTM" else 1, T, B)
    expected = loss_and_gradients(model, model, x, **call)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    agree(loss_and_gradients(compiled, model, x, **call), expected, **SINGLE)
    assert all(v.abs().sum() > 0 for v in expected)


@pytest.mark.parametrize(
    "name, case", [*(("LSTM", case) for case in CALLS), ("GRU", "tap"), ("GRU", "features"), ("RNN", "lengths")]
)
def test_fullgraph_compile_equals_eager(name, case):
    compiled_equals_eager("aot_eager", name, case)


@pytest.mark.slow
def test_inductor_equals_eager():
    compiled_equals_eager("inductor", "LSTM", "tap")


@needs_cpu_library
@pytest.mark.parametrize(
    "compiler, name, case, training",
    [
        *(("aot_eager", name, case, False) for name in ("LSTM", "GRU") for case in ("tap", "features")),
        *(("aot_eager", name, case, True) for name in ("LSTM", "RNN") for case in ("plain", "lengths", "clip tensor")),
        *(("aot_eager", "LSTM", case, True) for case in ("projection", "cells")),
        pytest.param("inductor", "LSTM", "features", False, marks=pytest.mark.slow),
        pytest.param("inductor", "GRU", "lengths", True, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_takes_the_backend_of_the_eager_one(compiler, name, case, training, monkeypatch):
    """Forward and backward; and zeros in place of a gradient that never arrives do not send it elsewhere, or cost."""
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


@every_backend
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_compiled_call_of_a_packed_batch(backend, num_layers):
    """In more than one graph: PyTorch does not compile packing."""
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
@every_kind
def test_a_second_derivative_in_a_compiled_function_is_right_or_refused(kind):
    model, x = make(kind, backend="reference"), random(T, B, I, requires_grad=False)
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


@pytest.mark.parametrize("name, with_tap", [("LSTM", False), ("LSTM", True), ("GRU", True)])
def test_one_compilation_serves_every_length_and_batch_size(name, with_tap):
    model = tagger(name, bidirectional=True)
    counter, compiled = counting(model)
    for steps, batch in ((5, 3), (9, 3), (4, 7), (31, 5)):
        x = torch.randn(steps, batch, I)
        shape = (2, 2, 2 if name == "LSTM" else 1, steps, batch) if with_tap else None
        expected = loss_and_gradients(model, model, x, tap=shape)

        def marked(x, tap=None):
            torch._dynamo.mark_dynamic(x, (0, 1))
            if tap is not None:
                torch._dynamo.mark_dynamic(tap, (3, 4))
            return compiled(x, **({} if tap is None else {"tap": tap}))

        agree(loss_and_gradients(marked, model, x, tap=shape), expected, **SINGLE)
    # T = 2 would be one more: PyTorch sets sizes of one apart, and h_prev is then a slice of one step.
    assert counter.frame_count == 1, f"{counter.frame_count} compilations for four shapes"


def test_automatic_dynamic_shapes_settle_after_two_compilations():
    """Without mark_dynamic the first shape is compiled as it is, the second makes T and B symbols, then nothing."""
    model = tagger()
    counter, compiled = counting(model)
    for steps, batch in ((5, 3), (9, 4), (6, 7), (31, 5)):
        compiled(torch.randn(steps, batch, I)).backward()
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


# ----------------------------------------------------------------------------------------------------------- torch.func


def per_sample_loss(module):
    def loss(params, x):
        y, state = functional_call(module, params, (x,))
        return y.square().sum() + flat(state)[-1].sum()

    return loss


@every_backend
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_layers": 2, "bidirectional": True}, {"layer_norm": True}, {"clip_state_grad_norm": 0.1}],
    ids=str,
)
@every_kind
def test_per_sample_gradients(kind, settings, backend):
    """vmap(grad) over the batch equals one backward per sample."""
    ours = make(kind, backend, **settings)
    params = {name: p.detach() for name, p in ours.named_parameters()}
    x = random(T, B, I, requires_grad=False)
    loss = per_sample_loss(ours)
    got = vmap(grad(loss), in_dims=(None, 1))(params, x)
    for b in range(B):
        expected = grad(loss)(params, x[:, b])
        agree([got[name][b] for name in params], [expected[name] for name in params])
        values = torch.autograd.grad(loss(dict(ours.named_parameters()), x[:, b]), list(ours.parameters()))
        agree(values, [expected[name] for name in params])


@every_kind
@every_backend
def test_gradients_of_many_losses_at_once(kind, backend):
    """vmap over the backward of a forward that ran outside of any transform."""
    ours = make(kind, backend=backend)
    x = random(9, 8, I).requires_grad_()
    y = ours(x)[0]
    losses = random(3, *y.shape)
    leaves = (x, *ours.parameters())
    got = vmap(lambda loss: torch.autograd.grad(y, leaves, loss, retain_graph=True))(losses)
    for k, loss in enumerate(losses):
        agree([g[k] for g in got], torch.autograd.grad(y, leaves, loss, retain_graph=True))


@every_kind
def test_vmap_over_weights_and_lengths(kind):
    """An ensemble: every member its own weights; and per-sample reset masks."""
    members = [make(kind) for _ in range(3)]
    for k, member in enumerate(members):
        with torch.no_grad():
            for p in member.parameters():
                p.add_(0.1 * k)
    params, _ = torch.func.stack_module_state(members)
    x, base = random(T, B, I, requires_grad=False), members[0]
    got = vmap(lambda p: functional_call(base, p, (x,))[0])(params)
    agree(got, [member(x)[0] for member in members])
    got = vmap(grad(lambda p: functional_call(base, p, (x,))[0].square().sum()))(params)
    for k, member in enumerate(members):
        expected = torch.autograd.grad(member(x)[0].square().sum(), list(member.parameters()))
        agree([got[name][k] for name, _ in member.named_parameters()], expected)
    reset = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.5
    single = vmap(lambda x, r: base(x, reset_mask=r)[0], in_dims=1, out_dims=1)(x, reset)
    agree([single], [base(x, reset_mask=reset)[0]])


@every_kind
@pytest.mark.parametrize("mapped", ["weights", "input"])
def test_a_backward_from_outside_of_vmap(kind, mapped):
    """Where all that requires grad is mapped over, as in training an ensemble, nothing inside says that it is."""
    members = [make(kind) for _ in range(3)]
    weights, _ = torch.func.stack_module_state(members)
    x = random(3, T, B, I)
    if mapped == "input":
        weights = {name: p.detach() for name, p in weights.items()}
    else:
        x = x.detach()
    leaves = (x,) if mapped == "input" else tuple(weights.values())

    def member(p, x):
        return functional_call(members[0], p, (x,))[0].square().sum()

    got = torch.autograd.grad(vmap(member)(weights, x).sum(), leaves)
    one_by_one = [member({name: p[k] for name, p in weights.items()}, x[k]) for k in range(3)]
    agree(got, torch.autograd.grad(sum(one_by_one), leaves))


def test_vmap_without_gradients_folds_the_batch():
    """No loop over the samples, of which PyTorch would warn."""
    model, x = make("LSTM"), random(3, T, B, I, requires_grad=False)
    enabled = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        with torch.no_grad():
            got = vmap(lambda x: model(x)[0])(x)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(enabled)
    agree(got, [model(each)[0] for each in x])


@every_backend
def test_forward_mode_is_refused(backend):
    """The raw op would drop the tangent without a word."""
    model, x = make("GRU", backend).requires_grad_(False), random(T, B, I, requires_grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward mode"):
            model(dual)
        assert torch.equal(model(x)[0], make("GRU", backend)(x)[0])


@every_kind
def test_jacobian_and_hessian(kind):
    ours, theirs_at = make(kind), random(T, I, requires_grad=False)
    jacobian = jacrev(lambda x: ours(x)[0])(theirs_at)
    rows = [
        torch.autograd.grad(ours(x)[0].flatten()[k], x)[0]
        for k in range(jacobian[..., 0, 0].numel())
        for x in [theirs_at.clone().requires_grad_()]
    ]
    agree([jacobian.flatten(0, 1)], [torch.stack(rows)])
    # forward over reverse would need a jvp; reverse over reverse is what create_graph promises
    second = jacrev(jacrev(lambda x: twin(kind, ours)(x)[0].square().sum()))
    with torch.backends.mkldnn.flags(enabled=False):
        expected = second(theirs_at)
    got = jacrev(jacrev(lambda x: ours(x)[0].square().sum()))(theirs_at)
    agree([got], [expected])
    agree([got.flatten(0, 1).flatten(1)], [got.flatten(0, 1).flatten(1).t()])


# --------------------------------------------------------------------------------------------------- higher derivatives


GRADCHECKED = [
    ("LSTM", {}),
    ("LSTM", {"layer_norm": True}),
    ("LSTM", {"bidirectional": True}),
    ("LSTM-proj", {"zoneout": 0.3}),
    ("LSTM-proj", {"layer_norm": True}),
    ("GRU", {}),
    ("GRU", {"layer_norm": True, "zoneout": 0.3}),
    ("RNN", {"num_layers": 2, "residual": True}),
    ("leaky_relu", {}),
    ("elu", {}),
]


@pytest.mark.parametrize("kind, settings", GRADCHECKED, ids=str)
def test_gradcheck_and_gradgradcheck(kind, settings):
    """First and second derivatives in float64 against differences, through module, functional and scan."""
    settings = {"dtype": torch.float64, "backend": "reference", **settings}
    torch.manual_seed(0)
    if kind in KINDS:
        name, extra = KINDS[kind]
        ours = getattr(fastrnn, name)(2, 3, **extra, **settings).eval()
    else:
        ours = fastrnn.RNN(2, 3, nonlinearity=kind, **settings).eval()
    names = [name for name, _ in ours.named_parameters()]
    lengths = torch.tensor([3, 1])

    def function(x, *params):
        y, state = functional_call(ours, dict(zip(names, params, strict=True)), (x,), {"lengths": lengths})
        return y, *flat(state)

    inputs = (random(3, 2, 2), *(p.detach().requires_grad_() for p in ours.parameters()))
    # gradcheck's defaults: differences of 1e-6 in float64 leave some 1e-9; atol 1e-5 and rtol 1e-3 catch any wrong term
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@every_backend
@every_kind
def test_gradient_penalty_equals_torch_nns_double_backward(kind, backend):
    settings = {"num_layers": 2, "bidirectional": True}
    ours = make(kind, backend, **settings)
    theirs = twin(kind, ours, **settings)

    def penalty(module):
        x = random(T, B, I)
        y, state = module(x)
        loss = y.square().sum() + sum(s.sin().sum() for s in flat(state))
        first = torch.autograd.grad(loss, (x, *module.parameters()), create_graph=True)
        total = sum(g.square().sum() for g in first)
        return (total, *torch.autograd.grad(total, (x, *module.parameters())))

    with torch.backends.mkldnn.flags(enabled=False):
        agree(penalty(ours), penalty(theirs))


# --------------------------------------------------------------------------------------- autocast, dtypes, surroundings


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
    """Bit for bit, forward and backward: inside the scan autocast has no say, so the arithmetic there stays float32."""
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


@every_backend
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, backend):
    """Recomputing gives the same gradients and the same tap, the zoneout masks redrawn from the stored generator."""
    ours = make("LSTM", backend, num_layers=2, zoneout=0.3)

    def found(call):
        torch.manual_seed(5)
        x, tap = random(T, B, I), torch.zeros(2, 2, 2, T, B, dtype=torch.float64, requires_grad=True)
        ours.zero_grad()
        y = call(lambda x, tap: ours(x, tap=tap)[0], x, tap)
        y.square().sum().backward()
        return [x.grad, tap.grad, *(p.grad.clone() for p in ours.parameters())]

    expected = found(lambda f, *a: f(*a))
    got = found(lambda f, *a: checkpoint(f, *a, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert expected[1].any()


@every_backend
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_parametrized_weights(name, backend):
    """weight_norm and orthogonal on W_hh: torch's own functional form of the same network is the oracle."""
    torch.manual_seed(0)
    ours = getattr(fastrnn, name)(I, H, dtype=torch.float64, backend=backend)
    nn.utils.parametrizations.weight_norm(ours, "weight_ih_l0")
    nn.utils.parametrizations.orthogonal(ours, "weight_hh_l0") if name == "RNN" else None
    theirs, x = getattr(nn, name)(I, H, dtype=torch.float64), random(T, B, I)
    weights = {key: getattr(ours, key) for key, _ in theirs.named_parameters()}
    leaves = list(ours.parameters())
    expected = torch.autograd.grad(functional_call(theirs, weights, (x,))[0].square().sum(), leaves)
    got = torch.autograd.grad(ours(x)[0].square().sum(), leaves)
    agree(got, expected)
    if name == "RNN":
        w = ours.weight_hh_l0
        agree([w @ w.t()], [torch.eye(H, dtype=torch.float64)])
    ours.flatten_parameters()
    optimiser = torch.optim.SGD(ours.parameters(), lr=0.1)
    before = ours(x)[0].detach()
    ours(x)[0].square().sum().backward()
    optimiser.step()
    assert not torch.allclose(ours(x)[0], before), "a step reaches the weights that the call uses"


def test_swapped_and_tied_weights():
    """Parameters are read by name at the call: a tied or exchanged one takes effect."""
    ours = make("RNN")
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(H, H, dtype=torch.float64))
    x = random(T, B, I)
    agree([ours(x)[0]], [F.linear(x, ours.weight_ih_l0, ours.bias_ih_l0 + ours.bias_hh_l0).tanh()])
    ours.weight_ih_l0.data = ours.weight_ih_l0.data * 2
    agree([ours(x)[0]], [F.linear(x, ours.weight_ih_l0, ours.bias_ih_l0 + ours.bias_hh_l0).tanh()])


@every_kind
@pytest.mark.parametrize("steps", [4, 40])
def test_forward_mode_of_a_plain_call_is_torchs(kind, steps):
    ours = make(kind)
    theirs = fastrnn.convert(copy.deepcopy(ours), to="torch")
    x = random(steps, B, I, requires_grad=False)
    found = []
    for module in (ours, theirs):

        def total(x, module=module):
            return module(x)[0].square().sum()

        value, tangent = torch.func.jvp(total, (x,), (torch.ones_like(x),))
        found.append([value, tangent, torch.func.jacfwd(total)(x), hessian(total)(x[:2])])
    agree(*found)


def test_forward_mode_of_the_scan_is_refused_with_a_reason():
    """There is no jvp: torch's own error, not a wrong number."""
    ours = make("GRU", "reference")
    x = random(T, B, I, requires_grad=False)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward.?(mode)?|jvp"):
        torch.func.jvp(lambda x: ours(x)[0], (x,), (torch.ones_like(x),))


def test_hessian_of_the_scan_by_forward_over_reverse_is_refused_too():
    ours = make("GRU", "reference")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)forward.?(mode)?|jvp"):
        hessian(lambda x: ours(x)[0].sum())(random(T, I, requires_grad=False))


@pytest.mark.parametrize("extra", [{}, {"lengths": torch.tensor([4, 2])}], ids=["plain", "lengths"])
def test_meta_tensors_give_shapes(extra):
    """A model on the meta device can be traced for its shapes, as torch.nn's can."""
    model = fastrnn.LSTM(3, 5, 2, bidirectional=True, device="meta")
    y, (h, c) = model(torch.empty(4, 2, 3, device="meta"), **extra)
    assert (y.shape, h.shape, c.shape) == ((4, 2, 10), (4, 2, 5), (4, 2, 5))


@pytest.mark.parametrize("extra", [{}, {"reset_mask": torch.zeros(70, 32, dtype=torch.bool)}], ids=["plain", "resets"])
def test_fake_tensors_go_forward_and_back(extra):
    """As memory estimators send them, outside of any compiler."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fastrnn.GRU(256, 256)
        model(torch.randn(70, 32, 256), **extra)[0].sum().backward()
    assert model.weight_hh_l0.grad.shape == (768, 256)


@pytest.mark.parametrize("call", ["packed", "lengths"])
def test_the_default_device_is_for_new_tensors_only(call):
    model, x, lengths = fastrnn.GRU(3, 4), torch.randn(70, 3, 3), torch.tensor([70, 5, 2])
    packed = pack_padded_sequence(x, lengths)
    expected = model(packed)[0].data
    with torch.device("meta"):
        got = model(packed)[0].data if call == "packed" else model(x, lengths=lengths)[0]
    if call == "lengths":
        got = pack_padded_sequence(got, lengths).data
    torch.testing.assert_close(got, expected)
