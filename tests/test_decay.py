"""decay=: the factor on all states before each step, against loops in float64 with autograd's gradients."""

import copy

import pytest
import torch
from by_hand import hand_inputs as parameters_by_hand
from by_hand import hand_step
from setups import (
    DOUBLE,
    agree,
    every_backend,
    flat,
    gradients,
    kept_of,
    loss_of,
    needs_cpu_library,
    random,
    random_incoming,
    random_inputs,
)
from torch.nn.utils.rnn import pack_padded_sequence
from user_cells import OWN, call

import fastrnn
from fastrnn import ops
from fastrnn.arguments import MASKS, ScanGradients, ScanOutputs, Walk
from fastrnn.dispatch import BACKENDS, Request

T, B, I, H = 6, 4, 3, 5
LENGTHS, NAMES = [6, 0, 4, 3], ("LSTM", "GRU", "RNN", "three", "unconnected")


def make(name, **settings):
    torch.manual_seed(0)
    settings = {"dtype": torch.float64, **settings}
    return fastrnn.Recurrent(OWN[name], I, H, **settings) if name in OWN else getattr(fastrnn, name)(I, H, **settings)


def factors(*shape):
    """Leaves in (0, 1.5); a few are zero."""
    found = random(*shape, seed=7, requires_grad=False).abs().clamp(max=1.5)
    return found.masked_fill(found < 0.1, 0).requires_grad_()


def states_of(module):
    """Random initial states of every layer and direction, as leaves."""
    rows, count = (
        module.num_layers * (2 if module.bidirectional else 1),
        len(fastrnn.cell_table.spec_of(module._cell).states),
    )
    sizes = [module.proj_size or H, *(H for _ in range(count - 1))]
    return tuple(random(rows, B, size, seed=2 + k) for k, size in enumerate(sizes))


def inputs_of(name):
    return {one: random(T, B, H, seed=9 + k) for k, one in enumerate(OWN[name].inputs)} if name in OWN else {}


def one_direction(module, name, x, states, decay, back, lengths, resets, inputs, zone):
    """y `[T, B, P]` and the final states of a layer's direction, sequence by sequence and step by step."""
    params = dict(module.named_parameters())
    gx = x @ params[f"weight_ih_{name}"].t() + params[f"bias_ih_{name}"]
    cell = getattr(module, "cell", None)
    own = None
    if cell is not None and cell.parameters:
        own = torch.cat([params[f"{one}_{name}"] for one in cell.parameters])
    ys, finals = torch.zeros(T, B, states[0].shape[-1], dtype=x.dtype), []
    columns = [[None for _ in range(B)] for _ in range(T)]
    for b in range(B):
        state, n = [s[b : b + 1] for s in states], lengths[b]
        order = range(n - 1, -1, -1) if back else range(n)
        for t in order:
            first = back and t == n - 1
            seam = t + 1 if back else t  # the step whose factor and reset lie between this step and the one before
            if not first:
                state = [s * decay[seam, b] * (not resets[seam, b]) for s in state]
            if cell is None:
                inputs_by_hand = parameters_by_hand(params, name, None, None, None)
                if zone:
                    inputs_by_hand = inputs_by_hand._replace(zone_h=[zone[0] for _ in range(T)])
                    if len(state) > 1:
                        inputs_by_hand = inputs_by_hand._replace(zone_c=[zone[1] for _ in range(T)])
                c = state[1] if len(state) > 1 else None
                kind = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[type(module).__name__]
                state = list(hand_step(kind, gx[t, b : b + 1], state[0], c, inputs_by_hand, t)[:2])[: len(state)]
            else:
                u = None
                if cell.recurrent:
                    u = state[0] @ params[f"weight_hh_{name}"].t() + params[f"bias_hh_{name}"]
                given = [inputs[one][t, b : b + 1] for one in cell.inputs]
                state = list(call(cell, gx[t, b : b + 1], u, state, own, torch.cat(given, -1) if given else None))
            columns[t][b] = state[0]
        finals.append(state)
    rows = [[ys[t, b : b + 1] if one is None else one for b, one in enumerate(row)] for t, row in enumerate(columns)]
    y = torch.stack([torch.cat(row) for row in rows])
    return y, [torch.cat(each) for each in zip(*finals, strict=True)]


def by_hand(module, x, states, decay, lengths=None, resets=None, inputs=(), zone=()):
    decay = decay.unsqueeze(-1) if decay.dim() == 2 else decay
    lengths = [T for _ in range(B)] if lengths is None else lengths
    resets = torch.zeros(T, B, dtype=torch.bool) if resets is None else resets
    D, finals = 2 if module.bidirectional else 1, []
    for layer in range(module.num_layers):
        ys = []
        for d, end in enumerate(("", "_reverse")[:D]):
            own = [s[layer * D + d] for s in states]
            y, last = one_direction(module, f"l{layer}{end}", x, own, decay, bool(d), lengths, resets, inputs, zone)
            ys.append(y)
            finals.append(last)
        x = torch.cat(ys, -1)
    return x, [torch.stack(each) for each in zip(*finals, strict=True)]


