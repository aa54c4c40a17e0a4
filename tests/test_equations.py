"""Scans and modules against loops written here: chunks of time, every feature's equations, layer norm, return_cells."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from by_hand import CASES, B, T, hand_inputs, hand_scan, scan_arguments
from setups import KINDS, MASKS, ZONES, H, I, agree, every_backend, every_kind, flat, gradients, initial, make, random
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.arguments import Walk
from fastrnn.scan import scan

# --------------------------------------------------------------------------------------------------------------- chunks


def cut(inputs, begin, end):
    """The steps from `begin` to `end`."""
    steps = {name: getattr(inputs, name) for name in ("gx", "flags", *ZONES)}
    return inputs._replace(**{name: x if x is None else x[begin:end] for name, x in steps.items()})


@every_backend
@pytest.mark.parametrize("cuts", [(0, 3, T), tuple(range(T + 1))], ids=["two", "every step"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("cell, features", CASES)
def test_t_steps_equal_chunks_bit_for_bit(cell, features, reverse, cuts, backend):
    """In float32 the states and dL/dgx have the same bits however time is cut, forward and backward."""
    inputs, walk = scan_arguments(cell, torch.float32, features, reverse), Walk(cell, reverse, backend)
    gx, h0, c0 = inputs.gx.requires_grad_(), inputs.h0, inputs.c0
    states = [s.requires_grad_() for s in (h0, c0) if s is not None]
    whole = scan(inputs, walk)
    state, pieces = (h0, c0), []
    spans = list(pairwise(cuts))
    for begin, end in reversed(spans) if reverse else spans:
        out = scan(cut(inputs, begin, end)._replace(h0=state[0], c0=state[1]), walk)
        state = (out.h_n, out.c_n if c0 is not None else None)
        pieces.insert(0 if reverse else len(pieces), out)
    y = torch.cat([out.y for out in pieces])
    assert torch.equal(whole.y, y)
    assert torch.equal(whole.h_n, state[0]) and (c0 is None or torch.equal(whole.c_n, state[1]))
    weight = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    ends = [state[0], *([] if c0 is None else [state[1]])]
    whole_ends = [whole.h_n, *([] if c0 is None else [whole.c_n])]
    expected = torch.autograd.grad((whole.y * weight).sum() + sum(e.sum() for e in whole_ends), (gx, *states))
    got = torch.autograd.grad((y * weight).sum() + sum(e.sum() for e in ends), (gx, *states))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ------------------------------------------------------------------------------------ every equation, written once more


@every_backend
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("cell, features", CASES)
def test_scan_equals_a_hand_written_loop(cell, features, reverse, backend):
    """Layer norm, projection, zoneout, recurrent dropout and flags: values and every gradient, c's included."""
    inputs = scan_arguments(cell, torch.float64, features, reverse)
    leaves = [v.requires_grad_() for n, v in inputs._asdict().items() if v is not None and n not in MASKS]
    out = scan(inputs, Walk(cell, reverse, backend), keep_c=True)
    expected = [v for v in hand_scan(cell, inputs, reverse) if v is not None]
    got = [out.y, out.c, out.h_n, out.c_n] if inputs.c0 is not None else [out.y, out.h_n]
    agree(got, expected)
    agree(gradients(got, leaves), gradients(expected, leaves))


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
@every_kind
def test_layer_norm_of_the_modules(kind, bidirectional, backend):
    """LN(W_ih x) with b_ih as its shift outside, LN(W_hh h) and LN(c) inside; both layers, both directions."""
    ours = make(kind, backend, num_layers=2, bidirectional=bidirectional, layer_norm=True)
    with torch.no_grad():
        for k, (name, p) in enumerate(ours.named_parameters()):
            if name.startswith("ln_"):
                p.add_(random(*p.shape, seed=50 + k).detach() / 4)
    params, x = dict(ours.named_parameters()), random(T, B, I)
    cell = "rnn_tanh" if kind == "RNN" else KINDS[kind][0].lower()
    source, states = x, []
    for layer in range(2):
        outputs = []
        for end in ("", "_reverse")[: 2 if bidirectional else 1]:
            name = f"l{layer}{end}"
            gx = source @ params[f"weight_ih_{name}"].t()
            gx = F.layer_norm(gx, gx.shape[-1:], params[f"ln_ih_{name}"], None, 1e-5) + params[f"bias_ih_{name}"]
            h = torch.zeros(B, params[f"weight_hh_{name}"].shape[1], dtype=x.dtype)
            c = torch.zeros(B, H, dtype=x.dtype) if cell == "lstm" else None
            y, _, h_n, _ = hand_scan(cell, hand_inputs(params, name, gx, h, c), reverse=bool(end))
            outputs.append(y)
            states.append(h_n)
        source = torch.cat(outputs, -1)
    y, state = ours(x)
    got, expected = (y, flat(state)[0]), (source, torch.stack(states))
    agree(got, expected)
    leaves = (x, *params.values())
    agree(gradients(got, leaves), gradients(expected, leaves))


