"""W_hh in heads in the Triton scan: a program takes a head in mode local and a tile of a head in modes grouped and
stepwise; mode gemm multiplies all heads at once."""

import pytest
import torch
from cell_texts import TEXTS
from setups import mostly_slow
from test_heads import dense

import fastrnn
from fastrnn import tiles
from fastrnn.arguments import IncomingGradients, Kept, ScanInputs
from fastrnn.backend_table import MODES, Request
from fastrnn.backends import reference
from fastrnn.backends import triton as launcher
from fastrnn.cell_table import CELLS, spec_of
from fastrnn.evidence import verification
from fastrnn.tiles import Tile
from problems import (
    FLOAT32,
    GEMM,
    HALF,
    SMALL,
    Problem,
    check,
    everything,
    in_one_call,
    same_bits,
)

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned", "ieee")]

LOCAL = SMALL["local"]
TILES = {**SMALL, "gemm": GEMM}
EXCHANGING = ("grouped", "stepwise")  # the modes in which the programs of a head exchange h
WITHOUT_CLIP_NORM = tuple(name for name in Problem.ALL if name != "clip_norm")


def in_heads(cell, device, heads, units, *, steps=2, batch=2, **settings):
    """A problem of `heads` of so many units, each with a random block of W_hh."""
    problem = Problem(cell, device, sizes=(steps, batch, heads * units), **settings)
    shape = (heads, len(spec_of(cell).gates) * units, units)
    generator = torch.Generator().manual_seed(5)
    problem.w_hh = (torch.randn(shape, generator=generator) / units**0.5).to(device, problem.h0.dtype)
    return problem


def densely(problem):
    """The same problem with zeros between the heads."""
    other = Problem.__new__(Problem)
    vars(other).update(vars(problem))
    other.w_hh = dense(problem.w_hh, len(spec_of(problem.cell).gates))
    return other


def check_against_dense(problem, tile, dtype=torch.float64, tolerance=FLOAT32):
    """Forward and backward of the kernels in heads are those of the reference with the dense W_hh."""
    forward, whole = problem.forward(launcher, tile=tile), densely(problem)
    want = whole.forward(reference, dtype)
    check(forward, want, tolerance)
    kept = [
        None if x is None else x.to(like.dtype)
        for x, like in zip(want[:2] + want[4:], forward[:2] + forward[4:], strict=True)
    ]
    backward = problem.backward(launcher, *kept, tile=tile)
    check(backward, whole.backward(reference, want.y, want.c, want.saved, dtype), tolerance)


EXTRAS = {"local": WITHOUT_CLIP_NORM, "gemm": (*Problem.ALL, "layer_norm", "decay")}


@pytest.mark.parametrize("mode", TILES)
@pytest.mark.parametrize("cell", mostly_slow(CELLS, "lstm", "gru"))
def test_it_is_the_dense_w_hh_with_zeros(cell, mode, device):
    extras = EXTRAS.get(mode, Problem.ALL)
    problem = in_heads(cell, device, heads=3, units=2, extras=extras, reverse=cell == "gru")
    check_against_dense(problem, TILES[mode])


@pytest.mark.parametrize("mode", TILES)
@pytest.mark.parametrize("text", [TEXTS["leaky"], TEXTS["four"]], ids=["leaky", "four"])
def test_users_cells(text, mode, device):
    clip = ("clip_norm",) if mode in EXCHANGING else ()
    problem = in_heads(text, device, heads=2, units=3, extras=("flags", "norms", "recurrent_mask", *clip))
    check_against_dense(problem, TILES[mode])


@pytest.mark.parametrize("mode", EXCHANGING)
def test_several_programs_a_head(mode, device):
    """Three tiles of units a head, of which the last is partly outside, and products over two."""
    problem = in_heads("gru", device, heads=2, units=35, extras=("flags", "clip_norm", "norms"))
    check_against_dense(problem, Tile(mode, 16, 16, 32, 4, 1))


def test_three_modes_give_the_same_bits(device):
    problem = in_heads("gru", device, heads=2, units=17, extras=WITHOUT_CLIP_NORM)
    local = everything(problem, LOCAL)
    for mode in EXCHANGING:
        assert same_bits(everything(problem, SMALL[mode]), local)


@pytest.mark.parametrize(("heads", "units"), [(2, 16), (2, 17), (3, 1)], ids=["whole", "two tiles", "one unit"])
def test_heads_that_fill_a_tile_or_take_several(heads, units, device):
    check_against_dense(in_heads("gru", device, heads, units, batch=units + 1, extras=("norms",)), LOCAL)


