"""fastrnn.Recurrent: calls against loops of the cell's function, its inputs, and what a module of PyTorch has to do."""

import copy
import io
import pickle

import pytest
import torch
from torch import tanh
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from user_cells import lstm, network, three, unconnected

import fastrnn

T, B, I, H = 5, 3, 2, 4
CELLS = {"lstm": lstm, "three": three, "unconnected": unconnected}


def module_of(cell, **settings):
    torch.manual_seed(0)
    return fastrnn.Recurrent(cell, I, H, dtype=torch.float64, backend="reference", **settings)


def randn(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def inputs_of(cell, module, form="steps"):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    shape = {"steps": (T, B, H), "constant": (B, H), "rows": (rows, T, B, H)}[form]
    return {name: randn(*shape, seed=7 + k) for k, name in enumerate(cell.inputs)}


def states_of(cell, module):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    return tuple(randn(rows, B, H, seed=20 + s) for s in range(len(cell.states)))


def as_hx(states):
    return states if len(states) > 1 else states[0]


def agree(got, want, leaves):
    """Values and gradients of two `(y, states)`, states in a tuple or alone."""
    (y, states), (expected_y, expected_states) = got, want
    states = states if isinstance(states, tuple) else (states,)
    pairs = list(zip((y, *states), (expected_y, *expected_states), strict=True))
    weights = [torch.linspace(0.5, 1.5, w.numel(), dtype=w.dtype).reshape(w.shape) for _, w in pairs]
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    found, expected = (
        torch.autograd.grad([pair[k] for pair in pairs], list(leaves.values()), weights) for k in range(2)
    )
    for name, a, b in zip(leaves, found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", ["steps", "constant", "rows"])
@pytest.mark.parametrize("name", CELLS)
def test_a_network_is_the_loop(name, form):
    cell = CELLS[name]
    module = module_of(cell, num_layers=3, bidirectional=True, residual=True)
    x, hx, inputs = randn(T, B, I), states_of(cell, module), inputs_of(cell, module, form)
    lengths, resets = torch.tensor([T, 0, 3]), torch.rand(T, B) < 0.3
    leaves = {"x": x, **dict(module.named_parameters()), **inputs, **dict(zip(cell.states, hx, strict=True))}
    got = module(x, as_hx(hx), lengths=lengths, reset_mask=resets, **inputs)
    masked = x.masked_fill((torch.arange(T)[:, None] >= lengths)[..., None], 0)
    agree(got, network(cell, module, masked, hx, lengths, resets, **inputs), leaves)


@pytest.mark.parametrize("bias", [True, False])
def test_without_bias_and_with_the_functional_form(bias):
    module = module_of(three, bias=bias)
    x, inputs = randn(T, B, I), inputs_of(three, module)
    leaves = {"x": x, **dict(module.named_parameters())}
    agree(module(x, **inputs), network(three, module, x, **inputs), leaves)
    y, states = fastrnn.functional.recurrent(three, x, None, dict(module.named_parameters()), **inputs)
    agree((y, states), network(three, module, x, **inputs), leaves)


def test_input_layouts_of_step_inputs():
    """batch_first, unbatched and packed calls are the time-first one."""
    module = module_of(three, bidirectional=True)
    x, inputs, lengths = randn(T, B, I), inputs_of(three, module), torch.tensor([3, T, 2])
    y, states = module(x, lengths=lengths, **inputs)

    first = copy.deepcopy(module)
    first.batch_first = True
    for rows in (False, True):
        given = {n: v.transpose(0, 1) for n, v in inputs.items()}
        if rows:
            given = {n: v.expand(2, B, T, H) for n, v in given.items()}
        got_y, got = first(x.transpose(0, 1), lengths=lengths, **given)
        torch.testing.assert_close((got_y.transpose(0, 1), *got), (y, *states))

    one = module(x[:, 0], **{n: v[:, 0] for n, v in inputs.items()})
    want = module(x[:, :1], **{n: v[:, :1] for n, v in inputs.items()})
    torch.testing.assert_close((one[0], *one[1]), (want[0][:, 0], *(s[:, 0] for s in want[1])))
    constant = {n: v[0] for n, v in inputs.items()}
    one = module(x[:, 0], **{n: v[0] for n, v in constant.items()})
    want = module(x, **constant)
    torch.testing.assert_close(one[0], want[0][:, 0])

    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for given in (inputs, {n: pack_padded_sequence(v, lengths, enforce_sorted=False) for n, v in inputs.items()}):
        got_y, got = module(packed, **given)
        assert isinstance(got_y, PackedSequence)
        torch.testing.assert_close((pad_packed_sequence(got_y)[0], *got), (y, *states))
    got = module(packed, **{n: v[0] for n, v in inputs.items()})
    want = module(x, lengths=lengths, **{n: v[0] for n, v in inputs.items()})
    torch.testing.assert_close(pad_packed_sequence(got[0])[0], want[0])


def test_wrong_step_inputs_are_refused():
    module, x = module_of(three), randn(T, B, I)
    good = inputs_of(three, module)
    for wrong, error, reason in (
        ({}, TypeError, "k: three needs it at every call"),
        ({**good, "z": x}, TypeError, "unexpected keyword argument 'z'; the inputs of three are k, l"),
        ({**good, "k": x}, ValueError, r"k should be \[T, B, H\]"),
        ({**good, "k": 1.0}, TypeError, "as a tensor"),
        ({**good, "k": good["k"].float()}, RuntimeError, "k has dtype"),
        ({**good, "k": pack_padded_sequence(x, torch.tensor([5, 5, 5]))}, ValueError, "k is a PackedSequence"),
    ):
        with pytest.raises(error, match=reason):
            module(x, **wrong)
    with pytest.raises(TypeError, match=r"lstm got an unexpected keyword argument 'noise'$"):
        module_of(lstm)(x, noise=x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'noise'"):
        fastrnn.LSTM(I, H)(x.float(), noise=x)


def test_wrong_constructions_are_refused():
    for wrong, error, reason in (
        (lambda: fastrnn.Recurrent("lstm", I, H), TypeError, "fastrnn.cell"),
        (lambda: module_of(lstm, proj_size=2), ValueError, "proj_size"),
        (lambda: module_of(unconnected, weight_dropout=0.1), ValueError, "W_hh, which unconnected"),
        (lambda: module_of(unconnected, recurrent_dropout=0.1), ValueError, "W_hh, which unconnected"),
        (lambda: module_of(three, zoneout=(0.1, 0.2)), ValueError, "one for each of h, m, c"),
        (lambda: module_of(lstm)(randn(T, B, I), torch.zeros(1, B, H)), RuntimeError, r"pair \(h0, c0\)"),
        (lambda: module_of(three)(randn(T, B, I), 3, k=0, l=0), RuntimeError, r"hx of three .* tuple \(h0, m0, c0\)"),
    ):
        with pytest.raises(error, match=reason) as caught:
            wrong()
        assert "forward" not in str(caught.value)  # a line of the cell's text


def test_forced_backends_say_why_not_by_the_cell_s_name():
    module, x = module_of(lstm).float(), randn(T, B, I).float()
    for backend in ("aten", "cuda"):
        module.backend = backend
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run this call") as caught:
            module(x)
        assert "gates" not in str(caught.value) and len(str(caught.value)) < 300
    module.backend = None
    table = str(fastrnn.explain(module, x))
    assert table.startswith("lstm, cpu") and "gates" not in table and "torch has no lstm" in table


def test_parameters_have_names_first_values_and_a_state_dict():
    module = module_of(unconnected, bidirectional=True, layer_norm=True)
    names = [
        f"{kind}_l0{end}" for end in ("", "_reverse") for kind in ("weight_ih", "bias_ih", "ln_ih", "w")
    ]  # fmt: skip
    assert list(module.state_dict()) == names
    assert bool((module.w_l0 == 0.5).all()) and module.w_l0.shape == (H,)
    assert [name for row in module.all_names for name in row] == names
    other = module_of(unconnected, bidirectional=True, layer_norm=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    other.load_state_dict(module.state_dict())
    x, inputs = randn(T, B, I), inputs_of(unconnected, module)
    torch.testing.assert_close(other(x, **inputs)[0], module(x, **inputs)[0])
    module.reset_parameters()
    assert bool((module.w_l0_reverse == 0.5).all()) and bool((module.ln_ih_l0 == 1).all())
    assert bool((module_of(three).q_l0.abs() <= H**-0.5).all())


def test_a_module_can_be_copied_pickled_moved_and_shown():
    module = module_of(three, num_layers=2, zoneout=(0.1, 0.0, 0.2), dropout=0.1)
    module.eval()
    x, inputs = randn(T, B, I), inputs_of(three, module)
    want = module(x, **inputs)[0]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):  # fmt: skip
        assert twin.cell is three
        torch.testing.assert_close(twin(x, **inputs)[0], want)
    single = module.float()(x.float(), **{n: v.float() for n, v in inputs.items()})[0]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=1e-4, atol=1e-5)
    shown = repr(module)
    assert shown == "Recurrent(three, 2, 4, num_layers=2, dropout=0.1, zoneout=(0.1, 0.0, 0.2), backend=reference)"
    assert module.mode == "three" and repr(three).startswith("cell three(gates='a b', states='h m c'")
    assert three.__doc__.startswith("Three states") and copy.deepcopy(three) is three
    meta = fastrnn.Recurrent(three, I, H, device="meta")
    assert meta.q_l0.device.type == "meta"


def test_a_cell_that_no_module_has_is_pickled_by_its_function():
    made = fastrnn.cell(gates="n", parameters={"a": 2.0}, inputs="k")(a_function)
    twin = pickle.loads(pickle.dumps(made))
    assert twin.text == made.text and twin.initial == {"a": 2.0} and twin.function is a_function


def a_function(x, u, state, p, inputs):
    return (tanh(x.n + u.n) + p.a * state.h * inputs.k,)


def test_regularisers_draw_masks_and_expectations():
    x = randn(T, B, I)
    for settings in (
        dict(zoneout=0.3), dict(zoneout=(0.0, 0.5)), dict(recurrent_dropout=0.5), dict(weight_dropout=0.5),
        dict(dropout=0.5, num_layers=2), dict(dropout=0.5, num_layers=2, locked_dropout=True),
    ):  # fmt: skip
        module = module_of(lstm, **settings)
        torch.manual_seed(1)
        first = module(x)[0]
        torch.manual_seed(1)
        torch.testing.assert_close(module(x)[0], first)
        assert not torch.allclose(module(x)[0], first)
        module.eval()
        torch.testing.assert_close(module(x)[0], module(x)[0])
    # The LSTM's zoneout is (p_c, p_h), a user's cell's in the order of its states.
    built_in = fastrnn.LSTM(I, H, dtype=torch.float64, zoneout=(0.5, 0.1), layer_norm=False, backend="reference")
    module = module_of(lstm, zoneout=(0.1, 0.5))
    built_in.load_state_dict(module.state_dict())
    torch.testing.assert_close(module.eval()(x)[0], built_in.eval()(x)[0])
    torch.manual_seed(2)
    got = module.train()(x)[0]
    torch.manual_seed(2)
    torch.testing.assert_close(got, built_in.train()(x)[0])


def test_extras_of_a_call_are_the_built_in_lstm_s():
    """return_cells, return_layers, a tap, clipping, a single state after another."""
    settings = dict(num_layers=2, bidirectional=True, clip_state_grad_norm=0.1, clip_state_grad_value=0.05)
    module = module_of(lstm, **settings)
    built_in = fastrnn.LSTM(I, H, dtype=torch.float64, backend="reference", **settings)
    built_in.load_state_dict(module.state_dict())
    x, found = randn(T, B, I), []
    for one in (module, built_in):
        tap = torch.zeros(4, 2, 2, T, B, dtype=torch.float64, requires_grad=True)
        y, (h, c), cells, layers = one(x, tap=tap, return_cells=True, return_layers=True)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + c.sum()
        loss.backward()
        found.append((y, h, c, cells, *layers, tap.grad, *(p.grad for p in one.parameters())))
    torch.testing.assert_close(*found)
    y, states, (m, c) = module_of(three)(x, return_cells=True, **inputs_of(three, module_of(three)))
    assert m.shape == c.shape == (T, B, H)
    torch.testing.assert_close((m[-1], c[-1]), (states[1][0], states[2][0]))


def test_layer_norm_is_of_the_products():
    module = module_of(lstm, layer_norm=True)
    assert "ln_c_l0" not in module.state_dict() and "ln_hh_l0" in module.state_dict()
    gru_of = fastrnn.cell(gates="r z n")(gru_function)
    x = randn(T, B, I)
    mine, built_in = (
        fastrnn.Recurrent(gru_of, I, H, dtype=torch.float64, layer_norm=True, backend="reference"),
        fastrnn.GRU(I, H, dtype=torch.float64, layer_norm=True, backend="reference"),
    )
    mine.load_state_dict(built_in.state_dict())
    torch.testing.assert_close(mine(x)[0], built_in(x)[0])


def gru_function(x, u, state):
    r, z = torch.sigmoid(x.r + u.r), torch.sigmoid(x.z + u.z)
    n = tanh(x.n + r * u.n)
    return (n + z * (state.h - n),)


# ----------------------------------------------------------------------------------------------------- transformations


def test_vmap_and_per_sample_gradients():
    module, cell = module_of(three), three
    x = randn(T, B, I).detach()
    inputs = {n: v.detach() for n, v in inputs_of(cell, module).items()}
    params = {n: p.detach() for n, p in module.named_parameters()}

    def loss(params, x, inputs):
        y, _ = torch.func.functional_call(module, params, (x,), inputs)
        return y.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1, 1))(params, x, inputs)
    for b in range(B):
        one = torch.func.grad(loss)(params, x[:, b], {n: v[:, b] for n, v in inputs.items()})
        for name, gradient in one.items():
            torch.testing.assert_close(each[name][b], gradient)
    several = {n: torch.stack([p, 2 * p]) for n, p in params.items()}
    mapped = torch.func.vmap(loss, in_dims=(0, None, None))(several, x, inputs)
    for k in range(2):
        torch.testing.assert_close(mapped[k], loss({n: p[k] for n, p in several.items()}, x, inputs))


