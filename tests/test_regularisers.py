"""Dropouts, zoneout and the residual sum: their masks, their seeds, and what they are in eval mode."""

import pytest
import torch
from by_hand import B, T, hand_inputs, hand_scan
from setups import (
    KINDS,
    ZONES,
    H,
    I,
    agree,
    every_backend,
    every_kind,
    flat,
    gradients,
    initial,
    make,
    needs_cpu_library,
    random,
    twin,
)  # fmt: skip
from torch import nn

import fastrnn

# ------------------------------------------------------------------------------------------------- dropouts and zoneout


REGULARISED = {
    "zoneout": {"zoneout": 0.3},
    "recurrent": {"recurrent_dropout": 0.4},
    "weight": {"weight_dropout": 0.4},
    "locked": {"dropout": 0.5, "locked_dropout": True},
    "dropout": {"dropout": 0.5},
    "all": {
        "zoneout": 0.3, "recurrent_dropout": 0.4, "weight_dropout": 0.4, "dropout": 0.5, "locked_dropout": True,
        "residual": True, "layer_norm": True,
    },
}  # fmt: skip


@needs_cpu_library
@pytest.mark.parametrize("name", REGULARISED)
@every_kind
def test_one_seed_gives_one_result_on_every_backend(kind, name):
    settings = {"num_layers": 2, "bidirectional": True, **REGULARISED[name]}
    x, found = random(T, B, I), {}
    for backend in ("reference", "cpu"):
        ours = make(kind, backend, **settings)
        torch.manual_seed(17)
        y, state = ours(x)
        found[backend] = (y, *flat(state), *gradients((y, *flat(state)), (x, *ours.parameters())))
    agree(found["cpu"], found["reference"])
    torch.manual_seed(18)
    assert not torch.allclose(ours(x)[0], y), "another seed should draw other masks"


@every_backend
@pytest.mark.parametrize("name", REGULARISED)
@every_kind
def test_eval_is_deterministic_and_leaves_the_generator_alone(kind, name, backend):
    ours = make(kind, backend, num_layers=2, **REGULARISED[name]).eval()
    x, before = random(T, B, I), torch.get_rng_state()
    first, second = ours(x)[0], ours(x)[0]
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)


@every_backend
@pytest.mark.parametrize("name", ["recurrent", "weight", "locked", "dropout"])
@every_kind
def test_dropouts_are_gone_in_eval(kind, name, backend):
    ours = make(kind, backend, num_layers=2, **REGULARISED[name]).eval()
    agree((ours(random(T, B, I))[0],), (twin(kind, ours, num_layers=2)(random(T, B, I))[0],))


def relu_network(width, **settings):
    """W_ih = I, no bias: its output shows the masks. The test sets W_hh."""
    module = fastrnn.RNN(width, width, bias=False, nonlinearity="relu", **settings)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.eye(width) if "weight_ih" in name else torch.zeros_like(p))
    return module


def near(share, p, draws):
    """Whether a share of ones is within six standard deviations of p: one false alarm in 1e9."""
    return abs(share - p) < 6 * (p * (1 - p) / draws) ** 0.5


@every_backend
def test_recurrent_dropout_is_one_inverted_mask_per_sequence(backend):
    width, batch, p = 64, 32, 0.25
    ours = relu_network(width, recurrent_dropout=p, backend=backend)
    with torch.no_grad():
        ours.weight_hh_l0.copy_(torch.eye(width))
    y = ours(torch.ones(5, batch, width))[0]
    assert (y[0] == 1).all()  # no state yet
    masks = (y[1:] - 1) / y[:-1]  # h_t = 1 + mask h_{t-1}
    # float32: h < 10 keeps 1e-6
    torch.testing.assert_close(masks, masks[:1].expand_as(masks), rtol=1e-5, atol=1e-5)
    kept = masks[0] > 0
    torch.testing.assert_close(masks[0][kept], torch.full((int(kept.sum()),), 1 / (1 - p)), rtol=1e-5, atol=1e-5)
    assert near((~kept).float().mean(), p, kept.numel())
    assert not torch.equal(kept[0], kept[1]), "every sequence has its own mask"


@every_backend
def test_grus_carry_is_not_dropped(backend):
    """Recurrent dropout acts on the operand of W_hh, not on z h: with z = 1 the state survives any dropout."""
    ours = fastrnn.GRU(I, H, recurrent_dropout=0.9, backend=backend)
    with torch.no_grad():
        ours.bias_ih_l0[H : 2 * H] = 50.0  # sigmoid(50) is 1 in float32
    h0 = torch.randn(1, B, H)
    # float32: z may be one rounding below 1, over 7 steps
    torch.testing.assert_close(ours(torch.randn(T, B, I), h0)[1], h0, rtol=1e-5, atol=1e-5)


@every_backend
def test_zoneout_draws_fresh_masks_per_step(backend):
    width, batch, p = 32, 16, 0.3
    ours = relu_network(width, zoneout=p, backend=backend)
    x = torch.arange(1.0, 21).reshape(-1, 1, 1).expand(20, batch, width)
    y = ours(x)[0]
    before = torch.cat((torch.zeros_like(y[:1]), y[:-1]))
    kept = y == before
    assert torch.equal(torch.where(kept, before, x), y), "either the old state or the new one"
    assert near(kept.float().mean(), p, kept.numel())
    assert near((kept[1:] & kept[:-1]).float().mean(), p * p, kept[1:].numel() / 3), "steps are independent"


