"""`num_heads`: a W_hh in blocks is the dense one with the same blocks and zeros elsewhere."""

import copy
import pickle

import pytest
import torch

import fastrnn
from fastrnn.backends import cpu
from fastrnn.cell_table import spec_of

T, B, I, H, N = 5, 3, 2, 6, 3
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(cpu.MISSING is not None, reason="the C++ library is not built")),
]
MODULES = {
    "lstm": lambda **settings: fastrnn.LSTM(I, H, **settings),
    "gru": lambda **settings: fastrnn.GRU(I, H, **settings),
    "rnn": lambda **settings: fastrnn.RNN(I, H, nonlinearity="relu", **settings),
    "leaky": lambda **settings: fastrnn.RNN(I, H, leak=0.3, learn_leak=True, **settings),
    "peephole_lstm": lambda **settings: fastrnn.Recurrent(fastrnn.cells.peephole_lstm, I, H, **settings),
    "slstm": lambda **settings: fastrnn.Recurrent(fastrnn.cells.slstm, I, H, **settings),
}
LENGTHS = {"lengths": torch.tensor([5, 2, 0])}
RESETS = {"reset_mask": torch.tensor([[False, True, False]]).repeat(T, 1).logical_and(torch.arange(T)[:, None] == 2)}
CASES = {
    "plain": ({}, {}),
    "without bias": ({"bias": False}, {}),
    "lengths and resets": ({"bidirectional": True, "num_layers": 2}, {**LENGTHS, **RESETS}),
    "layer norm": ({"layer_norm": True}, LENGTHS),
    "dropouts": ({"recurrent_dropout": 0.4, "zoneout": 0.2, "num_layers": 2, "dropout": 0.3}, RESETS),
    "clipped": ({"clip_state_grad_norm": 0.3, "clip_state_grad_value": 0.2}, {}),
}


def built(name, num_heads=N, **settings):
    torch.manual_seed(0)
    return MODULES[name](num_heads=num_heads, **{"dtype": torch.float64, **settings})


def dense(w_hh, gates):
    """[N, G*K, K] -> [G*H, H], by its definition."""
    heads, rows, units = w_hh.shape
    whole = w_hh.new_zeros(gates * heads * units, heads * units)
    for n in range(heads):
        for g in range(gates):
            to = g * heads * units + n * units
            whole[to : to + units, n * units : (n + 1) * units] = w_hh[n, g * units : (g + 1) * units]
    assert rows == gates * units
    return whole


def run(module, params, x, backend, hx=None, **options):
    torch.manual_seed(1)
    return fastrnn.functional.recurrent(module._cell, x, hx, params, backend, **module._arguments(), **options)


def densely(module):
    """The parameters, and the same with W_hh dense."""
    params = dict(module.named_parameters())
    gates = len(spec_of(module._cell).gates)
    return params, {name: dense(p, gates) if name.startswith("weight_hh") else p for name, p in params.items()}


def flat(found):
    return [one for part in found for one in (part if isinstance(part, tuple) else (part,))]


def compare(module, backend, tolerance=1e-12, tapped=True, **options):
    params, whole = densely(module)
    generator = torch.Generator().manual_seed(3)
    dtype = module.weight_ih_l0.dtype
    x = torch.randn(T, B, module.input_size, generator=generator).to(dtype).requires_grad_()
    rows, states = module.num_layers * (1 + module.bidirectional), len(spec_of(module._cell).states)
    hx = None
    if "reset_mask" not in options and states < 3:  # sLSTM starts from zeros
        hx = tuple(
            torch.randn(rows, B, module.hidden_size, generator=generator).to(dtype).requires_grad_()
            for _ in range(states)
        )
    leaves = [x, *(hx or ()), *params.values()]
    found = []
    for given, name in ((params, backend), (whole, "reference")):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        tap = torch.zeros(rows, 2, states, T, B, dtype=acc, requires_grad=True) if tapped else None
        out = flat(run(module, given, x, name, hx if hx is None or states > 1 else hx[0], tap=tap, **options))
        weights = [torch.linspace(-1, 1, one.numel(), dtype=one.dtype).reshape(one.shape) for one in out]
        grads = torch.autograd.grad(out, leaves + ([tap] if tapped else []), weights)
        found.append([*out, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_dense_module_with_zeros(name, case, backend):
    settings, options = CASES[case]
    compare(built(name, **settings), backend, **options)


@pytest.mark.parametrize("num_heads", [2, H])
def test_other_numbers_of_heads(num_heads):
    compare(built("gru", num_heads), "reference")


@pytest.mark.parametrize("name", ["lstm", "gru", "slstm"])
def test_the_names_and_shapes_of_parameters(name):
    module, plain = built(name), built(name, num_heads=1)
    gates = len(spec_of(module._cell).gates)
    assert module.weight_hh_l0.shape == (N, gates * H // N, H // N)
    assert plain.weight_hh_l0.shape == (gates * H, H)
    shapes = {name: p.shape for name, p in module.state_dict().items() if name != "weight_hh_l0"}
    assert shapes == {name: p.shape for name, p in plain.state_dict().items() if name != "weight_hh_l0"}
    assert f"num_heads={N}" in repr(module) and "num_heads" not in repr(plain)
    other = built(name)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], module(x)[0])


def test_refusals():
    with pytest.raises(ValueError, match="divisible by num_heads, got 6 and 4"):
        fastrnn.GRU(I, H, num_heads=4)
    with pytest.raises(ValueError, match="num_heads must be greater than zero"):
        fastrnn.GRU(I, H, num_heads=0)
    with pytest.raises(TypeError, match="num_heads should be of type int"):
        fastrnn.LSTM(I, H, num_heads=2.0)
    with pytest.raises(ValueError, match="without proj_size"):
        fastrnn.LSTM(I, H, proj_size=2, num_heads=2)
    with pytest.raises(ValueError, match="which min_gru has not"):
        fastrnn.Recurrent(fastrnn.cells.min_gru, I, H, num_heads=2)
    module = built("gru")
    x = torch.randn(T, B, I, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"cannot run this call: .* this one has heads"):
        run(module, dict(module.named_parameters()), x, "aten")
    params = {**dict(module.named_parameters()), "weight_hh_l0": torch.zeros(N, 6, 3, dtype=torch.float64)}
    with pytest.raises(RuntimeError, match="should have shape"):
        run(module, params, x, None)
    with pytest.raises(ValueError, match="has no num_heads"):
        fastrnn.convert(module, to="torch")


def test_no_plain_call_of_heads_reaches_torch():
    module = built("lstm", backend=None)
    assert fastrnn.explain(module, torch.randn(T, B, I, dtype=torch.float64)).chosen != "aten"
    compare(module, None)


def test_gradients_of_gradients():
    module = built("gru")
    params, whole = densely(module)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    found = []
    for given in (params, whole):
        y, _ = run(module, given, x, None)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *params.values()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", None])
def test_per_sample_gradients(backend):
    module = built("lstm", backend=backend)
    params = dict(module.named_parameters())
    x = torch.randn(T, B, I, dtype=torch.float64)

    def loss(params, x):
        y, _ = torch.func.functional_call(module, params, (x.unsqueeze(1),))
        return y.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 1))(params, x)
    for b in range(B):
        for name, p in torch.func.grad(loss)(params, x[:, b]).items():
            torch.testing.assert_close(found[name][b], p)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    each = torch.func.vmap(lambda params: torch.func.functional_call(module, params, (x,))[0])(stacked)
    torch.testing.assert_close(each[0], module(x)[0])


