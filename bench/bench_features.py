"""fastrnn against the Python loop, feature by feature; see `features.py`.

`pytest bench --benchmark-json=FILE` runs it behind the throughput suite. The figure is `speed_up` in each contestant's
entry of `extra_info`: the faster loop's time over the contestant's, by interleaved rounds.
"""

import pytest

from . import features
from .cases import DEVICE
from .feature_cases import CASES, OVERHEAD, SESSION_SECONDS

ROUNDS = 3  # of pytest-benchmark's own timing, which is not interleaved and decides nothing


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_feature(case, session, benchmark):
    """All contestants agree; their interleaved times go into the JSON. The gain is reported and not bounded."""
    record = session.record(case, features.measure, SESSION_SECONDS)
    benchmark.extra_info.update(record)
    benchmark.group = case.name
    failed = {name: entry["failed"] for name, entry in record["contestants"].items() if "failed" in entry}
    if "fastrnn" not in failed:
        benchmark.pedantic(features.fastrnn_call(case), rounds=ROUNDS, warmup_rounds=1)
    assert not failed, "\n".join(f"{case.name}: {name}: {why}" for name, why in failed.items())


@pytest.mark.skipif(DEVICE == "cpu", reason="a bound for GPUs: on a CPU the overhead is only recorded")
@pytest.mark.parametrize("case", [case for case in CASES if case.feature.overhead], ids=lambda case: case.name)
def test_overhead(case, session):
    """A feature costs next to nothing on its backend: even the lower end of the interval would have to break the
    bound."""
    entries = session.record(case, features.measure, SESSION_SECONDS)["contestants"]
    found = {name: entry["overhead"] for name, entry in entries.items() if "overhead" in entry}
    if not found:
        pytest.skip("no backend of its own ran the plain call")
    high = {name: cost["ratio"] for name, cost in found.items() if cost["interval"][0] > OVERHEAD}
    assert not high, f"{case.name}: against the plain call {high}, allowed {OVERHEAD}"
