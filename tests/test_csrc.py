"""csrc's cells: one step of the C++ scan, against the same equations in float64 with autograd's gradients.

The step is written down here once more, apart from fastrnn/equations.py, so that a shared mistake shows. gh is W_hh
h_prev with a W_hh of signed powers of two, one in each row: it is exact, and differs from gate to gate.
"""

import pytest
import torch

from fastrnn.arguments import IncomingGradients, Kept, ScanInputs, Walk
from fastrnn.backends import cpu
from fastrnn.cell_table import CELLS
from fastrnn.equations import EQUATIONS, LayerNorm

if cpu.MISSING is not None:
    pytest.skip(f"csrc: {cpu.MISSING}", allow_module_level=True)

GATES = {cell: len(spec.gates) for cell, spec in CELLS.items()}
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


def weights(cell, H, dtype):
    """W_hh: in row j of gate k one power of two, with a sign, at column (j + k) % H."""
    w_hh, j = torch.zeros(GATES[cell], H, H, dtype=dtype), torch.arange(H)
    for k in range(GATES[cell]):
        w_hh[k, j, (j + k) % H] = (1.0, -0.5, 2.0, -1.0)[k]
    return w_hh.flatten(0, 1)


def random_step(cell, B, H, dtype, ln=False, seed=1):
    """gx, h_prev, c_prev (None without c), dh, dc, ln (weight and bias, or None)."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return (2 * torch.randn(*shape, generator=rng, dtype=acc_of(dtype))).to(dtype)

    has_c = cell == "lstm"
    gx, h_prev, dh = draw(B, GATES[cell] * H), draw(B, H), draw(B, H)
    c_prev, dc = (draw(B, H, dtype=acc_of(dtype)) if has_c else None for _ in range(2))
    return gx, h_prev, c_prev, dh, dc, (draw(H), draw(H)) if ln else None


def forward(cell, gx, w_hh, h_prev, c_prev, ln=None):
    """h, c (None without) and saved of one step of the C++ scan."""
    inputs = ScanInputs(gx[None], w_hh, h_prev, c_prev)
    if ln:
        inputs = inputs._replace(ln_c_weight=ln[0], ln_c_bias=ln[1])
    found = cpu.forward(inputs, Walk(cell, False, "cpu"), True)
    return found.y[0], found.c[0] if c_prev is not None else None, found.saved[0]


def backward(cell, saved, w_hh, h_prev, c_prev, dh, dc, ln=None, norms=False):
    """`ScanGradients` of one step of the C++ scan."""
    # One step reads neither y nor c: its previous state is the initial one.
    kept = Kept(torch.full_like(h_prev, torch.nan)[None], None if c_prev is None else c_prev[None], saved[None])
    inputs = ScanInputs(None, w_hh, h_prev, c_prev)
    if ln:
        inputs = inputs._replace(ln_c_weight=ln[0], ln_c_bias=ln[1])
    incoming = IncomingGradients(dh[None], None if dc is None else dc[None])
    return cpu.backward(incoming, kept, inputs, Walk(cell, False, "cpu"), norms)


def cell_gradients(cell, saved, h_prev, c_prev, dh, dc, ln=None):
    """dgx, dgh, dh_prev past W_hh (which is zero here), dc_prev (None without c)."""
    found = backward(cell, saved, torch.zeros_like(weights(cell, dh.shape[1], dh.dtype)), h_prev, c_prev, dh, dc, ln)
    assert (found.dgh.shape == (0,)) == (cell != "gru") and (found.dc0.shape == (0,)) == (cell != "lstm")
    dgx = found.dgx[0]
    return dgx, found.dgh[0] if cell == "gru" else dgx, found.dh0, found.dc0 if cell == "lstm" else None


def autograd(cell, gx, gh, h_prev, c_prev, dh, dc, ln):
    """dgx, dgh, dh_prev, dc_prev in float64."""
    leaves = [x.double().requires_grad_() for x in (gx, gh, h_prev, c_prev) if x is not None]
    h, c, _ = truth(cell, *leaves, *(() if cell == "lstm" else (None,)), ln and [x.double() for x in ln])
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
    # Not with seed 0: for layer norm and H = 1, autograd magnifies its own rounding by 1/sqrt(eps).
    gx, h_prev, c_prev, dh, dc, ln = random_step(cell, B, H, dtype, ln)
    acc, w_hh = acc_of(dtype), weights(cell, H, dtype)
    ulps = 64 if dtype == acc else 2  # one rounding to the storage dtype, after those of the arithmetic

    h, c, saved = forward(cell, gx, w_hh, h_prev, c_prev, ln)
    gh = h_prev.double() @ w_hh.double().T
    c_wide = None if c_prev is None else c_prev.double()
    expected = truth(cell, gx.double(), gh, h_prev.double(), c_wide, ln and [x.double() for x in ln])
    assert (h.dtype, saved.dtype) == (dtype, dtype)
    close(h, expected[0], dtype, ulps)
    if cell == "lstm":
        assert c.dtype == acc
        close(c, expected[1], acc)
    close(saved, expected[2], dtype, ulps=2)

    want = autograd(cell, *split_saved(cell, saved), h_prev, c_prev, dh, dc, ln)
    *gradients, dc_prev = cell_gradients(cell, saved, h_prev, c_prev, dh, dc, ln)
    for gradient, expected in zip(gradients, want[:3], strict=True):
        assert gradient.dtype == dtype
        close(gradient, expected, dtype, ulps)
    if cell == "lstm":
        assert dc_prev.dtype == acc
        close(dc_prev, want[3], acc)


@pytest.mark.parametrize(("cell", "ln"), CASES)
def test_gradient_is_the_slope_of_the_forward(cell, ln):
    """Central differences along one random direction; in float64 their error is about 1e-9."""
    gx, h_prev, c_prev, dh, dc, ln = random_step(cell, 3, 17, torch.float64, ln, seed=1)
    w_hh = weights(cell, 17, torch.float64)
    variables = [x for x in (gx, h_prev, c_prev) if x is not None]
    direction = [torch.randn_like(x) for x in variables]

    def loss(step):
        moved_gx, *state = (x + step * d for x, d in zip(variables, direction, strict=True))
        h, c, _ = forward(cell, moved_gx, w_hh, *state, *(() if c_prev is not None else (None,)), ln)
        return (h * dh).sum() + ((c * dc).sum() if dc is not None else 0)

    saved = forward(cell, gx, w_hh, h_prev, c_prev, ln)[2]
    found = backward(cell, saved, w_hh, h_prev, c_prev, dh, dc, ln)
    gradients = [found.dgx[0], found.dh0, found.dc0]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=False))
    torch.testing.assert_close((loss(1e-6) - loss(-1e-6)) / 2e-6, slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("cell", "ln"), CASES)
def test_reference_and_csrc_hold_the_same_equations(cell, ln):
    gx, h_prev, c_prev, dh, dc, ln = random_step(cell, 3, 17, torch.float64, ln, seed=2)
    w_hh, ln_c, equations = weights(cell, 17, torch.float64), ln and LayerNorm(*ln), EQUATIONS[cell]
    state, dstate = ((h_prev, c_prev), (dh, dc)) if cell == "lstm" else ((h_prev,), (dh,))
    new, saved = equations.forward(gx, h_prev @ w_hh.T, state, ln_c)
    h, c, found_saved = forward(cell, gx, w_hh, h_prev, c_prev, ln)
    close(h, new[0], torch.float64)
    close(found_saved, saved, torch.float64)
    if cell == "lstm":
        close(c, new[1], torch.float64)
    total = equations.total(saved, state, dstate, ln_c)
    dgx, dgh, dprev = equations.backward(saved, state, total, ln_c)
    norms = backward(cell, saved, w_hh, h_prev, c_prev, dh, dc, ln, norms=True).norms[0, :, 0]
    for norm, gradient in zip(norms, total, strict=True):
        close(norm, gradient.norm(dim=1), torch.float64)
    gradients = cell_gradients(cell, saved, h_prev, c_prev, dh, dc, ln)
    for gradient, want in zip(gradients, (dgx, dgh, *dprev), strict=False):
        if want is not None:
            close(gradient, want, torch.float64)


# --- the whole range of the numbers ---------------------------------------------------------------


def ulps(actual, expected):
    """Largest distance, in units of the last place of float32 at `expected`."""
    rounded = expected.float().abs()
    unit = torch.nextafter(rounded, torch.tensor(float("inf"))) - rounded
    return ((actual.double() - expected).abs() / unit.double()).max().item()


def activation(name, x):
    """tanh, sigmoid, elu or elu's slope (exp) of float32 [B, H], through the cells; W_hh is zero."""
    zero = torch.zeros_like(x)
    if name == "sigmoid":  # h of a GRU with n = 0 and h_prev = 1
        gx = torch.cat((zero, x, zero), 1)
        return forward("gru", gx, torch.zeros(gx.shape[1], x.shape[1]), torch.ones_like(x), None)[0]
    if name == "exp":
        return cell_gradients("rnn_elu", x, zero, None, torch.ones_like(x), None)[0]
    return forward(f"rnn_{name}", x, torch.zeros(x.shape[1], x.shape[1]), zero, None)[0]


