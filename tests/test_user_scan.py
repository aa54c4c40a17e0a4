"""Scans of users' cells on the reference: traced built-in cells against the built-in ones, others against loops."""

import pytest
import torch
from setups import MASKS, kept_of, random_incoming, random_inputs
from user_cells import BUILT_IN, OWN, hand_scan

import fastrnn
from fastrnn import reference
from fastrnn.arguments import ScanInputs, ScanOutputs, Walk
from fastrnn.scan import scan

SIZES = (5, 3, 4)
FEATURES = {
    "plain": (),
    "flags": ("flags",),
    "masks": MASKS,
    "clipped": ("flags", "zone_h", "zone_c", "clip_norm"),
    "layer norm": ("layer_norm", "recurrent_mask"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_traced_cell_is_the_built_in_one(name, features, dtype):
    """The saved planes are pre-activations here, too; the GRU's may be others than the built-in's, and round apart."""
    text, reverse = BUILT_IN[name].text, features == "flags"
    inputs = random_inputs(name, FEATURES[features], sizes=SIZES, reverse=reverse, dtype=dtype)
    inputs = inputs._replace(ln_c_weight=None, ln_c_bias=None)
    walks = [Walk(cell, reverse, "reference", 0.7 if features == "clipped" else None) for cell in (name, text)]
    first, second = (reference.forward(inputs, walk, True) for walk in walks)
    for field in ("y", "c", "h_n", "c_n"):
        assert_close(getattr(second, field), getattr(first, field), dtype)
    incoming = random_incoming(inputs, scale=2.0)
    given = inputs._replace(gx=None)
    first, second = (
        reference.backward(incoming, kept_of(found), given, walk, True)
        for found, walk in zip((first, second), walks, strict=True)
    )
    for field, want in first._asdict().items():
        assert_close(getattr(second, field), want, dtype)
    assert len(BUILT_IN[name].spec.saved) == {"lstm": 4, "gru": 4, "rnn_elu": 1}[name]


def assert_close(got, want, dtype):
    if want is None:
        assert got is None
        return
    half = dtype == torch.bfloat16
    # bfloat16: a product of rounded numbers may round the other way once, 2**-8, and a few steps add it up.
    torch.testing.assert_close(got, want, **(dict(rtol=3e-2, atol=3e-2) if half else dict(rtol=1e-9, atol=1e-11)))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("features", ["plain", "flags", "masks", "layer norm"])
@pytest.mark.parametrize("name", OWN)
def test_a_scan_and_its_gradients_are_the_loop_s(name, features, reverse):
    cell = OWN[name]
    inputs = random_inputs(cell.text, FEATURES[features], sizes=SIZES, reverse=reverse)
    if not cell.recurrent:
        inputs = inputs._replace(recurrent_mask=None)
    leaves = {n: x.requires_grad_() for n, x in inputs._asdict().items() if x is not None and n not in MASKS}
    T, B, _ = inputs.gx.shape
    tap = torch.zeros(2, len(cell.states), T, B, dtype=torch.float64, requires_grad=True)
    out = scan(inputs, Walk(cell.text, reverse, "reference"), tap=tap, keep_c=True)
    *want, nodes = hand_scan(cell, inputs, reverse)
    pairs = [(g, w) for g, w in zip(out[:4], want, strict=True) if w is not None]
    for got, one in pairs:
        torch.testing.assert_close(got, one)
    weights = [torch.randn_like(w) for _, w in pairs]
    got = torch.autograd.grad([g for g, _ in pairs], [*leaves.values(), tap], weights)
    expected = torch.autograd.grad([w for _, w in pairs], list(leaves.values()), weights, retain_graph=True)
    for field, a, b in zip(leaves, got, expected, strict=False):
        torch.testing.assert_close(a, b, msg=lambda m, f=field: f"{f}: {m}")
    if features == "plain":
        _check_norms(got[-1], [w for _, w in pairs], weights, nodes, reverse)


def _check_norms(norms, outputs, weights, nodes, reverse):
    """Total: of the gradient of each new state; carried: of that of the copy that the next step reads."""
    for t, (made, _) in nodes.items():
        total = torch.autograd.grad(outputs, made, weights, retain_graph=True)
        torch.testing.assert_close(norms[0, :, t], torch.stack([d.norm(dim=-1) for d in total]))
        after = t - 1 if reverse else t + 1
        if after in nodes:
            carried = torch.autograd.grad(outputs, nodes[after][1], weights, retain_graph=True)
            torch.testing.assert_close(norms[1, :, t], torch.stack([d.norm(dim=-1) for d in carried]))


@pytest.mark.parametrize("name", [*OWN, "gru"])
def test_a_gradient_can_be_differentiated(name):
    cell = {**OWN, **BUILT_IN}[name]
    inputs = random_inputs(cell.text, ("flags",), sizes=(3, 2, 2))
    leaves = {n: x.requires_grad_() for n, x in inputs._asdict().items() if x is not None and n not in MASKS}

    def outputs(*given):
        found = scan(ScanInputs(**{**inputs._asdict(), **dict(zip(leaves, given, strict=True))}), walk)
        return tuple(v for v in (found.y, found.h_n, found.c_n) if v is not None and v.dim() > 1)

    walk = Walk(cell.text, False, "reference")
    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, tuple(leaves.values()), fast_mode=True)


@fastrnn.cell(gates="n", states="h c d", recurrent=False)
def passing(x, state):
    """States and gradients that are passed on as they are, and a state that nothing reads."""
    return x.n, state.h, state.c


@fastrnn.cell(gates="n", states="h c", recurrent=False)
def sharing(x, state):
    """Both states have the same gradient, and are the same."""
    v = torch.tanh(x.n + (state.h + state.c))
    return v, v


@pytest.mark.parametrize("cell, features", [("three", MASKS), ("unconnected", ()), ("passing", ()), ("sharing", ())])
def test_opcheck_of_the_raw_ops(cell, features):
    """torch.library's own examination, also of results that would be inputs or constants."""
    text = {**OWN, "passing": passing, "sharing": sharing}[cell].text
    inputs = random_inputs(text, features, sizes=(1, 3, 2), dtype=torch.float32)
    walk, tests = Walk(text, False, "reference"), ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastrnn.scan_forward.default, (*inputs, *walk, True), test_utils=tests)
    kept = kept_of(ScanOutputs(*torch.ops.fastrnn.scan_forward(*inputs, *walk, True)))
    arguments = (*random_incoming(inputs), *kept, *inputs._replace(gx=None), *walk, True)
    torch.library.opcheck(torch.ops.fastrnn.scan_backward.default, arguments, test_utils=tests)


def test_padding_and_resets_keep_what_is_not_finite_out():
    """A cell that divides by zero at padding, where the saved planes are zero, and NaN in the padding's inputs."""

    @fastrnn.cell(gates="n", parameters="a", inputs="k")
    def divides(x, u, state, p, inputs):
        return (inputs.k / (x.n + u.n) ** 2 + p.a * state.h / 2,)

    inputs = random_inputs(divides.text, ("flags",), sizes=SIZES)
    padding = (inputs.flags & 1).bool()
    assert padding.any()
    inputs.step_inputs[padding] = float("nan")
    leaves = {n: x.requires_grad_() for n, x in inputs._asdict().items() if x is not None and n not in MASKS}
    out = scan(inputs, Walk(divides.text, False, "reference"))
    assert out.y.isfinite().all() and not out.y[padding].any()
    found = torch.autograd.grad(out.y.sum() + out.h_n.sum(), list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        assert gradient.isfinite().all(), name