def test_a_penalty_on_the_gradient_trains():
    module, x = module_of(three), randn(T, B, I)
    inputs = inputs_of(three, module)
    leaves = [x, *inputs.values(), *module.parameters()]

    def penalties(y):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        return torch.autograd.grad(penalty, leaves)

    got, want = penalties(module(x, **inputs)[0]), penalties(network(three, module, x, **inputs)[0])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["lstm", "three"])
def test_compiled_and_exported(name):
    cell = CELLS[name]
    module = module_of(cell, num_layers=2).float()
    x = torch.randn(T, B, I)
    inputs = {n: v.float().detach() for n, v in inputs_of(cell, module).items()}

    def results(one):
        module.zero_grad()
        y, states = one(x, **inputs)
        (y.square().sum() + sum(s.sum() for s in (states if isinstance(states, tuple) else (states,)))).backward()
        return y.detach(), *(p.grad.clone() for p in module.parameters())

    want = results(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled), want)
    exported = torch.export.export(module, (x,), inputs)
    torch.testing.assert_close(exported.module()(x, **inputs)[0].detach(), want[0])


def test_autocast_chooses_the_dtypes_of_the_built_in_module():
    module = module_of(lstm).float()
    built_in = fastrnn.LSTM(I, H, backend="reference")
    built_in.load_state_dict(module.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        got, want = module(torch.ones(T, B, I)), built_in(torch.ones(T, B, I))
        own = module_of(three).float()(torch.ones(T, B, I), **{n: torch.ones(T, B, H) for n in "kl"})
    assert got[0].dtype == want[0].dtype == own[0].dtype == torch.bfloat16
    assert [s.dtype for s in got[1]] == [s.dtype for s in want[1]]
    torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=1e-2)  # a few roundings of bfloat16, 2**-8 each


