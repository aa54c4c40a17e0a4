"""csrc's persistent CUDA kernels without a GPU: their own source, emulated on the host, against the reference.

`emulator/scan.cpp` compiles csrc/cuda with a C++ compiler: a fiber is a CUDA thread; tensor-core products, shared
memory, clusters and barriers are emulated (emulator/emulated.h). The launcher is fastrnn/backends/cuda.py, with the
emulated ops in place of csrc's. Races: test_csrc_races.py. Not covered: caches, and the C++ code that launches.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastrnn import ops
from fastrnn.arguments import IncomingGradients, Kept, ScanInputs, Walk, as_tensors
from fastrnn.backends import cuda, reference
from fastrnn.cells import CELLS, PAD, RESET, START
from fastrnn.dispatch import Request
from problems import in_one_call, same_bits

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "g++")
WAYS = ("cluster", "grid", "wide_grid")
# The largest H by cluster, in the half types and in TF32.
BY_CLUSTER = {"lstm": (640, 256), "gru": (768, 512)} | dict.fromkeys(
    ("rnn_tanh", "rnn_relu", "rnn_leaky_relu", "rnn_elu"), (768, 768)
)

if shutil.which(CXX) is None:
    pytest.skip(f"no C++ compiler {CXX}", allow_module_level=True)


class Shape(ctypes.Structure):
    _fields_ = [("T", ctypes.c_int64), *((name, ctypes.c_int) for name in ("D", "B", "H", "reverse"))]


class Layout(ctypes.Structure):
    _fields_ = [
        ("groups", ctypes.c_int), ("seed", ctypes.c_uint), ("wait_limit", ctypes.c_int), ("missing", ctypes.c_int),
        ("timeout_flag", ctypes.c_uint32),
    ]  # fmt: skip


class Emulator:
    """csrc's ops on the emulator. `way` chooses the kernel, `room` is for how many directions at once; the other fields
    describe a launch."""

    way, groups, seed, wait_limit, missing, room, launches = "grid", 0, 0, 2**30, -1, 2, 0

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))

    def describe(self, cell, dtype, hidden_size):
        """bucket, units, rows, shared bytes forward and backward, or None."""
        sizes = (ctypes.c_int * 5)()
        name = str(dtype).split(".")[1].encode()
        found = self.library.describe(cell.encode(), name, self.way.encode(), hidden_size, sizes)
        return list(sizes) if found else None

    def persistent_group(self, w_hh, cell, ways):
        sizes = self.describe(cell, w_hh.dtype, w_hh.shape[-1])
        room = len(w_hh) <= self.room if w_hh.dim() == 3 else self.room
        allowed = ways == "all" or (ways == "cluster") == (self.way == "cluster")
        return -(-w_hh.shape[-1] // sizes[1]) if sizes and room and allowed else 0

    def call(self, function, cell, like, reverse, pointers, timeout_flag, *rest):
        *D, T, B, H = like.shape
        layout = Layout(self.groups, self.seed, self.wait_limit, self.missing, 0)
        addresses = (ctypes.c_void_p * len(pointers))(*(None if x is None else x.data_ptr() for x in pointers))
        assert function(
            cell.encode(), str(like.dtype).split(".")[1].encode(), self.way.encode(),
            ctypes.byref(Shape(T, *(D or [1]), B, H, reverse)), ctypes.byref(layout), addresses, *rest,
        )  # fmt: skip
        self.launches += 1
        timeout_flag[0] |= layout.timeout_flag

    def persistent_forward(self, gx, w_hh, h0, c0, b_hh, flags, cell, reverse, ways, y, c, h_n, c_n, saved,
                           timeout_flag):  # fmt: skip
        pointers = [gx, w_hh, b_hh, h0, c0, flags, y, h_n, c_n, c, saved]
        self.call(self.library.emulate_forward, cell, y, reverse, pointers, timeout_flag)

    def persistent_backward(self, dy, dc, dh_n, dc_n, y, c, saved, w_hh, h0, c0, flags, clip_norm, cell, reverse,
                            clip_value, ways, dgx, dgh, dh0, dc0, norms, timeout_flag):  # fmt: skip
        pointers = [dy, dc, dh_n, dc_n, saved, y, c, h0, c0, w_hh, flags, clip_norm, dgx, dgh, dh0, dc0, norms]
        bound = ctypes.c_float(float("inf") if clip_value is None else clip_value)
        self.call(self.library.emulate_backward, cell, y, reverse, pointers, timeout_flag, bound)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The kernels, compiled for the host."""
    made = tmp_path_factory.mktemp("emulated") / "scan.so"
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [CXX, "-std=c++17", "-O1", "-shared", "-fPIC", *strict]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/emulator'}"]
    subprocess.run([*command, str(ROOT / "tests/emulator/scan.cpp"), "-o", str(made)], check=True)
    return made


