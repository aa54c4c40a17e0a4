"""Lengths, resets, chunks, dropouts, zoneout, layer norm, residual and clipping, each against something written here.

The hand-written loops below follow the papers, not the library, and leave differentiation to autograd.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from setups import MASKS, agree, every_backend, needs_cpu_library, random_inputs
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import packing, stack
from fastrnn.arguments import ScanInputs, Walk
from fastrnn.cells import CELLS, PAD, RESET, START
from fastrnn.scan import scan

KINDS = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {"nonlinearity": "tanh"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
T, B, I, H = 7, 4, 3, 5


def make(kind, backend=None, **settings):
    name, extra = KINDS[kind]
    torch.manual_seed(0)
    return getattr(fastrnn, name)(I, H, **{"dtype": torch.float64, **extra, **settings}, backend=backend)


def twin(kind, ours, **settings):
    name, extra = KINDS[kind]
    theirs = getattr(nn, name)(I, H, **{"dtype": torch.float64, **extra, **settings})
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs


def random(*shape, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True)


def initial(kind, rows, batch=B):
    name, extra = KINDS[kind]
    h = random(rows, batch, extra.get("proj_size", H), seed=2)
    return (h, random(rows, batch, H, seed=3)) if name == "LSTM" else h


def flat(state):
    return state if isinstance(state, tuple) else (state,)


def select(state, index):
    """The samples `index` of a state or a pair of them."""
    picked = tuple(s[:, index] for s in flat(state))
    return picked if isinstance(state, tuple) else picked[0]


def loss_of(values):
    """A scalar in which every element has its own weight, so that a permuted gradient does not pass."""
    return sum((v * torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype).reshape(v.shape)).sum() for v in values)


def gradients(values, leaves):
    found = torch.autograd.grad(loss_of(values), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


# -------------------------------------------------------------------------------------------------------------- lengths


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
@pytest.mark.parametrize("lengths", [(7, 2, 5, 1), (3, 3, 6, 2), (7, 0, 4, 0)], ids=str)
@every_kind
def test_lengths_equal_a_packed_sequence(kind, lengths, bidirectional, backend):
    settings = {"num_layers": 2, "bidirectional": bidirectional}
    ours = make(kind, backend, **settings)
    theirs = twin(kind, ours, **settings)
    x, hx = random(T, B, I), initial(kind, 4 if bidirectional else 2)
    y, state = ours(x, hx, lengths=torch.tensor(lengths))

    # A PackedSequence refuses zeros: those samples are left out, and their state stays what it was.
    real = [b for b in range(B) if lengths[b]]
    packed = pack_padded_sequence(x[:, real], torch.tensor(lengths)[real], enforce_sorted=False)
    out, expected_state = theirs(packed, select(hx, real))
    expected = torch.zeros_like(y).index_copy(1, torch.tensor(real), pad_packed_sequence(out, total_length=T)[0])
    final = [s.index_copy(1, torch.tensor(real), e) for s, e in zip(flat(hx), flat(expected_state), strict=True)]
    agree((y, *flat(state)), (expected, *final))
    agree(
        gradients((y, *flat(state)), (x, *flat(hx), *ours.parameters())),
        gradients((expected, *final), (x, *flat(hx), *theirs.parameters())),
    )


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
@every_kind
def test_a_packed_sequence_with_everything_else(kind, bidirectional, backend, monkeypatch):
    """Equals the padded call with lengths; on backend cpu its input products leave out the padding."""
    extras = {"layer_norm": True, "residual": True, "zoneout": 0.2, "clip_state_grad_norm": 0.5}
    ours = make(kind, backend, num_layers=3, bidirectional=bidirectional, **extras).eval()
    directions, states = (2 if bidirectional else 1), (2 if kind.startswith("LSTM") else 1)
    lengths, resets, rows, linear = torch.tensor([3, 7, 1, 7]), torch.zeros(T, B, dtype=torch.bool), [], stack.linear
    resets[2, :2] = True
    monkeypatch.setattr(stack, "linear", lambda x, *rest: rows.append(x[..., 0].numel()) or linear(x, *rest))
    results, x = [], random(T, B, I)
    for packed in (False, True):
        rows.clear()
        tap = torch.zeros(3 * directions, 2, states, T, B, dtype=torch.float64, requires_grad=True)
        call = {"reset_mask": resets, "tap": tap}
        if packed:
            y, state = ours(pack_padded_sequence(x, lengths, enforce_sorted=False), **call)
            y = pad_packed_sequence(y)[0]
        else:
            y, state = ours(x, lengths=lengths, **call)
        results.append((y, *flat(state), *gradients((y, *flat(state)), (x, tap, *ours.parameters()))))
        assert rows == [lengths.sum() if packed and backend == "cpu" else T * B] * 3 * directions
    agree(*results)


def nodes(node, seen):
    """The functions that the gradient goes through behind this one."""
    if node is not None and node not in seen:
        seen.add(node)
        for behind, _ in node.next_functions:
            nodes(behind, seen)
    return seen


@pytest.mark.parametrize("lengths", [(7,), (7, 7), (7, 5, 1)], ids=str)
def test_padding_and_packing_are_torchs(lengths):
    x, lengths = random(7, len(lengths), I), torch.tensor(lengths)
    rows = pack_padded_sequence(x, lengths)
    where = packing.packed_positions(rows.batch_sizes)
    assert torch.equal(packing.pad(rows, where), pad_packed_sequence(rows)[0])
    assert torch.equal(packing.pack(x, rows.batch_sizes, where).data, rows.data)


def test_the_gradient_through_padding_takes_no_step_per_length():
    """As does that of torch's, each over the whole padded tensor: T*T*B for as many lengths as steps."""
    batch_sizes = torch.arange(50, 0, -1)
    rows = PackedSequence(random(int(batch_sizes.sum()), I), batch_sizes)
    padded = packing.pad(rows, packing.packed_positions(batch_sizes))
    assert len(nodes(padded.grad_fn, set())) < 10


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_lengths_take_every_integer_dtype_and_a_batch_first_layout(dtype):
    ours = make("GRU", batch_first=True)
    x, lengths = random(B, T, I), torch.tensor([7, 2, 5, 0])
    y, h = ours(x, lengths=lengths.to(dtype))
    expected, h_expected = make("GRU")(x.transpose(0, 1), lengths=lengths)
    agree((y.transpose(0, 1), h), (expected, h_expected))


