"""The Triton scan whose products are a library's (gemm mode): against the reference, with layer norm and projection."""

import pytest
import torch
from setups import ZONES, mostly_slow

from fastrnn import tiles
from fastrnn.backends import gemm_step
from fastrnn.backends import triton as launcher
from fastrnn.cell_table import CELLS
from problems import GEMM, HALF, SMALL, WHOLE, Problem, check, check_against_reference

# numpy, in the interpreter, warns of results that the kernels rely on: 1 / 0 and exp of a large number are infinite.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("poisoned", "ieee")]


@pytest.mark.parametrize(
    ("reverse", "extras"),
    [(False, ()), (True, Problem.ALL), (False, ("layer_norm", "projection")), (True, WHOLE)],
    ids=["plain", "masks", "layer_norm_projection", "all"],
)
@pytest.mark.parametrize("cell", mostly_slow(CELLS, "lstm"))
def test_gemm_equals_the_reference(cell, reverse, extras, device):
    check_against_reference(Problem(cell, device, reverse=reverse, extras=extras), GEMM)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_gemm_equals_step_by_step_within_rounding(cell, device):
    problem = Problem(cell, device, reverse=True, extras=Problem.ALL)
    got, want = (problem.forward(launcher, tile=tile) for tile in (GEMM, SMALL["stepwise"]))
    # Both sum the same 17 products of order one, in another order: a few roundings to 2**-24.
    check(got, want, 1e-6)
    y, c, _, _, saved = want
    got, want = (problem.backward(launcher, y, c, saved, tile=tile) for tile in (GEMM, SMALL["stepwise"]))
    check(got, want, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extras",
    [*((extra,) for extra in (*Problem.ALL, "no_bias", "no_gradient_but_dy", "no_dy")),
     ("norms", "clip_value"), ("clip_value", "clip_norm"), (ZONES[0], "clip_norm")],
    ids="-".join,
)  # fmt: skip
@pytest.mark.parametrize("shape", ["layer_norm", "projection"])
def test_each_extra_beside_layer_norm_or_projection(shape, extras, device):
    problem = Problem("lstm", device, extras=(shape, *extras))
    if "no_bias" in extras:
        problem.b_hh = None
    if "no_gradient_but_dy" in extras:
        problem.dc = problem.dh_n = problem.dc_n = None
    if "no_dy" in extras:
        problem.dy = None
    check_against_reference(problem, GEMM)


# Not an LSTM of one unit: nearly all of its gradient cancels in the layer norm, and the rest is rounding.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "B", "H"), [("rnn_tanh", 1, 1), ("gru", 5, 3), ("lstm", 4, 63), ("rnn_relu", 3, 130), ("lstm", 2, 257)]
)
def test_odd_sizes_with_layer_norm_and_projection(cell, B, H, device):
    problem = Problem(cell, device, sizes=(2, B, H), extras=("norms", "clip_norm", "layer_norm", "projection"))
    check_against_reference(problem, GEMM)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gemm_in_half_types(cell, dtype, device):
    check_against_reference(Problem(cell, device, dtype=dtype, extras=WHOLE), GEMM, None, HALF[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_of_tiny_and_huge_gradients_with_layer_norm_and_projection(scale, device):
    extras = ("norms", "clip_norm", "clip_value", "layer_norm", "projection")
    check_against_reference(Problem("lstm", device, extras=extras, scale=scale), GEMM)


def test_a_plain_call_may_ask_for_gemm(monkeypatch, device):
    monkeypatch.setenv("FASTRNN_TRITON_MODE", "gemm")
    monkeypatch.setattr(gemm_step, "forward", lambda *args: args[-1])
    assert Problem("rnn_tanh", device).forward(launcher) == tiles.GEMM[0][1]


@pytest.mark.parametrize(
    ("extras", "per_step"), [((), 1), (("layer_norm", "norms", "clip_norm"), 1), (("projection", "norms"), 2)]
)
def test_launches_of_a_gemm_step(extras, per_step, monkeypatch, device):
    """A step is one product and one kernel, with projection two and two. The gradient of h0 is one kernel more; with
    layer norm the backward has one product more, that of all steps at once."""
    count = {"mm": 0, "__call__": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            count[name] += 1
            return function(*args, **kwargs)

        return call

    for owner, name in ((torch, "mm"), (gemm_step.Launch, "__call__")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    problem, steps = Problem("lstm", device, sizes=(2, 1, 2), extras=extras), 2 * per_step
    y, c, _, _, saved = problem.forward(launcher, tile=GEMM)
    assert count == {"mm": steps, "__call__": steps}
    problem.backward(launcher, y, c, saved, tile=GEMM)
    assert count == {"mm": 2 * steps + ("layer_norm" in extras), "__call__": 2 * steps + 1}
