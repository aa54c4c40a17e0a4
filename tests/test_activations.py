"""Built-in cells with other activations: against loops, the built-in call where they are torch.nn's, and refusals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from setups import H, I, every_backend, random
from torch import nn

import fastrnn
from fastrnn.activations import ACTIVATIONS

T, B = 4, 3


def hard(v):
    """Keras's hard sigmoid."""
    return (0.2 * v + 0.5).clamp(0, 1)


def function_of(activation):
    return ACTIVATIONS[activation] if isinstance(activation, str) else activation


def loop(module, kind, x, act, gate_act=None):
    """y of one layer, from the equations."""
    h = c = x.new_zeros(B, H)
    ys = []
    for one in x:
        gx, gh = (
            F.linear(one, module.weight_ih_l0, module.bias_ih_l0),
            F.linear(h, module.weight_hh_l0, module.bias_hh_l0),
        )
        if kind == "LSTM":
            i, f, g, o = (gx + gh).chunk(4, -1)
            c = gate_act(f) * c + gate_act(i) * act(g)
            h = gate_act(o) * act(c)
        elif kind == "GRU":
            (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
            z = gate_act(xz + hz)
            h = (1 - z) * act(xn + gate_act(xr + hr) * hn) + z * h
        else:
            h = act(gx + gh)
        ys.append(h)
    return torch.stack(ys)


CASES = [
    ("LSTM", dict(activation="relu", gate_activation="sigmoid")),
    ("LSTM", dict(activation="tanh", gate_activation=hard)),
    ("LSTM", dict(activation=F.elu, gate_activation="hardsigmoid")),
    ("GRU", dict(activation=nn.ReLU(), gate_activation="sigmoid")),
    ("GRU", dict(activation="softsign", gate_activation=hard)),
    *(("RNN", dict(nonlinearity=f)) for f in (F.silu, torch.sin, nn.Hardtanh(-2, 2), hard)),
]  # fmt: skip


def name_of(parameter):
    """For test ids, which must be the same in every process: a function by its name."""
    if not isinstance(parameter, dict):
        return str(parameter)
    return ",".join(str(getattr(value, "__name__", value)) for value in parameter.values())


@pytest.mark.parametrize("kind, settings", CASES, ids=name_of)
def test_outputs_and_gradients_are_the_loop_s(kind, settings):
    torch.manual_seed(0)
    module = getattr(fastrnn, kind)(I, H, dtype=torch.float64, backend="reference", **settings)
    x = random(T, B, I)
    functions = [function_of(f) for f in settings.values()]
    leaves = [x, *module.parameters()]
    got, want = module(x)[0], loop(module, kind, x, *functions)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, weights), torch.autograd.grad(want, leaves, weights))
    assert not list(module.children()) and list(module.state_dict()) == list(getattr(nn, kind)(I, H).state_dict())
    for name, function in settings.items():
        shown = f"{name}={getattr(function, '__name__', function)}"
        assert (shown in repr(module)) == (function not in ("tanh", "sigmoid"))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    torch.testing.assert_close(twin(x)[0], want)


def test_torch_s_activations_are_the_built_in_cells():
    for kind in ("LSTM", "GRU"):
        module = getattr(fastrnn, kind)(I, H, activation="tanh", gate_activation="sigmoid")
        assert module._cell == kind.lower() == module.mode.lower() and "activation" not in repr(module)
    assert fastrnn.RNN(I, H, nonlinearity="elu")._cell == "rnn_elu"
    assert fastrnn.GRU(I, H, activation="relu").mode == "GRU(RELU, SIGMOID)"


def test_a_single_step_cell_and_the_functional_form_take_a_function():
    cell, network = fastrnn.RNNCell(I, H, nonlinearity=F.silu), fastrnn.RNN(I, H, nonlinearity=F.silu)
    network.load_state_dict({f"{n}_l0": p for n, p in cell.state_dict().items()})
    x = torch.randn(1, B, I)
    torch.testing.assert_close(cell(x[0]), network(x)[0][0])
    params = dict(network.named_parameters())
    torch.testing.assert_close(fastrnn.functional.rnn(x, None, params, nonlinearity=F.silu)[0], network(x)[0])


def test_a_function_compiles_in_one_graph():
    for module in (fastrnn.RNN(I, H, nonlinearity=F.silu), fastrnn.LSTM(I, H, gate_activation=hard)):
        module.backend = "reference"
        x = torch.randn(T, B, I)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x)[0], module(x)[0])


def test_options_and_initialisations_go_with_activations():
    module = fastrnn.LSTM(I, H, num_layers=2, bidirectional=True, zoneout=(0.1, 0.0), activation="relu")
    fastrnn.init.forget_bias_(fastrnn.init.chrono_(module, 10), 2.0)
    assert bool((module.bias_ih_l1_reverse[H : 2 * H] == 2).all())
    with fastrnn.GradientMonitor(module) as monitor:
        module(torch.randn(T, B, I))[0].sum().backward()
    assert {r.state for r in monitor.report()} == {"h", "c"}
    assert fastrnn.GRU(I, H, layer_norm=True, activation="relu")(torch.randn(T, B, I))[0].shape == (T, B, H)
    twin = fastrnn.convert(nn.Sequential(nn.GRU(I, H)))[0]
    assert twin.activation == "tanh"