def test_compiled():
    module = built("lstm", bidirectional=True, dtype=torch.float32)
    x = torch.randn(T, B, I)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for one in (module, compiled):
        y, _ = one(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_exported():
    module = built("gru").eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x)[0], module(x)[0])


def test_weight_dropout_and_packed_input():
    module = built("lstm", weight_dropout=0.5)
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(T, B, I, dtype=torch.float64), [5, 4, 2])
    y, _ = module(packed)
    y.data.sum().backward()
    assert 0 < (module.weight_hh_l0.grad == 0).double().mean() < 1
    module.eval()
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(packed)
    want, _ = module(padded, lengths=torch.tensor([5, 4, 2]))
    torch.testing.assert_close(torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0])[0], want)


def test_initialisation_of_each_block():
    module = fastrnn.init.orthogonal_(built("lstm", bidirectional=True))
    K = H // N
    for block in module.weight_hh_l0_reverse.detach().reshape(-1, K, K):
        torch.testing.assert_close(block @ block.T, torch.eye(K, dtype=torch.float64))
    fastrnn.init.forget_bias_(fastrnn.init.kaiming_(module))
    bound = (6 / (2 * K)) ** 0.5
    weights = fastrnn.init.xavier_(module).weight_hh_l0
    assert 0.8 * bound < weights.abs().max() <= bound
    simple = fastrnn.init.identity_(built("rnn"))
    assert torch.equal(simple.weight_hh_l0, torch.eye(K, dtype=torch.float64).expand(N, K, K))


def test_the_monitor_reads_the_blocks():
    module = built("lstm")
    with fastrnn.GradientMonitor(module) as monitor:
        module(torch.randn(T, B, I, dtype=torch.float64))[0].sum().backward()
    assert len(monitor.report()) == 2


# Of the largest element: sums of some hundred terms in float32; of the half types their rounding of y and dgx.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@pytest.mark.skipif(cpu.MISSING is not None, reason="the C++ library is not built")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_sizes_and_dtypes_of_the_c_scan(name, dtype):
    """Heads wider than a panel of the product, and than the terms that it sums at once; and a call of one step."""
    kind = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU}[name]
    for units, heads, steps in ((20, 3, 2), (130, 2, 2), (33, 2, 1), (1, 5, 2)):
        torch.manual_seed(0)
        settings = {"num_heads": heads, "layer_norm": units == 20, "dtype": dtype}
        module = kind(I, units * heads, **settings)
        x = torch.randn(steps, 70, I).to(dtype)
        found = []
        for backend in ("cpu", "reference"):
            y, _ = run(module, dict(module.named_parameters()), x, backend)
            found.append([y.detach(), *torch.autograd.grad(y.float().square().mean(), list(module.parameters()))])
        for a, b in zip(*found, strict=True):
            scale = float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("kind", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_a_block_is_drawn_as_the_w_hh_of_a_network_of_its_size(kind):
    torch.manual_seed(0)
    module = kind(I, 64, num_heads=16, num_layers=2, bidirectional=True)
    for name, p in module.named_parameters():
        bound = 1 / 2 if name.startswith("weight_hh") else 1 / 8  # of 4 units, of 64
        assert 0.9 * bound < p.abs().max() <= bound, name