@every_backend
@pytest.mark.parametrize("extras", [{}, {"layer_norm": True, "residual": True, "clip_state_grad_norm": 0.5}], ids=str)
@every_kind
def test_nan_in_the_padding_leaks_into_nothing(kind, extras, backend):
    """NaN in the padded input, and NaN in the gradient that a loss sends to the padded output."""
    ours = make(kind, backend, num_layers=2, bidirectional=True, **({} if "residual" in extras else extras))
    if "residual" in extras:
        ours = make(kind, backend, num_layers=2, **extras)
    lengths = torch.tensor([7, 2, 5, 0])
    padding = torch.arange(T).unsqueeze(1) >= lengths
    rows = 4 if ours.bidirectional else 2
    hx, clean = initial(kind, rows), random(T, B, I)

    def everything(fill):
        x = clean.detach().masked_fill(padding.unsqueeze(-1), fill).requires_grad_()
        leaves = (x, *flat(hx), *ours.parameters())
        y, state = ours(x, hx, lengths=lengths)
        dy = torch.ones_like(y).masked_fill(padding.unsqueeze(-1), fill)
        outputs = (y, *flat(state))
        found = torch.autograd.grad(outputs, leaves, (dy, *map(torch.ones_like, flat(state))))
        return *outputs, *found

    for got, expected in zip(everything(float("nan")), everything(0.0), strict=True):
        assert torch.equal(got, expected)
    (
        y,
        *_,
    ) = everything(float("nan"))
    assert not y[padding].any(), "the output at padding is zero"