def test_layer_norm_starts_as_the_identity_map():
    params = dict(make("LSTM", layer_norm=True).named_parameters())
    assert all((params[f"{kind}_l0"] == 1).all() for kind in ("ln_ih", "ln_hh", "ln_c"))
    assert not params["ln_c_bias_l0"].any()


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_a_layer_norm_are_summed_up_in_float32(dtype, backend):
    """torch's layer norm on a CPU sums its weights' gradients in their half type: a bias was off by two thirds."""
    torch.manual_seed(0)
    half = fastrnn.RNN(16, 128, layer_norm=True, dtype=dtype, backend=backend)
    double = fastrnn.RNN(16, 128, layer_norm=True, dtype=torch.float64, backend="reference")
    double.load_state_dict(half.state_dict())
    x, found = torch.randn(17, 300, 16).to(dtype), []
    for module in (half, double):
        module(x.to(module.bias_ih_l0.dtype))[0].sum().backward()
        found.append([parameter.grad.double() for parameter in module.parameters()])
    for got, want in zip(*found, strict=True):
        # The states round to the half type at each of 17 steps, and the gates once more.
        assert (got - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


# --------------------------------------------------------------------------------------------------------- return_cells


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
def test_return_cells_equal_a_loop_of_lstm_cells(bidirectional, backend):
    ours = make("LSTM", backend, num_layers=2, bidirectional=bidirectional)
    x, D = random(T, B, I), 2 if bidirectional else 1
    hx = initial(ours, B)
    y, _, cells = ours(x, hx, return_cells=True)
    params, source = dict(ours.named_parameters()), x
    for layer in range(2):
        ys, cs = [], []
        for d, end in enumerate(("", "_reverse")[:D]):
            cell = nn.LSTMCell(source.shape[-1], H, dtype=torch.float64)
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                del cell._parameters[kind]
                setattr(cell, kind, params[f"{kind}_l{layer}{end}"])
            state = tuple(s[layer * D + d] for s in hx)
            steps = [None] * T
            for t in range(T - 1, -1, -1) if d else range(T):
                steps[t] = state = cell(source[t], state)
            ys.append(torch.stack([s[0] for s in steps]))
            cs.append(torch.stack([s[1] for s in steps]))
        source, expected = torch.cat(ys, -1), torch.cat(cs, -1)
    agree((y, cells), (source, expected))
    leaves = (x, *hx, *ours.parameters())
    agree(gradients((cells,), leaves), gradients((expected,), leaves))
    agree(gradients((y, cells), leaves), gradients((source, expected), leaves))


def test_return_cells_in_every_layout():
    x, lengths = random(T, B, I), torch.tensor([7, 2, 5, 3])
    ours = make("LSTM-proj")
    _, (_, c_n), c = ours(x, lengths=lengths, return_cells=True)
    assert c.shape == (T, B, H) and not c[2:, 1].any()
    agree([c[lengths - 1, torch.arange(B)]], [c_n[0]])
    swapped = make("LSTM-proj", batch_first=True)(x.transpose(0, 1), lengths=lengths, return_cells=True)[2]
    single = ours(x[:, 0], return_cells=True)[2]
    packed = ours(pack_padded_sequence(x, lengths, enforce_sorted=False), return_cells=True)[2]
    with torch.no_grad():
        quiet = ours(x, lengths=lengths, return_cells=True)[2]
    agree((swapped.transpose(0, 1), single, pad_packed_sequence(packed)[0], quiet), (c, c[:, 0], c, c))