@pytest.fixture
def emulator(library, monkeypatch, set_precision):
    """`fastrnn.backends.cuda` runs on the emulator, into outputs that hold NaN before."""
    emulator = Emulator(library)

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    monkeypatch.setattr(cuda, "OPS", emulator)
    monkeypatch.delenv("FASTRNN_CUDA_MODE", raising=False)
    set_precision(torch.backends.cudnn.rnn, "tf32")
    return emulator


class Problem:
    """Random arguments of one forward and one backward call. `extras`: what goes beyond the plain call."""

    ALL = ("flags", "clip_norm", "clip_value", "norms")

    def __init__(self, cell, dtype, T=3, B=5, H=40, reverse=False, extras=(), draw=torch.randn, w_hh=None, seed=0):
        rng = torch.Generator().manual_seed(seed)
        G, has_c = len(CELLS[cell].gates), "c" in CELLS[cell].states

        def drawn(*shape, dtype=dtype):
            return draw(shape, generator=rng).to(dtype)

        self.cell, self.reverse, self.norms = cell, reverse, "norms" in extras
        self.gx, self.h0, self.b_hh = drawn(T, B, G * H), drawn(B, H), drawn(G * H)
        self.w_hh = (torch.randn(G * H, H, generator=rng) / H**0.5).to(dtype) if w_hh is None else w_hh
        self.dy, self.dh_n = drawn(T, B, H), drawn(B, H)
        self.c0, self.dc_n = (drawn(B, H, dtype=torch.float32) if has_c else None for _ in range(2))
        self.dc = drawn(T, B, H, dtype=torch.float32) if has_c else None
        self.flags = self.some_flags(rng, T, B, reverse) if "flags" in extras else None
        self.clip_norm = torch.tensor(0.9 * H**0.5) if "clip_norm" in extras else None
        self.clip_value = 1.1 if "clip_value" in extras else None

    @staticmethod
    def some_flags(rng, T, B, reverse):
        """Lengths, one of them zero and one full, and resets."""
        lengths = torch.randint(1, T + 1, (B,), generator=rng)
        lengths[0], lengths[-1] = T, 0
        t = torch.arange(T)[:, None]
        flags = PAD * (t >= lengths) + RESET * (torch.rand(T, B, generator=rng) < 0.25)
        return (flags + (START * (t == lengths - 1) if reverse else 0)).to(torch.uint8)

    def arguments(self):
        tensors = {name: getattr(self, name) for name in ("gx", "w_hh", "h0", "c0", "b_hh", "flags", "clip_norm")}
        return ScanInputs(**tensors), Walk(self.cell, self.reverse, "cuda", self.clip_value)

    def forward(self, backend, save=True):
        inputs, walk = self.arguments()
        if backend is cuda:  # by the raw op, which splits directions
            return ops.scan_forward(*inputs, *walk, save)
        return as_tensors(backend.forward(inputs, walk, save), self.gx)

    def backward(self, backend, y, c, _h_n, _c_n, saved):
        inputs, walk = self.arguments()
        inputs = inputs._replace(gx=None)
        incoming = IncomingGradients(self.dy, self.dc, self.dh_n, self.dc_n)
        kept = Kept(y, None if self.c0 is None else c, saved)
        if backend is cuda:
            return ops.scan_backward(*incoming, *kept, *inputs, *walk, self.norms)
        return as_tensors(backend.backward(incoming, kept, inputs, walk, self.norms), self.gx)


def check(got, want, tolerance):
    """Every output within `tolerance` of the largest element of the wanted one."""
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), k
        if a.numel():
            error = (a.double() - b.double()).abs().max().item()
            assert error <= tolerance * max(1e-30, b.double().abs().max().item()), f"output {k} is off by {error}"


def extras_of(dtype):
    """All that the kernels take in that type."""
    return tuple(name for name in Problem.ALL if dtype != torch.float16 or name != "clip_norm")


# Against the reference in the same type, over few steps. Sums in another order: some roundings fall to the other side
# of a tie, and one such flip of h passes through the gates. TF32 keeps 10 bits of each factor.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-9}


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


def small_integers(shape, generator):
    return torch.randint(-2, 3, shape, generator=generator).float()


def three_per_row(H, dtype):
    """Three signed permutations: every sum stays a small integer, exact in each type, so that one wrong index shows."""
    rng, w = torch.Generator().manual_seed(3), torch.zeros(H, H)
    for _ in range(3):
        w[torch.arange(H), torch.randperm(H, generator=rng)] += torch.randint(0, 2, (H,), generator=rng) * 2.0 - 1
    return w.to(dtype)


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
    problem = Problem(
        "rnn_relu", dtype, B=9, H=H, reverse=H % 2 == 1, draw=small_integers, w_hh=three_per_row(H, dtype)
    )
    want = problem.forward(reference)
    assert same_bits(problem.forward(cuda), want)
    assert same_bits(problem.backward(cuda, *want), problem.backward(reference, *want))


