"""What all tests share: Triton's interpreter where there is no GPU, the fixtures, the `gpu` marker, the guards.

FASTRNN_TEST_DEVICE chooses the device; unset, it is a GPU where there is one. A test that takes `device` is marked
`gpu` where that is a GPU.
"""

import gc
import inspect
import os
import shutil
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import guards
import pytest
import torch
from packaging.version import Version

if not torch.cuda.is_available():
    # Before the first kernel is decorated: it decides once whether it will be compiled or interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

# The records of the user who runs the tests must not decide, nor be written.
CACHE = tempfile.TemporaryDirectory(prefix="fastrnn-tests-")
os.environ["FASTRNN_CACHE"] = CACHE.name

# What `auto` takes in the tests follows from one record, whatever the processor.
from fastrnn.evidence import records

SHIPPED = Path(CACHE.name, "shipped")
SHIPPED.mkdir()
shutil.copy(records.SHIPPED / "cpu-2-threads.json", SHIPPED)
records.SHIPPED = SHIPPED

DEVICE = torch.device(os.environ.get("FASTRNN_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@cache
def _builtins(place) -> list[str]:
    """The names of Triton's builtin functions in a module or class, which nothing has replaced at the first call."""
    from triton.language.core import is_builtin

    return [name for name, member in inspect.getmembers(place) if is_builtin(member)]


def _members(place):
    return [(name, getattr(place, name)) for name in _builtins(place)]


def pytest_sessionstart():
    """Stops at once where the interpreter cannot work, instead of in every test that needs it; and makes it quicker.

    It replaces the builtin functions of its modules at every call within a kernel, and finds them by
    `inspect.getmembers`, which takes half of the time of a small kernel. Here their names are looked up once.
    """
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        import numpy
        import triton
        from triton.runtime import interpreter

        interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": _members})
        if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
            raise pytest.UsageError(
                f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__}: "
                "pip install 'numpy<2.4', or Triton 3.7 and later"
            )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="module")
def poisoned():
    """New memory, torch.empty's and that of the C++ library, holds NaN: an element that nothing wrote shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # only a warning, because cuBLAS has no such algorithms
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def ieee(monkeypatch):
    """Triton's kernels multiply float32 as float32: TF32 has 11 bits."""
    monkeypatch.setattr("fastrnn.backends.sequence.precision", lambda: "ieee")


@pytest.fixture
def set_precision():
    """`set_precision(place, value)` sets a `fp32_precision` of torch.backends until the test ends.

    torch serves some of them through `__getattr__`, and monkeypatch would delete what it cannot find in `__dict__`.
    """
    before = []

    def set_until_the_end(place, value):
        before.append((place, place.fp32_precision))
        place.fp32_precision = value

    yield set_until_the_end
    for place, value in reversed(before):
        place.fp32_precision = value


def pytest_addoption(parser):
    parser.addoption("--guards", action="store_true", help="run the guards alone, and note which pass (guards.py)")


class Unchanged(pytest.File):
    """A file of guards that need not run. Its tests are not even collected."""

    def collect(self):
        pytest.skip(f"{self.path.stem} passed on these sources and tools: make guards", allow_module_level=True)


def _is_unchanged(name: str) -> bool:
    return name in guards.SOURCES and guards.passed().get(name) == guards.digest(name)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path, parent):
    name = module_path.stem
    if not (parent.config.getoption("--guards") or torch.cuda.is_available()) and _is_unchanged(name):
        return Unchanged.from_parent(parent, path=module_path)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config, items):
    if config.getoption("--guards"):
        config.hook.pytest_deselected(items=[item for item in items if item.path.stem not in guards.SOURCES])
        items[:] = [item for item in items if item.path.stem in guards.SOURCES]
    for item in items:
        if DEVICE.type == "cuda" and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish():
    """Thousands of tests and modules stay until the end: the garbage collector need not look at them each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Notes which guards passed, of the files that were asked for. Without a GPU, a test that needs one is no guard."""
    if not config.getoption("--guards") or config.option.collectonly:
        return
    stats = terminalreporter.stats

    def files(reports):
        return {report.location[0].rpartition("/")[2].removesuffix(".py") for report in reports}

    passed, failed, errors, skipped = (stats.get(outcome, []) for outcome in ("passed", "failed", "error", "skipped"))
    missed = [report for report in skipped if torch.cuda.is_available() or "gpu" not in report.keywords]
    guards.write(guards.SOURCES.keys() & files(passed) - files([*failed, *errors, *missed]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """A kernel that went astray leaves its process without a GPU. pytest-xdist puts a fresh one in its place."""
    result = yield
    if torch.cuda.is_initialized() and hasattr(item.config, "workerinput"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result


@pytest.fixture
def evidence_in(tmp_path, monkeypatch):
    """An empty cache folder for the test, and nothing known but what is shipped."""
    from fastrnn import evidence, ranking

    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "cache"))
    evidence.clear()
    ranking.renew()
    yield tmp_path / "cache"
    evidence.clear()
    ranking.renew()


@pytest.fixture
def recorded(evidence_in):
    """`recorded(request, candidate, time)` records how much of torch.nn's time a candidate takes here."""
    from fastrnn import evidence, ranking
    from fastrnn.evidence import records

    def record(request, candidate, time, verdict="measured", **fields):
        ratio = (time, 0.99 * time, 1.01 * time) if verdict == "measured" else None
        entry = records.Entry(
            evidence.key_of(request), candidate, verdict, "2026-12-01", "torch.nn", ratio, fields.get("reason", "")
        )
        assert evidence.keep(entry, torch.get_num_threads()) is None
        ranking.renew()
        return entry

    return record
