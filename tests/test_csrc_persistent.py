"""csrc's persistent CUDA kernels without a GPU: their own source, emulated on the host, against the reference.

`emulator/scan.cpp` compiles csrc/cuda with a C++ compiler: a fiber is a CUDA thread; tensor-core products, shared
memory, clusters and barriers are emulated (emulator/emulated.h). The launcher is fastrnn/backends/cuda.py, with the
emulated ops in place of csrc's. Races: test_csrc_races.py. Not covered: caches, and the C++ code that launches.
"""

import shutil

import pytest
import torch
from cuda_problems import (
    BY_CLUSTER,
    TOLERANCE,
    Problem,
    all_outputs,
    check,
    each_alone,
    exact_problem,
    extras_of,
)
from emulated import CXX, Emulator, compiled

from fastrnn.arguments import MASKS, IncomingGradients, Kept, ScanInputs, Walk
from fastrnn.backends import cuda, reference
from fastrnn.cell_table import CELLS
from fastrnn.dispatch import Request
from problems import in_one_call, same_bits

pytestmark = pytest.mark.slow  # compiling the emulated kernels takes more than a minute
WAYS = ("cluster", "grid", "wide_grid")

if shutil.which(CXX) is None:
    pytest.skip(f"no C++ compiler {CXX}", allow_module_level=True)


@pytest.fixture(scope="session")
def library(pytestconfig):
    """The kernels, compiled for the host."""
    return compiled(pytestconfig.cache, "scan.cpp", "-shared", "-fPIC")


@pytest.fixture
def emulator(library, poisoned, monkeypatch, set_precision):
    """`fastrnn.backends.cuda` runs on the emulator, into outputs that hold NaN before."""
    emulator = Emulator(library)
    monkeypatch.setattr(cuda, "OPS", emulator)
    monkeypatch.delenv("FASTRNN_CUDA_MODE", raising=False)
    set_precision(torch.backends.cudnn.rnn, "tf32")
    return emulator


