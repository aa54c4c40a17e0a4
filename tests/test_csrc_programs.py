"""The C++ scan on users' cells, given as texts: against the reference, against autograd, and operation by operation."""

import threading

import pytest
import torch
import user_cells
from cell_texts import HAND_WRITTEN, Value, loop, pointwise
from setups import MASKS, random_incoming, random_inputs
from test_csrc_scan import of_batch, padding, run, same

import fastrnn
from fastrnn.arguments import ScanInputs, Walk
from fastrnn.backends import cpu, reference
from fastrnn.cell_table import spec_of

if cpu.MISSING is not None:
    pytest.skip(f"csrc: {cpu.MISSING}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")
every_cell = pytest.mark.parametrize("name", HAND_WRITTEN)
SHIPPED = {name: getattr(fastrnn.cells, name) for name in fastrnn.cells.__all__ if name != "leaky"}  # a factory
TRACED = {f"traced {name}": cell for name, cell in (user_cells.BUILT_IN | user_cells.OWN | SHIPPED).items()}
TEXT = {name: cell.text for name, cell in (HAND_WRITTEN | TRACED).items()}
every_text = pytest.mark.parametrize("name", TEXT)
FEATURES = {
    "plain": (),
    "flags": ("flags",),
    "masks": MASKS[1:],
    "layer_norm": ("layer_norm",),
    "clip": ("clip_norm",),
    "all": (*MASKS, "layer_norm", "clip_norm"),
}
SIZES = ((1, 1, 1), (2, 3, 17), (3, 2, 63), (2, 5, 300))  # T, B, H: one block of a row and several


def problem(name, T, B, H, dtype=torch.float32, features=(), reverse=False):
    """Arguments of forward and backward by name, with the incoming gradients."""
    inputs = random_inputs(TEXT[name], features, sizes=(T, B, H), reverse=reverse, dtype=dtype)
    found = inputs._asdict() | random_incoming(inputs)._asdict()
    if "clip_norm" in features:  # most steps are clipped by norm, a few elements by value
        found |= {"clip_norm": inputs.clip_norm / 2, "clip_value": 1.5}
    return {key: x for key, x in found.items() if x is not None}


def check_scan(name, sizes, features, reverse=False):
    given = problem(name, *sizes, torch.float64, FEATURES[features], reverse)
    for norms in (True, False):  # without norms and clipping, total and backward run as one program
        found, expected = (run(b, TEXT[name], given, reverse, norms=norms) for b in (cpu, reference))
        for key, value in expected.items():
            # float64: 1e-16 per rounding, over a few steps of sums of 300, and layer norms of one element.
            want = padding(given, key, value)
            torch.testing.assert_close(found[key], want, rtol=1e-10, atol=1e-10, msg=lambda m, n=key: f"{n}: {m}")


@every_cell
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("features", FEATURES)
def test_the_scan_is_the_references(name, features, reverse):
    for sizes in SIZES:
        check_scan(name, sizes, features, reverse)


@pytest.mark.parametrize("name", TRACED)
def test_a_traced_cell_is_the_references(name):
    for features in FEATURES:
        check_scan(name, (3, 4, 18), features)