def as_hx(states):
    return states if len(states) > 1 else states[0]


def compare(module, backend, decay, *, lengths=None, resets=None, name=None, zone=()):
    module.backend = backend
    x, states, inputs = random(T, B, I), states_of(module), inputs_of(name)
    leaves = [x, decay, *states, *module.parameters(), *inputs.values()]
    given = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    given |= {} if resets is None else {"reset_mask": resets}
    y, state = module(x, as_hx(states), decay=decay, **given, **inputs)
    want, want_states = by_hand(module, x, states, decay, lengths, resets, inputs, zone)
    agree([y, *flat(state)], [want, *want_states])
    found, expected = gradients([y, *flat(state)], leaves), gradients([want, *want_states], leaves)
    agree(found, expected)
    assert found[1].abs().max() > 0


@every_backend
@pytest.mark.parametrize("shape", [(T, B), (T, B, H)], ids=["rows", "units"])
@pytest.mark.parametrize("name", NAMES)
def test_a_decay_and_its_gradients_are_the_loop_s(name, shape, backend):
    """Also before the first step. Two layers, both directions; sequences that end, and segments that begin."""
    resets = torch.zeros(T, B, dtype=torch.bool)
    compare(make(name), backend, factors(*shape), name=name)
    resets[0, 0] = resets[2, 0] = resets[3, 2] = resets[5, 3] = True
    module = make(name, num_layers=2, bidirectional=True)
    compare(module, backend, factors(*shape), lengths=LENGTHS, resets=resets, name=name)


@every_backend
def test_a_projection_takes_a_factor_for_each_row(backend):
    compare(make("LSTM", proj_size=2, bidirectional=True), backend, factors(T, B), lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"decay should be \[T, B\] \(with a projection .*got \[6, 4, 5\]"):
        make("LSTM", proj_size=2)(random(T, B, I), decay=factors(T, B, H))


