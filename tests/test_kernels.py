"""Each Triton kernel against the reference: in Triton's interpreter on a CPU, natively on a GPU.

The launcher's outputs are filled with NaN before each launch, so an element that no program wrote shows.
"""

import pytest
import torch
import triton
import triton.language as tl
from setups import mostly_slow

from fastrnn import tiles
from fastrnn.backends import reference, sequence
from fastrnn.backends import triton as launcher
from fastrnn.cell_table import CELLS, CellSpec
from fastrnn.kernels.barrier import arrive, unless_stuck, wait
from fastrnn.kernels.cells import sigmoid, tanh
from fastrnn.kernels.norms import row_norm
from fastrnn.tiles import GemmTile, Tile
from problems import (
    FLOAT32,
    HALF,
    MODES,
    SMALL,
    WHOLE,
    B,
    H,
    Problem,
    check,
    check_against_reference,
    everything,
    in_one_call,
    same_bits,
)

# numpy, in the interpreter, warns of results that the kernels rely on: 1 / 0 and exp of a large number are infinite.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned", "ieee")]


@pytest.mark.parametrize(
    ("reverse", "extras"), [(False, ()), (True, Problem.ALL)], ids=["forward-plain", "reverse-all"]
)
@pytest.mark.parametrize("cell", mostly_slow(CELLS, "rnn_tanh"))
def test_all_modes_equal_the_reference_and_each_other(cell, reverse, extras, device):
    problem = Problem(cell, device, reverse=reverse, extras=extras)
    local, by_steps, grouped = (check_against_reference(problem, tile) for tile in SMALL.values())
    assert same_bits(local, by_steps) and same_bits(local, grouped)


@pytest.mark.parametrize("extra", [*Problem.ALL, "no_bias", "no_gradient_but_dy", "no_dy"])
@pytest.mark.parametrize("cell", mostly_slow(["lstm", "gru"], "gru"))
def test_each_extra_alone(cell, extra, device):
    problem = Problem(cell, device, extras=(extra,), reverse=extra == "flags")
    if extra == "no_bias":
        problem.b_hh = None
    if extra == "no_gradient_but_dy":
        problem.dc = problem.dh_n = problem.dc_n = None
    if extra == "no_dy":
        problem.dy = None
    check_against_reference(problem, SMALL["local"])


@pytest.mark.parametrize("mode", mostly_slow(MODES, "local"))
@pytest.mark.parametrize(
    ("cell", "B", "H"),
    [("lstm", 1, 1), ("gru", 17, 3), ("rnn_tanh", 16, 16), ("lstm", 2, 63), ("gru", 3, 65), ("rnn_elu", 33, 130)],
)
def test_odd_sizes(cell, B, H, mode, device):
    block = min(64, max(16, triton.next_power_of_2(H)))
    tile = GemmTile(16, 4) if mode == "gemm" else Tile(mode, 16, block, block if mode == "local" else 32, 4, 1)
    check_against_reference(Problem(cell, device, sizes=(2, B, H), extras=("norms", "clip_norm")), tile)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_half_types(cell, dtype, device):
    problem = Problem(cell, device, dtype=dtype, extras=Problem.ALL)
    local, by_steps, grouped = (check_against_reference(problem, tile, None, HALF[dtype]) for tile in SMALL.values())
    assert same_bits(local, by_steps) and same_bits(local, grouped)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_the_tile_of_the_table_runs(cell, device):
    check_against_reference(Problem(cell, device, sizes=(2, 2, 20), extras=("norms",)), None)


@pytest.mark.parametrize("mode", mostly_slow(MODES, "stepwise"))
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_chunks_of_steps_equal_the_whole(mode, reverse, device):
    whole = Problem("lstm", device, reverse=reverse, extras=("norms", "clip_norm"))
    y, c, h_n, c_n, saved = whole.forward(launcher, tile=MODES[mode])
    gradients = whole.backward(launcher, y, c, saved, tile=MODES[mode])
    early, late = (slice(2, None), slice(0, 2)) if reverse else (slice(0, 2), slice(2, None))
    first, second = Problem("lstm", device), Problem("lstm", device)
    for part, when in ((first, early), (second, late)):
        vars(part).update(vars(whole))
        part.gx, part.dy, part.dc = whole.gx[when], whole.dy[when], whole.dc[when]

    states = first.forward(launcher, tile=MODES[mode])
    second.h0, second.c0 = states[2:4]
    after = second.forward(launcher, tile=MODES[mode])
    assert same_bits(after[2:4], (h_n, c_n))
    for outputs, when in ((states, early), (after, late)):
        assert same_bits((outputs[0], outputs[1], outputs[4]), (y[when], c[when], saved[when]))

    back = second.backward(launcher, y[late], c[late], saved[late], tile=MODES[mode])
    first.dh_n, first.dc_n = back[2:4]
    front = first.backward(launcher, y[early], c[early], saved[early], tile=MODES[mode])
    assert same_bits(front[2:4], gradients[2:4])
    for outputs, when in ((front, early), (back, late)):
        assert same_bits((outputs[0], outputs[-1]), (gradients[0][when], gradients[-1][:, :, when]))