@every_backend
def test_zoneout_of_an_lstm_takes_p_c_and_p_h(backend):
    """(p_c, p_h): with p_h = 0 and p_c = 1 the cell state is frozen while h moves, and the other way round."""
    x, (h0, c0) = random(T, B, I), initial(make("LSTM"), B)
    y, (_, c), cells = make("LSTM", backend, zoneout=(1.0, 0.0))(x, (h0, c0), return_cells=True)
    assert torch.equal(c, c0) and torch.equal(cells, c0.expand(T, B, H)) and not torch.equal(y[-1], h0[0])
    y, (h, c) = make("LSTM", backend, zoneout=(0.0, 1.0))(x, (h0, c0))
    assert torch.equal(h, h0) and torch.equal(y, h0.expand(T, B, H)) and not torch.equal(c, c0)
    wide = fastrnn.LSTM(I, 64, zoneout=(0.2, 0.6), backend=backend)
    y, _, cells = wide(torch.randn(20, 16, I), return_cells=True)
    for values, p in ((cells, 0.2), (y, 0.6)):
        kept = values[1:] == values[:-1]
        assert near(kept.float().mean(), p, kept.numel())


@every_backend
@every_kind
def test_zoneout_in_eval_is_the_expectation(kind, backend):
    """h' = p h + (1 - p) new, at every step, in the state that is carried on (Krueger et al. 2017, section 3)."""
    zoneout = (0.2, 0.6) if kind.startswith("LSTM") else 0.6
    ours = make(kind, backend, zoneout=zoneout).eval()
    x, hx = random(T, B, I), initial(ours, B)
    y, state = ours(x, hx)
    params = dict(ours.named_parameters())
    gx = x @ params["weight_ih_l0"].t() + params["bias_ih_l0"]
    h, c = (*(s[0] for s in flat(hx)), None)[:2]
    kept = zip(ZONES if c is not None else ZONES[:1], (0.6, 0.2), strict=False)
    zones = {name: torch.full((T,), share, dtype=x.dtype) for name, share in kept}
    inputs = hand_inputs(params, "l0", gx, h, c)._replace(**zones)
    cell = "rnn_tanh" if kind == "RNN" else KINDS[kind][0].lower()
    expected, _, h_n, c_n = hand_scan(cell, inputs, reverse=False)
    final = [h_n[None]] + ([] if c is None else [c_n[None]])
    agree((y, *flat(state)), (expected, *final))
    leaves = (x, *flat(hx), *ours.parameters())
    agree(gradients((y, *flat(state)), leaves), gradients((expected, *final), leaves))


@every_backend
def test_weight_dropout_is_one_inverted_mask_on_w_hh_per_call(backend):
    width, p = 48, 0.3
    ours = relu_network(width, weight_dropout=p, backend=backend)
    with torch.no_grad():
        ours.weight_hh_l0.fill_(1.0)
    basis = torch.eye(width).unsqueeze(0)
    y = ours(torch.zeros(2, width, width), basis)[0]
    drawn = y[0].t()  # h0 = the unit vectors, so the first step shows W_hh itself
    kept = drawn > 0
    torch.testing.assert_close(drawn[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    assert near((~kept).float().mean(), p, kept.numel())
    # float32 sums of 48 terms
    torch.testing.assert_close(y[1].t(), drawn @ drawn, rtol=1e-5, atol=1e-5, msg="every step multiplies the same W_hh")
    again = ours(torch.zeros(1, width, width), basis)[0][0].t()
    assert not torch.equal(again, drawn), "every call draws its own"
    assert (ours.weight_hh_l0 == 1).all(), "the parameter itself stays"


@every_backend
@pytest.mark.parametrize("locked", [False, True], ids=["", "locked"])
def test_locked_dropout_holds_its_mask_over_time(locked, backend):
    width, batch, p = 64, 8, 0.4
    ours = relu_network(width, num_layers=2, dropout=p, locked_dropout=locked, backend=backend)
    y = ours(torch.ones(6, batch, width))[0]
    kept = y > 0
    torch.testing.assert_close(y[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    draws = kept[0].numel() if locked else kept.numel()
    assert near((~kept).float().mean(), p, draws)
    assert torch.equal(kept, kept[:1].expand_as(kept)) == locked
    assert not torch.equal(kept[:, 0], kept[:, 1]), "every sequence has its own mask"


# ------------------------------------------------------------------------------------------------------------- residual


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
@every_kind
def test_residual_adds_the_input_from_the_second_layer_on(kind, bidirectional, backend):
    settings = {"bidirectional": bidirectional}
    ours = make(kind, backend, num_layers=3, residual=True, **settings)
    name, extra = KINDS[kind]
    x, expected, finals = random(T, B, I), None, []
    leaves = [x]
    source = x
    for layer in range(3):
        one = getattr(nn, name)(source.shape[-1], H, dtype=torch.float64, **extra, **settings)
        one.load_state_dict(
            {k.replace(f"_l{layer}", "_l0"): v for k, v in ours.state_dict().items() if f"_l{layer}" in k}
        )
        leaves += one.parameters()
        expected, state = one(source)
        finals.append(flat(state))
        source = expected if layer == 0 else expected + source
    final = [torch.cat(column) for column in zip(*finals, strict=True)]
    y, state = ours(x)
    agree((y, *flat(state)), (source, *final))  # h_n is the plain state, without the sum
    agree(gradients((y, *flat(state)), (x, *ours.parameters())), gradients((source, *final), leaves))


@every_backend
def test_dropout_acts_on_the_residual_sum(backend):
    ours = relu_network(8, num_layers=3, residual=True, dropout=1.0, backend=backend)
    y = ours(torch.ones(T, B, 8))[0]
    assert not y.any(), "dropout(h + input): the last layer's input is all gone"
