"""What a candidate of `tune` may do wrong in its child process: none is ever chosen, and the record says why."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from fake_candidates import FAKES, FAULTS
from setups import needs_cpu_library

from fastrnn import backend_table, dispatch, evidence, ranking
from fastrnn.evidence import records
from fastrnn.tuning import search as tuning
from fastrnn.tuning.job import Job

FOLDER = Path(__file__).parent
JOB = Job("cpu", "gru", "float32", 8, 8, 2, True, torch.get_num_threads())
pytestmark = needs_cpu_library


@pytest.fixture(scope="module")
def child():
    """The command of a child process with the fakes."""
    with tempfile.TemporaryDirectory() as short:  # a socket's path has some hundred characters at most
        path = Path(short, "socket")
        server = subprocess.Popen([sys.executable, str(FOLDER / "fake_candidates.py"), str(path)])
        until = time.monotonic() + 120  # far beyond the import of torch on a busy machine
        while not path.exists() and server.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        yield sys.executable, str(FOLDER / "forked_child.py"), str(path)
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def tried(child, tmp_path_factory):
    """One search over all fakes, in one cache folder: each one's result, and the folder."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("cache")
    patch.setenv("FASTRNN_CACHE", str(folder))
    patch.setattr(backend_table, "BACKENDS", backend_table.BACKENDS | FAKES)
    for module in (dispatch, ranking, tuning):
        patch.setattr(module, "BACKENDS", backend_table.BACKENDS)
    patch.setattr(tuning, "LIMITS", {"cpu": 5.0})
    patch.setattr(tuning, "SECONDS", 0.0)
    evidence.clear()
    ranking.renew()
    search = tuning.Search(300.0, evidence.keep, child)
    bucket = tuning.Bucket((JOB,))
    found = {name: search.bucket(bucket, name) for name in FAKES}
    search.close()
    ranking.renew()
    yield found, folder
    patch.undo()
    evidence.clear()
    ranking.renew()


REASONS = {
    "wrong": "y is wrong: error", "wrong_once": "after some calls, y is wrong: error", "nan": "y is wrong: error inf",
    "wrong_backward": "d x is wrong", "raises": "RuntimeError: out of", "hangs": "killed after 5 s",
    "crashes": "signal SIGSEGV", "exits": "exit code 7", "poison": "after it, aten is wrong",
    "reuses": "is wrong: error",
    "threads": "it changes the number of threads",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_candidate_that_misbehaves_is_never_chosen_and_the_record_says_why(tried, fault):
    found, _ = tried
    entry, name = found[f"fake_{fault}"].entry, f"fake_{fault}"
    assert entry.candidate == name
    if fault in REASONS:
        assert entry.verdict == "broken" and REASONS[fault] in entry.reason
        assert entry.reason.isprintable() and len(entry.reason) <= records.LONGEST
        assert f"broken here: {entry.reason}" == evidence.Finding(entry, None).words
    else:
        assert entry.verdict == "measured" and evidence.Finding(entry, None).time >= 1
    for steps in (8, 100):
        for gradients in (False, True):
            request = JOB._replace(steps=steps, gradients=gradients).request()
            assert dispatch.choose(request) not in set(FAKES) - {"fake_good"}


def test_the_rest_is_unaffected(tried):
    """The good candidate came last, after all the others; each fault has a file, which reads back as it was written."""
    found, folder = tried
    entry = found["fake_good"].entry
    assert entry.verdict == "measured" and entry.against == "torch.nn"
    files = list(folder.rglob("*.json"))
    assert len(files) == len(FAKES)
    read = {one.candidate: one for file in files for one in records.read(file)[1]}
    for name, result in found.items():
        assert read[name][:4] == result.entry[:4] and read[name].reason == result.entry.reason
    assert not [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".json"]
