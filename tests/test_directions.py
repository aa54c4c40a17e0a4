"""Both directions of a layer in one scan, against one after the other."""

from dataclasses import replace

import pytest
import torch
from setups import agree, every_backend, flat, random_inputs
from torch.func import functional_call, grad, vmap

import fastrnn
from fastrnn import stack
from fastrnn.arguments import ScanInputs, Walk
from fastrnn.backends import triton as launcher
from fastrnn.cell_table import CELLS
from fastrnn.dispatch import BACKENDS, row
from fastrnn.scan import scan

T, B, I, H = 4, 3, 3, 5
# float64 keeps 16 digits; a few dozen terms of order one, added in another order.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}
MODULES = {
    "lstm": (fastrnn.LSTM, {}), "gru": (fastrnn.GRU, {}),
    **{f"rnn_{name}": (fastrnn.RNN, {"nonlinearity": name}) for name in ("tanh", "relu", "leaky_relu", "elu")},
}  # fmt: skip
EVERYTHING = {"num_layers": 2, "dropout": 0.3, "recurrent_dropout": 0.4, "zoneout": 0.2, "weight_dropout": 0.1}
CLIPPED = {"clip_state_grad_norm": 0.3, "clip_state_grad_value": 0.2}


@pytest.fixture
def together(monkeypatch):
    """A function that lets the stack hand both directions at once to any backend, as to Triton's; or to none."""

    def switch(on):
        monkeypatch.setattr(stack, "row", lambda backend: replace(row(backend), directions=on))

    return switch


def make(cell, **settings):
    module, extra = MODULES[cell]
    torch.manual_seed(0)
    return module(I, H, bidirectional=True, **{"dtype": torch.float64, **extra, **settings})


def inputs(dtype=torch.float64):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(T, B, I, generator=rng, dtype=dtype, requires_grad=True)
    resets = torch.rand(T, B, generator=rng) < 0.3
    return x, {"lengths": torch.tensor([4, 0, 3]), "reset_mask": resets}


def run(module, x, call, forward=None):
    """Output, states, and the gradients of input, parameters and tap for one seed. `forward` replaces `module`."""
    module.zero_grad()
    x.grad = None
    torch.manual_seed(2)
    states = 2 if isinstance(module, fastrnn.LSTM) else 1
    tap = x.new_zeros(2 * module.num_layers, 2, states, T, B, requires_grad=True)
    y, hidden = (module if forward is None else forward)(x, tap=tap, **call)
    sum((v.square() * torch.arange(v.shape[-1], device=v.device)).sum() for v in (y, *flat(hidden))).backward()
    return (y, *flat(hidden), x.grad, tap.grad, *(p.grad for p in module.parameters()))


@every_backend
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_one_after_the_other(cell, bias, backend, together):
    module, (x, call) = make(cell, bias=bias, backend=backend, **EVERYTHING, **CLIPPED), inputs()
    together(False)
    want = run(module, x, call)
    together(True)
    agree(run(module, x, call), want, **TOLERANCE)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in Triton's interpreter, tells of 1 / 0
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_triton_scan_takes_both(cell, device, monkeypatch):
    assert BACKENDS["triton"].directions
    module = make(cell, dtype=torch.float32, zoneout=0.2, **CLIPPED).to(device)
    x, call = inputs(torch.float32)
    x = x.detach().to(device).requires_grad_()
    call = {name: value.to(device) for name, value in call.items()}
    forward, backward, directions = launcher.forward, launcher.backward, []

    def counted_forward(inputs, *rest):
        directions.append(len(inputs.gx))
        return forward(inputs, *rest)

    def counted_backward(incoming, kept, *rest):
        directions.append(len(kept.y))
        return backward(incoming, kept, *rest)

    monkeypatch.setattr(launcher, "forward", counted_forward)
    monkeypatch.setattr(launcher, "backward", counted_backward)
    got = []
    for backend in ("reference", "triton"):
        with fastrnn.backend(backend):
            got.append(run(module, x, call))
    assert directions == [2, 2]  # forward, backward
    # float32 keeps 7 digits; sums of a few dozen products of order one over four steps.
    agree(*got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_gradients_of_both_orders(cell, together):
    together(True)
    module, (x, call) = make(cell), inputs()
    hx = torch.randn(2, B, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    states = (hx, hx * 0.5) if cell == "lstm" else hx

    def outputs(x, *parameters):
        named = dict(zip((n for n, _ in module.named_parameters()), parameters, strict=True))
        return functional_call(module, named, (x, states), call)[0]

    assert torch.autograd.gradcheck(outputs, (x, *module.parameters()))
    assert torch.autograd.gradgradcheck(lambda x: outputs(x, *module.parameters()), (x,), fast_mode=True)


def test_gradients_per_sample(together):
    together(True)
    module, (x, _) = make("gru"), inputs()
    parameters = dict(module.named_parameters())

    def loss(parameters, sample):
        return functional_call(module, parameters, (sample.unsqueeze(1),))[0].square().sum()

    each = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    for b in range(B):
        want = grad(loss)(parameters, x[:, b])
        agree([each[name][b] for name in want], want.values(), **TOLERANCE)


def test_a_compiled_graph_holds_both(together):
    together(True)
    module, (x, call) = make("lstm", backend="reference"), inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    agree(run(module, x, call, compiled), run(module, x, call), **TOLERANCE)


@every_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck_of_the_raw_op(backend, reverse):
    each = [random_inputs("lstm", sizes=(T, B, H), seed=d) for d in range(2)]
    inputs = ScanInputs(*(None if x is None else torch.stack([x, y]) for x, y in zip(*each, strict=True)))
    walk = Walk("lstm", reverse, backend)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    arguments = (*inputs, *walk, True)
    torch.library.opcheck(torch.ops.fastrnn.scan_forward.default, arguments, test_utils=tests)
    both = torch.ops.fastrnn.scan_forward(*arguments)
    for d in range(2):
        own = (x if x is None else x[d] for x in inputs)
        one = torch.ops.fastrnn.scan_forward(*own, *walk._replace(reverse=reverse != (d == 1)), True)
        agree([x[d] for x in both], one, rtol=0, atol=0)


def test_a_projection_takes_one_direction_at_a_time():
    gx, state = torch.zeros(2, T, B, 4 * H), torch.zeros(2, B, 2)
    inputs = ScanInputs(gx, torch.zeros(2, 4 * H, 2), state, c0=torch.zeros(2, B, H), w_hr=torch.zeros(2, 2, H))
    with pytest.raises(NotImplementedError, match="one direction"):
        scan(inputs, Walk("lstm", False, "reference"))
