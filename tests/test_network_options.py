"""Masks and layer norms in the whole-network operation of the C++ library, against the reference backend."""

import pytest
import torch
from setups import needs_cpu_library
from test_network_features import agree, made, new_tap, results, states_of
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import network, network_function, stack

pytestmark = [needs_cpu_library, pytest.mark.usefixtures("operation")]
LAYOUTS = [
    {}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "batch_first": True, "bias": False},
]  # fmt: skip
MASKS = {
    "zoneout": {"zoneout": 0.3},
    "recurrent dropout": {"recurrent_dropout": 0.3},
    "weight dropout": {"weight_dropout": 0.3},
}
NORMS = {
    "norms": {"layer_norm": True},
    "norm of the sum": {"layer_norm": "sum"},
    "norms of gates": {"layer_norm": "gates"},
}
OF_C = {
    "zoneout of h": {"zoneout": (0.0, 0.4)},
    "carried": {"layer_norm": True, "layer_norm_cell": "carried"},
    "without c": {"layer_norm": True, "layer_norm_cell": None},
    "carried, of the sum": {"layer_norm": "sum", "layer_norm_cell": "carried"},
    "all": {
        "layer_norm": True, "layer_norm_cell": "carried", "zoneout": 0.2, "recurrent_dropout": 0.2,
        "weight_dropout": 0.2, "clip_state_grad_norm": 0.3, "clip_state_grad_value": 0.1,
    },
}  # fmt: skip
KINDS = [
    *(("LSTM", options) for options in {**MASKS, **NORMS, **OF_C}.values()),
    *(("GRU", options) for options in {**MASKS, "norms": NORMS["norms"]}.values()),
    *(("RNN", options) for options in {**MASKS, **NORMS}.values()),
    ("RNN", {"nonlinearity": "elu"}),
    ("RNN", {"nonlinearity": "leaky_relu", "layer_norm": True}),
]
kinds = pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)


@pytest.fixture
def operation(monkeypatch):
    """Makes the general path fail on backend `cpu`, but for the call that a second derivative runs again."""
    general = stack.run

    def run(*given, backend, masks=None, **call):
        assert backend == "reference" or masks is not None
        return general(*given, backend=backend, masks=masks, **call)

    monkeypatch.setattr(stack, "run", run)
    monkeypatch.setattr(network_function, "run_stack", run)