@every_cell
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_gradients_are_autograds(name, reverse):
    """Of a Python loop over the cell's own function, which shares nothing with the programs."""
    spec = spec_of(TEXT[name])
    given = problem(name, 4, 3, 17, torch.float64, (), reverse)
    inputs = ScanInputs(*map(given.get, ScanInputs._fields))
    leaves = {key: x.requires_grad_() for key, x in inputs._asdict().items() if x is not None}
    sizes = len(spec.states), len(spec.parameters), len(spec.inputs)
    y, h_n, c_n = loop(HAND_WRITTEN[name].step, inputs, sizes, reverse)
    loss = (y * given["dy"]).sum() + (h_n * given["dh_n"]).sum()
    if c_n is not None:
        given.pop("dc")  # the loop does not return every c
        loss = loss + (c_n * given["dc_n"]).sum()
    grads = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
    want = {key: torch.zeros_like(x) if g is None else g for (key, x), g in zip(leaves.items(), grads, strict=True)}

    found = run(cpu, TEXT[name], {key: x.detach() for key, x in given.items()}, reverse)
    torch.testing.assert_close(found["y"], y.detach())
    torch.testing.assert_close(found["dgx"], want["gx"])
    torch.testing.assert_close(found["dh0"], want["h0"])
    if c_n is not None:
        torch.testing.assert_close(found["dc0"], want["c0"])
    if spec.recurrent:  # the gradient of the bias is the sum of dgh
        dgh = found["dgh"] if spec.distinct_dgh else found["dgx"]
        torch.testing.assert_close(dgh.sum((0, 1)), want["b_hh"])
    Q = len(spec.parameters) * 17
    if Q:
        torch.testing.assert_close(found["dcell"][..., :Q].sum((0, 1)), want["parameters"])
    if spec.inputs:
        torch.testing.assert_close(found["dcell"][..., Q:], want["step_inputs"])


@every_text
@pytest.mark.parametrize("features", ["plain", "all"])
def test_errors_are_at_most_twice_the_references(name, features):
    """Float32 against float64: products of 300 terms and 12 steps, in the largest error of each result and in the root
    mean square."""
    given = problem(name, 12, 5, 300, torch.float32, FEATURES[features])
    if name == "leaky":  # a leak beyond 1 makes the errors grow from step to step
        given["parameters"].sigmoid_()
    if name == "width":  # it divides by the root of the squares of a gate and a parameter
        given["parameters"] += given["parameters"].sign() / 2
    wide = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in given.items()}
    truth, found, yardstick = (run(b, TEXT[name], x) for b, x in ((reference, wide), (cpu, given), (reference, given)))
    for key, exact in truth.items():
        if not exact.numel():
            continue
        exact = padding(given, key, exact)
        errors = [padding(given, key, result[key]) - exact for result in (found, yardstick)]
        eps = torch.finfo(torch.float32).eps
        error, own = (one.norm().item() for one in errors)
        assert error <= 2 * own + eps * exact.norm().item(), f"{key}: {error:.2e}, the reference's {own:.2e}, in all"
        if name == "traced three" and features == "plain":
            continue  # its steps magnify every rounding: the largest of a few thousand errors is chance
        error, own = (one.abs().max().item() for one in errors)
        assert error <= 2 * own + 4 * eps * exact.abs().max().item(), f"{key}: {error:.2e}, the reference's {own:.2e}"


@every_text
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_round_where_the_reference_rounds(name, dtype):
    for features in ("plain", "all"):
        given = problem(name, 5, 3, 33, dtype, FEATURES[features])
        for norms in (True, False):
            found, expected = (run(b, TEXT[name], given, norms=norms) for b in (cpu, reference))
            for key, want in expected.items():
                want = padding(given, key, want)
                assert found[key].dtype == want.dtype
                # A float32 result on the other side of a tie is one unit of the half type; what follows, a few more.
                scale = max(1, want.abs().max().item()) if want.numel() else 1
                atol = 8 * torch.finfo(dtype).eps * scale
                torch.testing.assert_close(found[key], want, rtol=0, atol=atol, msg=lambda m, n=key: f"{n}: {m}")


@every_cell
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_thread(name):
    given = problem(name, 5, 150, 65, torch.float32, FEATURES["all"])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(cpu, TEXT[name], given)
        for count in (2, 7):
            torch.set_num_threads(count)
            same(one, run(cpu, TEXT[name], given))
    finally:
        torch.set_num_threads(threads)
    for begin, end in ((0, 1), (4, 11), (11, 150)):
        part = run(cpu, TEXT[name], {key: part_of(key, x, begin, end) for key, x in given.items()})
        same(part, {key: of_batch(key, x, begin, end) for key, x in one.items()})


