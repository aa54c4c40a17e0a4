"""Every feature beside every other one, on random small problems: what must hold whatever is combined.

Fresh memory is filled with NaN throughout, so that an element which nothing wrote shows.
"""

import dataclasses
import math
from functools import partial

import pytest
import torch
import user_cells
from hypothesis import given, settings
from hypothesis import strategies as st
from setups import CPU_REASON, needs_cpu_library

import fastrnn
from fastrnn.cell_table import CELLS
from fastrnn.dispatch import BACKENDS, Request

pytestmark = pytest.mark.usefixtures("poisoned")


def examples(count):
    """The same examples in every run, so that a failure is one of the change and not of the day."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


def test_fresh_memory_is_poisoned():
    x = torch.zeros(3)
    fresh = torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty(3, dtype=torch.bfloat16)
    assert all(f.isnan().all() for f in fresh)


# ------------------------------------------------------------------------------------------------------------- problems


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, a call of it, and the seed of all numbers in them."""

    kind: str  # of CELLS or USERS
    dtype: torch.dtype
    T: int
    B: int
    I: int
    H: int
    network: dict  # constructor arguments
    training: bool
    lengths: tuple[int, ...] | None
    resets: bool
    hx: bool
    tap: bool
    cells: bool
    decay: bool | None  # one factor for all units, or one for each
    seed: int

    @property
    def rows(self):
        return self.network["num_layers"] * (2 if self.network["bidirectional"] else 1)

    @property
    def cell(self):
        """The user's cell, or the row of CELLS."""
        return USERS.get(self.kind) or CELLS[self.kind]

    @property
    def states(self):
        return len(self.cell.states)


USERS = {name: getattr(fastrnn.cells, name) for name in fastrnn.cells.__all__ if name != "leaky"} | {
    "three": user_cells.three, "unconnected": user_cells.unconnected
}  # fmt: skip
"""Users' cells: several states, parameters, inputs, without W_hh."""
# Half of the problems each; the cpu backend, where it is there, has to take both.
CPU_TAKES_BOTH = BACKENDS["cpu"].reason(Request(fastrnn.cells.janet.text, "cpu", torch.float32, 1)) is None
KINDS = st.sampled_from(list(CELLS))
EVERY_KIND = KINDS | st.sampled_from(list(USERS)) if CPU_TAKES_BOTH or CPU_REASON else KINDS

PROBABILITY = st.sampled_from((0.0, 0.0, 0.3, 1.0))
SIZE = st.sampled_from((1, 2, 3, 5, 6, 7))
ACTIVATION = st.sampled_from(("tanh", "tanh", "hardsigmoid", "silu"))
LEAKS = st.sampled_from(({}, {"leak": 0.5}, {"leak": 0.25, "learn_leak": True}))
LAYER_NORM = st.sampled_from((False, True, "sum", "gates"))
BOUND = st.sampled_from((None, 0.01, 0.3))  # loss gradients are of order one: 0.01 clips everywhere, 0.3 here and there


@st.composite
def problems(draw, kinds=EVERY_KIND, dtypes=(torch.float64, torch.float32, torch.bfloat16), size=SIZE, layers=3):
    kind, flag = draw(kinds), st.booleans()
    T, B, I, H = (draw(size) for _ in range(4))
    lstm, zoneout = kind == "lstm", PROBABILITY
    user = USERS.get(kind)
    if lstm or user:
        zoneout = st.one_of(zoneout, st.tuples(*(PROBABILITY for _ in (user or CELLS[kind]).states)))
    network = {
        "num_layers": draw(st.integers(1, layers)),
        "bias": draw(flag),
        "batch_first": draw(flag),
        "dropout": draw(PROBABILITY),
        "bidirectional": draw(flag),
        "layer_norm": draw(LAYER_NORM if not user or user.recurrent else flag),
        "residual": draw(flag),
        "locked_dropout": draw(flag),
        "recurrent_dropout": draw(PROBABILITY),
        "recurrent_dropout_per_gate": draw(flag),
        "zoneout": draw(zoneout),
        "weight_dropout": draw(PROBABILITY),
        "clip_state_grad_norm": draw(BOUND),
        "clip_state_grad_value": draw(BOUND),
    }
    if network["num_layers"] == 1:
        network |= {"dropout": 0.0, "residual": False, "locked_dropout": False}  # they warn
    if lstm:
        network["proj_size"] = draw(st.integers(0, H - 1))
        network["layer_norm_cell"] = draw(st.sampled_from(("inside", "carried", None)))
    if user and not user.recurrent:
        network |= {"recurrent_dropout": 0.0, "weight_dropout": 0.0}  # of W_hh
    if kind.startswith("rnn"):
        network |= {"nonlinearity": kind.removeprefix("rnn_"), **draw(LEAKS)}
    elif kind == "gru" or (lstm and not network["layer_norm"] and not network["proj_size"]):
        network |= {"activation": draw(ACTIVATION), **({"layer_norm_cell": "inside"} if lstm else {})}
    refuses_heads = network.get("proj_size") or network.get("recurrent_dropout_per_gate")
    if not refuses_heads and (not user or user.recurrent):
        network["num_heads"] = draw(st.sampled_from([n for n in range(1, H + 1) if H % n == 0]))
    return Problem(
        kind, draw(st.sampled_from(dtypes)), T, B, I, H, network,
        training=draw(flag),
        lengths=draw(st.none() | st.tuples(*(st.integers(0, T) for _ in range(B)))),
        resets=draw(flag), hx=draw(flag), tap=draw(flag), cells=draw(flag) and (lstm or bool(user and user.states[1:])),
        decay=draw(st.sampled_from((None, None, False, not network.get("proj_size")))),
        seed=draw(st.integers(0, 10**6)),
    )  # fmt: skip


