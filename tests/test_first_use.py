"""The check before a kernel's first use, with Triton's interpreter as the device.

The interpreter is slow, so a check walks two steps, and the cell is the plainest: the check asks nothing of it but its
name.
"""

import logging
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from setups import mostly_slow

import fastrnn
from fastrnn import dispatch, evidence, ranking
from fastrnn.backends import triton
from fastrnn.dispatch import BACKENDS, MODES
from fastrnn.evidence import records, verification
from fastrnn.tuning import search as tuning
from fastrnn.tuning.job import Job

pytestmark = [
    pytest.mark.skipif(not triton.INSTALLED, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands for a GPU where there is none"),
]


@pytest.fixture(autouse=True)
def gpu(evidence_in, monkeypatch):
    """The CPU is treated as a GPU without a record: no C++ scan, and kernels are checked before their first use."""
    monkeypatch.setattr(ranking, "FIRST_USE", ("cpu",))
    monkeypatch.setattr(verification, "check", partial(verification.check, steps=2))
    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], why_not=lambda request: "it was not built"))
    monkeypatch.setattr(dispatch, "_warned", set())
    return evidence_in


@pytest.fixture
def checked(monkeypatch):
    """The kernels that were checked, in order."""
    found, check = [], verification.check

    def counted(launcher, request, *args):
        found.append(request)
        return check(launcher, request, *args)

    monkeypatch.setattr(verification, "check", counted)
    return found


def network(**settings):
    torch.manual_seed(0)
    return fastrnn.RNN(2, 3, **{"zoneout": 0.1, **settings}).eval()


X = torch.randn(3, 2, 2)


def quietly(call):
    """The result of a call that warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def test_a_kernel_is_checked_once_then_used_logged_and_remembered(checked, caplog, gpu):
    model = network()
    with caplog.at_level(logging.INFO, "fastrnn"):
        y = quietly(lambda: model(X)[0])
        quietly(lambda: model(torch.randn(4, 3, 2)))
    assert len(checked) == 1 and [
        r.getMessage() for r in caplog.records if "verified rnn_tanh of float32 on triton" in r.msg % r.args
    ]
    explained = fastrnn.explain(model, X)
    assert explained.chosen == "triton" and "verified here" in str(explained) and "not timed" in str(explained)
    with fastrnn.backend("reference"):
        torch.testing.assert_close(y, model(X)[0], rtol=1e-5, atol=1e-6)  # a few float32 roundings
    evidence.clear()  # as in another process
    ranking.renew()
    assert fastrnn.explain(model, X).chosen == "triton" and len(checked) == 1
    (entry,) = records.load(records.where("cpu", torch.get_num_threads()))
    assert entry.verdict == "verified" and entry.key.steps == 0


def test_other_features_and_other_kernels_are_checked_for_themselves(checked):
    network()(X)
    network(layer_norm=True)(X)
    quietly(lambda: network()(X, lengths=torch.tensor([3, 1])))
    fastrnn.RNN(2, 40, zoneout=0.1).eval()(X)
    assert [sorted(request.features) for request in checked] == [
        ["zoneout"], ["layer_norm", "zoneout"], ["lengths", "zoneout"], ["zoneout"],
    ]  # fmt: skip


def test_plain_calls_are_torchs_and_nothing_is_checked(checked):
    model = fastrnn.GRU(2, 3)
    assert fastrnn.explain(model, X).chosen == "aten" and not checked


def test_it_can_be_switched_off(checked, monkeypatch):
    monkeypatch.setenv("FASTRNN_TUNE", "0")
    with pytest.warns(UserWarning, match="Python loop.*triton: nothing is known of it here"):
        network()(X)
    assert not checked


def test_never_during_a_capture_and_the_question_stays_open(checked, monkeypatch):
    model = network()
    with monkeypatch.context() as during:
        during.setattr(verification, "capturing", lambda device: True)
        with pytest.warns(UserWarning, match="Python loop"):
            model(X)
        assert fastrnn.explain(model, X).chosen == "reference" and not checked
    assert fastrnn.explain(model, X).chosen == "triton" and len(checked) == 1


def test_kernels_whose_programs_wait_for_each_other_are_not_tried_here(checked, monkeypatch):
    monkeypatch.setenv("FASTRNN_TRITON_MODE", "grouped")
    assert fastrnn.explain(network(), X).chosen == "reference" and not checked


def broken(monkeypatch, function, change):
    real = getattr(triton, function)
    monkeypatch.setattr(triton, function, lambda *args: change(real(*args)))


def fails(found):
    raise RuntimeError("invalid device function")


WRONG = {
    "outputs": ("forward", lambda out: out._replace(y=out.y * 1.001), "y is wrong"),
    "a gradient": ("backward", lambda grad: grad._replace(dh0=grad.dh0 * 1.001), "dh0 is wrong"),
    "NaN": ("backward", lambda grad: grad._replace(dgx=grad.dgx * float("nan")), "dgx is wrong: error inf"),
    "an exception": ("forward", fails, "RuntimeError: invalid device function"),
    "nothing": ("backward", lambda grad: grad._replace(dh0=None), "dh0 is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_is_wrong_is_not_used_and_the_record_says_why(name, checked, monkeypatch):
    function, change, reason = WRONG[name]
    broken(monkeypatch, function, change)
    model = network()
    with pytest.warns(UserWarning, match=f"fastrnn does not use rnn_tanh of float32 on triton .*{reason}"):
        y = model(X)[0]
    with fastrnn.backend("reference"):
        assert torch.equal(y, model(X)[0])
    evidence.clear()
    ranking.renew()
    explained = fastrnn.explain(model, X)
    assert explained.chosen == "reference" and f"broken here: {reason}" in str(explained)
    assert len(checked) == 1


def test_a_first_failure_in_use_marks_it_and_falls_back_a_later_one_is_raised(checked, monkeypatch):
    model, real = network(), triton.forward
    for_long = torch.randn(9, 2, 2)

    def forward(inputs, *args):
        if len(inputs.gx) == 9:
            raise RuntimeError("out of resource")
        return real(inputs, *args)

    monkeypatch.setattr(triton, "forward", forward)
    with pytest.warns(UserWarning, match="the first call on backend 'triton' failed.*out of resource"):
        y = model(for_long)[0]
    with fastrnn.backend("reference"):
        assert torch.equal(y, model(for_long)[0])
    assert "broken here: its first call raised RuntimeError: out of resource" in str(fastrnn.explain(model, for_long))
    records.forget()
    evidence.clear()
    ranking.renew()
    monkeypatch.setattr(ranking, "_uses", {})
    quietly(lambda: model(torch.randn(8, 2, 2)))
    with pytest.raises(RuntimeError, match="out of resource"):
        model(for_long)
    with fastrnn.backend("triton"), pytest.raises(RuntimeError, match="out of resource"):
        network()(for_long)


@pytest.mark.slow
def test_a_compiled_region_is_checked_while_it_is_traced(checked):
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    y = compiled(X)[0]
    after_tracing = len(checked)
    assert after_tracing >= 1
    assert {e.verdict for e in records.load(records.where("cpu", torch.get_num_threads()))} == {"verified"}
    compiled(X)
    assert len(checked) == after_tracing
    with fastrnn.backend("reference"):
        torch.testing.assert_close(y, model(X)[0], rtol=1e-5, atol=1e-6)


def test_within_transforms_modes_and_autocast_the_check_runs_outside_of_them(checked):
    model = network()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, x):
        return torch.func.functional_call(model, params, (x,))[0].sum()

    request = dispatch.Request("rnn_tanh", "cpu", torch.float32, 3, features=frozenset({"tap"}))
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert dispatch.choose(request) == "triton"
    quietly(lambda: torch.vmap(torch.func.grad(loss), (None, 0))(params, X[None]))
    assert checked and {e.verdict for e in records.load(records.where("cpu", torch.get_num_threads()))} == {"verified"}


RANKS = """
import logging, multiprocessing, sys, torch
torch.set_num_threads(1)
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
import fastrnn
from dataclasses import replace
from fastrnn import ranking
from fastrnn.dispatch import BACKENDS
ranking.FIRST_USE = ("cpu",)
BACKENDS["cpu"] = replace(BACKENDS["cpu"], why_not=lambda request: "it was not built")