@every_backend
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_zoneout_keeps_the_decayed_state(name, backend):
    module = make(name, zoneout=(0.3, 0.2) if name == "LSTM" else 0.2).eval()  # (p_c, p_h)
    zone = (torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    compare(module, backend, factors(T, B, H), zone=zone)


@every_backend
@pytest.mark.parametrize("name", ["LSTM", "GRU", "three"])
def test_a_reset_is_the_factor_zero(name, backend):
    """With all that surrounds the cell, bit by bit but for the sign of zero."""
    settings = {"num_layers": 2, "bidirectional": True, "clip_state_grad_norm": 0.8, "clip_state_grad_value": 0.5}
    module = make(name, layer_norm=True, recurrent_dropout=0.3, zoneout=0.2, backend=backend, **settings)
    resets, found = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.3, []
    for given in ({"reset_mask": resets}, {"decay": 1 - resets.double()}):
        torch.manual_seed(4)
        x, states = random(T, B, I), states_of(module)
        tap = torch.zeros(4, 2, len(states), T, B, dtype=torch.float64, requires_grad=True)
        y, state = module(x, as_hx(states), lengths=torch.tensor(LENGTHS), tap=tap, **given, **inputs_of(name))
        values = [y, *flat(state)]
        found.append([*values, *gradients(values, [x, *states, *module.parameters(), tap])])
    agree(*found, rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_clipping_bounds_the_gradient_before_the_decay(name, backend):
    """By the definition: with one state per step, the gradient carried back is that of the clipped step times decay."""
    module = make(name, clip_state_grad_value=1e-3, backend=backend)
    x, decay = random(2, B, I), factors(2, B)
    h0 = random(1, B, H, seed=2)
    hx = (h0, random(1, B, H, seed=3)) if name == "LSTM" else h0
    (dh0,) = torch.autograd.grad(module(x, hx, decay=decay)[0].sum(), h0)
    plain = make(name)
    first = module(x[:1], hx, decay=decay[:1])[1]
    ones = [s.detach().requires_grad_() for s in flat(first)]
    second = plain(x[1:], as_hx(tuple(ones)), decay=decay[1:])[0]
    clipped_out = torch.full_like(second, 1e-3)
    sent = torch.autograd.grad(second, ones, clipped_out)
    sent = [sent[0] + 1, *sent[1:]]
    own = tuple(s.detach().requires_grad_() for s in flat(hx))
    third = flat(plain(x[:1], as_hx(own), decay=decay[:1])[1])
    cut = [d.clamp(-1e-3, 1e-3) for d in sent]
    (want,) = torch.autograd.grad(third, own[:1], cut)
    torch.testing.assert_close(dh0, want, **DOUBLE)


@every_backend
def test_the_tap_reports_what_arrives_after_the_decay(backend):
    """carried at t is the gradient of the state after step t that step t + 1, its decay included, passed back."""
    module, x, decay = make("GRU", backend=backend), random(T, B, I), factors(T, B)
    tap = torch.zeros(1, 2, 1, T, B, dtype=torch.float64, requires_grad=True)
    module(x, decay=decay, tap=tap)[0][-1].sum().backward()
    states, h = [], torch.zeros(1, B, H, dtype=torch.float64, requires_grad=True)
    for t in range(T):
        h = module(x[t : t + 1], h, decay=decay[t : t + 1])[1]
        states.append(h)
    found = torch.autograd.grad(h.sum(), states)
    carried = torch.stack([d[0].norm(dim=-1) for d in found])
    torch.testing.assert_close(tap.grad[0, 0, 0], carried, **DOUBLE)
    torch.testing.assert_close(tap.grad[0, 1, 0, :-1], carried[:-1], **DOUBLE)


@every_backend
def test_what_is_not_there_does_not_leak(backend):
    """NaN among the factors of padding, of resets, and of the first step of the backward direction."""
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2, 0] = True
    module, found = make("LSTM", bidirectional=True, backend=backend), []
    for value in (0.5, float("nan")):
        decay = factors(T, B, H).detach()
        decay[2, 0] = decay[:, 1] = decay[4:, 2] = decay[3:, 3] = value
        decay.requires_grad_()
        x, states = random(T, B, I), states_of(module)
        y, state = module(x, states, lengths=torch.tensor(LENGTHS), reset_mask=resets, decay=decay)
        values = [y, *state]
        found.append([*values, *gradients(values, [x, decay, *states, *module.parameters()])])
    agree(*found, rtol=0, atol=0)
    of_decay = found[0][4]
    assert not of_decay[2, 0].any() and not of_decay[:, 1].any() and not of_decay[4:, 2].any()


@every_backend
def test_layouts(backend):
    module, x, decay = make("GRU", bidirectional=True, backend=backend), random(T, B, I), factors(T, B, H)
    expected = module(x, decay=decay)[0]
    swapped = make("GRU", bidirectional=True, batch_first=True, backend=backend)
    for one in (decay, decay[..., 0]):
        want = module(x, decay=one)[0]
        agree([swapped(x.transpose(0, 1), decay=one.transpose(0, 1))[0].transpose(0, 1)], [want])
        agree([module(x[:, 1], decay=one[:, 1])[0]], [want[:, 1]])
        agree([module(x, decay=one.tolist())[0]], [want])
    lengths = torch.tensor([3, 1, 6, 6])
    want = module(x, lengths=lengths, decay=decay)[0]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for given in (decay, pack_padded_sequence(decay, lengths, enforce_sorted=False)):
        y = module(packed, decay=given)[0]
        agree([torch.nn.utils.rnn.pad_packed_sequence(y)[0]], [want])
    rows = pack_padded_sequence(decay[..., :1], lengths, enforce_sorted=False)
    rows = rows._replace(data=rows.data.squeeze(-1))
    agree([module(packed, decay=rows)[0].data], [module(packed, decay=decay[..., 0])[0].data])
    assert not torch.equal(expected, module(x)[0])


def test_wrong_decays_are_refused():
    module, x = make("GRU"), random(T, B, I)
    for decay, message in (
        (torch.ones(B, T), r"decay should be \[T, B\] or \[T, B, H\]; T, B, H = 6, 4, 5; got \[4, 6\]"),
        (torch.ones(T, B, 2), r"got \[6, 4, 2\]"),
        (torch.ones(()), r"got \[\]"),
        (torch.ones(T, B, dtype=torch.complex64), "real dtype"),
        (pack_padded_sequence(torch.ones(T, B, 1), torch.tensor([6, 6, 6, 6])), "PackedSequence"),
    ):
        with pytest.raises(ValueError, match=message):
            module(x, decay=decay)
    with pytest.raises(ValueError, match=r"decay should be \[T\] or \[T, H\]"):
        module(x[:, 0], decay=torch.ones(T, B, H))
    with pytest.raises(ValueError, match=r"decay should be \[B, T\] or \[B, T, H\]"):
        make("GRU", batch_first=True)(x, decay=torch.ones(B, T, H))
    with pytest.raises(RuntimeError, match="decay is on meta"):
        module(x, decay=torch.ones(T, B, device="meta"))


@every_backend
@pytest.mark.parametrize("name", ["LSTM", "GRU", "three"])
def test_second_derivatives(name, backend):
    module = make(name, bidirectional=True, backend=backend)
    lengths, inputs = torch.tensor([3, 1]), {k: v[:3, :2].detach() for k, v in inputs_of(name).items()}

    def outputs(x, decay, *states):
        y, state = module(x, as_hx(states), decay=decay, lengths=lengths, **inputs)
        return y, *flat(state)

    decay = (factors(3, 2, H).detach() + 0.2).requires_grad_()  # at a state of 0 the cell `three` has no derivative
    given = random(3, 2, I), decay, *(s[:, :2].detach().requires_grad_() for s in states_of(module))
    assert torch.autograd.gradcheck(outputs, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, given, fast_mode=True)


@every_backend
def test_vmap_and_grad(backend):
    module, x, decay = make("LSTM", backend=backend), random(3, T, B, I), factors(3, T, B)

    def loss(x, decay):
        return loss_of([module(x, decay=decay)[0]])

    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x.detach(), decay.detach())
    expected = [torch.func.grad(loss, argnums=(0, 1))(x[k].detach(), decay[k].detach()) for k in range(3)]
    agree(found, [torch.stack(each) for each in zip(*expected, strict=True)])
    shared = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(x.detach(), decay[0].detach())
    agree(shared, torch.stack([torch.func.grad(loss, argnums=1)(x[k].detach(), decay[0].detach()) for k in range(3)]))


