"""Lengths, packed batches and resets against torch.nn on each sequence and each segment alone."""

from itertools import pairwise

import pytest
import torch
from setups import I, agree, every_backend, every_kind, flat, gradients, initial, make, random, twin
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastrnn import packing, stack

T, B = 7, 4


def select(state, index):
    """The samples `index` of a state or a pair of them."""
    picked = tuple(s[:, index] for s in flat(state))
    return picked if isinstance(state, tuple) else picked[0]


@every_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bi"])
@pytest.mark.parametrize("lengths", [(7, 2, 5, 1), (3, 3, 6, 2), (7, 0, 4, 0)], ids=str)
@every_kind
def test_lengths_equal_a_packed_sequence(kind, lengths, bidirectional, backend):
    settings = {"num_layers": 2, "bidirectional": bidirectional}
    ours = make(kind, backend, **settings)
    theirs = twin(kind, ours, **settings)
    x, hx = random(T, B, I), initial(ours, B)
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
    """It equals the padded call with lengths; on backend cpu its input products leave out the padding."""
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
    """All functions that the gradient passes through from `node` on."""
    if node is not None and node not in seen:
        seen.add(node)
        for following, _ in node.next_functions:
            nodes(following, seen)
    return seen


@pytest.mark.parametrize("lengths", [(7,), (7, 7), (7, 5, 1)], ids=str)
def test_padding_and_packing_are_torchs(lengths):
    x, lengths = random(7, len(lengths), I), torch.tensor(lengths)
    rows = pack_padded_sequence(x, lengths)
    where = packing.packed_positions(rows.batch_sizes)
    assert torch.equal(packing.pad(rows, where), pad_packed_sequence(rows)[0])
    assert torch.equal(packing.pack(x, rows.batch_sizes, where).data, rows.data)


def test_the_gradient_through_padding_takes_no_step_per_length():
    """torch's own takes one per length, each over the whole padded tensor: T*T*B where there are T lengths."""
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
    hx, clean = initial(ours, B), random(T, B, I)

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
    hx, reset = initial(ours, B), torch.rand(T, B, generator=torch.Generator().manual_seed(0)) < 0.4
    reset |= (
        torch.arange(T).unsqueeze(1) >= lengths
    )  # in the padding these are no resets: the reverse direction starts after it, from hx
    y, (h, c) = ours(x, hx, lengths=lengths, reset_mask=reset)
    for b, n in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        expected, (h_b, c_b) = ours(x[:n, one], tuple(s[:, one] for s in hx), reset_mask=reset[:n, one])
        agree((y[:n, one], h[:, one], c[:, one]), (expected, h_b, c_b))


# --------------------------------------------------------------------------------------------------------------- resets


def by_segments(theirs, x, hx, reset):
    """y and the final states of torch.nn, run on every segment of every sample separately."""
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
    x, hx = random(T, B, I), initial(ours, B)
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
    x, hx = random(T, B, I), initial(ours, B)
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