def test_a_monitor_and_an_initialisation_take_any_cell(tmp_path):
    module = module_of(three, num_layers=2)
    inputs = inputs_of(three, module)
    with fastrnn.GradientMonitor(module) as monitor:
        module(randn(T, B, I), **inputs)[0].sum().backward()
    report = monitor.report()
    monitor.plot(tmp_path / "norms.png")
    assert [r.state for r in report[:3]] == ["h", "m", "c"] and len(report) == 6
    text = str(report)
    assert "instructions" not in text and "backward 1" not in text and len(text) < 6000
    for initialise in (fastrnn.init.xavier_, fastrnn.init.kaiming_, fastrnn.init.orthogonal_):
        initialise(module)
    block = module.weight_hh_l1[H:]
    torch.testing.assert_close(block @ block.T, torch.eye(H, dtype=torch.float64))
    alone = module_of(unconnected)
    fastrnn.init.xavier_(fastrnn.init.orthogonal_(alone))
    with fastrnn.GradientMonitor(alone) as monitor:
        alone(randn(T, B, I), **inputs_of(unconnected, alone))[0].sum().backward()
    assert "W_hh" not in str(monitor.report())
    for initialise in (fastrnn.init.forget_bias_, lambda m: fastrnn.init.chrono_(m, 10), fastrnn.init.identity_):
        with pytest.raises(ValueError, match="three"):
            initialise(module)