@every_backend
def test_lengths_beside_resets_equal_segments_of_the_shorter_sequence(backend):
    ours = make("LSTM", backend, bidirectional=True)
    x, lengths = random(T, B, I), torch.tensor([7, 4, 6, 1])
    hx, reset = initial("LSTM", 2), torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.4
    reset |= torch.arange(T).unsqueeze(1) >= lengths  # what stands in the padding is no reset: hx enters behind it
    y, (h, c) = ours(x, hx, lengths=lengths, reset_mask=reset)
    for b, n in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        expected, (h_b, c_b) = ours(x[:n, one], tuple(s[:, one] for s in hx), reset_mask=reset[:n, one])
        agree((y[:n, one], h[:, one], c[:, one]), (expected, h_b, c_b))


# --------------------------------------------------------------------------------------------------------------- resets


def by_segments(theirs, x, hx, reset):
    """Every segment of every sample on its own, through torch.nn: y, final states."""
    D = 2 if theirs.bidirectional else 1
    ys, finals = [], []
    for b in range(x.shape[1]):
        cuts = [0, *(t for t in range(1, len(x)) if reset[t, b]), len(x)]
        pieces, states = [], []
        for k, (begin, end) in enumerate(pairwise(cuts)):
            start = []
            for s in flat(hx):
                rows = [s[r, b] * 0 for r in range(len(s))]
                for r in range(len(s)):
                    backwards = D == 2 and r % 2 == 1
                    first = end == len(x) if backwards else (k == 0 and not reset[0, b])
                    rows[r] = s[r, b] if first else rows[r]
                start.append(torch.stack(rows).unsqueeze(1))
            y, state = theirs(x[begin:end, b : b + 1], tuple(start) if isinstance(hx, tuple) else start[0])
            pieces.append(y)
            states.append(flat(state))
        ys.append(torch.cat(pieces))
        finals.append(
            [
                torch.stack([(states[0] if D == 2 and r % 2 else states[-1])[i][r] for r in range(len(s))])
                for i, s in enumerate(flat(hx))
            ]
        )
    return torch.cat(ys, 1), [torch.cat(column, 1) for column in zip(*finals, strict=True)]


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
@every_kind
def test_resets_equal_separate_segments(kind, bidirectional, backend):
    settings = {"num_layers": 2, "bidirectional": bidirectional}
    ours = make(kind, backend, **settings)
    theirs = twin(kind, ours, **settings)
    x, hx = random(T, B, I), initial(kind, 4 if bidirectional else 2)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 0] = reset[0, 1] = reset[5, 1] = reset[T - 1, 2] = True  # sample 3: none
    reset[1:4, 1] = True  # segments of one step
    y, state = ours(x, hx, reset_mask=reset)
    expected, final = by_segments(theirs, x, hx, reset)
    agree((y, *flat(state)), (expected, *final))
    agree(
        gradients((y, *flat(state)), (x, *flat(hx), *ours.parameters())),
        gradients((expected, *final), (x, *flat(hx), *theirs.parameters())),
    )


@every_backend
def test_no_gradient_crosses_a_reset(backend):
    ours = make("LSTM", backend)
    x, hx = random(T, B, I), initial("LSTM", 1)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[4] = True
    y, _ = ours(x, hx, reset_mask=reset)
    dx, dh, dc = torch.autograd.grad(y[4:].sum(), (x, *hx))
    assert not dx[:4].any() and not dh.any() and not dc.any() and dx[4:].all()


def test_reset_mask_follows_batch_first_and_unbatched_layouts():
    ours, x = make("GRU"), random(T, B, I)
    reset = torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.4
    expected, _ = ours(x, reset_mask=reset)
    swapped, _ = make("GRU", batch_first=True)(x.transpose(0, 1), reset_mask=reset.t())
    single, _ = ours(x[:, 0], reset_mask=reset[:, 0])
    agree((swapped.transpose(0, 1), single), (expected, expected[:, 0]))


# --------------------------------------------------------------------------------------------------------------- chunks


def scan_arguments(cell, dtype, features, reverse):
    """Random arguments of one direction; the flags have every bit, and pass over no step of the chunks."""
    inputs = random_inputs(cell, features, sizes=(T, B, H), projection=3, reverse=reverse, dtype=dtype, seed=4)
    if "flags" in features:
        flags = torch.zeros(T, B, dtype=torch.uint8)
        flags[3, 0] = flags[5, 1] = flags[0, 2] = RESET
        flags[5:, 3] = PAD
        if reverse:
            flags[4, 3] = START
        inputs = inputs._replace(flags=flags)
    return inputs