@pytest.mark.parametrize("tile", [LOCAL, GEMM], ids=["local", "gemm"])
def test_a_half_type(tile, device):
    problem = in_heads("lstm", device, heads=2, units=5, dtype=torch.bfloat16, extras=("flags",))
    check_against_dense(problem, tile, None, HALF[torch.bfloat16])


def test_both_directions_in_one_grid(device):
    each = [in_heads("rnn_tanh", device, 2, 3, extras=("flags", "norms"), reverse=d, seed=d) for d in (0, 1)]
    each[1].w_hh = each[1].w_hh.flip(0)
    both = in_one_call(each)
    assert launcher.takes_directions(both.of(ScanInputs), both.walk(), LOCAL)
    alone = zip(*(everything(problem, LOCAL) for problem in each), strict=True)
    assert same_bits(everything(both, LOCAL), [None if x[0] is None else torch.stack(x) for x in alone])


def of_head(problem, n, heads):
    """The scan of head n by itself."""
    other = Problem.__new__(Problem)
    vars(other).update(vars(problem))
    units, gates = problem.h0.shape[-1] // heads, len(spec_of(problem.cell).gates)
    for name in ("gx", "b_hh"):
        x = getattr(problem, name)
        setattr(other, name, x.unflatten(-1, (gates, heads, units))[..., n, :].flatten(-2))
    for name in ("h0", "c0", "dy", "dc", "dh_n", "dc_n"):
        x = getattr(problem, name)
        setattr(other, name, None if x is None else x.unflatten(-1, (heads, units))[..., n, :].contiguous())
    other.w_hh = problem.w_hh[n]
    return other


def test_a_head_has_the_bits_of_a_scan_of_its_own(device):
    problem = in_heads("lstm", device, heads=2, units=17)
    y, c, h_n, _, saved = problem.forward(launcher, tile=LOCAL)
    gradients = problem.backward(launcher, y, c, saved, tile=LOCAL)
    for n in (0, 1):
        units = slice(n * 17, (n + 1) * 17)
        own = of_head(problem, n, 2)
        forward = own.forward(launcher, tile=LOCAL)
        assert same_bits((y[..., units], h_n[..., units]), (forward.y, forward.h_n))
        backward = own.backward(launcher, forward.y, forward.c, forward.saved, tile=LOCAL)
        assert same_bits((gradients.dh0[..., units], gradients.dc0[..., units]), (backward.dh0, backward.dc0))


def test_nan_stays_in_its_head(device):
    problem = in_heads("gru", device, heads=2, units=3)
    problem.b_hh[:3] = float("nan")  # of the reset gate of head 0
    y, c, _, _, saved = problem.forward(launcher, tile=LOCAL)
    assert y[..., :3].isnan().all() and not y[..., 3:].isnan().any()
    problem.b_hh = None
    dh0 = problem.backward(launcher, y, c, saved, tile=LOCAL).dh0
    assert dh0[..., :3].isnan().any() and not dh0[..., 3:].isnan().any()


@pytest.mark.parametrize("name", mostly_slow(["LSTM", "GRU"], "GRU"))
def test_a_module_forced_to_this_backend(name, device):
    module = getattr(fastrnn, name)(3, 6, bidirectional=True, num_heads=3, device=device)
    x = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for backend in ("triton", "reference"):
        module.backend = backend
        y, _ = module(x, lengths=torch.tensor([2, 1]))
        found.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for got, want in zip(*found, strict=True):
        check((got,), (want,), FLOAT32)


def test_clipping_by_norm_takes_all_heads_at_once(device, monkeypatch):
    problem = in_heads("lstm", device, heads=2, units=3, extras=("clip_norm",))
    inputs = problem.of(ScanInputs)
    assert launcher.tile_of(inputs, problem.walk()).mode == "gemm"
    assert launcher.tile_of(inputs._replace(clip_norm=None), problem.walk()).mode == "local"
    y, c, _, _, saved = problem.forward(launcher, tile=LOCAL)
    with pytest.raises(ValueError, match="needs all of H in one program"):
        problem.backward(launcher, y, c, saved, tile=LOCAL)
    monkeypatch.setenv("FASTRNN_TRITON_MODE", "stepwise")  # whose programs exchange the norms of all heads
    assert launcher.tile_of(inputs, problem.walk()).mode == "stepwise"


