"""Each initialisation against its definition: per gate, layer and direction, on fastrnn's and torch.nn's modules."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fastrnn
from fastrnn import init
from fastrnn.cell_table import CELLS

I, H = 64, 256
"""One gate's block holds at least 16,384 weights: the variance of that many uniform draws is known to 0.7 %."""
SPREAD = 0.035  # five of its standard errors, sqrt(0.8 / 16384)
STACK = {"num_layers": 2, "bidirectional": True}
CASES = [
    *((library, name, STACK) for library in (fastrnn, nn) for name in ("LSTM", "GRU", "RNN")),
    *((library, f"{name}Cell", {}) for library in (fastrnn, nn) for name in ("LSTM", "GRU", "RNN")),
    *((fastrnn, "RNN", {"nonlinearity": name}) for name in ("relu", "leaky_relu", "elu")),
    (nn, "RNN", {"nonlinearity": "relu", "bias": False}),
    (fastrnn, "LSTM", {"proj_size": 32, "layer_norm": True, **STACK}),
    (nn, "LSTM", {"proj_size": 32, "bias": False}),
]
GATES = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"}


def label(value):
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" for k, v in value.items()) or "plain"
    return value.__name__ if hasattr(value, "__name__") else str(value)


every_module = pytest.mark.parametrize("library, name, settings", CASES, ids=label)


def build(library, name, settings, hidden=H):
    torch.manual_seed(0)
    return getattr(library, name)(I, hidden, **settings)