def cut(inputs, begin, end):
    """The steps from `begin` to `end`."""
    steps = {name: getattr(inputs, name) for name in ("gx", "flags", "zone_h", "zone_c")}
    return inputs._replace(**{name: x if x is None else x[begin:end] for name, x in steps.items()})


def features_of(cell):
    zone = ("zone_h", "zone_c")
    names = [(), ("flags",), (*zone, "recurrent_mask"), ("layer_norm",)]
    return [*names, ("projection",), ("projection", "layer_norm", "flags", *zone)] if cell == "lstm" else names


CASES = [pytest.param(cell, f, id="-".join((cell, *f))) for cell in CELLS for f in features_of(cell)]


@every_backend
@pytest.mark.parametrize("cuts", [(0, 3, T), tuple(range(T + 1))], ids=["two", "every step"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("cell, features", CASES)
def test_t_steps_equal_chunks_bit_for_bit(cell, features, reverse, cuts, backend):
    """float32, forward and backward: the states, and dL/dgx, are the same bits however time is cut."""
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


def hand_step(cell, gx, h, c, inputs, t):
    """One step from the papers; returns the new (h, c) and the c inside the tanh, all in autograd's hands."""
    w_hr, ln_c = inputs.w_hr, inputs.ln_c_weight
    operand = h if inputs.recurrent_mask is None else h * inputs.recurrent_mask
    gh = operand @ inputs.w_hh.t()
    if inputs.ln_hh is not None:
        gh = F.layer_norm(gh, gh.shape[-1:], inputs.ln_hh, None, 1e-5)
    if inputs.b_hh is not None:
        gh = gh + inputs.b_hh
    inner = None
    if cell == "lstm":
        i, f, g, o = (gx + gh).split(H, -1)
        inner = f.sigmoid() * c + i.sigmoid() * g.tanh()
        squashed = inner if ln_c is None else F.layer_norm(inner, (H,), ln_c, inputs.ln_c_bias, 1e-5)
        new_h, new_c = o.sigmoid() * squashed.tanh(), inner
        if w_hr is not None:
            new_h = new_h @ w_hr.t()
    elif cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = gx.split(H, -1), gh.split(H, -1)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        new_h, new_c = (1 - z) * (xn + r * hn).tanh() + z * h, c
    else:
        squash = {"tanh": torch.tanh, "relu": F.relu, "leaky_relu": F.leaky_relu, "elu": F.elu}
        new_h, new_c = squash[cell.removeprefix("rnn_")](gx + gh), c
    if inputs.zone_h is not None:
        new_h = inputs.zone_h[t] * h + (1 - inputs.zone_h[t]) * new_h
    if inputs.zone_c is not None:
        new_c = inputs.zone_c[t] * c + (1 - inputs.zone_c[t]) * new_c
    return new_h, new_c, inner


def hand_inputs(params, name, gx, h, c):
    """The arguments of `hand_scan` for the layer and direction `name` of a module's parameters."""
    kinds = dict(w_hh="weight_hh", b_hh="bias_hh", w_hr="weight_hr", ln_hh="ln_hh", ln_c_weight="ln_c")
    given = {field: params.get(f"{kind}_{name}") for field, kind in kinds.items()}
    return ScanInputs(gx=gx, h0=h, c0=c, ln_c_bias=params.get(f"ln_c_bias_{name}"), **given)


def hand_scan(cell, inputs, reverse):
    """y, every c, h_n, c_n."""
    h, c, ys, cs = inputs.h0, inputs.c0, {}, {}
    for t in range(T - 1, -1, -1) if reverse else range(T):
        reset = pad = torch.zeros(B, 1, dtype=torch.bool)
        if inputs.flags is not None:
            reset, pad = ((inputs.flags[t] & bit).bool().unsqueeze(-1) for bit in (RESET, PAD))
        start_h = torch.where(reset, 0.0, h)
        start_c = None if c is None else torch.where(reset, 0.0, c)
        new_h, new_c, _ = hand_step(cell, inputs.gx[t], start_h, start_c, inputs, t)
        h = torch.where(pad, h, new_h)
        ys[t] = torch.where(pad, 0.0, h)
        if c is not None:
            c = torch.where(pad, c, new_c)
            cs[t] = torch.where(pad, 0.0, c)
    ys, cs = (torch.stack([found[t] for t in range(T)]) if found else None for found in (ys, cs))
    return ys, cs, h, c


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


# --------------------------------------------------------------------------------------------------------- return_cells


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
def test_return_cells_equal_a_loop_of_lstm_cells(bidirectional, backend):
    ours = make("LSTM", backend, num_layers=2, bidirectional=bidirectional)
    x, D = random(T, B, I), 2 if bidirectional else 1
    hx = initial("LSTM", 2 * D)
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


# ------------------------------------------------------------------------------------------------------------- clipping


WEIGHTS = ("w_hh", "b_hh", "w_hr", "ln_hh", "ln_c_weight", "ln_c_bias")


def clipped_by_hand(cell, inputs, reverse, dy, theta, value):
    """The gradients by name, through single steps by hand: clamp, then scale the joint norm, then pass on."""
    order = list(range(T - 1, -1, -1) if reverse else range(T))
    inputs = ScanInputs(*(x if x is None else x.detach() for x in inputs))
    weights = {n: getattr(inputs, n).requires_grad_() for n in WEIGHTS if getattr(inputs, n) is not None}
    records, h, c = {}, inputs.h0, inputs.c0
    for t in order:
        reset = torch.zeros(B, 1, dtype=torch.bool)
        if inputs.flags is not None:
            reset = (inputs.flags[t] & RESET).bool().unsqueeze(-1)
        h, c = (None if s is None else s.detach().requires_grad_() for s in (h, c))
        g = inputs.gx[t].clone().requires_grad_()
        start = [None if s is None else torch.where(reset, 0.0, s) for s in (h, c)]
        new_h, new_c, inner = hand_step(cell, g, *start, inputs, t)
        records[t] = (g, h, c, new_h, new_c, inner)
        h, c = new_h, new_c
    dh, dc = torch.zeros_like(h), None if c is None else torch.zeros_like(c)
    dgx = torch.zeros_like(inputs.gx)
    dweights = {n: torch.zeros_like(w) for n, w in weights.items()}
    for t in reversed(order):
        g, h, c, new_h, new_c, inner = records[t]
        dh = dh + dy[t]
        if value is not None:
            dh = dh.clamp(-value, value)
            dc = None if dc is None else dc.clamp(-value, value)
        if theta is not None:
            parts = [dh]
            if dc is not None:  # the whole dL/dc: what came from the next step and what goes through this step's h
                parts.append(dc + torch.autograd.grad(new_h, inner, dh, retain_graph=True)[0])
            n = torch.cat(parts, -1).norm(dim=-1, keepdim=True)
            scale = torch.where(n > theta, theta / n, 1.0)
            dh, dc = dh * scale, None if dc is None else dc * scale
        ends = [(new_h, dh)] + ([] if dc is None else [(new_c, dc)])
        leaves = [v for v in (g, h, c, *weights.values()) if v is not None]
        outputs, cotangents = zip(*ends, strict=True)
        found = iter(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True))
        dgx[t], dh = next(found), next(found)
        dc = None if c is None else next(found)
        for name in weights:
            if (more := next(found)) is not None:
                dweights[name] += more
    states = {"h0": dh} if dc is None else {"h0": dh, "c0": dc}
    return {"gx": dgx, **states, **dweights}


CLIP_FEATURES = [(), ("layer_norm",), ("projection",)]
CLIP_CASES = [
    pytest.param(cell, f, id="-".join((cell, *f)))
    for cell in CELLS
    for f in CLIP_FEATURES
    if cell == "lstm" or f != ("projection",)
]


@every_backend
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("theta, value", [(0.7, None), (None, 0.3), (1.2, 0.4)], ids=["norm", "value", "both"])
@pytest.mark.parametrize("cell, features", CLIP_CASES)
def test_clipping_equals_a_hand_written_backward(cell, features, theta, value, reverse, backend):
    inputs = scan_arguments(cell, torch.float64, (*features, "flags"), reverse)
    inputs = inputs._replace(flags=inputs.flags & RESET)  # padding is held by the length tests
    leaves = [v.requires_grad_() for n, v in inputs._asdict().items() if v is not None and n not in MASKS]
    bound = None if theta is None else torch.tensor(theta, dtype=torch.float64)
    out = scan(inputs._replace(clip_norm=bound), Walk(cell, reverse, backend, clip_value=value))
    dy = random(*out.y.shape, seed=9).detach()
    got = torch.autograd.grad(out.y, leaves, dy)
    expected = clipped_by_hand(cell, inputs, reverse, dy, theta, value)
    agree(got, [expected[n] for n, v in inputs._asdict().items() if v is not None and n not in MASKS])
    free = scan(inputs, Walk(cell, reverse, backend))
    plain = torch.autograd.grad(free.y, leaves, dy)
    assert not torch.allclose(plain[0], got[0]), "the bound should bite, or the test is about nothing"
    assert torch.equal(out.y, free.y), "clipping leaves the forward alone"


@every_backend
@every_kind
def test_clip_bounds_as_float_and_as_tensor(kind, backend):
    """A float, a 0-d tensor of any float dtype, and AMP's habit: loss and bound times S give the gradient times S."""
    x, S = random(T, B, I), 64.0

    def found(bound, loss_scale=1.0):
        ours = make(kind, backend, num_layers=2, clip_state_grad_norm=bound)
        y, _ = ours(x)
        return torch.autograd.grad((y.square().sum()) * loss_scale, (x, *ours.parameters()))

    expected = found(0.25)
    agree(found(torch.tensor(0.25)), expected)
    agree(found(torch.tensor(0.25, dtype=torch.float64)), expected)
    agree([g / S for g in found(torch.tensor(0.25 * S), S)], expected)
    unbounded = found(None)
    agree(found(1e30), unbounded)
    assert not torch.allclose(expected[0], unbounded[0])


@every_backend
def test_clipping_bounds_the_norms_that_the_next_step_receives(backend):
    """An exploding linear network (W = 2 I): behind the bound every dL/dx_t has norm theta and no more."""
    ours = fastrnn.RNN(H, H, nonlinearity="relu", bias=False, clip_state_grad_norm=1.5, backend=backend)
    with torch.no_grad():
        ours.weight_ih_l0.copy_(torch.eye(H))
        ours.weight_hh_l0.copy_(2 * torch.eye(H))
    x = torch.ones(T, B, H, requires_grad=True)
    ours(x)[0][-1].sum().backward()
    # float32: one square root and one division, 1e-6 relative
    torch.testing.assert_close(x.grad.norm(dim=-1), torch.full((T, B), 1.5), rtol=1e-6, atol=0)


@every_backend
def test_nan_stays_nan_through_clipping(backend):
    ours = make("LSTM", backend, clip_state_grad_norm=1.0, clip_state_grad_value=1.0)
    x = random(T, B, I)
    dy = torch.zeros(T, B, H, dtype=torch.float64)
    dy[-1, 1, 0] = float("nan")
    (dx,) = torch.autograd.grad(ours(x)[0], x, dy)
    assert dx[:, 1].isnan().all(), "it stays visible"
    assert not dx[:, [0, 2, 3]].isnan().any(), "and in its own sample"


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
    """W_ih = I, no bias: its output shows the masks. W_hh is for the test to set."""
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
    x, (h0, c0) = random(T, B, I), initial("LSTM", 1)
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
    x, hx = random(T, B, I), initial(kind, 1)
    y, state = ours(x, hx)
    params = dict(ours.named_parameters())
    gx = x @ params["weight_ih_l0"].t() + params["bias_ih_l0"]
    h, c = (*(s[0] for s in flat(hx)), None)[:2]
    inputs = hand_inputs(params, "l0", gx, h, c)._replace(zone_h=torch.full((T,), 0.6, dtype=x.dtype))
    if c is not None:
        inputs = inputs._replace(zone_c=torch.full((T,), 0.2, dtype=x.dtype))
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


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_a_layer_norm_are_summed_up_in_float32(dtype, backend):
    """A CPU's own layer norm adds the gradients of its weights up in their half type: a bias was off by two thirds."""
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