@needs_cpu_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_and_autocast(dtype):
    module, x, decay = make("LSTM", dtype=torch.float32), random(T, B, I).float().detach(), factors(T, B)
    wide = copy.deepcopy(module).double()
    expected = wide(x.double(), decay=decay)[0]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = module(x, decay=decay)[0]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    agree([y.double()], [expected], rtol=tolerance, atol=tolerance)
    got, want = (torch.autograd.grad(v.sum(), decay, retain_graph=True)[0] for v in (y, expected))
    agree([got], [want], rtol=10 * tolerance, atol=10 * tolerance)


@needs_cpu_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", OWN["three"].text], ids=["lstm", "gru", "rnn", "three"])
def test_the_raw_ops_agree_in_every_result(cell, dtype):
    """With every mask, and with a projection for the LSTM; more rows than a block of the C++ scan has."""
    features = ("decay", *MASKS, "clip_norm", "projection", "layer_norm")
    inputs, found = random_inputs(cell, features, sizes=(3, 70, 4), reverse=True, dtype=dtype), []
    for name in ("cpu", "reference"):
        walk = Walk(cell, True, name, 1.5)
        outputs = ScanOutputs(*ops.scan_forward(*inputs, *walk, True))
        arguments = (*random_incoming(inputs), *kept_of(outputs), *inputs._replace(gx=None), *walk, True)
        results = outputs._asdict() | ScanGradients(*ops.scan_backward(*arguments))._asdict()
        found.append({key: x.double() for key, x in results.items()})
    assert found[0]["ddecay_h"].shape == inputs.decay_h.shape and found[0]["ddecay_h"].any()
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for key, want in found[1].items():
        largest = float(want.abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(found[0][key], want, rtol=tolerance, atol=tolerance * (1 + largest))


def test_examination_of_the_raw_ops():
    inputs = random_inputs("lstm", ("decay", "flags"), sizes=(1, 3, 2), dtype=torch.float32)
    walk, tests = Walk("lstm", False, "reference"), ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastrnn.scan_forward.default, (*inputs, *walk, True), test_utils=tests)
    kept = kept_of(ScanOutputs(*torch.ops.fastrnn.scan_forward(*inputs, *walk, True)))
    arguments = (*random_incoming(inputs), *kept, *inputs._replace(gx=None), *walk, True)
    torch.library.opcheck(torch.ops.fastrnn.scan_backward.default, arguments, test_utils=tests)


def test_which_backends_take_it():
    request = Request("lstm", "cpu", torch.float32, H, features=frozenset({"decay"}))
    assert BACKENDS["reference"].reason(request) is None
    assert BACKENDS["aten"].reason(request) is not None
    assert "decay" in BACKENDS["cuda"].reason(request._replace(device="cuda")) or BACKENDS["cuda"].launcher.MISSING


def test_a_compiled_call():
    module, x, decay = make("GRU"), random(T, B, I), factors(T, B)
    compiled = torch.compile(lambda x, decay: module(x, decay=decay)[0], fullgraph=True, backend="aot_eager")
    found = [
        [y, *torch.autograd.grad(y.sum(), [x, decay])] for y in (compiled(x, decay), module(x, decay=decay)[0])
    ]  # fmt: skip
    agree(*found)