# Units of the last place, measured over the same points: exp 1.0, elu 0.9, sigmoid 2.4, tanh 2.5 (torch: 2.5 for
# sigmoid). One quotient of a numerator and a denominator, each about one unit off.
@pytest.mark.parametrize(("name", "bound"), [("exp", 1.5), ("elu", 1.5), ("sigmoid", 3.0), ("tanh", 3.0)])
def test_nonlinearities_are_accurate_everywhere(name, bound):
    tiny = torch.logspace(-44.8, 1.5, 200_000)
    x = torch.cat((torch.linspace(-110, 20, 400_000), tiny, -tiny)).view(8000, -1)
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
    """Each gate in turn gets `value`: the result is that of float64, and NaN exactly where float64 has it."""
    H = 3 * GATES[cell]
    gx, h_prev, c_prev, dh, dc, _ = random_step(cell, 2, H, dtype, seed=3)
    w_hh, equations = weights(cell, H, dtype), EQUATIONS[cell]
    for gate in range(GATES[cell]):
        gx[:, gate * H + gate] = value
    h, _, saved = forward(cell, gx, w_hh, h_prev, c_prev)
    wide = [None if x is None else x.double() for x in (h_prev, c_prev, dh, dc)]
    expected_h, _, expected_saved = truth(cell, gx.double(), h_prev.double() @ w_hh.double().T, *wide[:2])
    state, dstate = ([x for x in pair if x is not None] for pair in (wide[:2], wide[2:]))
    total = equations.total(expected_saved, state, dstate)
    expected_dgx = equations.backward(expected_saved, state, total)[0]
    dgx = cell_gradients(cell, saved, h_prev, c_prev, dh, dc)[0]
    for actual, expected in ((h, expected_h), (dgx, expected_dgx)):  # 1e-5: some 50 float32 roundings
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