def check_both_directions(problems, tile):
    """One call gives the results of each direction alone: the same bits, unless a library multiplies, which may add in
    another order where a matrix has another address."""
    alone = zip(*(everything(problem, tile) for problem in problems), strict=True)
    want = [None if each[0] is None else torch.stack(each) for each in alone]
    got = everything(in_one_call(problems), tile)
    if tile.mode == "gemm":
        for part in (slice(5), slice(5, None)):  # forward, backward
            check(got[part], want[part], 1e-6)  # a few roundings to 2**-24 of sums of 17 products of order one
    else:
        assert same_bits(got, want)


@pytest.mark.parametrize("mode", mostly_slow(MODES, "stepwise"))
@pytest.mark.parametrize(
    ("cell", "extras", "reverse"),
    [("lstm", (), False), ("lstm", Problem.ALL, True), ("gru", Problem.ALL, False), ("rnn_tanh", Problem.ALL, False)],
    ids=["lstm", "lstm-all-reverse", "gru-all", "rnn_tanh-all"],
)
def test_both_directions_in_one_call(cell, extras, reverse, mode, device):
    backs = (reverse, not reverse)
    directions = [Problem(cell, device, reverse=back, extras=extras, seed=int(back)) for back in backs]
    check_both_directions(directions, MODES[mode])


def test_both_directions_share_a_grid_where_it_fits(monkeypatch, device):
    leading = []

    class Recorded:
        def __init__(self, kernel, tile, walk, inputs, **arguments):
            leading.append(len(inputs.w_hh))

        def between(self, **states):
            return None

        def run(self, *steps):
            pass

    monkeypatch.setattr(sequence, "ScanKernel", Recorded)
    both = in_one_call([Problem("gru", device, reverse=back) for back in (False, True)])
    both.forward(launcher, tile=SMALL["grouped"])
    assert leading == [2]
    monkeypatch.setattr(launcher, "_processors", lambda x: 3)  # for four programs
    both.forward(launcher, tile=SMALL["grouped"])
    assert leading == [2, 3 * 17, 3 * 17]  # G*H where a launch has one direction
    both.forward(launcher, tile=SMALL["stepwise"])
    assert leading[3:] == [2]


@pytest.mark.parametrize("mode", ["stepwise", "gemm"])
@pytest.mark.parametrize("steps", [1, 6])
def test_one_step_and_more_than_two_kinds_of_launches(steps, mode, device):
    """The first step, the last, and the steps between them, which alternate between two buffers and repeat launches."""
    extras = WHOLE if mode == "gemm" else Problem.ALL
    check_against_reference(Problem("lstm", device, sizes=(steps, 2, 5), extras=extras, reverse=True), MODES[mode])


@pytest.mark.parametrize("mode", mostly_slow(SMALL, "local"))
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_of_tiny_and_huge_gradients(scale, mode, device):
    check_against_reference(Problem("lstm", device, extras=("norms", "clip_norm"), scale=scale), SMALL[mode])


@pytest.mark.parametrize("mode", mostly_slow(MODES, "local"))
def test_nan_stays_visible_and_in_its_sample(mode, device):
    problem = Problem("gru", device, extras=("norms", "clip_norm", "clip_value"))
    problem.dy[1, 1, 5] = float("nan")
    y, c, _, _, saved = problem.forward(reference)
    dgx, dgh, dh0, *_, norms = problem.backward(launcher, y, c, saved, tile=MODES[mode])
    lost = torch.tensor([False, True, False], device=device)
    for x in (dgx[:2], dgh[:2]):
        assert torch.equal(x.isnan().any(0).any(-1), lost)
    assert torch.equal(dh0.isnan().any(-1), lost)
    assert norms[0, 0, :2, 1].isnan().all() and not norms[:, :, :, [0, 2]].isnan().any()


