"""The three copies of the equations: PyTorch, Triton and C++, held to each other and to gradcheck in float64."""

import pytest
import torch
import triton
import triton.language as tl
from setups import MASKS, every_cell, kept_of, needs_cpu_library, random_inputs

from fastrnn.arguments import IncomingGradients, ScanInputs, Walk
from fastrnn.backends import cpu, reference
from fastrnn.cell_table import CELLS
from fastrnn.equations import EQUATIONS, LayerNorm
from fastrnn.kernels.cells import EQUATIONS as TRITON
from fastrnn.scan import scan

B, H = 3, 5


def operands(cell: str, dtype, seed: int = 0, device="cpu"):
    """Random gx, gh, state_prev, dstate of one step, `[B, planes*H]`, a few of them large enough to saturate."""
    spec, generator = CELLS[cell], torch.Generator().manual_seed(seed)

    def draw(planes):
        return (3 * torch.randn(B, planes * H, generator=generator, dtype=dtype)).to(device)

    G, S = len(spec.gates), len(spec.states)
    return draw(G), draw(G), tuple(draw(1) for _ in range(S)), tuple(draw(1) for _ in range(S))


def step_results(step, gx, gh, state_prev, dstate, ln_c=None):
    """Every output of one step under a name, zeros where a step says None."""
    state, saved = step.forward(gx, gh, state_prev, ln_c)
    total = step.total(saved, state_prev, dstate, ln_c)
    dgx, dgh, dprev = step.backward(saved, state_prev, total, ln_c)
    found = {"saved": saved, "dgx": dgx, "dgh": dgh}
    for name, values in (("state", state), ("total", total), ("dprev", dprev)):
        found |= {f"{name}{k}": torch.zeros_like(gx[:, :H]) if v is None else v for k, v in enumerate(values)}
    return found


@pytest.mark.parametrize("cell, layer_norm", [*((cell, False) for cell in CELLS), ("lstm", True)])
def test_total_and_backward_are_the_derivative_of_forward(cell, layer_norm):
    """autograd of `forward` alone gives what `total` and `backward` say, in float64."""
    gx, gh, state_prev, dstate = operands(cell, torch.float64)
    inputs = [t.requires_grad_() for t in (gx, gh, *state_prev)]
    ln_c = LayerNorm(torch.linspace(0.5, 2, H).double(), torch.linspace(-1, 1, H).double()) if layer_norm else None
    step = EQUATIONS[cell]
    state, saved = step.forward(gx, gh, state_prev, ln_c)
    want = torch.autograd.grad(state, inputs, dstate, allow_unused=True)
    with torch.no_grad():
        total = step.total(saved, state_prev, dstate, ln_c)
        dgx, dgh, dprev = step.backward(saved, state_prev, total, ln_c)
    for got, expected in zip((dgx, dgh, *dprev), want, strict=True):
        # Two float64 evaluations of one formula, a few dozen roundings apart.
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def _one_step(launcher, cell, gx, gh, state_prev, dstate):
    """A scan of one step, forward and backward, in which W_hh is the identity: the bias is the rest of gh."""
    (h0, *others), (dh_n, *dothers) = state_prev, dstate
    c0, dc_n = (torch.cat(x, -1) if x else None for x in (others, dothers))
    w_hh = torch.eye(H, dtype=gx.dtype).repeat(len(CELLS[cell].gates), 1)
    inputs = ScanInputs(gx=gx[None], w_hh=w_hh, h0=h0, c0=c0, b_hh=gh)
    walk = Walk(cell, reverse=False, backend="")
    out = launcher.forward(inputs, walk, True)
    kept, incoming = kept_of(out), IncomingGradients(dh_n=dh_n, dc_n=dc_n)
    found = launcher.backward(incoming, kept, inputs._replace(gx=None), walk, True)
    return {name: x for part in (out, found) for name, x in part._asdict().items() if x is not None and x.numel()}


