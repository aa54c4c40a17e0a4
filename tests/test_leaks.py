"""What does not count must not leak: NaN in a state, an input or a gradient that belongs to no step stays there."""

import pytest
import torch
from setups import MASKS, every_backend, kept_of, random_incoming, random_inputs
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import scan
from fastrnn.arguments import Walk
from fastrnn.backends import cpu, reference
from fastrnn.cell_table import CELLS, PAD

T, B, I, H = 5, 4, 3, 4
LENGTHS = torch.tensor([5, 0, 3, 4])  # sequence 1 has no step, so that its initial state is only handed on
KINDS = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 2}),
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {"nonlinearity": "relu"}),
}
SETTINGS = {
    "plain": {},
    "stacked": {"num_layers": 2, "residual": True},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "layer_norm": {"layer_norm": True, "bidirectional": True},
    "masks": {"zoneout": 0.3, "recurrent_dropout": 0.4, "bidirectional": True},
    "clip": {"clip_state_grad_norm": 0.1, "clip_state_grad_value": 0.2, "layer_norm": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_setting = pytest.mark.parametrize("settings", SETTINGS)
every_poison = pytest.mark.parametrize("poison", [float("nan"), float("inf")])


def network(kind, backend, **settings):
    torch.manual_seed(0)
    name, own = KINDS[kind]
    return getattr(fastrnn, name)(I, H, dtype=torch.float64, backend=backend, **own, **settings)


def initial_states(module, sequence, value):
    """Random states of a batch, those of one sequence `value`."""
    D = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H, H] if isinstance(module, fastrnn.LSTM) else [H]
    generator, states = torch.Generator().manual_seed(1), []
    for width in widths:
        state = torch.randn(D, B, width, generator=generator, dtype=torch.float64)
        state[:, sequence] = value
        states.append(state.requires_grad_())
    return states


def outcome(module, sequence, value, lengths=None, reset_mask=None, padding=0.0, dpadding=0.0, second=False):
    """Everything that a call and its backward give, but for the final states of the sequence without a step.

    value: of the initial states of `sequence`. padding, dpadding: what the input and the gradient of the output hold
    after a sequence's end.
    """
    torch.manual_seed(2)  # the masks
    after_end = torch.zeros(T, B, 1, dtype=torch.bool)
    if lengths is not None:
        after_end = (torch.arange(T)[:, None] >= lengths)[..., None]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, B, I, generator=generator, dtype=torch.float64).masked_fill(after_end, padding).requires_grad_()
    states = initial_states(module, sequence, value)
    hx = tuple(states) if len(states) > 1 else states[0]
    D = states[0].shape[0]
    tap = torch.zeros(D, 2, len(states), T, B, dtype=torch.float64, requires_grad=True)
    pair = isinstance(module, fastrnn.LSTM)
    y, finals, *c = module(x, hx, lengths=lengths, reset_mask=reset_mask, tap=tap, return_cells=pair)
    finals = finals if pair else (finals,)
    wanted = [x, tap, *module.parameters(), *states]
    outputs = [y, *c, *finals]
    incoming = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in outputs]
    incoming[: 1 + len(c)] = [g.masked_fill(after_end, dpadding) for g in incoming[: 1 + len(c)]]
    if second:
        del wanted[1]  # the tap: its gradient is a report
        gradients = torch.autograd.grad(outputs, wanted, incoming, create_graph=True)
        loss = sum(g.square().sum() for g in gradients)
        return [*gradients, *torch.autograd.grad(loss, wanted)]
    others = [b for b in range(B) if b != sequence]
    gradients = torch.autograd.grad(outputs, wanted, incoming)
    return [y, *c, *(s[:, others] for s in finals), *gradients]


def assert_same(got, want):
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert b.isfinite().all(), f"value {k} without the poison"
        assert torch.equal(a, b), f"value {k}: {a} instead of {b}"


@pytest.fixture(params=["padding is multiplied", "padding is left out"])
def product(request, monkeypatch):
    """Both ways of a weight's gradient, which depend on the problem's size."""
    monkeypatch.setattr(scan, "LEAST_PADDED_WORK", 0 if request.param == "padding is left out" else 1 << 40)


@every_kind
@every_backend
def test_the_state_of_a_sequence_without_a_step_reaches_no_gradient(backend, kind, product):
    module = network(kind, backend)
    assert_same(*(outcome(module, 1, value, LENGTHS) for value in (float("nan"), 0.5)))


@every_poison
@every_setting
@every_kind
@every_backend
def test_padding_reaches_nothing(backend, kind, settings, poison):
    module = network(kind, backend, **SETTINGS[settings])
    got = outcome(module, 1, poison, LENGTHS, padding=poison, dpadding=poison)
    assert_same(got, outcome(module, 1, 0.5, LENGTHS))


@every_poison
@pytest.mark.parametrize("settings", [name for name in SETTINGS if not SETTINGS[name].get("bidirectional")])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@every_kind
@every_backend
def test_a_state_that_is_reset_before_the_first_step_reaches_nothing(backend, kind, lengths, settings, poison):
    module, reset_mask = network(kind, backend, **SETTINGS[settings]), torch.zeros(T, B, dtype=torch.bool)
    reset_mask[0, 2] = reset_mask[2, 3] = True
    assert_same(*(outcome(module, 2, value, lengths, reset_mask) for value in (poison, 0.5)))


@every_poison
@pytest.mark.parametrize("settings", ["plain", "bidirectional", "layer_norm"])
@every_kind
@every_backend
def test_nothing_leaks_into_a_second_derivative(backend, kind, settings, poison):
    module = network(kind, backend, **SETTINGS[settings])
    got = outcome(module, 1, poison, LENGTHS, padding=poison, dpadding=poison, second=True)
    assert_same(got, outcome(module, 1, 0.5, LENGTHS, second=True))


@every_kind
@every_backend
def test_the_padding_of_a_packed_batch_reaches_nothing(backend, kind):
    """In a packed batch each sequence has a step; NaN in one makes its own results NaN, and no others'."""
    module, x = network(kind, backend), torch.randn(T, B, I, dtype=torch.float64)
    lengths, found = torch.tensor([5, 1, 3, 4]), []
    for value in (0.0, float("nan")):
        after_end = (torch.arange(T)[:, None] >= lengths)[..., None]
        given = pack_padded_sequence(x.masked_fill(after_end, value), lengths, enforce_sorted=False)
        y, _ = module(given)
        found.append([y.data, *torch.autograd.grad(y.data.square().sum(), list(module.parameters()))])
    assert_same(*found)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("features", [("flags",), MASKS], ids=str)
@pytest.mark.parametrize("launcher", [reference, cpu], ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("cell", CELLS)
def test_saved_planes_are_zero_at_padding(cell, launcher, features, reverse):
    """Gradients that are zero there are multiplied with them."""
    inputs = random_inputs(cell, features, sizes=(T, B, H), reverse=reverse)
    inputs.h0[-1] = float("nan")  # of the sequence without a step
    outputs = launcher.forward(inputs, Walk(cell, reverse, "reference"), True)
    padding = (inputs.flags & PAD).bool()
    assert padding[:, -1].all() and not outputs.saved[padding].any()
    gradients = launcher.backward(random_incoming(inputs), kept_of(outputs), inputs, Walk(cell, reverse, ""), True)
    assert gradients.dgx.isfinite().all() and not gradients.dgx[padding].any()