@triton.jit
def _pointwise(x_ptr, sigmoid_ptr, tanh_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(sigmoid_ptr + at, sigmoid(x))
    tl.store(tanh_ptr + at, tanh(x))


def test_sigmoid_and_tanh(device):
    sizes = torch.logspace(-30, 3, 2048 - 4)
    special = torch.tensor([0.0, float("inf"), float("-inf"), float("nan")])
    x = torch.cat((sizes[::2], -sizes[1::2], special)).to(device)
    got = torch.zeros(2, len(x), device=device)
    _pointwise[(1,)](x_ptr=x, sigmoid_ptr=got[0], tanh_ptr=got[1], N=len(x))
    # 4 units in the last place: a polynomial or a quotient of an exponential, each rounded a few times. A GPU's exp(x)
    # is 2**(x log2(e)), and rounding the exponent costs |x| 2**-24; tanh does not see it, a small sigmoid does.
    want = torch.stack((x.double().sigmoid(), x.double().tanh())).float()
    exponent = (-x).clamp(0, 104) * 2**-24 if device.type == "cuda" else torch.zeros_like(x)
    for value, expected, extra in zip(got, want, (exponent, torch.zeros_like(x)), strict=True):
        assert torch.equal(value.isnan(), expected.isnan())
        allowed = 1e-38 + (4 * 2**-23 + extra) * expected.abs()
        assert not ((value - expected).abs() > allowed).any()


@triton.jit
def _row_norm(x_ptr, norm_ptr, R: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, R)
    x = tl.load(x_ptr + rows[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(norm_ptr + rows, row_norm(x))


def test_row_norm_over_the_whole_range(device):
    scales = [0.0, 1e-38, 1e-30, 1e-19, 1e-15, 1e-10, 1e-3, 1.0, 1e3, 1e10, 1e15, 1e19, 1e30, 1e37, 1.0, 1.0]
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(scales)[:, None]
    x[14, 7], x[15, 7] = float("inf"), float("nan")
    x = x.to(device)
    norm = torch.zeros(16, device=device)
    _row_norm[(1,)](x_ptr=x, norm_ptr=norm, R=16, N=64)
    # 64 squares and their sums, rounded to 2**-24 each; at 1e-38, subnormal numbers have fewer bits.
    torch.testing.assert_close(norm, x.double().norm(dim=-1).float(), rtol=2e-6, atol=1e-44, equal_nan=True)


def test_an_empty_batch(device):
    problem = Problem("lstm", device, sizes=(3, 0, 5), extras=("norms",))
    y, c, h_n, _, saved = problem.forward(launcher)
    assert y.shape == (3, 0, 5) and h_n.shape == (0, 5)
    assert problem.backward(launcher, y, c, saved)[-1].shape == (2, 2, 3, 0)


def test_without_save_nothing_is_saved(device):
    problem = Problem("lstm", device)
    y, c, h_n, c_n, saved = problem.forward(launcher, save=False)
    assert c is None and saved is None
    check((y, h_n, c_n), [problem.forward(reference)[k] for k in (0, 2, 3)], FLOAT32)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_table_has_a_tile_for_everything(dtype, precision):
    for cell in CELLS:
        for hidden_size in (1, 16, 17, 64, 100, 128, 200, 256, 1000, 4096):
            for batch_size in (1, 64, 5000):
                tile = tiles.choose(cell, dtype, hidden_size, batch_size, precision)
                assert tile.mode != "grouped"  # until it has been measured
                assert tile.mode != "local" or tile.block_h == tile.block_k
                assert tile.block_h >= 16 and tile.block_b >= 16  # what tl.dot needs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("gates", [2, 5, 8])
def test_any_number_of_gates_has_a_tile_or_a_reason(gates, dtype, monkeypatch):
    spec = CellSpec("other", gates=tuple("abcdefgh"[:gates]), states=("h",), saved=("a",))
    monkeypatch.setitem(CELLS, "other", spec)
    for hidden_size in (1, 100, 1000):
        assert tiles.choose("other", dtype, hidden_size, 64).mode in ("local", "stepwise")
        for mode in tiles.MODES:
            try:
                assert tiles.choose("other", dtype, hidden_size, 64, mode=mode).mode == mode
            except ValueError as reason:
                assert f"mode {mode!r}" in str(reason) and "other" in str(reason)
    local = tiles.choose("other", dtype, 16, 64)
    assert local.mode == ("local" if gates == 2 else "stepwise")
    with pytest.raises(ValueError, match="float64"):
        tiles.choose("other", torch.float64, 16, 64)
    with pytest.raises(ValueError, match=r"'stepwise'.*other"):
        tiles.choose("other", dtype, 16, 64, mode="stepwise", shared_memory=1024)


# --------------------------------------------------------------------------------------------------- grouped programs


def test_a_mode_that_was_asked_for_is_taken_or_refused(monkeypatch, device):
    problem = Problem("lstm", device)
    for mode in tiles.MODES:
        monkeypatch.setenv("FASTRNN_TRITON_MODE", mode)
        assert launcher.choose_tile("lstm", problem.w_hh.bfloat16(), H, B).mode == mode
    monkeypatch.setenv("FASTRNN_TRITON_MODE", "grouped")
    with pytest.raises(ValueError, match=r"'grouped'.*lstm of torch.float32"):  # "ieee" leaves it no tensor cores
        problem.forward(launcher)
    with pytest.raises(ValueError, match="batch size 5000"):
        tiles.choose("lstm", torch.bfloat16, 512, 5000, mode="grouped")  # more programs than can run at once
    with pytest.raises(ValueError, match="local, grouped, stepwise, gemm"):
        tiles.choose("lstm", torch.bfloat16, 512, 16, mode="columns")


def stepwise(tile):
    """The same tile in mode stepwise."""
    return tile._replace(mode="stepwise")


@pytest.mark.slow
@pytest.mark.parametrize("extras", [Problem.ALL, ()], ids=["all", "plain"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_a_group_of_the_table_equals_the_reference(cell, extras, device):
    """Several programs with several tiles of weights each; the last tiles are partly outside."""
    tile = tiles.choose(cell, torch.bfloat16, 70, 17, mode="grouped")
    problem = Problem(cell, device, sizes=(2, 17, 70), extras=extras, reverse=True)
    grouped, by_steps = (check_against_reference(problem, t) for t in (tile, stepwise(tile)))
    assert same_bits(grouped, by_steps)


def test_a_grouped_launch_has_no_more_steps_than_its_counter_counts(device, monkeypatch):
    """A single program is a group of its own, so it walks several steps in the interpreter too."""
    problem = Problem("lstm", device, sizes=(7, 3, 5), extras=Problem.ALL)
    tile = Tile("grouped", 16, 16, 16, 4, 1)
    want = everything(problem, tile)
    monkeypatch.setattr(sequence, "MOST_STEPS", 3)
    assert same_bits(everything(problem, tile), want)


@pytest.mark.gpu
@pytest.mark.parametrize("extras", [(), Problem.ALL], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_grouped_equals_stepwise_bit_for_bit(cell, dtype, extras, device, monkeypatch):
    monkeypatch.setattr(sequence, "precision", lambda: "tf32")
    for sizes in ((9, 5, 200), (33, 37, 256), (5, 16, 512)):
        problem = Problem(cell, device, dtype, sizes, reverse=bool(extras), extras=extras)
        tile = tiles.choose(cell, dtype, sizes[2], sizes[1], mode="grouped")
        grouped, by_steps = (everything(problem, t) for t in (tile, stepwise(tile)))
        assert all(x.isfinite().all() for x in grouped)
        assert same_bits(grouped, by_steps)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside-another-stream"])
def test_ten_thousand_launches(busy, device):
    tile = tiles.choose("lstm", torch.bfloat16, 256, 100, mode="grouped")
    problem = Problem("lstm", device, torch.bfloat16, (8, 100, 256))
    want = everything(problem, tile)
    other, square = torch.cuda.Stream(), torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    for k in range(5000):  # forward and backward
        if busy and k % 10 == 0:
            with torch.cuda.stream(other):
                square = (square @ square).clamp(-1, 1)
        got = everything(problem, tile)
        if k % 500 == 0:
            assert same_bits(got, want), k
    assert same_bits(got, want)


@pytest.mark.gpu
def test_a_graph_of_grouped_launches_replays(device):
    tile = tiles.choose("gru", torch.bfloat16, 512, 20, mode="grouped")
    problem, other = (Problem("gru", device, torch.bfloat16, (6, 20, 512), seed=seed) for seed in (0, 1))
    everything(problem, tile)  # compiles
    want = everything(other, tile)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything(problem, tile)
    for name in ("gx", "w_hh", "b_hh", "h0", "dy", "dh_n"):
        getattr(problem, name).copy_(getattr(other, name))
    for _ in range(100):
        graph.replay()
    assert same_bits(got, want)


@triton.jit
def _wait_in_vain(x_ptr, arrived_ptr, timeout_flag_ptr, N: tl.constexpr):
    arrive(arrived_ptr)
    alive = wait(arrived_ptr, tl.num_programs(0) + 1, timeout_flag_ptr)
    at = tl.program_id(0) * N + tl.arange(0, N)
    (x,) = unless_stuck(alive, (tl.load(x_ptr + at),), 1)
    tl.store(x_ptr + at, x)


@pytest.mark.gpu
def test_a_wait_in_vain_ends_in_nan_and_an_error(device):
    x, arrived = torch.ones(4, 64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    _wait_in_vain[(4,)](
        x_ptr=x, arrived_ptr=arrived, timeout_flag_ptr=sequence.timeout_flag(), N=64, launch_cooperative_grid=True
    )
    torch.cuda.synchronize()
    assert x.isnan().all()
    problem = Problem("lstm", device)
    with pytest.raises(RuntimeError, match="waited for each other"):
        problem.forward(launcher)
    check_against_reference(problem, None)