def scrambled(module):
    """The module with layer norms that are not the identity."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("ln_"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@kinds
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_the_references(kind, options, layout, training):
    module = scrambled(made(kind, **options, **layout)).train(training)
    T, B = 6, 4
    x = torch.randn((B, T, 3) if module.batch_first else (T, B, 3), dtype=torch.float64, requires_grad=True)
    agree(module, x, states_of(module, B))
    agree(module, x, None)


@kinds
def test_taps_and_resets(kind, options):
    module = scrambled(made(kind, num_layers=2, bidirectional=True, **options))
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    agree(module, x, None, tap=new_tap(module, 6, 4), reset_mask=torch.rand(6, 4) > 0.6)


@kinds
def test_packed_rows(kind, options):
    module = scrambled(made(kind, num_layers=2, bidirectional=True, **options))
    lengths = torch.tensor([2, 6, 1, 4])
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    agree(module, pack_padded_sequence(x, lengths, enforce_sorted=False), states_of(module, 4))


@kinds
@pytest.mark.parametrize("layout", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
def test_lengths(kind, options, layout):
    module = scrambled(made(kind, **options, **layout))
    x = torch.randn(6, 6, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 5, 1, 4, 4, 3])
    agree(module, x, states_of(module, 6), lengths=lengths)
    agree(module.eval(), x, None, lengths=lengths, tap=new_tap(module, 6, 6))


def test_lengths_and_layers_apart():
    module = made("LSTM", num_layers=3, residual=True, zoneout=0.2)
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    agree(module, x, states_of(module, 4), lengths=torch.tensor([2, 5, 1, 4]), return_layers=True)


@kinds
def test_unbatched_input(kind, options):
    module = scrambled(made(kind, **options))
    agree(module, torch.randn(5, 3, dtype=torch.float64, requires_grad=True), states_of(module))


@kinds
def test_many_chunks_of_steps(kind, options, monkeypatch):
    monkeypatch.setattr(network, "LARGEST_PRODUCT", 1 << 40)
    module = scrambled(made(kind, 8, 40, bidirectional=True, **options))
    x = torch.randn(260, 9, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(260, 9) > 0.9
    agree(module, x, states_of(module, 9), rtol=1e-8, tap=new_tap(module, 260, 9), reset_mask=mask)


@kinds
def test_bits_do_not_depend_on_the_threads(kind, options, monkeypatch):
    monkeypatch.setattr(network, "LARGEST_PRODUCT", 1 << 40)
    module = scrambled(made(kind, 24, 200, dtype=torch.float32, **options))
    x = torch.randn(70, 9, 24, requires_grad=True)
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(2)
            found.append(results(module, x, None))
        finally:
            torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_at_most_twice_the_references(kind, options, dtype):
    """Against float64: in the root mean square of each result."""
    options = {name: value for name, value in options.items() if "drop" not in name and "zone" not in name}
    module = scrambled(made(kind, 16, 48, dtype=dtype, **options))
    x = torch.randn(20, 6, 16, dtype=dtype, requires_grad=True)
    found = []
    for backend in ("cpu", "reference"):
        module.backend = backend
        found.append(results(module, x, None))
    exact = results(module.double(), x.detach().double().requires_grad_(), None)
    for got, own, want in zip(*found, exact, strict=True):
        error, of_reference = ((one.double() - want).norm().item() for one in (got, own))
        assert error <= 2 * of_reference + torch.finfo(dtype).eps * want.norm().item()


@pytest.mark.parametrize("options", [*MASKS.values(), *NORMS.values(), OF_C["all"]], ids=str)
def test_second_derivatives(options):
    """Without clipping: what comes by way of y is clipped apart from the rest; the general path clips their sum."""
    options = {name: value for name, value in options.items() if not name.startswith("clip")}
    module = scrambled(made("LSTM", bidirectional=True, **options))
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def gradients(x, w_hh):
        torch.manual_seed(2)
        parameters = {**dict(module.named_parameters()), "weight_hh_l0": w_hh}
        y, (_, c_n) = torch.func.functional_call(module, parameters, (x,))
        return torch.autograd.grad(y.square().sum() + c_n.sum(), (x, w_hh), create_graph=True)

    found = []
    for backend in ("cpu", "reference"):
        module.backend = backend
        once = gradients(x, module.weight_hh_l0)
        twice = torch.autograd.grad(sum(one.square().sum() for one in once), (x, module.weight_hh_l0))
        found.append([*once, *twice])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [MASKS["zoneout"], NORMS["norms"]], ids=str)
def test_a_batch_of_gradients(options):
    module = scrambled(made("GRU", **options))
    module.backend = "cpu"
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    y, _ = module(x)
    dy = torch.randn(3, *y.shape, dtype=torch.float64)
    (together,) = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    for one, given in zip(together, dy, strict=True):
        (alone,) = torch.autograd.grad(y, x, given, retain_graph=True)
        torch.testing.assert_close(one, alone, rtol=1e-10, atol=1e-12)


def test_what_may_change_before_the_backward():
    """The biases, which are only added, the output and the mask of resets; the layer norms' weights are read."""
    module = scrambled(made("LSTM", layer_norm=True))
    module.backend = "cpu"
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(module(x)[0].sum(), x)
    y, _ = module(x)
    total = y.sum()
    with torch.no_grad():
        module.bias_ih_l0.add_(1)
        module.bias_hh_l0.add_(1)
        y.zero_()
    assert torch.equal(*wanted, *torch.autograd.grad(total, x))
    mask = torch.rand(4, 2) > 0.5
    wanted = torch.autograd.grad(module(x, reset_mask=mask)[0].sum(), x)
    total = module(x, reset_mask=mask)[0].sum()
    mask.fill_(True)
    assert torch.equal(*wanted, *torch.autograd.grad(total, x))
    for name in ("ln_ih_l0", "ln_hh_l0", "ln_c_l0", "ln_c_bias_l0", "weight_hh_l0"):
        total = module(x)[0].sum()
        with torch.no_grad():
            getattr(module, name).mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, x)


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"recurrent_dropout": 0.1, "recurrent_dropout_per_gate": True}, {}),
        ({"zoneout": 0.1, "proj_size": 2}, {}),
        ({"layer_norm": True, "proj_size": 2}, {}),
        ({"layer_norm": True, "num_heads": 5}, {}),
        ({"zoneout": 0.1}, {"lengths": torch.tensor([0, 4])}),
        ({"num_layers": 2, "dropout": 0.1}, {"lengths": torch.tensor([2, 4])}),
        ({"zoneout": 0.1}, {"decay": torch.full((4, 2), 0.5, dtype=torch.float64)}),
        ({"zoneout": 0.1}, {"return_cells": True}),
    ],
    ids=str,
)
def test_the_general_path_runs_what_the_operation_lacks(options, call):
    module = made("LSTM", **options)
    module.backend = "cpu"
    with pytest.raises(AssertionError):  # of the fixture
        module(torch.randn(4, 2, 3, dtype=torch.float64), **call)