def part_of(key, x, begin, end):
    return x if key == "parameters" else of_batch(key, x, begin, end)


def test_a_text_of_the_lstm_is_the_lstm():
    """The sums are the same; the products inside the step are rounded apart, which an FMA does not do."""
    for features in FEATURES.values():
        features = tuple(f for f in features if f != "layer_norm")  # the LSTM would normalise c, too
        given = problem("lstm", 6, 5, 70, torch.float32, features)
        found, built_in = run(cpu, TEXT["lstm"], given), run(cpu, "lstm", given)
        for key in ("y", "c", "saved", "dgx", "dh0", "dc0", "norms"):
            torch.testing.assert_close(found[key], built_in[key], rtol=1e-5, atol=1e-5)


def test_without_saving_the_states_are_the_same():
    for name in HAND_WRITTEN:
        given = problem(name, 3, 2, 5)
        full, lean = run(cpu, TEXT[name], given), run(cpu, TEXT[name], given, save=False)
        assert lean["saved"].shape == lean["c"].shape == (0,)
        same({key: full[key] for key in ("y", "h_n", "c_n")}, {key: lean[key] for key in ("y", "h_n", "c_n")})


def test_any_layout_of_the_step_inputs_gives_the_same_bits():
    given = problem("four", 4, 3, 17)
    x = given["step_inputs"]
    for laid in (
        x[:1].expand(4, 3, 17),
        x[:, :1].expand(4, 3, 17),
        x.mT.contiguous().mT,
        x.flatten()[0].expand(4, 3, 17),
    ):
        same(run(cpu, TEXT["four"], given | {"step_inputs": laid}),
             run(cpu, TEXT["four"], given | {"step_inputs": laid.contiguous()}))  # fmt: skip


@every_cell
def test_an_empty_batch(name):
    found = run(cpu, TEXT[name], problem(name, 3, 0, 5, features=FEATURES["all"]))
    assert found["y"].shape[:2] == found["dgx"].shape[:2] == (3, 0)


@every_cell
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(name, value):
    given = problem(name, 4, 9, 17, torch.float32, FEATURES["all"])
    given["flags"][:, 3] = 0
    clean = run(cpu, TEXT[name], given)
    given["gx"][1, 3, 5] = value
    spoilt, expected = run(cpu, TEXT[name], given), run(reference, TEXT[name], given)
    for key, x in clean.items():
        for begin, end in ((0, 3), (4, 9)):
            assert torch.equal(of_batch(key, spoilt[key], begin, end), of_batch(key, x, begin, end)), key
    for key in ("y", "dgx", "norms"):
        assert torch.equal(spoilt[key].isfinite(), expected[key].isfinite()), key


# --- operations -----------------------------------------------------------------------------------


def op(name):
    """Writes the operation `name`."""
    return lambda *operands: operands[0].program.write(name, *operands)


def as_number(condition):
    return condition.program.write("where", condition, 1.0, 0.0)


UNARY = ("neg", "abs", "sign", "exp", "expm1", "log", "log1p", "sqrt", "sigmoid", "tanh", "erf", "sin", "cos")
BINARY = ("add", "sub", "mul", "div", "pow", "maximum", "minimum")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
SPECIAL = (
    0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -3.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45, 1e-39, 1e-30,
    -1e-30, 3e38, -3e38, 88.7, 88.73, 89.5, -87.4, -88.0, -103.9, -104.5, 1e-7, -1e-7, 1e4, 0.70710677, 1.4142135,
)  # fmt: skip


def evaluate(text, planes):
    """h of one step of a cell without W_hh, for [n] tensors."""
    x = torch.cat(planes)[None, None]
    h0 = torch.zeros_like(planes[0])[None]
    inputs = ScanInputs(x, None, h0)
    return cpu.forward(inputs, Walk(text, False, "cpu"), False).y[0, 0]


