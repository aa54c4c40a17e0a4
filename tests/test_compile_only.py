"""The Triton kernels compiled for GPUs that this machine does not have, at the tiles that `tiles.py` chooses.

A group of kernels compiles in a process of its own, without Triton's interpreter: this file, run as a script with
the cases as JSON, prints what it read from each compiled kernel as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

from fastrnn import cells, tiles
from fastrnn.arguments import MASKS
from fastrnn.backends import programs
from fastrnn.cell_table import spec_of
from scripts import without_interpreter

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# The pointers of a call without extras. The other pointers are None, unless a case names them.
PLAIN = {
    "forward": ["gx", "w", "b", "h_in", "h_out", "y", "saved", "c_in", "c_out", "c"],
    "backward": ["dy", "dh_in", "dc_in", "saved", "y", "h0", "w", "dh_out", "dgx", "dgh", "c", "c0", "dc_out"],
}
# The same of the kernels of kernels/gemm_step.py.
PLAIN_GEMM = {
    "forward": ["gx", "gh", "b", "h_in", "h_out", "y", "saved", "c_in", "c_out", "c"],
    "backward": [*PLAIN["backward"], "product"],
    "forward_projected": ["projected", "h_in", "h_out", "y"],
    "backward_projected": ["dy", "product", "dh_in", "dh_out", "dh_new"],
    "initial": ["product", "past_weights", "dh0"],
}
BETWEEN_PROGRAMS = {"local": [], "stepwise": ["operand"], "grouped": ["operand", "arrived", "timeout_flag"]}
FLOAT32 = ["c_in", "c_out", "c", "c0", "dc_in", "dc_out", "dc", "norms", "clip_norm"]
FLOAT32 += [
    "unscaled_x",
    "unscaled_h",
    "unscaled_cell",
    "partial_norms",
    "gh",
    "projected",
    "gh_hat",
    "gh_rstd",
    "product",
]
FLOAT32 += ["dh_cell", "dh_cell_unclamped", "norm_h", "scales", "past_weights"]
FLOAT32 += ["decayed_h_grad", "decayed_c_grad", "dc_new"]
OTHER_TYPES = {"flags": "u8", "arrived": "i32", "timeout_flag": "i32"}
ONLY_WITH_C = ["c_in", "c_out", "c", "c0", "dc_in", "dc_out", "dc", "zone_c", "ln_c_weight", "ln_c_bias", "dh_new"]
ONLY_WITH_C += ["decay_c", "decayed_c_grad", "dc_new"]
KILOBYTE = 1024
LIMITS = {80: 163 * KILOBYTE, 90: 227 * KILOBYTE, "gfx942": 64 * KILOBYTE}  # shared memory of one program


def tile_of(case: dict) -> tiles.Tile | tiles.GemmTile:
    return (tiles.GemmTile if case["gemm"] else tiles.Tile)(*case["tile"])


def signature(kernel, case: dict) -> tuple[dict, dict]:
    """Types and constants of the kernel's arguments, in the form that `ASTSource` takes."""
    spec, (forward, total, backward) = spec_of(case["cell"]), programs.equations(case["cell"])
    tile = tile_of(case)
    S, H, heads = len(spec.states), case["hidden_size"], case.get("heads", 1)
    constants = dict(
        CELL_FORWARD=forward, CELL_TOTAL=total, CELL_BACKWARD=backward, G=len(spec.gates), K=len(spec.saved), S=S,
        Q=len(spec.parameters), N=len(spec.inputs), H=H, LN_EPS=1e-5, BLOCK_B=tile.block_b,
    )  # fmt: skip
    if case["gemm"]:
        width = 1 << (H - 1).bit_length()
        constants |= dict(BLOCK_H=width, P=H, BLOCK_P=width, MASKS=1, LN_OF="separate", LN_CARRIED=False)
        constants |= case["kinds"]
        present = {*PLAIN_GEMM[case["kernel"]], *case["extras"]}
    else:
        count = heads * -(-(H // heads) // tile.block_h)
        constants |= dict(
            HEADS=heads, BLOCK_H=tile.block_h, BLOCK_K=tile.block_k, MODE=tile.mode,
            WIDTH=1 << (S * count - 1).bit_length(), PRECISION=case["precision"],
        )  # fmt: skip
        present = {*PLAIN[case["kernel"]], *case["extras"], *BETWEEN_PROGRAMS[tile.mode]}
    present.difference_update(ONLY_WITH_C if S == 1 else (), () if spec.distinct_dgh else ("dgh", "unscaled_h"))
    present.difference_update(() if spec.recurrent else ("w", "b", "gh", "product"))
    beside = {"parameters": spec.parameters, "step_inputs": spec.inputs, "dcell": spec.parameters + spec.inputs}
    present.update(name for name, planes in beside.items() if planes)
    if "unscaled_x" in present and beside["dcell"]:
        present.add("unscaled_cell")
    types = {}
    for name in kernel.arg_names:
        short = name.removesuffix("_ptr")
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr") or name == "clip_value":
            element = "fp32" if short in FLOAT32 else OTHER_TYPES.get(short, DTYPES[case["dtype"]])
            types[name] = "constexpr" if short not in present else "fp32" if name == "clip_value" else "*" + element
        else:
            types[name] = "i32"
    return types, {name: constants.get(name) for name, kind in types.items() if kind == "constexpr"}


def marked_lines(ttgir: str) -> Iterator[tuple[bool, str]]:
    """Each line of the kernel, and whether it is in a loop."""
    depth, loop_depth = 0, None
    for line in ttgir.splitlines():
        if loop_depth is None and " scf.for " in line:
            loop_depth = depth
        yield loop_depth is not None, line
        depth += line.count("{") - line.count("}")
        if loop_depth is not None and depth <= loop_depth:
            loop_depth = None


def lines_of(ttgir: str, pointers: list[str], until: str) -> Iterator[tuple[bool, str]]:
    """The `marked_lines` on what comes of the pointers, up to operations that match `until`."""
    derived = {f"%{name}_ptr" for name in pointers}
    for inside, line in marked_lines(ttgir):
        result, _, expression = line.strip().partition(" = ")
        if not result.startswith("%"):
            result, expression = "", line.strip()
        if not derived.intersection(re.findall(r"%[\w#]+", expression)):
            continue
        yield inside, line.strip()
        if not re.search(until, expression):
            derived.update(re.findall(r"%[\w#]+", result))


def weights_in_loop(ttgir: str) -> list[str]:
    """Lines in a loop that load W_hh from global memory, or move it to a place on the chip other than the registers."""
    moves = r"tt\.load|buffer_load|local_alloc|async_copy|local_store"
    return [line for inside, line in lines_of(ttgir, ["w"], "local_load|dot") if inside and re.search(moves, line)]


EXCHANGED = {"forward": ["operand"], "backward": ["dgx", "dgh", "unscaled_x", "unscaled_h", "partial_norms"]}


def exchange(ttgir: str, pointers: list[str]) -> str:
    """The operations of the time loop on data that the programs of a group exchange, a letter each, in order: w(ait),
    l(oad), L(oad from the L1 cache), s(tore), a(rrive)."""
    moves = {line for _, line in lines_of(ttgir, pointers, r"tt\.load") if re.search(r"tt\.(load|store)", line)}
    letters = ""
    for inside, line in marked_lines(ttgir):
        if inside and "ld.acquire.gpu" in line:
            letters += "w"
        elif inside and "red.release.gpu" in line:
            letters += "a"
        elif inside and line.strip() in moves:
            letters += "s" if "tt.store" in line else "l" if re.search(r"cache_?[mM]odifier = cg", line) else "L"
    return letters


PREFETCHED = {"forward": "gx", "backward": "saved"}  # the pointer to several planes that a step reads first


def fetched(ttgir: str, pointer: str) -> str:
    """The operations of the time loop on the planes at the pointer: l(oad), c(onversion), which waits for a load."""
    lines = [line for inside, line in lines_of(ttgir, [pointer], "convert_layout|local_alloc") if inside]
    moves = [re.search(r"tt\.(l)oad|ttg\.(c)onvert_layout|ttg\.lo(c)al_alloc", line) for line in lines]
    return "".join(move[1] or move[2] or move[3] for move in moves if move)


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)")
# A letter for each instruction that reads or writes memory or waits: asynchronous copy, report to the host, arrival,
# wait, barrier, load of data of other programs, any other load, store.
MACHINE = [
    (r"LDGSTS|UTMA|UBLKCP", "*"), (r"STG.*STRONG\.SYS", "r"), (r"REDG?\..*ADD", "a"), (r"BAR\.RED", "w"), (r"BAR", "b"),
    (r"LDG.*STRONG\.GPU", "x"), (r"LDG", "l"), (r"STG", "s"),
]  # fmt: skip


def machine(sass: str) -> str:
    """The kernel's machine code in the letters of `MACHINE`."""
    letters = ""
    for name in INSTRUCTION.findall(sass):
        letters += next((letter for pattern, letter in MACHINE if re.match(pattern, name)), "")
    return letters


def arithmetic(ttgir: str) -> list[str]:
    """All that the order of sums depends on: the types and instruction of products, the layout of reductions."""
    layouts = dict(re.findall(r"^(#\w+) = (#\S+<.*>)$", ttgir, re.M))
    kinds = set()
    for line in ttgir.splitlines():
        if re.search(r"tt\.dot |warp_group_dot |^\s*\}\) : \(", line):
            kind = re.sub(r"#\w+\b", lambda m: layouts.get(m[0], m[0]), line.split(" : ", 1)[1].split(" loc(")[0])
            # Which warp holds which element of a product does not change its sum.
            kinds.add(re.sub(r"warpsPerCTA = \[.*?\], ", "", kind) if "dot" in line else kind)
    return sorted(kinds)


def compiled(case: dict) -> dict:
    """Compiles one kernel and reads from it the properties that the tests check."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastrnn.kernels import gemm_step, scan

    kernel, tile = getattr(gemm_step if case["gemm"] else scan, f"{case['kernel']}_kernel"), tile_of(case)
    types, values = signature(kernel, case)
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(kernel.arg_names) if types[name][0] == "*"}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=aligned)
    options = dict(num_warps=tile.warps, num_stages=1 if case["gemm"] else tile.stages, enable_fp_fusion=False)
    if tile.mode == "grouped":
        options["launch_cooperative_grid"] = True
    binary = triton.compile(source, target=GPUTarget(*case["target"]), options=options)
    ttgir = binary.asm["ttgir"]
    found = {
        "shared": binary.metadata.shared,
        "weights_in_loop": weights_in_loop(ttgir),
        "arithmetic": arithmetic(ttgir),
        "exchange": exchange(ttgir, [] if case["gemm"] else EXCHANGED[case["kernel"]]),
        "fetched": "" if case["gemm"] else fetched(ttgir, PREFETCHED[case["kernel"]]),
        "copies_in_loop": [line.strip() for inside, line in marked_lines(ttgir) if inside and "async" in line],
    }
    if case["target"][0] == "cuda":
        path = os.path.join(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
        with open(path, "wb") as file:
            file.write(binary.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.check_output([tool, "-res-usage", path], text=True)
        found.update(registers=int(re.search(r"REG:(\d+)", usage)[1]), spilled=int(re.search(r"STACK:(\d+)", usage)[1]))
        sass = subprocess.check_output([tool, "-sass", path], text=True)
        found.update(machine=machine(sass), instructions=len(INSTRUCTION.findall(sass)))
    return found


def read_compiled(cases: list[dict], cache) -> list[dict]:
    """`compiled` of every case, in a process without the interpreter."""
    return without_interpreter(__file__, cases, cache)


# cell, dtype, H, B: the largest H of a tile that holds all of W_hh, or one far beyond.
SIZES = [
    ("lstm", "bfloat16", 128, 16),
    ("lstm", "bfloat16", 1024, 64),
    ("lstm", "float32", 64, 16),
    ("lstm", "float32", 1024, 128),
    ("gru", "bfloat16", 128, 16),
    ("gru", "float16", 1024, 16),
    ("gru", "float32", 64, 16),
    ("gru", "float32", 1000, 64),
    ("rnn_tanh", "bfloat16", 256, 16),
    ("rnn_tanh", "float32", 1024, 128),
    ("rnn_relu", "float16", 100, 16),
    ("rnn_leaky_relu", "bfloat16", 1024, 128),
    ("rnn_elu", "float32", 128, 16),
]


def make_case(
    kernel, target, arch, cell, dtype, hidden_size, batch_size, extras=(), precision="tf32", mode=None, heads=1
):
    sizes = (hidden_size, batch_size, precision, mode, LIMITS[arch])
    tile = tiles.choose(cell, getattr(torch, dtype), *sizes, heads=heads)
    return dict(
        kernel=kernel, cell=cell, dtype=dtype, hidden_size=hidden_size, tile=tile, extras=extras, precision=precision,
        heads=heads, gemm=False, target=(target, arch, 32 if target == "cuda" else 64),
    )  # fmt: skip


# What each kernel of kernels/gemm_step.py can have at once, with layer norm and with projection.
GEMM_EXTRAS = {
    "forward": (*MASKS, "decay_h", "decay_next", "decay_c", "ln_hh", "ln_c_weight", "ln_c_bias", "operand"),
    "backward": (
        *MASKS, "decay_h", "decay_c", "decayed_h_grad", "decayed_c_grad", "ln_hh", "ln_c_weight", "ln_c_bias", "gh_hat",
        "gh_rstd", "dgh_raw", "dh_new", "clip_norm", "clip_value", "norms", "dc",
    ),
    "forward_projected": (*MASKS[:3], "decay_h", "decay_next", "operand"),
    "backward_projected": (*MASKS[:3], "decay_h", "decayed_h_grad", "clip_value", "scales", "dh_new_unclamped",
        "norm_h", "norms"),
    "initial": (*MASKS[:2], "decay_h", "decayed_h_grad", "scales"),
}  # fmt: skip


def make_gemm_case(kernel, arch, cell, dtype, hidden_size, extras=(), **kinds):
    tile = tiles.choose(cell, getattr(torch, dtype), hidden_size, 1, mode="gemm")
    return dict(
        kernel=kernel, cell=cell, dtype=dtype, hidden_size=hidden_size, tile=tile, extras=extras, gemm=True,
        kinds=kinds, target=("hip", arch, 64) if arch == "gfx942" else ("cuda", arch, 32),
    )  # fmt: skip


def check(case, found, arch):
    tile, what = case["tile"], f"{case['kernel']} {case['cell']} {case['dtype']} H={case['hidden_size']} {case['tile']}"
    assert found["shared"] <= LIMITS[arch], what
    # The loads of all planes are issued before the first wait for one.
    if tile.mode == "grouped":
        assert re.fullmatch("l+c*", found["fetched"]), f"{what}: {found['fetched']}"
    if tile.mode != "stepwise":
        assert not found["weights_in_loop"], f"{what}: W_hh is loaded in the time loop"
        # Data that a step writes must not be fetched before the write.
        assert not found["copies_in_loop"], f"{what}: copied asynchronously in the time loop"
    else:
        assert found["weights_in_loop"], f"{what}: W_hh is streamed, but no load of it was found"
    if tile.mode == "grouped":
        # Data of other programs is read after they arrived, and not from L1; all stores come before the arrival.
        assert re.fullmatch(r"w[ls]*l[ls]*s[ls]*a", found["exchange"]), f"{what}: {found['exchange']}"
        # The same of the machine code, where the first x is the poll. Between the last store and the arrival, which one
        # thread signals for all, there is a barrier.
        assert re.fullmatch(r"[lbs]*xrw[lbsx]*x[lbsx]*s[lb]*ba[lbs]*", found["machine"]), f"{what}: {found['machine']}"
    # ptxas spills a few values to lower the register count to where one more program fits (at most 24 bytes were seen,
    # at 128 registers; and 32 at 255, for a float32 LSTM whose planes are all loaded at once). A tile that is too large
    # spills hundreds of bytes. Grouped and clipping by norm, a dozen addresses that do not change over time are
    # spilled too (40 bytes were seen).
    limit = 64 if tile.mode == "grouped" and "clip_norm" in case["extras"] else 32
    assert found.get("spilled", 0) <= limit, f"{what}: {found['registers']} registers, {found['spilled']} bytes spilled"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("arch", [80, 90])
def test_nvidia(arch, kernel, tmp_path):
    norms = ("norms",) if kernel == "backward" else ()
    cases = [make_case(kernel, "cuda", arch, *size, extras=norms) for size in SIZES]
    for batch_size in (16, 64, 128):
        cases.append(make_case(kernel, "cuda", arch, "lstm", "float32", 1024, batch_size, norms, "ieee"))
    for case, found in zip(cases, read_compiled(cases, tmp_path), strict=True):
        check(case, found, arch)


NORMS = {"forward": (), "backward": ("norms",)}

# cell, dtype, H, B, architecture on which a group can hold W_hh.
GROUPED = [
    ("lstm", "bfloat16", 512, 64, 80),
    ("lstm", "float16", 768, 16, 90),
    ("lstm", "bfloat16", 1024, 64, 90),
    ("lstm", "float32", 512, 32, 90),
    ("gru", "bfloat16", 512, 64, 80),
    ("gru", "float16", 1024, 64, 90),
    ("gru", "float32", 512, 64, 90),
    ("rnn_tanh", "bfloat16", 1000, 64, 80),
    ("rnn_elu", "float32", 1024, 64, 90),
]


def check_group(size, extras, cache, heads=1):
    """Grouped kernels. The stepwise ones at the same tile have the same instructions and reductions, so that the bits
    can be equal."""
    *size, arch = size
    cases = []
    for kernel in extras:
        case = make_case(kernel, "cuda", arch, *size, extras[kernel], mode="grouped", heads=heads)
        cases += [case, {**case, "tile": case["tile"]._replace(mode="stepwise")}]
    found = read_compiled(cases, cache)
    for k in (0, 2):
        check(cases[k], found[k], arch)
        assert found[k]["arithmetic"] == found[k + 1]["arithmetic"], cases[k]


@pytest.mark.slow
@pytest.mark.parametrize("size", GROUPED, ids=lambda size: "-".join(map(str, size)))
def test_grouped(size, tmp_path):
    check_group(size, NORMS, tmp_path)


EVERY_EXTRA = {
    "forward": MASKS,
    "backward": (*MASKS, "norms", "clip_norm", "clip_value", "dc", "unscaled_x", "unscaled_h", "partial_norms"),
}


# cell, dtype, units of a head: the most that a program can hold, and a number that fills no tile.
HEADS = [
    ("lstm", "bfloat16", 128),
    ("lstm", "float32", 80),
    ("gru", "bfloat16", 192),
    (cells.slstm.text, "bfloat16", 100),
]


# cell, dtype, H, B: heads that no program can hold.
STEPWISE_HEADS = [("lstm", "bfloat16", 1024, 64), ("gru", "float32", 1000, 128)]
# The same with the architecture on which the programs of a head can hold it.
GROUPED_HEADS = [
    ("lstm", "bfloat16", 1024, 16, 80),
    ("lstm", "float32", 1000, 32, 90),
    ("gru", "float16", 2048, 16, 90),
    (cells.slstm.text, "bfloat16", 1024, 16, 90),
]


@pytest.mark.slow
@pytest.mark.parametrize("size", GROUPED_HEADS, ids=lambda size: "-".join(map(str, (spec_of(size[0]).name, *size[1:]))))
def test_heads_grouped(size, tmp_path):
    check_group(size, NORMS, tmp_path, heads=4)


@pytest.mark.slow
def test_every_extra_at_once_in_grouped_heads(tmp_path):
    check_group(("lstm", "bfloat16", 1024, 16, 90), EVERY_EXTRA, tmp_path, heads=4)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_heads(arch, tmp_path):
    cases = []
    for cell, dtype, units in HEADS:
        # The shared memory of sm_80 holds no GRU of 192 units.
        units = 128 if arch == 80 and cell == "gru" else units
        for kernel in NORMS:
            cases.append(
                make_case(kernel, "cuda", arch, cell, dtype, 8 * units, 16, NORMS[kernel], mode="local", heads=8)
            )
    for size in STEPWISE_HEADS:
        cases += [make_case(kernel, "cuda", arch, *size, NORMS[kernel], heads=4) for kernel in NORMS]
        assert cases[-1]["tile"].mode == "stepwise"
    for case, found in zip(cases, read_compiled(cases, tmp_path), strict=True):
        check(case, found, arch)


@pytest.mark.slow
def test_every_extra_at_once(tmp_path):
    sizes = [("lstm", "bfloat16", 128, 16), ("gru", "bfloat16", 1024, 16)]
    cases = [make_case(kernel, "cuda", 90, *size, EVERY_EXTRA[kernel]) for kernel in EVERY_EXTRA for size in sizes]
    for case, found in zip(cases, read_compiled(cases, tmp_path), strict=True):
        check(case, found, 90)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_extra_at_once_grouped(cell, tmp_path):
    check_group((cell, "bfloat16", 512, 64, 90), EVERY_EXTRA, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_gemm_step(arch, tmp_path):
    """The kernels of kernels/gemm_step.py, plain and with everything at once, do not spill up to H = 2048."""
    cases = [make_gemm_case(kernel, arch, "lstm", "float32", 2048, GEMM_EXTRAS[kernel]) for kernel in GEMM_EXTRAS]
    # With a projection, the gradient of h comes from backward_projected_kernel.
    projected = {*GEMM_EXTRAS["backward"], "dh_cell", "dh_cell_unclamped", "norm_h", "scales"} - {"dh_new"}
    cases.append(make_gemm_case("backward", arch, "lstm", "bfloat16", 2048, (*projected,)))
    for kernel in ("forward", "backward"):
        cases.append(make_gemm_case(kernel, arch, "gru", "bfloat16", 1024, GEMM_EXTRAS[kernel]))
        cases.append(make_gemm_case(kernel, arch, "lstm", "float16", 512, GEMM_EXTRAS[kernel]))
        cases.append(make_gemm_case(kernel, arch, "lstm", "bfloat16", 1500))
        cases.append(make_gemm_case(kernel, arch, "rnn_tanh", "float32", 1))
    for case, found in zip(cases, read_compiled(cases, tmp_path), strict=True):
        what = f"{case['kernel']} {case['cell']} {case['dtype']} H={case['hidden_size']} {case['tile']}"
        assert found["shared"] <= LIMITS[arch], what
        # As in `check`: with Triton 3.6, 8 bytes of the forward go where 64 registers let one more program fit.
        assert found["spilled"] <= 32, f"{what}: {found['registers']} registers and {found['spilled']} bytes spilled"


@pytest.mark.slow
def test_gemm_step_of_other_kinds(tmp_path):
    """The same with the other layer norms, and with a recurrent mask for each gate."""
    arch, of_lstm = 80, (dict(LN_OF="gates", LN_CARRIED=True, MASKS=4), dict(LN_OF="sum", LN_CARRIED=True))
    cases = []
    for kernel in ("forward", "backward"):
        extras = GEMM_EXTRAS[kernel] if kernel == "forward" else (*GEMM_EXTRAS[kernel], "dgh", "dc_new")
        cases += [make_gemm_case(kernel, arch, "lstm", "float32", 1024, extras, **kinds) for kinds in of_lstm]
        cases.append(make_gemm_case(kernel, arch, "lstm", "bfloat16", 2048, extras, **of_lstm[0]))
        cases.append(make_gemm_case(kernel, arch, "gru", "float16", 512, extras, LN_OF="gates", MASKS=3))
    for kernel in ("forward_projected", "backward_projected", "initial"):
        cases.append(make_gemm_case(kernel, arch, "lstm", "bfloat16", 2048, GEMM_EXTRAS[kernel], MASKS=4))
    for case, found in zip(cases, read_compiled(cases, tmp_path), strict=True):
        what = f"{case['kernel']} {case['cell']} {case['dtype']} H={case['hidden_size']} {case['kinds']}"
        assert found["shared"] <= LIMITS[arch], what
        assert found["spilled"] <= 32, f"{what}: {found['registers']} registers and {found['spilled']} bytes spilled"


@pytest.mark.slow
def test_amd(tmp_path):
    sizes = [("lstm", "bfloat16", 64, 16), ("gru", "bfloat16", 1024, 64)]
    sizes += [("lstm", dtype, 1024, 128) for dtype in ("bfloat16", "float32")]
    cases = [
        make_case(kernel, "hip", "gfx942", *size, precision="ieee")
        for kernel in ("forward", "backward")
        for size in sizes
    ]
    gemm = [make_gemm_case(kernel, "gfx942", "lstm", "bfloat16", 512, GEMM_EXTRAS[kernel]) for kernel in GEMM_EXTRAS]
    found = read_compiled([*cases, *gemm], tmp_path)
    for case, result in zip(cases, found, strict=False):
        check(case, result, "gfx942")
    assert all(result["shared"] <= LIMITS["gfx942"] for result in found)


def table():
    """Prints the table of grouped kernels in docs/notes/compiler.md."""
    print("| | sm | tile | shared KB | registers | spilled bytes | barriers |\n|---|---|---|---|---|---|---|")
    for *size, arch in GROUPED:
        cell, dtype, hidden_size, batch_size = size
        cases = [make_case(kernel, "cuda", arch, *size, NORMS[kernel], mode="grouped") for kernel in NORMS]
        found = [compiled(case) for case in cases]
        for f in found:
            f["shared"] //= KILOBYTE
            # of all threads of a program, from the end of its wait for the others to its arrival
            f["barriers"] = re.search("w(.*)a", f["machine"])[1].count("b")
        tile = cases[0]["tile"]
        columns = (
            f"{cell} {dtype}, H {hidden_size}, B {batch_size}", arch,
            f"{tile.block_b} x {tile.block_h}, {tile.warps} warps, {-(-hidden_size // tile.block_h)} programs",
            *(" / ".join(str(f[key]) for f in found) for key in ("shared", "registers", "spilled", "barriers")),
        )  # fmt: skip
        print("|", " | ".join(map(str, columns)), "|", flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["table"]:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        table()
elif __name__ == "__main__":
    json.dump([compiled(case) for case in json.load(sys.stdin)], sys.stdout)
