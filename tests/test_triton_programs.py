"""Users' cells on the Triton backend: the source written from their texts, and the scan that it is handed to.

As test_kernels.py does for the built-in cells, against the reference, in Triton's interpreter where there is no GPU.
`python tests/test_triton_programs.py` prints the table of traced and hand-written cells in docs/notes/compiler.md.
"""

import os
import tempfile

import pytest
import torch
from cell_texts import TEXTS, Value, hand_written, pointwise
from setups import mostly_slow
from test_compile_only import check as check_compiled
from test_compile_only import compiled, make_case, make_gemm_case, read_compiled
from user_cells import BUILT_IN

import fastrnn
from fastrnn import tiles
from fastrnn.backends import triton as launcher
from fastrnn.cell_table import spec_of
from fastrnn.dispatch import Request
from fastrnn.program import CONDITIONS, OPERANDS, run
from problems import (
    GEMM,
    HALF,
    MODES,
    SMALL,
    Problem,
    check,
    check_against_reference,
    everything,
    in_one_call,
    same_bits,
)

# numpy, in the interpreter, warns of results that the kernels rely on: 1 / 0 and exp of a large number are infinite.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned", "ieee")]
FOUR_STATES, GATED, IND, LEAKY, MEMORY, WIDTH = (
    TEXTS[name] for name in ("four", "gru", "ind", "leaky", "memory", "width")
)
SHIPPED = {name: getattr(fastrnn.cells, name) for name in fastrnn.cells.__all__ if name != "leaky"}
WITHOUT_CLIP_NORM = tuple(extra for extra in Problem.ALL if extra != "clip_norm")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """A folder for this module's sources; no test reads or fills the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTRNN_CACHE", str(tmp_path_factory.mktemp("sources")))
        yield


@pytest.mark.parametrize("name", TEXTS)
def test_the_derivatives_in_the_texts_are_those_of_their_forward(name):
    spec, generator = spec_of(TEXTS[name]), torch.Generator().manual_seed(0)
    G, S, K = len(spec.gates), len(spec.states), len(spec.saved)
    forward, total, backward = spec.program

    def draw(count):
        return [torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(count)]

    inputs, dstate = [x.requires_grad_() for x in draw(forward.inputs)], draw(S)
    prev, beside = inputs[-S - len(spec.parameters + spec.inputs) :][:S], len(spec.parameters + spec.inputs)
    results = run(forward, inputs)
    want = torch.autograd.grad(results[:S], inputs, dstate, allow_unused=True)
    rest = [*prev, *dstate, *inputs[len(inputs) - beside :]]
    with torch.no_grad():
        saved = results[S : S + K]
        rest[S : 2 * S] = run(total, [*saved, *rest])
        got = run(backward, [*saved, *rest])
    if spec.recurrent and not spec.distinct_dgh:
        got = got[:G] + got
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.detach(), torch.zeros(7).double() if b is None else b)


# --------------------------------------------------------------------------------------------- against the reference


def test_four_states_in_every_mode(device):
    problem = Problem(FOUR_STATES, device, sizes=(2, 2, 17), reverse=True, extras=Problem.ALL)
    local, by_steps, grouped = (check_against_reference(problem, tile) for tile in SMALL.values())
    assert same_bits(local, by_steps) and same_bits(local, grouped)
    check_against_reference(problem, GEMM)


@pytest.mark.parametrize("mode", mostly_slow(MODES, "local"))
@pytest.mark.parametrize("extras", [(), Problem.ALL], ids=["plain", "all"])
@pytest.mark.parametrize("text", [pytest.param(LEAKY, id="leaky"), pytest.param(GATED, id="gated")])
def test_parameters_inputs_and_distinct_gradients(text, extras, mode, device):
    check_against_reference(Problem(text, device, extras=extras), MODES[mode])


@pytest.mark.parametrize("text", [pytest.param(IND, id="ind"), pytest.param(MEMORY, id="memory")])
def test_cells_without_w_hh(text, device):
    """Two programs of 16 units each; clipping by norm takes mode gemm by itself."""
    check_against_reference(Problem(text, device, reverse=True, extras=WITHOUT_CLIP_NORM), SMALL["local"])
    check_against_reference(Problem(text, device, sizes=(2, 2, 3), extras=Problem.ALL), None)
    with pytest.raises(ValueError, match="clipping by norm"):
        check_against_reference(Problem(text, device, extras=Problem.ALL), SMALL["local"])


@pytest.mark.parametrize("mode", mostly_slow(MODES, "local", "gemm"))
def test_units_beyond_h_may_be_nan(mode, device):
    """Tiles of 16 and of 32 units for 17: a cell of zeros is NaN, and no product and no norm may see it."""
    extras = ("norms", "clip_norm", *(("layer_norm",) if mode == "gemm" else ()))
    check_against_reference(Problem(WIDTH, device, sizes=(2, 2, 17), extras=extras), MODES[mode])


@pytest.mark.parametrize("text", [pytest.param(FOUR_STATES, id="four"), pytest.param(GATED, id="gated")])
def test_layer_norm_of_the_gates(text, device):
    check_against_reference(Problem(text, device, extras=("layer_norm", *Problem.ALL)), None)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mode", mostly_slow(MODES, "local"))
def test_half_types(mode, dtype, device):
    problem = Problem(FOUR_STATES, device, dtype=dtype, extras=("norms", "clip_norm"))
    check_against_reference(problem, MODES[mode], None, HALF[dtype])


@pytest.mark.parametrize(
    ("text", "mode"),
    [(LEAKY, "local"), pytest.param(FOUR_STATES, "stepwise", marks=pytest.mark.slow), (IND, "local")],
    ids=["leaky", "four", "ind"],
)
def test_both_directions_in_one_call(text, mode, device):
    sizes, extras = (2, 2, 17), ("flags", "norms")
    each = [Problem(text, device, sizes=sizes, reverse=bool(back), extras=extras, seed=back) for back in (0, 1)]
    alone = zip(*(everything(problem, MODES[mode]) for problem in each), strict=True)
    want = [None if results[0] is None else torch.stack(results) for results in alone]
    assert same_bits(everything(in_one_call(each), MODES[mode]), want)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_cells(name, device):
    """At the tile of the table."""
    check_against_reference(Problem(SHIPPED[name].text, device, sizes=(3, 2, 5), extras=("flags",)), None)


def test_a_module_equals_the_reference(device):
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).to(device)
    noise = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)).to(device)
    outputs, weights = [], None
    for backend in ("triton", "reference"):
        module = fastrnn.Recurrent(fastrnn.cells.leaky_rnn, 4, 5, backend=backend, device=device)
        module.load_state_dict(weights or module.state_dict())
        weights = module.state_dict()
        y, states = module(x, noise=noise.requires_grad_())
        grads = torch.autograd.grad((y.square().sum(), *(s.sum() for s in states)), [noise, *module.parameters()])
        outputs.append((y, *states, *grads))
    check(*outputs, 2e-5)


# --------------------------------------------------------------------------------------------------------- the source

CONSTANTS = (0.3, 1e-50, 1e300, float("-inf"))


def every_instruction() -> str:
    """A cell that saves the result of each instruction, of values and of constants."""

    def forward(x, u, _state, _p, _n):
        (x,), (u,), write = x, u, x[0].program.write
        constants = [Value(x.program, x.program.number(value)) for value in CONSTANTS]
        positive, less, more = write("abs", x), write("lt", x, u), write("gt", x, constants[0])
        special = {
            "not": (less,), "and": (less, more), "or": (less, more), "where": (less, x, constants[0]),
            "pow": (positive, u), **dict.fromkeys(("log", "log1p", "sqrt"), (positive,)),
        }  # fmt: skip
        results = []
        for op, count in OPERANDS.items():
            found = write(op, *special.get(op, (x, u)[:count]))
            results.append(write("where", found, x, u) if op in CONDITIONS else found)
        results += [write("pow", x, 2.0), write("pow", x, 3.0), constants[0] * constants[0], x * constants[0]]
        return [x, *results, *constants]

    return hand_written(
        "every", "g", "h", forward, lambda _k, _s, d, _p, _n: d, lambda *_: [0.0, 0.0],
        saved=len(OPERANDS) + 4 + len(CONSTANTS), step=None,
    ).text  # fmt: skip


def test_every_instruction(device):
    text = every_instruction()
    problem = Problem(text, device, sizes=(1, 4, 40))
    problem.w_hh, problem.gx = torch.zeros_like(problem.w_hh), 2 * problem.gx
    saved = problem.forward(launcher, tile=tiles.Tile("local", 16, 64, 64, 4, 1)).saved[0]
    u = problem.b_hh.expand(4, 40)
    # One rounding per instruction; `program.run` in float64 gets the same float32 numbers.
    want = run(spec_of(text).program.forward, [x.double() for x in (problem.gx[0], u, problem.h0)])[1:]
    for got, expected in zip(saved.split(40, -1), want, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=2e-6, atol=1e-38)


@pytest.mark.parametrize("op", ["expm1", "log1p", "pow", "maximum", "sign", "sigmoid", "tanh"])
def test_the_ends_of_the_range(op, device):
    infinity, nan = float("inf"), float("nan")
    x = [0.0, 1e-30, -1e-30, 1e-4, -1e-4, 0.9, -0.9, 1.1, 20, -20, 88, -88, infinity, -infinity, nan, 2, -3]
    u = [1.0, 0, 2, -3, 0.5, nan, infinity]
    x, u = (each.flatten() for each in torch.meshgrid(torch.tensor(x), torch.tensor(u), indexing="ij"))
    text = pointwise(lambda *operands: operands[0].program.write(op, *operands), OPERANDS[op])
    problem = Problem(text, device, sizes=(1, 1, len(x)))
    operands = (x, u)[: OPERANDS[op]]
    problem.gx = torch.cat(operands).to(device)[None, None]
    y = problem.forward(launcher, tile=GEMM).y.flatten()
    want = run(spec_of(text).program.forward, [*(each.double() for each in operands), x.double()])[0]
    torch.testing.assert_close(y.cpu(), want.float(), rtol=2e-6, atol=1e-37, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------- the tiles


def test_a_cell_without_w_hh_has_a_tile_for_every_size(monkeypatch):
    for hidden_size in (1, 100, 5000):
        assert tiles.choose(IND, torch.float32, hidden_size, 64).mode == "local"
        assert tiles.choose(IND, torch.bfloat16, hidden_size, 64, mode="gemm").mode == "gemm"
        for mode in ("grouped", "stepwise"):
            with pytest.raises(ValueError, match=f"{mode!r}.*ind"):
                tiles.choose(IND, torch.float32, hidden_size, 64, mode=mode)
    request = Request(IND, "cuda", torch.float32, 8, 8)
    assert launcher.why_not(request) is None
    monkeypatch.setenv("FASTRNN_TRITON_MODE", "grouped")
    assert "ind has none" in launcher.why_not(request)
    assert launcher.why_not(request._replace(cell=LEAKY)) is None


# cell, dtype, H, B, mode
COMPILED = [
    ("peephole_lstm", "bfloat16", 128, 16, None),
    ("peephole_lstm", "bfloat16", 512, 64, "grouped"),
    ("slstm", "bfloat16", 128, 16, None),
    ("slstm", "float32", 512, 64, None),
    ("leaky_rnn", "float32", 128, 16, None),
    ("min_lstm", "bfloat16", 1024, 64, None),
    ("ea_lstm", "bfloat16", 512, 64, "gemm"),
]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_compiled_cells(arch, tmp_path):
    cases = []
    for name, dtype, hidden_size, batch_size, mode in COMPILED:
        for kernel in ("forward", "backward"):
            extras = ("norms",) if kernel == "backward" else ()
            if mode == "gemm":
                cases.append(make_gemm_case(kernel, arch, SHIPPED[name].text, dtype, hidden_size, extras))
            else:
                sizes = (SHIPPED[name].text, dtype, hidden_size, batch_size)
                cases.append(make_case(kernel, "cuda", arch, *sizes, extras, mode=mode))
    for case, found in zip(cases, read_compiled(cases, tmp_path), strict=True):
        check_compiled(case, found, arch)


# dtype, H, B, mode
SIZES = [
    ("bfloat16", 128, 16, None),
    ("float32", 64, 16, None),
    ("bfloat16", 512, 64, "grouped"),
    ("bfloat16", 1024, 64, "stepwise"),
    ("float32", 512, 64, "gemm"),
]


def twins(cell, dtype, hidden_size, batch_size, mode):
    """For the forward and the backward, the case of the built-in cell and that of the same cell traced."""
    cases = []
    for kernel, extras in (("forward", ()), ("backward", ("norms",))):
        for name in (cell, BUILT_IN[cell].text):
            if mode == "gemm":
                cases.append(make_gemm_case(kernel, 90, name, dtype, hidden_size, extras))
            else:
                cases.append(make_case(kernel, "cuda", 90, name, dtype, hidden_size, batch_size, extras, mode=mode))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_traced_cell_compiles_to_no_more_than_the_hand_written_one(cell, tmp_path):
    found = read_compiled([case for size in SIZES[:2] for case in twins(cell, *size)], tmp_path)
    for hand, traced in zip(found[::2], found[1::2], strict=True):
        assert traced["shared"] == hand["shared"]
        assert traced["spilled"] <= hand["spilled"]
        # Equal sums in another order, which the compiler gives registers in another order: 2% and 5 were seen.
        assert traced["instructions"] <= 1.03 * hand["instructions"]
        assert traced["registers"] <= hand["registers"] + 8


def table():
    """Prints the table of traced and hand-written cells."""
    columns = "| | kernel | registers | spilled bytes | instructions |"
    print(columns, "|---|---|---|---|---|", sep="\n")
    for built_in in ("lstm", "gru"):
        for dtype, hidden_size, batch_size, mode in SIZES:
            found = [compiled(case) for case in twins(built_in, dtype, hidden_size, batch_size, mode)]
            for kernel, pair in (("forward", found[:2]), ("backward", found[2:])):
                values = (" / ".join(str(f[key]) for f in pair) for key in ("registers", "spilled", "instructions"))
                name = f"{built_in} {dtype}, H {hidden_size}, B {batch_size}, {mode or 'local'}"
                print("|", " | ".join((name, kernel, *values)), "|", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(TRITON_CACHE_DIR=folder, FASTRNN_CACHE=folder)
        table()