@pytest.mark.parametrize("nonlinearity", ["tanh", "elu", F.silu], ids=["tanh", "elu", "silu"])
@pytest.mark.parametrize("learn_leak", [False, True])
@every_backend
def test_a_leaky_network_moves_by_a_share(backend, learn_leak, nonlinearity):
    torch.manual_seed(0)
    module = fastrnn.RNN(I, H, 1, nonlinearity, leak=0.3, learn_leak=learn_leak, dtype=torch.float64, backend=backend)
    a, x, h = 0.3, random(T, B, I), torch.zeros(B, H, dtype=torch.float64)
    if learn_leak:
        a = module.leak_l0
        assert bool((a == 0.3).all())
        torch.nn.init.uniform_(a)
    ys, function = [], function_of(nonlinearity)
    for one in x:
        pre = one @ module.weight_ih_l0.T + module.bias_ih_l0 + h @ module.weight_hh_l0.T + module.bias_hh_l0
        h = (1 - a) * h + a * function(pre)
        ys.append(h)
    leaves, got, want = [x, *module.parameters()], module(x)[0], torch.stack(ys)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(got, leaves, weights), torch.autograd.grad(want, leaves, weights))
    params = dict(module.named_parameters())
    leak = {} if learn_leak else {"leak": 0.3}
    torch.testing.assert_close(fastrnn.functional.rnn(x, None, params, nonlinearity=nonlinearity, **leak)[0], got)


def test_a_fixed_leak_is_zoneout_in_eval_mode():
    leaky, zoned = fastrnn.RNN(I, H, leak=0.3, bidirectional=True), fastrnn.RNN(I, H, zoneout=0.7, bidirectional=True)
    zoned.eval().load_state_dict(leaky.state_dict())
    x, lengths = torch.randn(T, B, I), torch.tensor([4, 0, 2])
    torch.testing.assert_close(leaky(x, lengths=lengths), zoned(x, lengths=lengths))


def test_a_leaky_network_is_a_module_like_the_others():
    module = fastrnn.RNN(I, H, num_layers=2, leak=0.3, learn_leak=True, nonlinearity="relu")
    assert [n for n in module.state_dict() if "leak" in n] == ["leak_l0", "leak_l1"]
    assert "leak=0.3, learn_leak=True" in repr(module) and "leak" not in repr(fastrnn.RNN(I, H))
    x = torch.randn(T, B, I)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(copied(x), module(x))
    fastrnn.init.orthogonal_(module)
    module.reset_parameters()
    assert bool((module.leak_l1 == 0.3).all())


@pytest.mark.parametrize(("settings", "error"), [
    (dict(leak=0.0), ValueError), (dict(leak=1.5), ValueError), (dict(leak=True), ValueError),
    (dict(leak="0.1"), ValueError), (dict(learn_leak=True), ValueError), (dict(leak=0.1, learn_leak=1), TypeError),
])  # fmt: skip
def test_refused_leaks(settings, error):
    with pytest.raises(error, match="leak"):
        fastrnn.RNN(I, H, **settings)


def test_torch_has_no_leak():
    with pytest.raises(ValueError, match="has no leak"):
        fastrnn.convert(nn.Sequential(fastrnn.RNN(I, H, leak=0.3)), to="torch")


def test_refusals():
    relu = nn.Sequential(fastrnn.GRU(I, H, activation="relu"))
    for build, error, reason in (
        (lambda: fastrnn.LSTM(I, H, activation="sinh"), ValueError, "Unknown activation 'sinh'.*'relu'.*pointwise"),
        (lambda: fastrnn.GRU(I, H, gate_activation=3), ValueError, "Unknown gate_activation 3"),
        (lambda: fastrnn.RNN(I, H, nonlinearity="sinh"), ValueError, "Unknown nonlinearity 'sinh'.*pointwise"),
        (lambda: fastrnn.RNN(I, H, nonlinearity=torch.softmax), ValueError, "cell rnn.softmax. ?:"),
        (lambda: fastrnn.LSTM(I, H, activation="relu", layer_norm=True), ValueError, "layer_norm and proj_size"),
        (lambda: fastrnn.LSTM(I, H, activation="relu", proj_size=2), ValueError, "layer_norm and proj_size"),
        (lambda: fastrnn.RNN(I, H, nonlinearity=nn.PReLU()), ValueError, "not among|requires grad"),
        (lambda: fastrnn.convert(relu, to="torch"), ValueError, "has no activation"),
    ):  # fmt: skip
        with pytest.raises(error, match=reason):
            build()