def module_of(problem):
    torch.manual_seed(problem.seed)
    name = problem.kind.upper() if problem.kind in ("lstm", "gru") else "RNN"
    build = partial(fastrnn.Recurrent, problem.cell) if problem.kind in USERS else getattr(fastrnn, name)
    module = build(problem.I, problem.H, dtype=problem.dtype, **problem.network)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith("ln_"):
                p.add_(0.1 * torch.randn_like(p))  # away from the identity
    return module.train(problem.training)


def arguments_of(problem):
    """input, hx, lengths, reset_mask and weights of the loss, by name."""
    p, rng = problem, torch.Generator().manual_seed(problem.seed)
    P = p.network.get("proj_size") or p.H
    directions = 2 if p.network["bidirectional"] else 1

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(p.dtype)

    def in_time(*tail):
        return (p.B, p.T, *tail) if p.network["batch_first"] else (p.T, p.B, *tail)

    found = {"input": draw(*in_time(p.I))}
    sizes = (P, *(p.H for _ in p.cell.states[1:]))
    if p.hx:
        found |= {f"{s}0": draw(p.rows, p.B, size) for s, size in zip(p.cell.states, sizes, strict=True)}
    found |= {name: draw(*in_time(p.H)) for name in p.cell.inputs}
    if p.lengths is not None:
        found["lengths"] = torch.tensor(p.lengths)
    if p.decay is not None:
        found["decay"] = draw(*in_time(*([p.H] if p.decay else [])))
    if p.resets:
        found["reset_mask"] = torch.rand(in_time(), generator=rng) < 0.3
    found["dy"] = draw(*in_time(directions * P))
    found |= {f"d{s}_n": draw(p.rows, p.B, size) for s, size in zip(p.cell.states, sizes, strict=True)}
    if p.cells:
        found |= {f"dcells{k}": draw(*in_time(directions * p.H)) for k in range(p.states - 1)}
    return found


def results(problem, backend, change=lambda name, x: x, module=None, device="cpu"):
    """Everything that a call and its backward give, by name. `change` may lay an argument or parameter out anew."""
    module = (module or module_of(problem)).to(device)
    for name, parameter in module.named_parameters():
        parameter.data = change(name, parameter.data)
    arguments = {name: change(name, x.to(device)) for name, x in arguments_of(problem).items()}
    initial = [f"{state}0" for state in problem.cell.states]
    given = [name for name in ("input", *initial, *problem.cell.inputs, "decay") if name in arguments]
    leaves = {name: arguments[name].detach().requires_grad_() for name in given}
    call = {name: arguments[name] for name in ("lengths", "reset_mask") if name in arguments}
    call |= {name: leaves[name] for name in (*problem.cell.inputs, "decay") if name in leaves}
    acc = torch.float64 if problem.dtype == torch.float64 else torch.float32
    if problem.tap:
        shape = (problem.rows, 2, problem.states, problem.T, problem.B)
        leaves["tap"] = torch.zeros(shape, dtype=acc, device=device, requires_grad=True)
        call["tap"] = leaves["tap"]
    if problem.cells:
        call["return_cells"] = True
    hx = tuple(leaves[name] for name in initial if name in leaves)
    hx = None if not hx else hx if len(hx) > 1 else hx[0]
    torch.manual_seed(problem.seed)  # of the masks
    with fastrnn.backend(backend):
        y, state, *cells = module(leaves["input"], hx, **call)
    state = state if isinstance(state, tuple) else (state,)
    found = {"y": y, **{f"{s}_n": v for s, v in zip(problem.cell.states, state, strict=True)}}
    if cells:
        each = cells[0] if isinstance(cells[0], tuple) else cells  # a tuple of more than one state beyond h
        found |= {f"cells{k}": one for k, one in enumerate(each)}
    sum((v * arguments[f"d{name}"]).sum() for name, v in found.items()).backward()
    found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return {name: v.detach() for name, v in found.items()}