@pytest.mark.parametrize("way", ["cluster", "grid"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_reference(emulator, cell, dtype, reverse, way):
    emulator.way = way
    problem = Problem(cell, dtype, B=19, reverse=reverse, extras=extras_of(dtype))
    want = problem.forward(reference)
    check(problem.forward(cuda), want, TOLERANCE[dtype])
    check(problem.backward(cuda, *want), problem.backward(reference, *want), TOLERANCE[dtype])


# Every bucket, below its full size and at it; the widest of them once per storage size.
@pytest.mark.parametrize(
    ("way", "H", "dtype"),
    [("cluster", H, dtype) for H in (1, 33, 256, 500) for dtype in (torch.bfloat16, torch.float32)]
    + [("grid", H, dtype) for H in (7, 250, 512, 767) for dtype in (torch.float16, torch.float32)]
    + [("cluster", 767, torch.bfloat16), ("cluster", 513, torch.float32), ("cluster", 640, torch.float32)]
    + [("grid", 1000, torch.bfloat16), ("grid", 1280, torch.bfloat16), ("grid", 1025, torch.float32)],
)
def test_sums_are_exact(emulator, way, H, dtype):
    emulator.way = way
    problem = exact_problem(dtype, B=9, H=H, reverse=H % 2 == 1)
    want = problem.forward(reference)
    assert same_bits(problem.forward(cuda), want)
    assert same_bits(problem.backward(cuda, *want), problem.backward(reference, *want))


@pytest.mark.parametrize(
    ("cell", "way", "H", "dtype"),
    [
        ("lstm", "cluster", 512, torch.bfloat16),
        ("lstm", "grid", 700, torch.float16),
        ("lstm", "wide_grid", 1000, torch.bfloat16),
        ("lstm", "wide_grid", 500, torch.float32),
        ("gru", "cluster", 300, torch.float32),
        ("gru", "wide_grid", 1280, torch.bfloat16),
        ("lstm", "cluster", 600, torch.bfloat16),
        ("lstm", "cluster", 640, torch.float16),
        ("lstm", "grid", 640, torch.bfloat16),
        ("gru", "cluster", 768, torch.bfloat16),
        ("lstm", "wide_grid", 1100, torch.float32),
        ("gru", "grid", 1100, torch.float32),
    ],
)
def test_large_layers_equal_the_reference(emulator, cell, way, H, dtype):
    """Where a part of W_hh lies in shared memory, and groups have many members."""
    emulator.way = way
    assert emulator.describe(cell, dtype, H)
    problem = Problem(cell, dtype, T=2, B=3, H=H, extras=extras_of(dtype))
    want = problem.forward(reference)
    check(problem.forward(cuda), want, TOLERANCE[dtype])
    check(problem.backward(cuda, *want), problem.backward(reference, *want), TOLERANCE[dtype])


@pytest.mark.parametrize("way", ["cluster", "grid"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_neither_the_order_of_threads_nor_the_number_of_groups_changes_a_bit(emulator, cell, way):
    emulator.way = way
    problem = Problem(cell, torch.bfloat16, B=35, H=90, extras=Problem.ALL)
    first = problem.forward(cuda)
    gradients = problem.backward(cuda, *first)
    for emulator.seed, emulator.groups in ((1, 0), (2, 1), (3, 2)):
        again = problem.forward(cuda)
        assert same_bits(again, first)
        assert same_bits(problem.backward(cuda, *again), gradients)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_chunks_of_steps_equal_the_whole(emulator, cell, reverse):
    whole = Problem(cell, torch.float32, T=5, reverse=reverse, extras=("norms", "clip_norm"))
    y, c, h_n, c_n, saved = whole.forward(cuda)
    gradients = whole.backward(cuda, y, c, h_n, c_n, saved)
    early, late = (slice(2, None), slice(0, 2)) if reverse else (slice(0, 3), slice(3, None))
    parts = []
    for when in (early, late):
        part = Problem(cell, torch.float32, reverse=reverse)
        vars(part).update(vars(whole))
        part.gx, part.dy, part.dc = whole.gx[when], whole.dy[when], None if whole.dc is None else whole.dc[when]
        parts.append(part)
    first, second = parts
    between = first.forward(cuda)
    second.h0, second.c0 = between[2], None if whole.c0 is None else between[3]
    assert same_bits(second.forward(cuda)[2:4], (h_n, c_n))

    def at(when):
        return y[when], c if whole.c0 is None else c[when], None, None, saved[when]

    back = second.backward(cuda, *at(late))
    first.dh_n, first.dc_n = back[2], None if whole.c0 is None else back[3]
    front = first.backward(cuda, *at(early))
    assert same_bits(front[2:4], gradients[2:4])
    for outputs, when in ((back, late), (front, early)):
        assert same_bits((outputs[0], outputs[-1]), (gradients[0][when], gradients[-1][:, :, when]))


@pytest.mark.parametrize("way", ["cluster", "grid"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward-first", "reverse-first"])
@pytest.mark.parametrize("extras", [(), Problem.ALL], ids=["plain", "all"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_both_directions_in_one_launch_equal_each_alone(emulator, cell, extras, reverse, way):
    emulator.way = way
    directions = [Problem(cell, torch.bfloat16, B=19, reverse=d != reverse, extras=extras, seed=d) for d in range(2)]
    want = each_alone(directions)
    both = in_one_call(directions)
    emulator.launches = 0
    for emulator.seed, emulator.groups in ((0, 0), (1, 1)):
        assert same_bits(all_outputs(both), want)
    assert emulator.launches == 2 * 2  # forward and backward, twice


def test_directions_that_do_not_fit_together_go_one_after_the_other(emulator):
    directions = [Problem("lstm", torch.float32, reverse=back, extras=Problem.ALL, seed=back) for back in range(2)]
    want = each_alone(directions)
    emulator.room, emulator.launches = 1, 0
    assert same_bits(all_outputs(in_one_call(directions)), want)
    assert emulator.launches == 4
    emulator.room = 0
    with pytest.raises(RuntimeError, match="does not fit the chip"):
        in_one_call(directions).forward(cuda)


def test_a_wait_in_vain_leaves_the_other_direction_alone(emulator):
    directions = [Problem("gru", torch.float32, reverse=back, seed=back) for back in range(2)]
    want = directions[1].forward(cuda)[0]
    emulator.missing, emulator.wait_limit = 1, 2000
    y = in_one_call(directions).forward(cuda)[0]
    assert y[0].isnan().all() and torch.equal(y[1], want)
    with pytest.raises(RuntimeError, match="waited in vain"):
        directions[0].forward(cuda)


@pytest.mark.parametrize("left_out", ["b_hh", "dy", "dc", "dh_n", "dc_n"])
def test_what_may_be_absent(emulator, left_out):
    problem = Problem("lstm", torch.float32)
    setattr(problem, left_out, None)
    want = problem.forward(reference)
    check(problem.forward(cuda), want, TOLERANCE[torch.float32])
    check(problem.backward(cuda, *want), problem.backward(reference, *want), TOLERANCE[torch.float32])


def test_without_save_nothing_is_saved(emulator):
    problem = Problem("lstm", torch.float32)
    y, c, h_n, c_n, saved = problem.forward(cuda, save=False)
    assert c.numel() == saved.numel() == 0
    assert same_bits((y, h_n, c_n), [problem.forward(cuda)[k] for k in (0, 2, 3)])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_over_the_whole_range(emulator, scale):
    """Squares of 1e-30 are zero in float32, those of 1e30 infinite."""
    problem = Problem("lstm", torch.float32, extras=("norms",))
    for name in ("dy", "dc", "dh_n", "dc_n"):
        setattr(problem, name, getattr(problem, name) * scale)
    want = problem.forward(reference)
    check(problem.backward(cuda, *want), problem.backward(reference, *want), TOLERANCE[torch.float32])


def test_nan_stays_visible_and_in_its_sample(emulator):
    problem = Problem("gru", torch.bfloat16, extras=("norms", "clip_norm", "clip_value"))
    want = problem.forward(reference)
    problem.dy[1, 2, 5] = float("nan")
    dgx, dgh, dh0, *_, norms = problem.backward(cuda, *want)
    lost = torch.arange(5) == 2
    for x in (dgx[:2], dgh[:2]):
        assert torch.equal(x.isnan().any(0).any(-1), lost)
    assert torch.equal(dh0.isnan().any(-1), lost)
    assert norms[0, 0, :2, 2].isnan().all() and not norms[..., [0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wait_in_vain_gives_nan_and_the_next_call_raises(emulator, cell, direction):
    problem = Problem(cell, torch.float32, extras=("norms",))
    want = problem.forward(cuda)
    emulator.missing, emulator.wait_limit = 1, 2000
    if direction == "forward":
        y, _, h_n, c_n, _ = problem.forward(cuda)
        assert all(x.isnan().all() for x in (y, h_n, c_n))
    else:
        assert all(x.isnan().all() for x in problem.backward(cuda, *want))
    emulator.missing = -1
    with pytest.raises(RuntimeError, match="waited in vain"):
        problem.forward(cuda)
    assert same_bits(problem.forward(cuda), want)  # raised only once


def test_why_not_a_call(emulator, monkeypatch, set_precision):
    """The reasons that `why_not` gives before there are tensors."""
    monkeypatch.setattr(cuda, "MISSING", None)

    def why(dtype=torch.float32, **request):
        return cuda.why_not(Request("lstm", "cuda", dtype, 40, **request)) or ""

    assert why() == why(torch.float16, batch=5, features=frozenset({"tap", "clip", "lengths", "residual"})) == ""
    for feature in ("layer_norm", "projection", "zoneout", "recurrent_dropout"):
        assert f"no {feature}" in why(features=frozenset({feature}))
    assert "float64" in why(torch.float64)
    assert "32-bit" in why(batch=2**31 // 160 + 1)
    set_precision(torch.backends.cudnn.rnn, "ieee")
    assert "not tf32" in why() and why(torch.float16) == ""
    monkeypatch.setattr(cuda, "MISSING", "it is not built")
    assert why(torch.float16) == "it is not built"


def test_why_not_these_tensors(emulator, monkeypatch, set_precision):
    """The reasons that only the tensors of a call show, or that may have changed since."""

    def why(dtype=torch.float32, H=40, B=5, **others):
        inputs = ScanInputs(None, torch.zeros(4 * H, H, dtype=dtype), torch.zeros(1, H, dtype=dtype).expand(B, H))
        return cuda.why_not_tensors(inputs._replace(**others), Walk("lstm", False, "cuda")) or ""

    bound = torch.ones(())
    assert why() == why(clip_norm=bound) == why(torch.float16) == why(B=0) == ""
    for name in ("w_hr", "ln_hh", "ln_c_weight", *MASKS[1:]):
        assert f"no {name}" in why(**{name: bound})
    assert "float64" in why(torch.float64)
    assert "overflow float16" in why(torch.float16, clip_norm=bound)
    assert "32-bit" in why(B=2**31 // 160 + 1)
    assert "does not fit" in why(torch.bfloat16, H=1281)
    set_precision(torch.backends.cudnn.rnn, "ieee")
    assert "not tf32" in why() and why(torch.float16) == ""
    monkeypatch.setenv("FASTRNN_CUDA_MODE", "step")
    with pytest.raises(ValueError, match="all, cluster, grid"):
        why(torch.float16)
    for emulator.way, other in (("cluster", "grid"), ("grid", "cluster")):
        monkeypatch.setenv("FASTRNN_CUDA_MODE", emulator.way)
        assert why(torch.float16) == ""
        monkeypatch.setenv("FASTRNN_CUDA_MODE", other)
        assert f"does not fit the chip by {other}" in why(torch.float16)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_the_table_has_a_kernel_that_fits(emulator, cell):
    """There is one for every bucket on either architecture except one on sm_80; by cluster up to the H
    given; all within the shared memory of a CTA."""
    for H in (1, 256, 257, 512, 513, 640, 641, 768, 769, 1024, 1280):
        for dtype in TOLERANCE:
            found = {}
            for emulator.way in WAYS:
                if sizes := emulator.describe(cell, dtype, H):
                    found[emulator.way] = sizes
                    bucket, units, rows, forward, backward = sizes
                    assert H <= bucket and (units, rows) in ((32, 8), (48, 8), (32, 16), (16, 16), (16, 8))
                    assert max(forward, backward) <= (163 if emulator.way == "grid" else 227) * 1024
            assert ("grid" in found) == ((cell, dtype) != ("lstm", torch.float32) or H <= 1024)
            assert "grid" in found or "wide_grid" in found
            assert ("cluster" in found) == (H <= BY_CLUSTER[cell][dtype == torch.float32])
    assert emulator.describe(cell, torch.bfloat16, 1281) is None


def test_what_the_kernels_do_not_know_is_refused_with_its_reason(emulator):
    problem = Problem("lstm", torch.float32)
    inputs, walk = problem.of(ScanInputs), problem.walk()
    zone = torch.full_like(problem.dc, 0.3)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call: its kernels have no zone_c"):
        cuda.forward(inputs._replace(zone_c=zone), walk, True)
    y = torch.zeros_like(problem.dy)
    with pytest.raises(RuntimeError, match="no zone_c"):
        kept = Kept(y, y, y)
        cuda.backward(IncomingGradients(), kept, inputs._replace(gx=None, zone_c=zone), walk, False)
    assert emulator.launches == 0


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_an_empty_batch_launches_nothing(emulator, cell):
    problem = Problem(cell, torch.float32, B=1, extras=("norms",))
    for name in ("gx", "h0", "c0", "dy", "dh_n", "dc", "dc_n"):
        x = getattr(problem, name)
        setattr(problem, name, None if x is None else x[..., :0, :])
    want = problem.forward(reference)
    got = problem.forward(cuda)
    assert [x.shape for x in got] == [x.shape for x in want]
    gradients = problem.backward(cuda, *got), problem.backward(reference, *want)
    assert [x.shape for x in gradients[0]] == [x.shape for x in gradients[1]]
    assert emulator.launches == 0