def rank():
    model = fastrnn.RNN(2, 3, zoneout=0.1).eval()
    print("chosen", fastrnn.explain(model, torch.randn(3, 2, 2)).chosen, flush=True)


fork = multiprocessing.get_context("fork")
ranks = [fork.Process(target=rank) for _ in range(2)]
for each in ranks:
    each.start()
for each in ranks:
    each.join()
"""
"""Two processes, forks of one that has imported what they need."""


@pytest.mark.slow
def test_processes_of_one_machine_check_a_kernel_once(gpu):
    done = subprocess.run([sys.executable, "-c", RANKS], capture_output=True, text=True, env=os.environ, timeout=180)
    assert done.stdout.count("chosen triton") == 2, done.stderr
    assert done.stdout.count("verified rnn_tanh") == 1
    assert not list(gpu.rglob("*.claim"))


def test_an_old_claim_is_ignored(checked, gpu, monkeypatch):
    monkeypatch.setattr(verification, "PATIENCE", 0.2)
    model, claimed = network(), verification._is_claimed
    monkeypatch.setattr(verification, "_is_claimed", lambda claim: claimed(claim) or claimed(claim))
    assert fastrnn.explain(model, X).chosen == "triton" and len(checked) == 1


# Not triton:local, which is what triton takes for this call.
@pytest.mark.parametrize("name", mostly_slow(["triton", *(name for name in MODES if name != "triton:local")], "triton"))
def test_the_triton_scan_is_tried_and_recorded_end_to_end(name, monkeypatch):
    """In this process, since the child's part is the same whatever the device; the interpreter is slow, and loses."""
    from fastrnn.tuning import trial

    trials = {}

    class Here(tuning.Search):
        def _ask(self, job, candidate):
            request = {"job": job._asdict(), "candidate": candidate, "seconds": 0.0}
            return trial.answer(request, trials, lambda name: None)

    monkeypatch.setattr(trial, "TIMES", 1)
    monkeypatch.setattr(trial, "ROUNDS", 1)
    monkeypatch.setattr(trial, "SAMPLE_SECONDS", 0.0)
    job = Job("cpu", "rnn_tanh", "float32", 3, 2, 2, True, torch.get_num_threads(), features=("tap",))
    assert "triton" in tuning.candidates(job)
    result = Here(60.0, evidence.keep).bucket(tuning.Bucket((job,)), name)
    ranking.renew()
    assert result.entry.verdict == "measured" and result.entry.against == "reference"
    explained = str(dispatch.explanation(job.request()))
    assert name in explained and "of the loop's time" in explained
    assert dispatch.choose(job.request(), name) == name
    model = fastrnn.RNN(3, 3, backend=name)
    tap = torch.zeros(1, 2, 1, 2, 2, requires_grad=True)
    model(torch.randn(2, 2, 3), tap=tap)[0].sum().backward()
    assert tap.grad.abs().sum() > 0
