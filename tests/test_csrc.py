"""csrc's ops, one step of each cell, against the same equations in float64 with autograd's gradients.

The step is written down here a third time, apart from fastrnn/reference.py, so that a shared mistake shows.
"""

import pytest
import torch

from fastrnn import reference
from fastrnn.backends import extension

if (reason := extension.load("cpu")) is not None:
    pytest.skip(f"csrc: {reason}", allow_module_level=True)

ops = torch.ops.fastrnn_c
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu", "rnn_leaky_relu", "rnn_elu")
GATES = {"lstm": 4, "gru": 3}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = ((1, 1), (3, 17), (17, 3), (2, 65), (5, 256))
ACTIVATIONS = {
    "rnn_tanh": torch.tanh,
    "rnn_relu": torch.relu,
    "rnn_leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "rnn_elu": lambda x: torch.where(x > 0, x, torch.expm1(x.clamp(max=0))),
}


def acc_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def truth(cell, gx, gh, h_prev, c_prev, ln=None):
    """(h, c or None, saved) of one step, in the arguments' own arithmetic."""
    if cell == "lstm":
        saved = gx + gh
        i, f, g, o = saved.split(saved.shape[1] // 4, 1)
        c = f.sigmoid() * c_prev + i.sigmoid() * g.tanh()
        u = c
        if ln is not None:
            variance = c.var(1, keepdim=True, unbiased=False)
            u = (c - c.mean(1, keepdim=True)) / (variance + 1e-5).sqrt() * ln[0] + ln[1]
        return o.sigmoid() * u.tanh(), c, saved
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = (x.split(x.shape[1] // 3, 1) for x in (gx, gh))
        pre = xn + (xr + hr).sigmoid() * hn
        z = (xz + hz).sigmoid()
        return (1 - z) * pre.tanh() + z * h_prev, None, torch.cat((xr + hr, xz + hz, pre, hn), 1)
    return ACTIVATIONS[cell](gx + gh), None, gx + gh


def inputs(cell, B, H, dtype, ln=False, seed=0):
    """gx, gh, h_prev, c_prev (None without c), dh, dc, ln (weight and bias, or None)."""
    rng = torch.Generator().manual_seed(seed)
    acc, width = acc_of(dtype), GATES.get(cell, 1) * H

    def draw(*shape):
        return 2 * torch.randn(*shape, generator=rng, dtype=acc)

    has_c = cell == "lstm"
    gx, gh, h_prev, dh = draw(B, width).to(dtype), draw(B, width), draw(B, H), draw(B, H)
    c_prev, dc = (draw(B, H), draw(B, H)) if has_c else (None, None)
    return gx, gh, h_prev, c_prev, dh, dc, (draw(H), draw(H)) if ln else None


def forward(cell, gx, gh, h_prev, c_prev, ln):
    return ops.cell_forward(cell, gx, gh, h_prev, c_prev, *(ln or (None, None)))


def backward(cell, saved, h_prev, c_prev, dh, dc, ln):
    """dgx, dgh, dh_prev, dc_prev with the empty ones filled in: what autograd gives."""
    if cell == "lstm":
        dc = ops.cell_total(cell, saved, c_prev, dh, dc, *(ln or (None, None)))
    dgx, dgh, dh_prev, dc_prev = ops.cell_backward(cell, saved, h_prev, c_prev, dh, dc, *(ln or (None, None)))
    absent = [x.shape == (0,) for x in (dgh, dh_prev, dc_prev)]
    assert absent == [cell != "gru", cell != "gru", cell != "lstm"]
    if cell != "gru":
        dgh, dh_prev = dgx, torch.zeros_like(dh)
    return dgx, dgh, dh_prev, dc_prev


def autograd(cell, gx, gh, h_prev, c_prev, dh, dc, ln):
    """dgx, dgh, dh_prev, dc_prev in float64."""
    leaves = [x.double().requires_grad_() for x in (gx, gh, h_prev, c_prev) if x is not None]
    h, c, _ = truth(cell, *leaves, *([None] * (4 - len(leaves))), ln and [x.double() for x in ln])
    loss = (h * dh.double()).sum() + (0 if c is None else (c * dc.double()).sum())
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]


def split_saved(cell, saved):
    """gx, gh in float64 that have exactly these saved planes, which may be rounded to half precision."""
    saved = saved.double()
    if cell != "gru":
        return saved, torch.zeros_like(saved)
    r, z, n, gh_n = saved.split(saved.shape[1] // 4, 1)
    zero = torch.zeros_like(r)
    return torch.cat((r, z, n - r.sigmoid() * gh_n), 1), torch.cat((zero, zero, gh_n), 1)


def close(actual, expected, dtype, ulps=64):
    """Within `ulps` of the largest value: a step is some 20 roundings, and the layer norm's 1/std can magnify them."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    tolerance = ulps * torch.finfo(dtype).eps * scale
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance, equal_nan=True)


CASES = [(cell, False) for cell in CELLS] + [("lstm", True)]


@pytest.mark.parametrize(("B", "H"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cell", "ln"), CASES)
def test_step_is_the_equations(cell, ln, dtype, B, H):
    gx, gh, h_prev, c_prev, dh, dc, ln = inputs(cell, B, H, dtype, ln)
    acc = acc_of(dtype)
    h, c, saved = forward(cell, gx, gh, h_prev, c_prev, ln)
    wide = [None if x is None else x.double() for x in (gx, gh, h_prev, c_prev)]
    expected = truth(cell, *wide, ln and [x.double() for x in ln])
    assert (h.dtype, c.dtype, saved.dtype) == (acc, acc, dtype)
    close(h, expected[0], acc)
    if cell == "lstm":
        close(c, expected[1], acc)
    close(saved, expected[2], dtype, ulps=2)  # one rounding to the storage dtype, after one in the arithmetic's
    grads = backward(cell, saved, h_prev, c_prev, dh, dc, ln)
    for grad, want in zip(grads, autograd(cell, *split_saved(cell, saved), h_prev, c_prev, dh, dc, ln), strict=False):
        assert grad.dtype == acc
        close(grad, want, acc)


@pytest.mark.parametrize(("cell", "ln"), CASES)
def test_gradient_is_the_slope_of_the_forward(cell, ln):
    """Central differences along one random direction; in float64 their error is about 1e-9."""
    gx, gh, h_prev, c_prev, dh, dc, ln = inputs(cell, 3, 17, torch.float64, ln, seed=1)
    variables = [x for x in (gx, gh, h_prev, c_prev) if x is not None]
    direction = [torch.randn_like(x) for x in variables]

    def loss(step):
        moved = [x + step * d for x, d in zip(variables, direction, strict=True)]
        h, c, _ = forward(cell, *moved, *([None] * (4 - len(moved))), ln)
        return (h * dh).sum() + ((c * dc).sum() if dc is not None else 0)

    _, _, saved = forward(cell, gx, gh, h_prev, c_prev, ln)
    grads = backward(cell, saved, h_prev, c_prev, dh, dc, ln)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=False))
    torch.testing.assert_close((loss(1e-6) - loss(-1e-6)) / 2e-6, slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("cell", "ln"), CASES)
def test_reference_and_csrc_hold_the_same_equations(cell, ln):
    gx, gh, h_prev, c_prev, dh, dc, ln = inputs(cell, 3, 17, torch.float64, ln, seed=2)
    ln_c = ln and reference.LayerNorm(*ln)
    state, dstate = ((h_prev, c_prev), (dh, dc)) if cell == "lstm" else ((h_prev,), (dh,))
    ref_forward, ref_total, ref_backward = reference.EQUATIONS[cell]
    new, saved = ref_forward(gx, gh, state, ln_c)
    h, c, csrc_saved = forward(cell, gx, gh, h_prev, c_prev, ln)
    close(csrc_saved, saved, torch.float64)
    close(h, new[0], torch.float64)
    total = ref_total(saved, state, dstate, ln_c)
    dgx, dgh, dprev = ref_backward(saved, state, total, ln_c)
    if cell == "lstm":
        close(c, new[1], torch.float64)
        close(ops.cell_total(cell, saved, c_prev, dh, dc, *(ln or (None, None))), total[1], torch.float64)
    grads = backward(cell, saved, h_prev, c_prev, dh, dc, ln)
    for grad, want in zip(grads, (dgx, dgh, *dprev), strict=False):
        if want is not None:
            close(grad, want, torch.float64)


# --- the whole range of the numbers ---------------------------------------------------------------


def ulps(actual, expected):
    """Largest distance, in units of the last place of float32 at `expected`."""
    rounded = expected.float().abs()
    unit = torch.nextafter(rounded, torch.tensor(float("inf"))) - rounded
    return ((actual.double() - expected).abs() / unit.double()).max().item()


def activation(name, x):
    """tanh, sigmoid, elu or elu's slope (exp) of float32 [B, H], through the cells."""
    zero = torch.zeros_like(x)
    if name == "sigmoid":  # h of a GRU with n = 0 and h_prev = 1
        gx, gh = torch.cat((zero, x, zero), 1), torch.cat((zero, zero, zero), 1)
        return ops.cell_forward("gru", gx, gh, torch.ones_like(x), None, None, None)[0]
    if name == "exp":
        return ops.cell_backward("rnn_elu", x, zero, None, torch.ones_like(x), None, None, None)[0]
    return ops.cell_forward(f"rnn_{name}", x, zero, zero, None, None, None)[0]


# Units of the last place, measured over the same points: exp 1.0, elu 0.9, sigmoid 2.4, tanh 2.5 (torch: 2.5 for
# sigmoid). One quotient of a numerator and a denominator, each about one unit off.
@pytest.mark.parametrize(("name", "bound"), [("exp", 1.5), ("elu", 1.5), ("sigmoid", 3.0), ("tanh", 3.0)])
def test_nonlinearities_are_accurate_everywhere(name, bound):
    tiny = torch.logspace(-44.8, 1.5, 200_000)
    x = torch.cat((torch.linspace(-110, 20, 400_000), tiny, -tiny)).view(800, -1)
    wide = x.double()
    expected = {
        "exp": lambda: wide.clamp(max=0).exp(),
        "elu": lambda: ACTIVATIONS["rnn_elu"](wide),
        "sigmoid": wide.sigmoid,
        "tanh": wide.tanh,
    }[name]()
    assert ulps(activation(name, x), expected) <= bound


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("value", (1e4, -1e4, float("inf"), -float("inf"), float("nan"), 100.0, -100.0))
def test_extreme_pre_activations(cell, dtype, value):
    """Each gate in turn gets `value`: what float64 makes of it, NaN exactly where float64 has it."""
    H = 3 * GATES.get(cell, 1)
    gx, gh, h_prev, c_prev, dh, dc, _ = inputs(cell, 2, H, dtype, seed=3)
    for gate in range(GATES.get(cell, 1)):
        gx[:, gate * H + gate] = value
    h, _, saved = forward(cell, gx, gh, h_prev, c_prev, None)
    wide = [None if x is None else x.double() for x in (gx, gh, h_prev, c_prev, dh, dc)]
    expected_h, _, expected_saved = truth(cell, *wide[:4])
    state, dstate = ([x for x in pair if x is not None] for pair in (wide[2:4], wide[4:]))
    expected_dgx = reference.EQUATIONS[cell][2](expected_saved, state, dstate)[0]
    dgx = ops.cell_backward(cell, saved, h_prev, c_prev, dh, dc, None, None)[0]
    for actual, expected in ((h, expected_h), (dgx, expected_dgx)):  # 1e-5: some 50 float32 roundings
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


# --- layout, threads, refusals --------------------------------------------------------------------


def strided(x):
    """The same values in rows that lie apart."""
    if x is None:
        return None
    wide = x.new_full((x.shape[0], x.shape[1] + 5), float("nan"))
    wide[:, 3:-2] = x
    return wide[:, 3:-2]


def run_all(cell, gx, gh, h_prev, c_prev, dh, dc, ln, change=lambda x: x):
    """Every output of the four ops on inputs that went through `change`."""
    gx, gh, h_prev, c_prev, dh, dc = map(change, (gx, gh, h_prev, c_prev, dh, dc))
    h, c, saved = forward(cell, gx, gh, h_prev, c_prev, ln)
    return [h, c, saved, *backward(cell, change(saved), h_prev, c_prev, dh, dc, ln), ops.row_norm(dh)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cell", "ln"), CASES)
def test_same_bits_from_strided_rows_and_any_number_of_threads(cell, ln, dtype):
    case = inputs(cell, 300, 65, dtype, ln)  # more than one thread's share even with one gate
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run_all(cell, *case)
        for count in (1, 2):
            torch.set_num_threads(count)
            for actual, want in zip(run_all(cell, *case, change=strided), expected, strict=True):
                assert torch.equal(actual, want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("cell", "ln"), CASES)
def test_empty_batch(cell, ln):
    case = inputs(cell, 0, 5, torch.float32, ln)
    outputs = run_all(cell, *case)
    assert outputs[0].shape == (0, 5) and outputs[-1].shape == (0,)


def bad(message, op, *arguments):
    with pytest.raises(RuntimeError, match=message):
        op(*arguments)


def test_bad_arguments_are_named():
    gx, gh, h, c, dh, dc, (weight, bias) = inputs("lstm", 3, 8, torch.float32, ln=True)
    none = (None, None)
    bad("cell must be lstm, gru", ops.cell_forward, "lsmt", gx, gh, h, c, *none)
    bad(r"gx must have shape \[3, 32\], got \[3, 31\]", ops.cell_forward, "lstm", gx[:, 1:], gh, h, c, *none)
    bad(r"gh must have shape \[3, 32\], got \[2, 32\]", ops.cell_forward, "lstm", gx, gh[1:], h, c, *none)
    bad("gh must be Float, got Double", ops.cell_forward, "lstm", gx, gh.double(), h, c, *none)
    bad("gh must be Float, got BFloat16", ops.cell_forward, "lstm", gx.bfloat16(), gh.bfloat16(), h, c, *none)
    bad(
        "gx must be float32, float64, bfloat16 or float16, got Int", ops.cell_forward, "lstm", gx.int(), gh, h, c, *none
    )
    bad("c_prev is needed", ops.cell_forward, "lstm", gx, gh, h, None, *none)
    bad("contiguous in its last dimension", ops.cell_forward, "lstm", gx, gh, h.t().contiguous().t(), c, *none)
    bad("h_prev must have shape", ops.cell_forward, "lstm", gx, gh, h[0], c, *none)
    bad("must be given together", ops.cell_forward, "lstm", gx, gh, h, c, weight, None)
    bad(r"ln_c_bias must have shape \[8\], got \[7\]", ops.cell_forward, "lstm", gx, gh, h, c, weight, bias[1:])
    bad("for the lstm only", ops.cell_forward, "rnn_tanh", h, h, h, None, weight, bias)
    bad("cell_total is for the lstm only", ops.cell_total, "gru", gx, c, dh, dc, *none)
    bad("dc must have shape", ops.cell_total, "lstm", gx, c, dh, dc[:, 1:], *none)
    bad("dc is needed", ops.cell_backward, "lstm", gx, h, c, dh, None, *none)
    bad(r"saved must have shape \[3, 32\], got \[3, 8\]", ops.cell_backward, "gru", h, h, None, dh, None, *none)
    bad(r"x must have shape \[B, H\], got \[8\]", ops.row_norm, h[0])
    bad("x must be Float, got BFloat16", ops.row_norm, h.bfloat16())