def blocks(module, kind):
    """`(gate, block)` for every parameter of a kind, cut by hand: H rows a gate."""
    gates = GATES[type(module).__name__.removesuffix("Cell")]
    for name, p in module.named_parameters():
        if name.startswith(kind):
            yield from zip(gates, p.detach().split(p.shape[0] // len(gates)), strict=True)


def changed(module, function, *args):
    """The kinds of parameter that a function changes."""
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert function(module, *args) is module
    after = dict(module.named_parameters())
    return {"_".join(name.split("_")[:2]) for name, p in before.items() if not torch.equal(p, after[name])}


def assert_uniform(block, bound):
    """U(-bound, bound): within the bound, of its variance, and its mean 0 within five standard errors."""
    assert block.abs().max() <= bound * (1 + 1e-6) and block.abs().max() > 0.99 * bound
    assert float(block.square().mean()) == pytest.approx(bound**2 / 3, rel=SPREAD)
    assert abs(float(block.mean())) < 5 * bound / math.sqrt(3 * block.numel())


@every_module
def test_xavier(library, name, settings):
    module = build(library, name, settings)
    expected = {"weight_ih", "weight_hh"} | ({"weight_hr"} if "proj_size" in settings else set())
    assert changed(module, init.xavier_, 0.5) == expected
    for kind in ("weight_ih", "weight_hh"):
        for _, block in blocks(module, kind):
            assert_uniform(block, 0.5 * math.sqrt(6 / sum(block.shape)))
    if "proj_size" in settings:
        assert module.weight_hr_l0.abs().max() <= 0.5 * math.sqrt(6 / (H + 32))


@every_module
def test_kaiming_takes_the_gain_of_each_gate(library, name, settings):
    module = build(library, name, settings)
    expected = {"weight_ih", "weight_hh"} | ({"weight_hr"} if "proj_size" in settings else set())
    assert changed(module, init.kaiming_) == expected
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    second_moment = torch.trapezoid(nn.functional.elu(z).square() * torch.exp(-z.square() / 2), z) / math.sqrt(
        2 * math.pi
    )
    gain = {"tanh": 5 / 3, "relu": math.sqrt(2), "leaky_relu": math.sqrt(2 / 1.0001)}
    gain["elu"] = float(second_moment.rsqrt())
    of_gate = {"g": 5 / 3, "n": 5 / 3, "h": gain[settings.get("nonlinearity", "tanh")]}
    for kind in ("weight_ih", "weight_hh"):
        for gate, block in blocks(module, kind):
            assert_uniform(block, of_gate.get(gate, 1.0) * math.sqrt(3 / block.shape[1]))


@every_module
def test_orthogonal(library, name, settings):
    module = build(library, name, settings, hidden=48)
    assert changed(module, init.orthogonal_, 1.5) == {"weight_hh"}
    seen = []
    for _, block in blocks(module, "weight_hh"):
        columns = block.shape[1]
        # rounding of 48 products of float32
        torch.testing.assert_close(block.T @ block, 2.25 * torch.eye(columns), atol=1e-5, rtol=0)
        seen.append(block)
    assert all(not torch.equal(a, b) for k, a in enumerate(seen) for b in seen[:k])  # one draw each


@pytest.mark.parametrize("library", (fastrnn, nn), ids=label)
@pytest.mark.parametrize("settings", ({}, STACK, {"bias": False}), ids=label)
def test_identity(library, settings):
    rnn = build(library, "RNN", {"nonlinearity": "relu", **settings}, hidden=9)
    biases = {"bias_ih", "bias_hh"} if settings.get("bias", True) else set()
    assert changed(rnn, init.identity_, 0.9) == {"weight_hh"} | biases
    for _, block in blocks(rnn, "weight_hh"):
        assert torch.equal(block, 0.9 * torch.eye(9))
        torch.testing.assert_close(torch.linalg.eigvals(block).abs(), torch.full((9,), 0.9))


def test_identity_keeps_the_state_of_a_relu_network_and_its_gradient():
    rnn = init.identity_(fastrnn.RNN(I, 5, nonlinearity="relu"))
    h0 = torch.rand(1, 3, 5, requires_grad=True)
    y, _ = rnn(torch.zeros(40, 3, I), h0)
    assert torch.equal(y, h0.expand(40, 3, 5))
    y[-1].sum().backward()
    assert torch.equal(h0.grad, torch.ones(1, 3, 5))


@pytest.mark.parametrize("name, settings", [("LSTM", STACK), ("LSTM", {"proj_size": 8}), ("LSTMCell", {})], ids=label)
@pytest.mark.parametrize("library", (fastrnn, nn), ids=label)
def test_forget_bias(library, name, settings):
    module = build(library, name, settings)
    before = {kind: [(g, b.clone()) for g, b in blocks(module, kind)] for kind in ("bias_ih", "bias_hh")}
    assert changed(module, init.forget_bias_, 1.5) == {"bias_ih", "bias_hh"}
    pairs = list(zip(blocks(module, "bias_ih"), blocks(module, "bias_hh"), strict=True))
    assert all(torch.equal(ih + hh, torch.full((H,), 1.5)) for (gate, ih), (_, hh) in pairs if gate == "f")
    for kind in before:
        for (gate, old), (_, new) in zip(before[kind], blocks(module, kind), strict=True):
            assert gate == "f" or torch.equal(old, new)


@pytest.mark.parametrize(
    "name, settings", [("LSTM", STACK), ("GRU", STACK), ("LSTMCell", {}), ("GRUCell", {})], ids=label
)
@pytest.mark.parametrize("library", (fastrnn, nn), ids=label)
def test_chrono(library, name, settings):
    """exp(b) is U(1, t_max - 1) on the gate that keeps; the input gate has -b, to the bit; other gates are left."""
    t_max, lstm = 200.0, name.startswith("LSTM")
    module = build(library, name, settings)
    old = [list(blocks(module, kind)) for kind in ("bias_ih", "bias_hh")]
    old = [[(gate, block.clone()) for gate, block in kind] for kind in old]
    assert changed(module, init.chrono_, t_max) == {"bias_ih", "bias_hh"}
    per_layer = len(GATES["LSTM" if lstm else "GRU"])
    ih, hh = list(blocks(module, "bias_ih")), list(blocks(module, "bias_hh"))
    draws = []
    for k in range(0, len(ih), per_layer):
        bias = {gate: a + b for (gate, a), (_, b) in zip(ih[k : k + per_layer], hh[k : k + per_layer], strict=True)}
        keep = bias["f" if lstm else "z"]
        draws.append(keep.exp())
        if lstm:
            assert torch.equal(bias["i"], -keep)
        for gate in bias.keys() - {"f", "i", "z"}:
            where = k + GATES["LSTM" if lstm else "GRU"].index(gate)
            assert torch.equal(ih[where][1], old[0][where][1]) and torch.equal(hh[where][1], old[1][where][1])
    assert len({float(d[0]) for d in draws}) == len(draws)  # one draw per layer and direction
    for draw in draws:
        u = ((draw - 1) / (t_max - 2)).sort().values
        assert u[0] >= -1e-5 and u[-1] <= 1 + 1e-5  # exp(log(u)) rounds
        steps = torch.arange(H + 1) / H
        distance = torch.maximum(u - steps[:-1], steps[1:] - u).max()
        assert distance < 1.95 / math.sqrt(H)  # Kolmogorov & Smirnov at 0.1 %


def test_chrono_makes_memories_that_last():
    """Without input and recurrence, c of an LSTM and h of a GRU decay by sigmoid(b) a step, as the bias promises."""
    lstm, gru = fastrnn.LSTM(1, 8), fastrnn.GRU(1, 8)
    with torch.no_grad():
        for p in (*lstm.parameters(), *gru.parameters()):
            p.zero_()
        for module in (lstm, gru):
            init.chrono_(module, 50)
        x, one = torch.zeros(20, 1, 1), torch.ones(1, 1, 8)
        _, (_, c) = lstm(x, (0 * one, one))
        _, h = gru(x, one)
    torch.testing.assert_close(c[0, 0], lstm.bias_ih_l0[8:16].sigmoid() ** 20)
    torch.testing.assert_close(h[0, 0], gru.bias_ih_l0[8:16].sigmoid() ** 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_orthogonal_in_half_types_is_that_of_float32_rounded(dtype):
    torch.manual_seed(0)
    half = init.orthogonal_(fastrnn.GRU(3, 8, dtype=dtype)).weight_hh_l0
    torch.manual_seed(0)
    fastrnn.GRU(3, 8, dtype=dtype)  # draws as many numbers
    full = init.orthogonal_(fastrnn.GRU(3, 8, device="meta").to_empty(device="cpu")).weight_hh_l0
    assert half.dtype == dtype and torch.equal(half, full.to(dtype))


WEIGHTS = (init.xavier_, init.kaiming_, init.orthogonal_)
BIASES = (init.forget_bias_, lambda module: init.chrono_(module, 10))


@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
def test_one_seed_gives_both_libraries_the_same(name):
    for function in WEIGHTS:
        ours, theirs = build(fastrnn, name, STACK), build(nn, name, STACK)
        for module in (ours, theirs):
            torch.manual_seed(1)
            function(module)
        for kind in ("weight_ih", "weight_hh"):
            assert all(
                torch.equal(a, b) for (_, a), (_, b) in zip(blocks(ours, kind), blocks(theirs, kind), strict=True)
            )


@pytest.mark.parametrize("library", (fastrnn, nn), ids=label)
def test_a_model_is_initialised_whole_and_the_optimiser_keeps_its_parameters(library):
    model = nn.ModuleDict({
        "encoder": nn.Sequential(library.LSTM(3, 4, **STACK), nn.Linear(8, 2)), "decoder": library.LSTMCell(2, 4),
    })  # fmt: skip
    model["decoder"].weight_ih.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    names, before = list(model.state_dict()), {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    linear = model["encoder"][1].weight.clone()
    for function in (*WEIGHTS, *BIASES):
        assert function(model) is model
    assert list(model.state_dict()) == names
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needs
    assert torch.equal(model["encoder"][1].weight, linear)  # no recurrent module, not touched
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    weight = model["encoder"][0].weight_hh_l1_reverse
    torch.testing.assert_close(weight[:4].T @ weight[:4], torch.eye(4), atol=1e-6, rtol=0)
    model["encoder"][0](torch.randn(5, 2, 3))[0].sum().backward()
    kept = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, kept)


def test_every_activation_has_a_gain():
    gates = {gate for spec in CELLS.values() for gate in spec.gates}
    assert all(init._gain(init.ACTIVATION.get(gate, "sigmoid")) > 0 for gate in gates)


BAD = [
    ("identity of an LSTM", init.identity_, fastrnn.LSTM(2, 3), "identity_: the model (LSTM) is of cell 'lstm'"),
    ("forget bias of a GRU", init.forget_bias_, fastrnn.GRU(2, 3), "'gru'; this initialisation is for lstm"),
    ("forget bias of an RNNCell", init.forget_bias_, nn.RNNCell(2, 3), "(RNNCell) is of cell 'rnn_tanh'"),
    ("chrono of an RNN", BIASES[1], nn.RNN(2, 3), "is for lstm, gru"),
    ("forget bias without biases", init.forget_bias_, nn.LSTM(2, 3, bias=False), "build it with bias=True"),
    ("chrono without biases", BIASES[1], fastrnn.GRUCell(2, 3, bias=False), "build it with bias=True"),
    ("chrono below 2", lambda m: init.chrono_(m, 1.5), fastrnn.LSTM(2, 3), "at least 2, got 1.5"),
    ("chrono for ever", lambda m: init.chrono_(m, math.inf), fastrnn.LSTM(2, 3), "at least 2, got inf"),
    ("nothing recurrent", init.orthogonal_, nn.Linear(2, 3), "Linear holds no LSTM"),
    ("parametrized", init.orthogonal_, weight_norm(nn.LSTM(2, 3), "weight_hh_l0"), "before you parametrize"),
    (
        "one of two",
        init.forget_bias_,
        nn.Sequential(fastrnn.LSTM(2, 3), nn.Sequential(nn.GRU(3, 3))),
        "forget_bias_: 1.0 (GRU) is of cell 'gru'",
    ),
]


@pytest.mark.parametrize("function, module, message", [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_where_it_makes_no_sense_it_says_so_and_changes_nothing(function, module, message):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError) as error:
        function(module)
    assert message in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
