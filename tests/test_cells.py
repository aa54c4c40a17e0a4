"""The three copies of the equations: PyTorch, Triton and C++, held to each other and to gradcheck in float64."""

import pytest
import torch
import triton
import triton.language as tl

from fastrnn.backends import extension
from fastrnn.cells import CELLS, PAD, RESET, START
from fastrnn.kernels.cells import EQUATIONS
from fastrnn.reference import LayerNorm, Masks, Step
from fastrnn.scan import Weights, scan

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
    step = Step(cell)
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


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpp_equals_reference(cell, dtype):
    if extension.load("cpu") is not None:
        pytest.skip(extension.load("cpu"))
    arguments = operands(cell, dtype)
    got, want = step_results(extension.Step(cell), *arguments), step_results(Step(cell), *arguments)
    # Both round at every operation; products of up to five factors of size 3 reach some 100 units in the last place.
    rtol = 1e-5 if dtype == torch.float32 else 1e-13
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
    state, saved = FORWARD(gx, gh, state_prev)
    total = TOTAL(saved, state_prev, dstate)
    dgx, dgh, dprev = BACKWARD(saved, state_prev, total)
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
        FORWARD=EQUATIONS[cell][0], TOTAL=EQUATIONS[cell][1], BACKWARD=EQUATIONS[cell][2],
    )  # fmt: skip
    for name in ("state", "total", "dprev"):
        out |= {f"{name}{k}": part for k, part in enumerate(out.pop(name).chunk(S, -1))}
    return out


@pytest.mark.parametrize("cell", CELLS)
def test_triton_equals_reference(cell, device):
    arguments = operands(cell, torch.float32, device=device)
    got, want = _triton_results(cell, *arguments), step_results(Step(cell), *arguments)
    for name, expected in want.items():
        # As for C++: float32 roundings through products of up to five factors of size 3.
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def _scan_case(cell: str, reverse: bool, extras: bool):
    """Arguments of `scan` in float64, and the function gradcheck differentiates."""
    torch.manual_seed(0)
    T, batch, hidden, spec = 3, 2, 3, CELLS[cell]
    lstm, rows = "c" in spec.states, len(spec.gates) * hidden
    P = 2 if extras and lstm else hidden

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    arguments = [leaf(T, batch, rows), leaf(rows, P), leaf(rows), leaf(batch, P), leaf(batch, hidden) if lstm else None]
    arguments += [leaf(P, hidden) if extras and lstm else None, leaf(rows) if extras else None]
    arguments += [leaf(hidden), leaf(hidden)] if extras and lstm else [None, None]
    masks = Masks()
    if extras:
        flags = torch.zeros(T, batch, dtype=torch.uint8)
        flags[2, 0], flags[1, 1] = PAD, RESET
        if reverse:
            flags[1, 0] |= START
        zones = torch.rand(2, T, batch, hidden, dtype=torch.float64)
        masks = Masks(flags, torch.rand(batch, P).double(), zones[0, ..., :P], zones[1] if lstm else None)
    present = [k for k, a in enumerate(arguments) if a is not None]

    def run(*values):
        found = dict(zip(present, values, strict=True))
        gx, w_hh, b_hh, h0, c0, w_hr, *norms = (found.get(k) for k in range(len(arguments)))
        outputs = scan(cell, gx, Weights(w_hh, b_hh, w_hr, *norms), h0, c0, masks, reverse=reverse)
        return tuple(out for out in outputs if out.numel())

    return run, [arguments[k] for k in present]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "every_feature"])
def test_scan_gradients(cell, extras):
    """First and second derivatives of the whole scan, with flags, masks, layer norm and projection."""
    for reverse in (False, True) if extras else (False,):
        run, arguments = _scan_case(cell, reverse, extras)
        assert torch.autograd.gradcheck(run, arguments)
        assert torch.autograd.gradgradcheck(run, arguments)