@pytest.mark.slow
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


def all_outputs(problem):
    outputs = problem.forward(cuda)
    return outputs + problem.backward(cuda, *outputs)


def each_alone(problems, run=all_outputs):
    each = zip(*map(run, problems), strict=True)
    return [torch.stack(found) if found[0].dim() > 1 else found[0] for found in each]


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
    """What `why_not` knows of a call before there are tensors."""
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
    """What shows only in the tensors of a call, or may have changed since."""

    def why(dtype=torch.float32, H=40, B=5, **others):
        inputs = ScanInputs(None, torch.zeros(4 * H, H, dtype=dtype), torch.zeros(1, H, dtype=dtype).expand(B, H))
        return cuda.why_not_tensors(inputs._replace(**others), Walk("lstm", False, "cuda")) or ""

    bound = torch.ones(())
    assert why() == why(clip_norm=bound) == why(torch.float16) == why(B=0) == ""
    for name in ("w_hr", "ln_hh", "ln_c_weight", "recurrent_mask", "zone_h", "zone_c"):
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
    """For every bucket on either architecture, but for one on sm_80; by cluster to the H given; with shared memory
    within what a CTA can have."""
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
    inputs, walk = problem.arguments()
    zone = torch.full_like(problem.dc, 0.3)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call: its kernels have no zone_c"):
        cuda.forward(inputs._replace(zone_c=zone), walk, True)
    _, walk, y = *problem.arguments(), torch.zeros_like(problem.dy)
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


# --- on a GPU ---------------------------------------------------------------------------------------


@pytest.fixture
def native(monkeypatch, set_precision):
    """A function that runs a problem on the GPU: by the kernels with that FASTRNN_CUDA_MODE, or by the reference."""
    if cuda.MISSING:
        pytest.skip(f"csrc: {cuda.MISSING}")
    set_precision(torch.backends.cudnn.rnn, "tf32")
    set_precision(torch.backends.cuda.matmul, "tf32")

    def run(problem, mode="all"):
        for name, value in vars(problem).items():
            setattr(problem, name, value.cuda() if torch.is_tensor(value) else value)
        backend = reference if mode == "reference" else cuda
        if backend is cuda:
            monkeypatch.setenv("FASTRNN_CUDA_MODE", mode)
        outputs = problem.forward(backend)
        return outputs + problem.backward(backend, *outputs)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("H", [1, 40, 256, 500, 512, 700, 1000])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("ways", ["cluster", "grid"])
def test_gpu_equals_the_reference_and_repeats_its_bits(native, ways, cell, dtype, reverse, H):
    if ways == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no thread-block clusters")
    if ways == "cluster" and H > BY_CLUSTER[cell][dtype == torch.float32]:
        pytest.skip("does not fit by cluster")
    for B in (1, 19, 150):
        problem = Problem(cell, dtype, T=4, B=B, H=H, reverse=reverse, extras=extras_of(dtype))
        first = native(problem, ways)
        check(first, native(problem, "reference"), TOLERANCE[dtype])
        assert same_bits(first, native(problem, ways))


@pytest.mark.gpu
@pytest.mark.parametrize("H", [40, 500, 1000])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_gpu_both_directions_in_one_launch_equal_each_alone(native, cell, H):
    directions = [Problem(cell, torch.bfloat16, B=70, H=H, reverse=d, extras=Problem.ALL, seed=d) for d in range(2)]
    if cuda._group_size(cell, in_one_call(directions).w_hh.cuda()) == 0:
        pytest.skip("this GPU does not hold a group of each direction at once")
    want = each_alone(directions, native)
    assert same_bits(native(in_one_call(directions)), want)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [256, 1000])
def test_gpu_sums_are_exact(native, H):
    problem = Problem("rnn_relu", torch.bfloat16, B=33, H=H, draw=small_integers, w_hh=three_per_row(H, torch.bfloat16))
    assert same_bits(native(problem), native(problem, "reference"))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("H", [256, 700])
def test_gpu_ten_thousand_launches_beside_a_busy_stream(native, H):
    """No hang, no drift: the same bits at the end as at the start, while another stream keeps the multiprocessors."""
    problem = Problem("lstm", torch.bfloat16, T=8, B=64, H=H, extras=("norms",))
    first = native(problem)
    busy, load = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for k in range(5000):  # forward and backward
        if k % 10 == 0:
            with torch.cuda.stream(busy):
                load @ load
        last = native(problem)
    assert same_bits(first, last)


@pytest.mark.gpu
@pytest.mark.parametrize("H", [256, 700])
def test_gpu_graph_replay(native, H):
    problem = Problem("gru", torch.bfloat16, T=16, B=40, H=H, extras=("norms", "clip_norm"))
    want = native(problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = native(problem)
    for _ in range(100):
        graph.replay()
    torch.cuda.synchronize()
    assert same_bits(got, want)