def check_values(found, want, exact_in_double, ulps):
    """`found` in float32 within `ulps` of the exact value, and not finite exactly where `want` is not."""
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found.isinf(), want.isinf()) and torch.equal(found[want.isinf()], want[want.isinf()])
    finite = want.isfinite()
    rounded = exact_in_double.float().abs()
    unit = (torch.nextafter(rounded, torch.tensor(float("inf"))) - rounded).double()
    off = ((found.double() - exact_in_double).abs() / unit)[finite]
    assert off.max() <= ulps, f"{off.max()} units of the last place"


# Units of the last place over these points; torch's own are at most 2.5 (sigmoid, tanh).
ULPS = {"sigmoid": 3.0, "tanh": 3.0, "exp": 1.5, "expm1": 1.5, "log": 1.5, "log1p": 1.5, "pow": 1.0}


def many_points():
    rng = torch.Generator().manual_seed(0)
    spread = torch.cat([torch.randn(4000, generator=rng) * scale for scale in (1e-6, 1e-2, 1, 10, 60)])
    tiny = torch.logspace(-44.8, 38, 8000)
    return torch.cat((torch.tensor(SPECIAL), spread, tiny, -tiny))


@pytest.mark.parametrize("name", UNARY)
def test_unary_operations_are_torchs(name):
    x = many_points()
    function = getattr(torch, name)
    found = evaluate(pointwise(op(name), 1), [x])
    check_values(found, function(x), function(x.double()), ULPS.get(name, 1.0))
    assert torch.equal(found[:2].signbit(), function(x[:2]).signbit())  # of the zeros
    wide = x.double()
    found = evaluate(pointwise(op(name), 1), [wide])
    # torch's own sigmoid flushes what is below the normal numbers to zero.
    torch.testing.assert_close(found, function(wide), rtol=4e-16, atol=1e-307, equal_nan=True)


def pairs():
    special = torch.tensor(SPECIAL)
    a, b = torch.cartesian_prod(special, special).unbind(1)
    rng = torch.Generator().manual_seed(1)
    return torch.cat((a, torch.randn(2000, generator=rng))), torch.cat((b, torch.randn(2000, generator=rng)))


