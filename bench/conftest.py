"""One measurement per case and session, shared by the benchmarks and the acceptance tests; the JSON; the summary."""

import time
from collections.abc import Callable

import pytest

from . import feature_cases, machine, report, rivals
from .cases import CASES, DEVICE, SESSION_SECONDS
from .measure import measure


class Session:
    """The records so far, by case, and when each suite (told by its `measure`) began."""

    def __init__(self):
        self.begin: dict[Callable, float] = {}
        self.records: dict[tuple[Callable, str], dict] = {}
        self.not_run: dict[str, str] = {}

    def record(self, case, measure: Callable = measure, seconds: float = SESSION_SECONDS) -> dict:
        """Measures a case the first time it is asked for; skips the test once the suite's time is spent."""
        key = measure, case.name
        if key not in self.records:
            if time.monotonic() - self.begin.setdefault(measure, time.monotonic()) > seconds:
                self.not_run[case.name] = f"the time budget of {seconds:.0f} s was spent"
                pytest.skip(self.not_run[case.name])
            self.records[key] = measure(case)
        return self.records[key]


SESSION = pytest.StashKey[Session]()


def pytest_configure(config):
    config.stash[SESSION] = Session()


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