def test_names_the_argument_that_does_not_fit():
    module = made("LSTM", layer_norm=True)
    x, weights = torch.zeros(4, 2, 3, dtype=torch.float64), list(module.parameters())
    forward, shape = torch.ops.fastrnn_c.network_forward, ("lstm", 1, False, True, False, False)

    def call(weights=weights, masks=(), norms=(1e-5, "separate", "inside"), shape=shape):
        return forward(x, None, None, None, None, weights, *shape, False, list(masks) or None, *norms)

    assert call()[0].shape == (4, 2, 5)
    with pytest.raises(RuntimeError, match="ln_of should be"):
        call(norms=(1e-5, "both", "inside"), weights=weights[:4] + weights[5:])
    with pytest.raises(RuntimeError, match="ln_c should be"):
        call(norms=(1e-5, "separate", "outside"))
    with pytest.raises(RuntimeError, match="a layer norm of c needs one of the gates"):
        call(norms=(1e-5, "", "inside"), weights=weights[:4] + weights[6:])
    with pytest.raises(RuntimeError, match="ln_hh must have shape"):
        call(weights=[*weights[:5], weights[5][:-1], *weights[6:]])
    with pytest.raises(RuntimeError, match="three for each layer and direction"):
        call(masks=[x])
    none = x.new_empty(0)
    with pytest.raises(RuntimeError, match="zone_h must have shape"):
        call(masks=[none, x.new_zeros(4, 2, 4), none])
    with pytest.raises(RuntimeError, match="recurrent_mask must have shape"):
        call(masks=[x.new_zeros(2, 10), none, none])


@pytest.mark.parametrize("options", [MASKS["zoneout"], NORMS["norms"]], ids=str)
def test_a_monitor_sees_the_call(options):
    module = scrambled(made("LSTM", **options))
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    found = []
    for backend in ("cpu", "reference"):
        module.backend = backend
        torch.manual_seed(2)
        with fastrnn.GradientMonitor(module) as monitor:
            monitor.norms_to(lambda name, norms: found.append((name, norms)))
            module(x)[0].sum().backward()
    (name, one), (other_name, other) = found
    assert name == other_name
    torch.testing.assert_close(one, other)


BETWEEN = {
    "dropout": {"dropout": 0.3},
    "locked": {"dropout": 0.3, "locked_dropout": True},
    "residual": {"residual": True},
    "both": {"dropout": 0.3, "residual": True, "zoneout": 0.2},
}


@pytest.mark.parametrize("layout", [{}, {"bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("options", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_what_is_between_the_layers(kind, options, layout):
    """Then each layer is one operation."""
    module = made(kind, num_layers=3, **options, **layout)
    x = torch.randn(6, 6, 3, dtype=torch.float64, requires_grad=True)
    agree(module, x, states_of(module, 6))
    agree(module, x, None, tap=new_tap(module, 6, 6), return_layers=True)
    agree(module.eval(), x, None)
    if "dropout" not in options:
        rows = pack_padded_sequence(x, torch.tensor([2, 6, 1, 4, 6, 3]), module.batch_first, enforce_sorted=False)
        agree(module.train(), rows, states_of(module, 6))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_dropout_between_packed_rows_draws_torch_nns_masks(kind):
    module = made(kind, num_layers=3, dropout=0.3, bidirectional=True)
    module.backend = "cpu"
    theirs = getattr(torch.nn, kind)(3, 5, 3, dropout=0.3, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    rows, found = pack_padded_sequence(x, torch.tensor([2, 6, 1, 4]), enforce_sorted=False), []
    for one in (module, theirs):
        torch.manual_seed(2)
        found.append(results(one, rows, None))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{"zoneout": 0.3}, {"num_layers": 2, "residual": True}], ids=str)
def test_a_batch_first_input_may_change_before_the_backward(options):
    """As in torch.nn, which copies it."""
    module = made("GRU", batch_first=True, **options)
    module.backend = "cpu"
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    total = module(x)[0].sum()
    x.zero_()
    total.backward()


@pytest.mark.parametrize("call", [{}, {"lengths": torch.tensor([2, 4])}], ids=str)
def test_masks_do_not_depend_on_the_strides_of_the_states(call):
    module = made("GRU", recurrent_dropout=0.5)
    x, h0 = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(1, 2, 5, dtype=torch.float64)
    agree(module, x, h0.mT.contiguous().mT.requires_grad_(), **call)


def test_biases_of_inference_mode():
    module = made("GRU")
    with torch.inference_mode():
        biases = {name: p.clone() for name, p in module.named_parameters() if name.startswith("bias")}
    params = {**dict(module.named_parameters()), **biases}
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in ("cpu", "reference"):
        y, _ = fastrnn.functional.gru(x, None, params, backend=backend)
        found.append([y, *torch.autograd.grad(y.sum(), (x, module.weight_hh_l0))])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_outputs_of_layers_may_change_before_the_backward():
    module = made("LSTM", num_layers=2, dropout=0.3)
    module.backend = "cpu"
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    _, _, layers = module(x, return_layers=True)
    total = layers[1].sum()
    with torch.no_grad():
        for y in layers:
            y.zero_()
    torch.autograd.grad(total, x)