# How far two ways to compute the same may lie apart, as a share of the largest element (of 1 where all are smaller).
# float64 and float32: rounding at 1e-16 and 6e-8, over some ten steps and layers, and through layer norms of few
# elements, which magnify by up to some hundred (`rounding` measures it). bfloat16: both round at the same places, so
# mostly nothing; where a float32 result falls to the other side of a tie, 2**-8, and what follows from a few of those.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}


def rounding(problem, expected):
    """How far each result moves when every argument and parameter moves by some two units in the last place: what the
    problem makes of rounding, as a layer norm of few and nearly equal elements may make much of it."""
    rng, eps = torch.Generator().manual_seed(0), torch.finfo(problem.dtype).eps

    def nudged(name, x):
        return x * (1 + eps * torch.randn(x.shape, generator=rng, dtype=x.dtype)) if x.is_floating_point() else x

    moved = results(problem, "reference", nudged)
    return {name: (moved[name] - x).abs().max().item() if x.numel() else 0.0 for name, x in expected.items()}


def agree(got, expected, tolerance, slack=None):
    """`slack`: per result, what `rounding` found; some ten roundings of that kind follow each other."""
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        a = got[name]
        finite = b.double().abs().nan_to_num(0, 0, 0)
        scale = max(1, finite.max().item()) if b.numel() else 1
        allowed = tolerance * scale + (10 * slack[name] if slack else 0)
        torch.testing.assert_close(a, b, rtol=0, atol=allowed, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def finite(found):
    for name, x in found.items():
        assert x.isfinite().all(), f"{name} is not finite"


@needs_cpu_library
@examples(120)
@given(problems())
def test_the_cpu_backend_equals_the_reference(problem):
    expected, got = results(problem, "reference"), results(problem, "cpu")
    finite(expected)
    normed = problem.dtype == torch.float32 and problem.network["layer_norm"]
    slack = rounding(problem, expected) if normed else None
    agree(got, expected, TOLERANCE[problem.dtype], slack)


@examples(60)
@given(problems(dtypes=(torch.float64,)))
def test_results_are_complete_and_where_the_sequence_has_ended_zero(problem):
    """Also the taps of a call with `lengths`, and the gradient of the input."""
    found = results(problem, "auto")
    finite(found)
    if problem.lengths is not None:
        padding = torch.arange(problem.T).unsqueeze(1) >= torch.tensor(problem.lengths)
        ours = padding.t() if problem.network["batch_first"] else padding
        kept = problem.network["residual"] and problem.network["num_layers"] > 1
        ends = ("y", "cells0", "cells1", "cells2", "gradient of input")
        for name in {*ends, *(f"gradient of {n}" for n in (*problem.cell.inputs, "decay"))} & found.keys():
            assert (found[name][ours] == 0).all(), name
        assert kept or (found["y"][ours] == 0).all()
        assert not problem.tap or (found["gradient of tap"][..., padding] == 0).all()


# ------------------------------------------------------------------------------------------------------ memory layouts


def transposed(x):
    return x.mT.contiguous().mT if x.dim() > 1 else x


def strided(x):
    """Every second element of a larger tensor in every dimension, from an offset on."""
    large = x.new_full([2 * n + 3 for n in x.shape], 99)  # integers and bools as well
    view = large[tuple(slice(2, 2 + 2 * n, 2) for n in x.shape)]
    return view.copy_(x)


def sliced(x):
    """Rows within longer ones: dense at the end, with an offset."""
    large = x.new_full((*x.shape[:-1], x.shape[-1] + 5), 99)
    return large[..., 3 : 3 + x.shape[-1]].copy_(x)


def expanded(x):
    """The first entry for all, by a stride of zero."""
    return x[:1].expand(x.shape)


LAYOUTS = (transposed, strided, sliced, expanded)


def drawn_alike(problem):
    """Without the masks that torch draws in the order of the memory of what they fall on: those on W_hh and on h0."""
    network = {**problem.network, "weight_dropout": 0.0, "recurrent_dropout": 0.0}
    return dataclasses.replace(problem, network=network)


@examples(80)
@given(
    problems(dtypes=(torch.float64,)).map(drawn_alike),
    st.sampled_from(LAYOUTS),
    st.sampled_from(["reference", *(["cpu"] if CPU_REASON is None else [])]),
)
def test_the_layout_of_the_memory_does_not_matter(problem, layout, backend):
    """Of the arguments, the parameters, and the gradients that come back to the outputs."""
    got = results(problem, backend, lambda name, x: layout(x))
    agree(got, results(problem, backend, lambda name, x: layout(x).contiguous()), 1e-10)  # GEMMs sum in another order


@examples(30)
@given(problems(dtypes=(torch.float64,)).map(drawn_alike), st.sampled_from(LAYOUTS))
def test_the_layout_of_the_memory_does_not_matter_to_a_chosen_backend(problem, layout):
    """The plain calls among them go to torch's own kernels."""
    got = results(problem, "auto", lambda name, x: layout(x))
    agree(got, results(problem, "auto", lambda name, x: layout(x).contiguous()), 1e-10)


# ------------------------------------------------------------------------------------------------------- not finite


def samples(name, problem):
    """The batch dimension of a result; None for parameters."""
    plain = name.removeprefix("gradient of ")
    if plain in ("y", "input", "decay", *problem.cell.inputs) or plain.startswith("cells"):
        return 0 if problem.network["batch_first"] else 1
    if plain == "tap":
        return -1
    return 1 if plain in {f"{state}{end}" for state in problem.cell.states for end in ("_n", "0")} else None


@examples(80)
@given(problems(dtypes=(torch.float64, torch.float32)), st.sampled_from((math.nan, math.inf, -math.inf)), st.data())
def test_what_is_not_finite_stays_visible_and_in_its_sample(problem, value, data):
    b, t = (data.draw(st.integers(0, n - 1)) for n in (problem.B, problem.T))
    position = (b, t) if problem.network["batch_first"] else (t, b)

    def spoil(name, x):
        return x.index_put([torch.tensor(i) for i in position], x.new_tensor(value)) if name == "input" else x

    backends = ["reference", *(["cpu"] if CPU_REASON is None else [])]
    found = {backend: results(problem, backend, spoil) for backend in backends}
    if len(backends) == 2:
        agree(found["cpu"], found["reference"], TOLERANCE[problem.dtype])
    real = problem.lengths is None or t < problem.lengths[b]
    for backend in backends:
        spoilt, clean = found[backend], results(problem, backend)
        others = torch.tensor([k for k in range(problem.B) if k != b], dtype=torch.int64)
        for name, x in clean.items():
            dim = samples(name, problem)
            if not real:
                assert torch.equal(spoilt[name], x), f"{name} has seen the padding"
            elif dim is not None:
                pair = (v.index_select(dim, others) for v in (spoilt[name], x))
                assert torch.equal(*pair), f"{name} of other samples has changed"
        if real and math.isnan(value):
            assert spoilt["y"][position].isnan().all()
            assert spoilt["gradient of weight_ih_l0"].isnan().all()


# ------------------------------------------------------------------------------------------------------------- triton


TRITON_KINDS = ("lstm", "gru", "rnn_relu", "rnn_elu", "janet")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under the interpreter, on 1 / 0 and exp of large numbers
@pytest.mark.slow
@pytest.mark.parametrize("kind", TRITON_KINDS)
def test_the_triton_backend_equals_the_reference(kind, device, ieee):
    cell = USERS[kind].text if kind in USERS else kind
    reason = BACKENDS["triton"].reason(Request(cell, device.type, torch.float32, 1))
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")

    # A launch takes some 30 ms in the interpreter, and there are two to twelve for each layer and direction. One layer,
    # because each is a scan of its own: what a network does between them knows nothing of the backend.
    @examples(4)
    @given(problems(kinds=st.just(kind), dtypes=(torch.float32,), size=st.integers(1, 3), layers=1))
    def holds(problem):
        got, expected = (results(problem, backend, device=device) for backend in ("triton", "reference"))
        finite(expected)
        agree(got, expected, TOLERANCE[torch.float32])

    holds()