@pytest.mark.parametrize("name", BINARY)
def test_binary_operations_are_torchs(name):
    a, b = pairs()
    function = getattr(torch, name)
    check_values(
        evaluate(pointwise(op(name)), [a, b]), function(a, b), function(a.double(), b.double()), ULPS.get(name, 1.0)
    )
    found = evaluate(pointwise(op(name)), [a.double(), b.double()])
    torch.testing.assert_close(found, function(a.double(), b.double()), rtol=4e-16, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_are_torchs(name, dtype):
    a, b = (x.to(dtype) for x in pairs())
    found = evaluate(pointwise(lambda x, y: as_number(op(name)(x, y))), [a, b])
    assert torch.equal(found, getattr(torch, name)(a, b).to(dtype))


def test_logic_and_choice():
    a, b = pairs()

    def choose(x, y, z):
        either = op("or")(op("lt")(x, y), op("and")(op("gt")(x, z), op("not")(op("eq")(y, z))))
        return op("where")(either, x, z)

    z = a.flip(0)
    want = torch.where((a < b) | ((a > z) & ~(b == z)), a, z)
    assert torch.equal(evaluate(pointwise(choose, 3), [a, b, z]).nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize(
    "value", [1.5, -0.1, 1e-310, 5e-324, 1e308, float("inf"), -float("inf"), float("nan"), 0.0, 1 / 3]
)
def test_constants_lose_no_digit(value):
    x = torch.zeros(3, dtype=torch.float64)
    found = evaluate(pointwise(lambda a: a * 0.0 + value if value == value else a + value, 1), [x])
    torch.testing.assert_close(found, torch.full_like(x, value), rtol=0, atol=0, equal_nan=True)
    text = pointwise(lambda a: Value(a.program, a.program.number(value)), 1)  # the result is a constant itself
    torch.testing.assert_close(evaluate(text, [x]), torch.full_like(x, value), rtol=0, atol=0, equal_nan=True)


def test_a_program_of_many_values_alive_at_once():
    """More registers than fit into the nearest cache: all powers are kept until the sum."""

    def write(x):
        powers = [x]
        for _ in range(300):
            powers.append(powers[-1] * x)
        total = powers[0]
        for power in powers[:0:-1]:
            total = total + power
        return total

    x = torch.linspace(-0.9, 0.9, 1000, dtype=torch.float64)
    want = sum(x**k for k in range(1, 302))
    torch.testing.assert_close(evaluate(pointwise(write, 1), [x]), want)


# --- texts ----------------------------------------------------------------------------------------


def test_malformed_texts_are_refused():
    good = TEXT["leaky"]
    assert good.count("forward 6 | ") == good.count("saved 1") == 1

    def bad(message, old, new):
        assert old in good
        with pytest.raises(RuntimeError, match=message):
            cpp(good.replace(old, new, 1))

    bad("it ends before the line 'gates'", good[good.index("\n") :], "")
    bad("line 2 must begin with 'gates', got 'gate x'", "gates x", "gate x")
    bad("'gates' must have at least 1 names, got 0", "gates x", "gates")
    bad("'states' must have at least 1", "states r v", "states")
    bad("'recurrent' must be a number from 0 to 1, got '2'", "recurrent 1", "recurrent 2")
    bad("'saved' must be a number from 1", "saved 1", "saved")
    bad("'saved' must be a number from 1", "saved 1", "saved 0")
    bad("'distinct_dgh 1' needs 'recurrent 1'", "recurrent 1\nsaved 1\ndistinct_dgh 0",
        "recurrent 0\nsaved 1\ndistinct_dgh 1")  # fmt: skip
    bad("forward must begin with its 6 inputs, got '7'", "forward 6", "forward 7")
    bad("forward must begin with its 6 inputs", "forward 6", "forward six")
    bad(r"forward, part 1 \('adds 0 1'\): there is no operation 'adds'", "forward 6 | add", "forward 6 | adds")
    bad("add takes 2 values", "forward 6 | add 0 1", "forward 6 | add 0")
    bad("there is no value 99 before it", "forward 6 | add 0 1", "forward 6 | add 0 99")
    bad("there is no value 6 before it", "forward 6 | add 0 1", "forward 6 | add 6 1")
    bad("'-1' is not the number of a value", "forward 6 | add 0 1", "forward 6 | add 0 -1")
    bad("'x' is not the number of a value", "forward 6 | add 0 1", "forward 6 | add x 1")
    bad("there is no instruction", "forward 6 | add 0 1", "forward 6 |  ")
    bad("value 6 is a condition, not a number", "forward 6 | add 0 1", "forward 6 | lt 0 1")
    bad("value 0 is a number, not a condition", "forward 6 | add 0 1", "forward 6 | where 0 1 2")
    for number in ("1.5", "0x1.8", "0xp+0", "0x1.8pp", "0x1.8p+", "0x1..8p+0", "", "0x1.8p+0 1", "1e5", "infinity"):
        bad("const takes a float", "forward 6 | add 0 1", f"forward 6 | const {number}")
    end = good[good.index("| out") : good.index("\ntotal")]
    bad("the last part must be 'out'", end, "")
    bad("it must have 3 results, got 1", end, "| out 0")
    bad("there is no value 999", end, "| out 0 1 999")
    with pytest.raises(RuntimeError, match="nothing may follow its last line, got 'more'"):
        cpp(good + "\nmore")
    assert cpp(good + "\n") is not None


def cpp(text):
    """One forward step of what is the leaky cell, were it not for the change."""
    given = problem("leaky", 1, 1, 2)
    inputs = ScanInputs(*map(given.get, ScanInputs._fields))
    return cpu.forward(inputs, Walk(text, False, "cpu"), True)


def test_tensors_that_do_not_fit_the_cell_are_named():
    def bad(message, name, **change):
        given = problem(name, 2, 3, 5)
        with pytest.raises(RuntimeError, match=message):
            run(cpu, TEXT[name], given | change)

    plane = torch.zeros(3, 5)
    bad("c0 is for the cells with a c", "leaky", c0=None)
    bad("c0 is for the cells with a c", "gru", c0=plane)
    bad(r"c0 must have shape \[3, 15\], got \[3, 5\]", "four", c0=plane)
    bad("w_hh is for the recurrent cells", "leaky", w_hh=None)
    bad("w_hh is for the recurrent cells", "min_gru", w_hh=torch.zeros(10, 5))
    bad("b_hh and ln_hh are for the recurrent cells", "min_gru", b_hh=torch.zeros(10))
    bad("parameters is for the cells with parameters", "leaky", parameters=None)
    bad("parameters is for the cells with parameters", "gru", parameters=torch.zeros(5))
    bad(r"parameters must have shape \[10\], got \[5\]", "four", parameters=torch.zeros(5))
    bad("step_inputs is for the cells with inputs", "leaky", step_inputs=None)
    bad(r"step_inputs must have shape \[2, 3, 5\], got \[2, 3, 10\]", "leaky", step_inputs=torch.zeros(2, 3, 10))
    bad(r"step_inputs must have shape \[T, B, inputs \* H\], got \[3, 5\]", "leaky", step_inputs=plane)
    bad("w_hr is for the built-in cells", "leaky", w_hr=torch.zeros(5, 5))
    bad(r"h0 must have shape \[3, 5\], got \[3, 4\]", "leaky", h0=torch.zeros(3, 4))


def test_threads_may_meet_a_new_text_at_once():
    text = TEXT["four"].replace("cell four", "cell four_anew")
    given, found = problem("four", 3, 4, 17), []
    workers = [threading.Thread(target=lambda: found.append(run(cpu, text, given))) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for each in found:
        same(each, found[0])
    assert len(found) == len(workers)


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [user_cells.three, user_cells.unconnected], ids=lambda cell: cell.name)
def test_a_module_is_the_references(cell):
    """Layers, directions, lengths, resets, zoneout, clipping, layer norm and the tap together."""
    T, B, H, layers = 6, 3, 9, 2
    rng = torch.Generator().manual_seed(3)
    options = {"num_layers": layers, "bidirectional": True, "residual": True, "layer_norm": True, "zoneout": 0.2}
    options |= {"clip_state_grad_norm": 2.0, "clip_state_grad_value": 1.5}
    module = fastrnn.Recurrent(cell, 2 * H, H, dtype=torch.float64, **options)
    x = torch.randn(T, B, 2 * H, generator=rng, dtype=torch.float64)
    given = {name: torch.randn(T, B, H, generator=rng, dtype=torch.float64) for name in cell.inputs}
    masks = {"lengths": torch.tensor([6, 2, 4]), "reset_mask": torch.rand(T, B, generator=rng) < 0.2}
    found = []
    for backend in ("cpu", "reference"):
        module.backend = backend
        torch.manual_seed(5)  # of zoneout
        tap = torch.zeros(2 * layers, 2, len(cell.states), T, B, dtype=torch.float64, requires_grad=True)
        leaves = [x.clone().requires_grad_(), *(g.clone().requires_grad_() for g in given.values())]
        y, states = module(leaves[0], **dict(zip(given, leaves[1:], strict=True)), **masks, tap=tap)
        states = states if isinstance(states, tuple) else (states,)
        loss = (y * y).sum() + sum(s.sin().sum() for s in states)
        grads = torch.autograd.grad(loss, [*leaves, tap, *module.parameters()])
        found.append([y, *states, *grads])
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-9)


def test_double_backward_ends_at_the_reference():
    module = fastrnn.Recurrent(user_cells.lstm, 3, 4, dtype=torch.float64, backend="cpu")
    x = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)