def test_a_raw_op_refuses_what_the_kernels_would_misread(device):
    problem = in_heads("lstm", device, heads=2, units=3, extras=("recurrent_mask",))
    inputs, walk = problem.of(ScanInputs), problem.walk()
    per_gate = inputs._replace(recurrent_mask=inputs.recurrent_mask.repeat(1, 4))
    y, c, _, _, saved = problem.forward(launcher, tile=GEMM)
    for wrong, settings, message in (
        (per_gate, walk, "for a W_hh without heads"),
        (inputs._replace(recurrent_mask=inputs.recurrent_mask.repeat(1, 3)), walk, "6 columns, or 24"),
        (inputs, walk._replace(ln_of="sum"), "ln_hh, its weight, is None"),
    ):
        with pytest.raises(RuntimeError, match=message):
            launcher.forward(wrong, settings, True, GEMM)
        with pytest.raises(RuntimeError, match=message):
            launcher.backward(IncomingGradients(y, None, None, None), Kept(y, c, saved), wrong, settings, False, GEMM)


@pytest.mark.parametrize("mode", TILES)
def test_an_empty_batch(mode, device):
    tile = TILES[mode]
    problem = in_heads("lstm", device, heads=2, units=3, batch=0, extras=("norms",))
    y, c, _, _, saved = problem.forward(launcher, tile=tile)
    assert y.shape == (2, 0, 6)
    assert problem.backward(launcher, y, c, saved, tile=tile).dgx.shape == (2, 0, 24)


# ---------------------------------------------------------------------------------------------------------- the tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", TEXTS["leaky"]], ids=["lstm", "gru", "rnn", "leaky"])
def test_heads_have_a_tile_or_a_reason(cell, dtype):
    for units, mode in ((1, "local"), (64, "local"), (512, "stepwise")):
        for precision in ("tf32", "ieee"):
            tile = tiles.choose(cell, dtype, 4 * units, 64, precision, heads=4)
            assert tile.mode == mode
            assert tile == tiles.choose(cell, dtype, units, 64, precision, mode)
    assert tiles.choose(cell, dtype, 1024, 16, mode="grouped", heads=4).mode == "grouped"
    # A head of its own would have a tile, but the programs of so many heads are more than there are multiprocessors.
    assert tiles.choose(cell, dtype, 256, 16, mode="grouped").mode == "grouped"
    with pytest.raises(ValueError, match=r"mode 'grouped' .* hidden size 8192 in 32 heads"):
        tiles.choose(cell, dtype, 32 * 256, 64, mode="grouped", heads=32)
    with pytest.raises(ValueError, match="hidden size 2048 in 2 heads"):
        tiles.choose(cell, dtype, 2048, 64, mode="local", heads=2)


def request(*features, heads=2, hidden_size=6):
    return Request("lstm", "cpu", torch.float32, hidden_size, features=frozenset({"heads", *features}), heads=heads)


def test_the_backend_and_its_modes_say_whether_they_can(monkeypatch):
    assert launcher.why_not(request()) is None
    half = request()._replace(dtype=torch.bfloat16)
    assert {name: MODES[f"triton:{name}"].reason(half) for name in tiles.MODES} == dict.fromkeys(tiles.MODES)
    for mode in EXCHANGING:
        assert MODES[f"triton:{mode}"].reason(half._replace(features=frozenset({"heads", "clip"}))) is None
    for feature in ("layer_norm", "clip", "decay"):
        assert "mode gemm has" in MODES["triton:local"].reason(request(feature))
        assert MODES["triton:gemm"].reason(request(feature)) is None
    assert "2048 in 2 heads" in MODES["triton:local"].reason(request(hidden_size=2048))
    monkeypatch.setenv("FASTRNN_TRITON_MODE", "stepwise")
    assert launcher.why_not(request()) is None


@pytest.mark.parametrize("mode", tiles.MODES)
def test_a_mode_as_a_backend_runs_that_mode(mode, device):
    problem = Problem("lstm", device, dtype=torch.bfloat16, sizes=(2, 3, 5))  # B and H differ
    assert MODES[f"triton:{mode}"].launcher._tile(problem.of(ScanInputs), problem.walk()).mode == mode


def test_the_check_before_the_first_use_has_heads():
    inputs, walk = verification.problem(request(heads=3), 2, False, torch.device("cpu"))
    assert inputs.w_hh.shape == (3, 8, 2)
    outputs = reference.forward(inputs, walk, True)
    assert Kept(outputs.y, outputs.c, outputs.saved).y.shape == inputs.gx.shape[:2] + (6,)
    assert verification.check(launcher, request(heads=3), 2, torch.device("cpu"), steps=2) is None
