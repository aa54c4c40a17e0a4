"""csrc's scan on raw tensors, against the reference: every feature, odd sizes, any layout, any number of threads.

New memory is filled with NaN throughout, so that an element which nothing wrote shows.
"""

import pytest
import torch
from setups import MASKS, every_cell, random_incoming, random_inputs

from fastrnn.arguments import IncomingGradients, Kept, ScanInputs, Walk
from fastrnn.backends import cpu, reference
from fastrnn.cell_table import PAD

if cpu.MISSING is not None:
    pytest.skip(f"csrc: {cpu.MISSING}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = ("layer_norm", "projection")
FEATURES = {
    "plain": (),
    "flags": ("flags",),
    "masks": MASKS[1:],
    "layer_norm": ("layer_norm",),
    "projection": ("projection",),
    "clip": ("clip_norm",),
    "all": (*MASKS, *SHAPES, "clip_norm"),
}


def problem(cell, T, B, H, dtype=torch.float32, features=(), reverse=False):
    """Arguments of forward and backward by name, with the incoming gradients. Layer norm and projection have a bias."""
    settings = {"projection": max(1, H // 2), "bias": any(name in features for name in SHAPES)}
    inputs = random_inputs(cell, features, sizes=(T, B, H), reverse=reverse, dtype=dtype, **settings)
    found = inputs._asdict() | random_incoming(inputs)._asdict()
    if "clip_norm" in features:  # most steps are clipped by norm, a few elements by value
        found |= {"clip_norm": inputs.clip_norm / 2, "clip_value": 1.5}
    return {name: x for name, x in found.items() if x is not None}


def present(results):
    """Named results as a dict, with an empty tensor for each that does not exist."""
    missing = torch.empty(0)
    return {n: missing if x is None or x.shape == (0,) else x for n, x in results._asdict().items()}


def run(launcher, cell, given, reverse=False, save=True, norms=True):
    """All outputs of forward and backward by name; those that do not exist are empty."""
    walk = Walk(cell, reverse, launcher.__name__.rpartition(".")[2], given.get("clip_value"))
    inputs = ScanInputs(*map(given.get, ScanInputs._fields))
    found = present(launcher.forward(inputs, walk, save))
    if save:
        kept = Kept(found["y"], found["c"] if "c0" in given else None, found["saved"])
        incoming = IncomingGradients(*map(given.get, IncomingGradients._fields))
        found |= present(launcher.backward(incoming, kept, inputs._replace(gx=None), walk, norms))
    return found


def padding(given, name, value):
    """Where a sequence has ended, `saved` is arbitrary in the reference, and zero in csrc: here zero."""
    if name != "saved" or "flags" not in given:
        return value
    return value.masked_fill((given["flags"] & PAD).bool().unsqueeze(-1), 0)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


SIZES = ((1, 1, 1), (2, 3, 17), (4, 17, 3), (3, 2, 63), (2, 9, 65))  # T, B, H


@every_cell
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("features", FEATURES)
def test_the_scan_is_the_references(cell, features, reverse):
    for T, B, H in SIZES:
        given = problem(cell, T, B, H, torch.float64, FEATURES[features], reverse)
        found, expected = run(cpu, cell, given, reverse), run(reference, cell, given, reverse)
        for name, value in expected.items():
            want = padding(given, name, value)
            # float64: 1e-16 per rounding, over a few steps of sums of 65, and layer norms of as few as one element.
            torch.testing.assert_close(found[name], want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@every_cell
@pytest.mark.parametrize("features", ["plain", "all"])
def test_errors_are_at_most_twice_the_references(cell, features):
    """Float32 against float64: products of 300 terms and 20 steps, in the largest error of each result."""
    given = problem(cell, 20, 5, 300, torch.float32, FEATURES[features])
    wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in given.items()}
    truth, found, yardstick = (
        run(*pair) for pair in ((reference, cell, wide), (cpu, cell, given), (reference, cell, given))
    )
    for name, exact in truth.items():
        if not exact.numel():
            continue
        exact = padding(given, name, exact)
        error, own = ((padding(given, name, r[name]) - exact).abs().max().item() for r in (found, yardstick))
        floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert error <= 2 * own + floor, f"{name}: {error:.2e}, the reference's {own:.2e}"


def test_sums_over_many_steps_round_once():
    """The gradient of the bias after a layer norm adds T terms, as do those of the norms' weights: in float64."""
    found = run(cpu, "lstm", problem("lstm", 5000, 2, 3, torch.float32, FEATURES["layer_norm"]))
    # The LSTM's dgx is that bias's gradient, step by step. Tolerance: half a unit in the last place, or one at a tie.
    torch.testing.assert_close(found["db_hh"], found["dgx"].double().sum(0).float(), rtol=1.2e-7, atol=0)


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_round_where_the_reference_rounds(cell, dtype):
    given = problem(cell, 5, 3, 33, dtype, FEATURES["all"])
    found, expected = run(cpu, cell, given), run(reference, cell, given)
    for name, want in expected.items():
        want = padding(given, name, want)
        assert found[name].dtype == want.dtype
        # A float32 result on the other side of a tie is one unit of the half type; what follows from it, a few more.
        scale = max(1, want.abs().max().item()) if want.numel() else 1
        torch.testing.assert_close(found[name], want, rtol=0, atol=8 * torch.finfo(dtype).eps * scale, msg=name)


@every_cell
@pytest.mark.parametrize("features", ["plain", "flags", "all"])
def test_a_row_has_the_same_bits_in_any_batch(cell, features):
    """On one thread or several, in a block by itself or at the end of another."""
    given = problem(cell, 5, 150, 65, torch.float32, FEATURES[features])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(cpu, cell, given)
        for count in (2, 7):
            torch.set_num_threads(count)
            same(one, run(cpu, cell, given))
    finally:
        torch.set_num_threads(threads)
    for begin, end in ((0, 1), (1, 4), (4, 11), (11, 150)):
        part = run(cpu, cell, {name: of_batch(name, x, begin, end) for name, x in given.items()})
        same(part, {name: of_batch(name, x, begin, end) for name, x in one.items()})


def of_batch(name, x, begin, end):
    """Some sequences of an argument or result."""
    if name in ("w_hh", "b_hh", "w_hr", "ln_hh", "ln_c_weight", "ln_c_bias", "clip_norm", "clip_value"):
        return x
    if name == "norms":
        return x[..., begin:end]
    return x if x.dim() == 1 else x[:, begin:end] if x.dim() == 3 or name == "flags" else x[begin:end]


@every_cell
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_steps_in_chunks_give_the_same_bits(cell, reverse):
    """States are passed on and gradients passed back, both of which float32 holds exactly."""
    given = problem(cell, 7, 5, 33)
    whole = run(cpu, cell, given, reverse)
    cuts = [(0, 3), (3, 4), (4, 7)]
    order = cuts[::-1] if reverse else cuts
    in_time, states = ("gx", "dy", "dc"), {name: given[name] for name in ("h0", "c0") if name in given}
    parts, starts = {}, {}
    for begin, end in order:
        starts[begin] = states
        chunk = given | {name: given[name][begin:end] for name in in_time if name in given} | states
        parts[begin] = run(cpu, cell, chunk, reverse)
        states = {f"{s[0]}0": parts[begin][s] for s in ("h_n", "c_n") if parts[begin][s].numel()}
    passed_back = {name: given[name] for name in ("dh_n", "dc_n") if name in given}
    for begin, end in order[::-1]:
        chunk = (
            given | {name: given[name][begin:end] for name in in_time if name in given} | starts[begin] | passed_back
        )
        parts[begin] = run(cpu, cell, chunk, reverse)
        passed_back = {f"{s[:2]}_n": parts[begin][s] for s in ("dh0", "dc0") if parts[begin][s].numel()}
    for name in ("y", "c", "saved", "dgx", "dgh"):
        assert torch.equal(torch.cat([parts[begin][name] for begin, _ in cuts]), whole[name]), name
    for name in ("h_n", "c_n"):
        assert torch.equal(parts[order[-1][0]][name], whole[name]), name
    for name in ("dh0", "dc0"):
        assert torch.equal(parts[order[0][0]][name], whole[name]), name


def strided(x):
    """Every second element of a larger tensor in every dimension."""
    large = x.new_full([2 * n for n in x.shape], 99)
    view = large[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def transposed(x):
    return x.mT.contiguous().mT if x.dim() > 1 else x


def expanded(x):
    """The first entry for all, by a stride of zero."""
    return x[:1].expand(x.shape) if x.dim() else x


def constant(x):
    """One number for all, by strides of zero: what zoneout is in eval mode, and the gradient of a sum."""
    return x.flatten()[0].expand(x.shape)


@every_cell
@pytest.mark.parametrize("layout", [strided, expanded, constant, transposed])
def test_any_layout_gives_the_same_bits(cell, layout):
    given = problem(cell, 4, 5, 17, torch.float32, FEATURES["all"])
    laid = {name: layout(x) if torch.is_tensor(x) else x for name, x in given.items()}
    dense = {name: x.contiguous() if torch.is_tensor(x) else x for name, x in laid.items()}
    same(run(cpu, cell, laid), run(cpu, cell, dense))


@every_cell
def test_the_bound_of_the_norm_may_have_another_dtype(cell):
    given = problem(cell, 3, 2, 5, torch.float32, FEATURES["clip"]) | {"clip_norm": torch.tensor(1.5)}
    same(run(cpu, cell, given), run(cpu, cell, given | {"clip_norm": torch.tensor(1.5, dtype=torch.float64)}))


@every_cell
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(cell, value):
    given = problem(cell, 4, 9, 17, torch.float32, FEATURES["all"])
    given["flags"][:, 3] = 0
    clean = run(cpu, cell, given)
    given["gx"][1, 3, 5] = value
    spoilt, expected = run(cpu, cell, given), run(reference, cell, given)
    for name, x in clean.items():
        for begin, end in ((0, 3), (4, 9)):
            assert torch.equal(of_batch(name, spoilt[name], begin, end), of_batch(name, x, begin, end)), name
    for name in ("y", "dgx", "norms"):
        assert torch.equal(spoilt[name].isfinite(), expected[name].isfinite()), name


@every_cell
def test_what_is_not_asked_for_does_not_exist(cell):
    given = problem(cell, 3, 2, 5)
    full, lean = run(cpu, cell, given), run(cpu, cell, given, save=False)
    assert lean["saved"].shape == lean["c"].shape == (0,)
    same({n: full[n] for n in ("y", "h_n", "c_n")}, {n: lean[n] for n in ("y", "h_n", "c_n")})
    back = run(cpu, cell, given, norms=False)
    assert back["norms"].shape == back["dh_new"].shape == (0,)
    same({n: full[n] for n in ("dgx", "dh0", "dc0")}, {n: back[n] for n in ("dgx", "dh0", "dc0")})
    gone = {name: x for name, x in given.items() if name not in ("dy", "dc", "dh_n", "dc_n")}
    assert not run(cpu, cell, gone)["dgx"].any()


@every_cell
@pytest.mark.parametrize("features", ["plain", "all"])
def test_an_empty_batch(cell, features):
    found = run(cpu, cell, problem(cell, 3, 0, 5, features=FEATURES[features]))
    assert found["y"].shape[:2] == found["dgx"].shape[:2] == (3, 0)


def test_bad_arguments_are_named():
    given = problem("lstm", 3, 2, 5, features=FEATURES["all"])

    def bad(message, cell="lstm", **change):
        with pytest.raises(RuntimeError, match=message):
            run(cpu, cell, given | change)

    bad("cell must be lstm, gru", cell="lsmt")
    bad(r"gx must have shape \[T, B, planes \* H\], got \[2, 20\]", gx=given["gx"][0])
    bad(r"gx must have shape \[T, B, 4 \* H\], got \[3, 2, 19\]", gx=given["gx"][..., 1:])
    bad("gx must be float32, float64, bfloat16 or float16, got Int", gx=given["gx"].int())
    bad(r"w_hh must have shape \[20, 2\], got \[40\]", w_hh=given["w_hh"].flatten())
    bad(r"w_hh must have shape \[20, 2\], got \[16, 2\]", w_hh=given["w_hh"][4:])
    bad(r"h0 must have shape \[B, P\], got \[2\]", h0=given["h0"][0])
    bad(r"ln_c_bias must have shape \[5\], got \[4\]", ln_c_bias=given["ln_c_bias"][1:])
    bad("w_hh must be Float, got Double", w_hh=given["w_hh"].double())
    bad("c0 is for the cells with a c", c0=None)
    bad("c0 is for the cells with a c", cell="rnn_tanh")
    bad("flags must be Byte, got Bool", flags=given["flags"].bool())
    bad(r"recurrent_mask must have shape \[2, 2\]", recurrent_mask=given["c0"])
    bad(r"dy must have shape \[3, 2, 2\], got \[2, 2, 2\]", dy=given["dy"][1:])
    bad("must be given together", ln_c_bias=None)
    bad("does not take dsaved", dsaved=given["gx"])