@needs_cpu_library
@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpp_equals_reference(cell, dtype):
    gx, gh, state_prev, dstate = operands(cell, dtype)
    arguments = gx, gh[0], state_prev, dstate
    got, want = _one_step(cpu, cell, *arguments), _one_step(reference, cell, *arguments)
    # Both round at every operation; products of up to five factors of size 3 reach some 100 units in the last place.
    rtol = 1e-5 if dtype == torch.float32 else 1e-13
    assert got.keys() == want.keys()
    for name, expected in want.items():
        torch.testing.assert_close(got[name], expected, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@triton.jit
def _load(ptr, planes: tl.constexpr, B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK_B)[:, None], tl.arange(0, BLOCK_H)[None, :]
    tiles = ()
    for k in tl.static_range(planes):
        tiles = tiles + (tl.load(ptr + rows * planes * H + k * H + cols, mask=(rows < B) & (cols < H), other=0.0),)
    return tiles


@triton.jit
def _store(ptr, tiles, planes: tl.constexpr, B, H, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK_B)[:, None], tl.arange(0, BLOCK_H)[None, :]
    for k in tl.static_range(planes):
        tile = tiles[k]
        if tile is None:
            tile = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        tl.store(ptr + rows * planes * H + k * H + cols, tile, mask=(rows < B) & (cols < H))


@triton.jit
def step_kernel(
    gx_ptr,  # [B, G*H]
    gh_ptr,  # [B, G*H]
    state_prev_ptr,  # [B, S*H]
    dstate_ptr,  # [B, S*H]
    saved_ptr,  # [B, K*H]
    dgx_ptr,  # [B, G*H]
    dgh_ptr,  # [B, G*H]
    state_ptr,  # [B, S*H]
    total_ptr,  # [B, S*H]
    dprev_ptr,  # [B, S*H]
    B,
    H,
    G: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FORWARD: tl.constexpr,
    TOTAL: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    state_prev = _load(state_prev_ptr, S, B, H, BLOCK_B, BLOCK_H)
    dstate = _load(dstate_ptr, S, B, H, BLOCK_B, BLOCK_H)
    gx, gh = _load(gx_ptr, G, B, H, BLOCK_B, BLOCK_H), _load(gh_ptr, G, B, H, BLOCK_B, BLOCK_H)
    state, saved = FORWARD(gx, gh, state_prev, ())
    total = TOTAL(saved, state_prev, dstate, ())
    dgx, dgh, dprev, _ = BACKWARD(saved, state_prev, total, ())
    _store(saved_ptr, saved, K, B, H, BLOCK_B, BLOCK_H)
    _store(dgx_ptr, dgx, G, B, H, BLOCK_B, BLOCK_H)
    _store(dgh_ptr, dgh, G, B, H, BLOCK_B, BLOCK_H)
    _store(state_ptr, state, S, B, H, BLOCK_B, BLOCK_H)
    _store(total_ptr, total, S, B, H, BLOCK_B, BLOCK_H)
    _store(dprev_ptr, dprev, S, B, H, BLOCK_B, BLOCK_H)


def _triton_results(cell, gx, gh, state_prev, dstate):
    """`step_results` by the functions of kernels/cells.py, in a kernel of one program."""
    spec = CELLS[cell]
    G, K, S = len(spec.gates), len(spec.saved), len(spec.states)
    out = {"saved": K, "dgx": G, "dgh": G, "state": S, "total": S, "dprev": S}
    out = {name: torch.full((B, n * H), torch.nan, device=gx.device) for name, n in out.items()}
    step_kernel[(1,)](
        gx, gh, torch.cat(state_prev, -1), torch.cat(dstate, -1), *out.values(),
        B=B, H=H, G=G, K=K, S=S, BLOCK_B=triton.next_power_of_2(B), BLOCK_H=triton.next_power_of_2(H),
        FORWARD=TRITON[cell][0], TOTAL=TRITON[cell][1], BACKWARD=TRITON[cell][2],
    )  # fmt: skip
    for name in ("state", "total", "dprev"):
        out |= {f"{name}{k}": part for k, part in enumerate(out.pop(name).chunk(S, -1))}
    return out


@pytest.mark.parametrize("cell", CELLS)
def test_triton_equals_reference(cell, device):
    arguments = operands(cell, torch.float32, device=device)
    got, want = _triton_results(cell, *arguments), step_results(EQUATIONS[cell], *arguments)
    for name, expected in want.items():
        # As for C++: float32 roundings through products of up to five factors of size 3.
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


NOT_DIFFERENTIATED = (*MASKS, "clip_norm")
EXTRAS = (*MASKS, "layer_norm", "projection")
WITH_FEATURES = ("lstm", "gru", "rnn_tanh")


def _scan_case(cell: str, reverse: bool, features):
    """Arguments of `scan` in float64, and the function gradcheck differentiates."""
    inputs = random_inputs(cell, features, sizes=(3, 3, 2), reverse=reverse)
    leaves = {n: x for n, x in inputs._asdict().items() if x is not None and n not in NOT_DIFFERENTIATED}

    def run(*values):
        given = inputs._replace(**dict(zip(leaves, values, strict=True)))
        outputs = scan(given, Walk(cell, reverse, "reference"))
        return tuple(out for out in outputs if out is not None and out.numel())

    return run, [x.requires_grad_() for x in leaves.values()]


# The features act outside of a nonlinearity: beside one of them they are beside all.
@pytest.mark.parametrize(
    "cell, extras",
    [*((cell, False) for cell in CELLS), *(pytest.param(c, True, marks=pytest.mark.slow) for c in WITH_FEATURES)],
)
def test_scan_gradients(cell, extras):
    """First and second derivatives of the whole scan, with flags, masks, layer norm and projection."""
    for reverse in (False, True) if extras else (False,):
        run, arguments = _scan_case(cell, reverse, EXTRAS if extras else ())
        assert torch.autograd.gradcheck(run, arguments)
        # Beside the features, along a random direction instead of along each element: a wrong one shows in it, too.
        assert torch.autograd.gradgradcheck(run, arguments, fast_mode=extras)
