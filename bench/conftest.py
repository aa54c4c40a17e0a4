"""One measurement per case and session, shared by the benchmarks and the acceptance tests; the JSON; the summary."""

import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest

from . import feature_cases, machine, report, rivals
from .cases import CASES, DEVICE, LONGEST_CASE, SESSION_SECONDS
from .measure import measure
from .worker import Worker


class Session:
    """The records so far, by case, and when each suite (told by its `measure`) began.

    `path`: takes the machine's description and each record as a line of JSON, as soon as it is there.
    """

    def __init__(self, path: Path | None):
        self.begin: dict[Callable, float] = {}
        self.records: dict[tuple[Callable, str], dict] = {}
        self.failed: dict[tuple[Callable, str], Exception] = {}
        self.not_run: dict[str, str] = {}
        self.path, self.worker = path, Worker()

    def record(
        self, case, measure: Callable = measure, seconds: float = SESSION_SECONDS, longest: float = LONGEST_CASE
    ) -> dict:
        """Measures a case the first time it is asked for; skips the test once the suite's time is spent."""
        key = measure, case.name
        if key in self.failed:
            raise self.failed[key]
        if key not in self.records:
            if time.monotonic() - self.begin.setdefault(measure, time.monotonic()) > seconds:
                self.not_run[case.name] = f"the time budget of {seconds:.0f} s was spent"
                pytest.skip(self.not_run[case.name])
            try:
                on_gpu = DEVICE == "cuda"
                self.records[key] = self.worker.measure(measure, case, longest) if on_gpu else measure(case, {})
            except Exception as error:
                self.failed[key] = error
                raise
            self.write(self.records[key])
        return self.records[key]

    def write(self, record: dict) -> None:
        if self.path is None:
            return
        if len(self.records) == 1:
            now = datetime.now(timezone.utc).isoformat()
            head = {"datetime": now, "machine_info": machine.describe(DEVICE), "commit_info": machine.commit()}
            self.path.write_text(json.dumps(head) + "\n")
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    parser.addoption("--records", type=Path, help="a file that takes each case's record at once, as a line of JSON")


def pytest_configure(config):
    config.stash[SESSION] = Session(config.getoption("--records", None))


def pytest_unconfigure(config):
    config.stash[SESSION].worker.close()


@pytest.fixture
def session(request) -> Session:
    return request.config.stash[SESSION]


def pytest_collection_modifyitems(items):
    """Each case's acceptance right behind its measurement, so that a spent budget drops whole cases."""
    order = {id(case): k for k, case in enumerate([*CASES, *feature_cases.CASES, *rivals.RIVAL_CASES])}

    def place(item) -> int:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return order.get(id(parameters.get("case")), -1)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_machine_info(config):
    return machine.describe(DEVICE)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_generate_commit_info(config):
    return machine.commit()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["not_run"] = config.stash[SESSION].not_run


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[SESSION]
    if not session.records:
        return
    for suite, records in report.by_suite(list(session.records.values())).items():
        title, table = report.SUITES[suite]
        terminalreporter.section(f"{title}, {machine.device_name(DEVICE)}")
        terminalreporter.write_line(table(records))
    for name, reason in session.not_run.items():
        terminalreporter.write_line(f"not run: {name}: {reason}")
