"""One measurement per case and session, which the benchmarks and the acceptance tests share; the results file."""

import time
from pathlib import Path

import pytest

from . import files, machine, tables
from .cases import DEVICE
from .measure import fastrnn_call, measure
from .suites import SUITES
from .worker import Worker

ROUNDS = 5  # of pytest-benchmark's own timing, which is not interleaved and decides nothing


class Session:
    """The records so far, by case, and the time at which each suite began.

    `path`: the results file, written after every record, so that a run that is cut off leaves what it has measured.
    """

    def __init__(self, path: Path | None):
        self.begin: dict[str, float] = {}
        self.records: dict[str, dict] = {}
        self.failed: dict[str, Exception] = {}
        self.not_run: dict[str, str] = {}
        self.path, self.worker = path, Worker()
        self.head = files.head(DEVICE) if path else {}

    def record(self, case, measure=measure) -> dict:
        """Measures a case the first time it is asked for; skips the test once the suite's time is spent."""
        key, suite = f"{case.suite} {case.name}", SUITES[case.suite]
        if key in self.failed:
            raise self.failed[key]
        if key not in self.records:
            if time.monotonic() - self.begin.setdefault(case.suite, time.monotonic()) > suite.session_seconds:
                self.not_run[case.name] = f"the time of {suite.session_seconds:.0f} s was spent"
                self.write()
                pytest.skip(self.not_run[case.name])
            try:
                on_gpu = DEVICE == "cuda"
                self.records[key] = self.worker.measure(measure, case, suite.longest) if on_gpu else measure(case, {})
            except Exception as error:
                self.failed[key] = error
                raise
            self.write()
        return self.records[key]

    def write(self) -> None:
        if self.path is not None:
            files.write(self.path, self.head | {"not_run": self.not_run}, "cases", list(self.records.values()))


def bench(case, session: Session, benchmark, must: set[str] | None = None) -> None:
    """Records a case, and fails for the contestants that failed; `must`: only for those."""
    record = session.record(case)
    benchmark.extra_info.update(record)
    benchmark.group = f"{case.suite} {case.name}"
    failed = {name: entry["failed"] for name, entry in record["contestants"].items() if "failed" in entry}
    if "fastrnn" not in failed:
        benchmark.pedantic(fastrnn_call(case), rounds=ROUNDS, warmup_rounds=1)
    failed = {name: why for name, why in failed.items() if must is None or name in must}
    assert not failed, "\n".join(f"{case.name}: {name}: {why}" for name, why in failed.items())


def accept(case, bound, session: Session) -> None:
    """Fails where even the lower end of the 95 % interval of the median ratio lies above the bound, so that noise alone
    does not fail it."""
    entries = session.record(case)["contestants"]
    entry = entries[bound.contestant]
    entry = entries[entry.get("same_as") or bound.contestant]
    if "cannot" in entry:
        pytest.skip(f"{bound.contestant} cannot run {case.name}: {entry['cannot']}")
    assert "failed" not in entry, entry["failed"]
    median, (low, high) = entry["ratio"].values()
    assert low <= bound.ratio, (
        f"{case.name}: {bound.contestant} takes {median:.3f} ({low:.3f} to {high:.3f}) of the time of "
        f"{' or '.join(SUITES[case.suite].against)}, allowed {bound.ratio}"
    )


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    parser.addoption("--records", type=Path, help="the results file")


def pytest_configure(config):
    config.stash[SESSION] = Session(config.getoption("--records", None))


def pytest_unconfigure(config):
    config.stash[SESSION].worker.close()


@pytest.fixture
def session(request) -> Session:
    return request.config.stash[SESSION]


def pytest_collection_modifyitems(items):
    """Each case's acceptance right after its measurement, so that spent time drops whole cases."""
    order = {id(case): k for k, case in enumerate(case for suite in SUITES.values() for case in suite.cases)}

    def rank(item) -> int:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return order.get(id(parameters.get("case")), -1)

    items.sort(key=rank)


# pytest-benchmark's own descriptions would name the machine.
@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config):
    return machine.describe(DEVICE)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info(config):
    return machine.commit()


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[SESSION]
    for title, table in tables.by_suite(list(session.records.values())).items():
        terminalreporter.section(f"{title}, {machine.device_name(DEVICE)}")
        terminalreporter.write_line(table)
    for name, reason in session.not_run.items():
        terminalreporter.write_line(f"not run: {name}: {reason}")
