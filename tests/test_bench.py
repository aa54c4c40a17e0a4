"""The benchmarks, as far as they can be tested without timing anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from setups import needs_cpu_library

from scripts import Forks

ROOT = Path(__file__).parents[1]
# In processes of their own, because the tests do not put the repository on sys.path; without Triton's interpreter, in
# which the Triton contestants would take minutes.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def forks():
    found = Forks("import torch; from bench import contestants, measure, report, search", ROOT, ENVIRONMENT)
    yield found
    found.close()


@pytest.fixture
def run(forks):
    """`run(code)`: what the program prints."""
    return forks.run


def test_measured_latencies_replace_the_estimates(tmp_path, run):
    code = f"""
import json
from pathlib import Path
from bench import latency, limit
folder = Path({str(tmp_path)!r})
estimate = limit.device_model("NVIDIA H100 80GB HBM3")
assert "estimates" in estimate.source["agree"]
limit.RESULTS = folder
seconds = {{"flag": {{"32 x 1": 1e-6, "32 x 4": 2e-6}}, "cluster": {{"8 x 16": "cluster: code -2"}}}}
latency.path(folder, "NVIDIA H100 80GB HBM3").write_text(json.dumps({{"seconds": seconds}}))
model = limit.device_model("NVIDIA H100 80GB HBM3")
assert model.agree == estimate.agree | {{"flag": 2e-6}}
assert model.source["agree"].startswith("measured (flag)")
assert limit.device_model("some CPU") is None
"""
    run(code)


def test_the_fair_share_beside_busy_processes(run):
    run("""
from bench import busy
assert busy.fair_slowdown(cores=2, threads=2, others=5) == 3.5
assert busy.fair_slowdown(cores=4, threads=2, others=1) == 1
assert busy.fair_slowdown(cores=2, threads=4, others=4) == 2
""")


def test_a_wavefront_needs_the_matrices_of_both_layers_on_the_chip(run):
    code = """
from bench import limit
in_turn, wavefront = limit.two_layers(limit.H200, "lstm", 16, 2048, 256)
assert in_turn / 2 < wavefront < in_turn
assert limit.two_layers(limit.H200, "lstm", 64, 512, 1024)[1] is None
"""
    run(code)


def test_the_search_knows_every_mode_and_prints_the_best_of_each(run):
    code = """
import torch
from bench import search
found = search.candidates("lstm", torch.bfloat16, 128, 64)
assert {tile.mode for tile in found} == {"local", "grouped", "stepwise", "gemm"} and len(set(found)) == len(found)
rows = [{"mode": "grouped", "tile": [1], "forward_us": 1.0, "backward_us": 2.0}, {"mode": "gemm", "failed": "wrong"}]
print(search.summary({"cell": "lstm", "dtype": "bfloat16", "H": 128, "B": 64, "not tried": 3, "tiles": rows}))
"""
    assert run(code).split("\n")[:2] == [
        "lstm bfloat16 H=128 B=64, 3 not tried",
        "  grouped       1.00 +     2.00 us a step  [1]",
    ]


ASTRAY = """
import time

from bench.worker import GpuLost


def loses(case, broken):
    for name in ("second", "third"):
        if name not in broken:
            raise GpuLost(name, "an illegal memory access")
    return {"case": case, "broken": broken}


def does_not_listen(case, broken):
    raise GpuLost("first", "an illegal memory access")


def hangs(case, broken):
    time.sleep(60)


def fails(case, broken):
    raise ArithmeticError(case)
"""


def test_a_case_that_loses_its_gpu_or_hangs_costs_no_other_case(tmp_path):
    """Only the contestant that lost the GPU is left out; the process is replaced."""
    (tmp_path / "astray.py").write_text(ASTRAY)
    code = f"""
import multiprocessing, sys
sys.path.insert(0, {str(tmp_path)!r})
import astray
from bench.worker import GpuLost, Worker
if __name__ == "__main__":
    worker = Worker()
    record = worker.measure(astray.loses, "lstm", 60)
    assert list(record["broken"]) == ["second", "third"] and "illegal" in record["broken"]["third"]
    late = multiprocessing.TimeoutError
    astray_ways = (astray.hangs, 0.1, late), (astray.fails, 60, ArithmeticError), (astray.does_not_listen, 60, GpuLost)
    for function, seconds, error in astray_ways:
        try:
            worker.measure(function, "gru", seconds)
        except error:
            continue
        raise AssertionError(function)
    assert worker.measure(astray.loses, "gru", 60)["case"] == "gru"
    worker.close()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, check=True)


SMALL = """
import torch
from bench import measure
from bench.cases import Case
from bench.feature_cases import FEATURES, FeatureCase
from bench.problem import SEED, Problem
from bench.suites import SUITES
plain = [Case(cell, 3, 5, 4, 6) for cell in ("lstm", "gru", "rnn_tanh")] + [Case("gru", 3, 5, 4, 6, mode="infer")]
asked = frozenset({"tap", "clip"})
deep = [Case("lstm", 3, 5, 4, 6, 2, True), Case("lstm", 3, 5, 4, 6, 2, True, features=asked)]
cases = plain + deep + [FeatureCase(feature, 3, 5, 4, 6) for feature in FEATURES]

def agreeing(case, broken):
    torch.manual_seed(SEED)
    suite, problem, entries = SUITES[case.suite], Problem(case), {}
    rows, inputs = suite.contestants(case), problem.inputs()
    with measure.precision(case.tf32):
        models = measure.build(problem, rows, broken, entries)
        return measure.agreeing(suite, problem, inputs, rows, models, entries), entries
"""


def test_all_contestants_of_small_cases_agree(run):
    code = """
for case in cases:
    right, entries = agreeing(case, {})
    assert not [entry["failed"] for entry in entries.values() if "failed" in entry], (case.name, entries)
    assert {"loop", "fastrnn", "fastrnn:reference"} <= right.keys() | {n for n, e in entries.items() if "same_as" in e}
    compared = [entries[name]["errors"] for name in right if not name.startswith("plain ")]
    assert all(error < 1e-4 for errors in compared for error in errors.values())
"""
    run(SMALL + code)


@needs_cpu_library
def test_a_users_cell_agrees_with_the_built_in_one(run):
    code = """
case = Case("lstm", 3, 5, 4, 6, suite="cells", without={"compiled loop": "compiling takes long"})
right, entries = agreeing(case, {})
assert right.keys() == {"fastrnn:cpu", "own cell", "loop"}, entries
"""
    run(SMALL + code)


def test_a_contestant_that_computes_something_else_is_not_timed(run):
    code = """
import dataclasses
from bench import contestants
def wrong(problem):
    model = contestants.fused(problem, None)
    def changed(x):
        outcome = model.run(x)
        return outcome._replace(outputs=(outcome.outputs[0] * 1.001, *outcome.outputs[1:]))
    return model._replace(run=changed)
rows = (*contestants.THROUGHPUT[:2], contestants.Contestant("wrong", wrong))
SUITES["throughput"] = dataclasses.replace(SUITES["throughput"], contestants=lambda case: rows)
right, entries = agreeing(cases[0], {})
assert list(right) == ["torch.nn", "loop"] and entries["wrong"]["failed"].startswith("ArithmeticError: y: error")
"""
    run(SMALL + code)


def test_what_lost_the_gpu_is_left_out(run):
    code = """
broken = {name: "gone" for name in ("fastrnn:cpu", "fastrnn:reference")}
for case in (cases[0], cases[-1]):
    right, entries = agreeing(case, broken)
    assert right and not right.keys() & broken.keys()
    assert {name: entries[name]["failed"] for name in broken} == broken
"""
    run(SMALL + code)


def test_the_figures_of_a_record_follow_from_the_samples(run):
    """Medians, order statistics and ratios by hand; a contestant's ratio is over the rounds that both were timed in."""
    code = """
from fastrnn.tuning.timing import Samples, figure, ratio
assert figure([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0) and figure([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 1.0, 6.0)
assert figure([float(k) for k in range(1, 13)])[1:] == (3.0, 10.0)
loop, own = Samples(1, [2.0, 8.0], [0, 2]), Samples(2, [1.0, 5.0, 2.0], [0, 1, 2])
assert ratio(loop, own) == ratio(Samples(1, [2.0, 4.0], [0, 1]), Samples(1, [1.0, 1.0], [0, 1]))
assert own.record() == {"median": 2.0, "interval": [1.0, 5.0], "rounds": 3, "inner": 2}
entries = {"loop": {}, "fastrnn": {"takes": "cpu"}, "plain cpu": {}}
plain = Samples(1, [0.5, 2.5, 1.0], [0, 1, 2])
from bench import measure
measure._compare(SUITES["features"], {"loop": loop, "fastrnn": own, "plain cpu": plain}, entries)
assert entries["fastrnn"]["speed_up"] == {"median": 3.0, "interval": [2.0, 4.0]}
assert entries["fastrnn"]["overhead"]["median"] == 2.0 and entries["plain cpu"] == {}
"""
    run(SMALL + code)


def test_the_cases_of_a_gpu_are_sound_on_any_machine(run):
    """They have names of their own, can be pickled, and have a limit; `warm` skips contestants that cannot run."""
    code = """
import pickle
from bench import cases, limit, rivals, warm
found = [*cases._gpu_cases(), *(rivals._case(cell, *size) for cell in ("lstm", "gru") for size in rivals.SIZES)]
assert len({(case.suite, case.name) for case in found}) == len(found) > 60
for case in found:
    assert pickle.loads(pickle.dumps(case)) == case and SUITES[case.suite].contestants(case)
    assert limit.floor(limit.H200, case)["seconds"] > 0 and case.describe()["dtype"]
small = [Case("lstm", 3, 9, 4, 6), FeatureCase(FEATURES[0], 2, 9, 4, 5)]
if not torch.cuda.is_available():
    assert [warm.compile_case(case) for case in small] == [[], []]
"""
    run(SMALL + code)


def test_the_tables_of_a_gpu_have_the_limit_and_the_memory(run):
    code = """
from bench import tables
from bench.cases import Case
def entry(seconds, ratio, peak): return {
    "seconds": {"median": seconds}, "ratio": {"median": ratio, "interval": [ratio, ratio]}, "peak_bytes": peak,
}
entries = {"torch.nn": entry(0.002, 1.0, 2**21), "fastrnn": entry(0.001, 0.5, 2**20), "loop": {"failed": "wrong"}}
record = {"suite": "rivals", **Case("gru", 2, 3, 4, 4).describe(), "limit": {"seconds": 5e-4}, "contestants": entries}
found = tables.by_suite([record])
assert [title.split(" ")[0] for title in found] == ["Time", "Peak"]
rows = [[cell.strip() for cell in table.splitlines()[2].split("|")[2:-1]] for table in found.values()]
assert rows == [["2", "0.50 (0.50–0.50)", "0.25", "0.50"], ["2", "0.50"]]
"""
    run(code)


def test_streams_and_packed_batches_agree_with_torch_nn(run):
    """Every contestant's results, at small sizes; a wrong one is recorded as failed."""
    code = """
from bench import packed, streams
from bench.cases import Case
from bench.contestants import CannotRun
from bench.direct import difference
for suite, sizes in ((streams, (2, 1, 4, 5)), (packed, (3, 4, 5, 5))):
    for cell in ("lstm", "gru", "rnn_tanh"):
        case = Case(cell, *sizes, mode="infer" if suite is streams else "train", suite="packed")
        truth = next(iter(suite.makers(case, True).values()))()(0)
        for name, make in suite.makers(case, False).items():
            try:
                found = difference(make()(0), truth)
            except CannotRun:
                continue
            assert found < suite.SUITE.tolerance, (cell, name, found)
            assert difference([one * 1.001 for one in truth], truth) > suite.SUITE.tolerance
"""
    run(code)


def test_the_limit_of_a_cpu_counts_the_products(run):
    code = """
from bench import limit
from bench.cases import Case
assert limit.cpu_floor(Case("gru", 2, 3, 4, 5, mode="infer"), 1.0)["seconds"] == 2 * 2 * 3 * 15 * 9
both = Case("lstm", 2, 3, 4, 5, 2, True)
assert limit.cpu_floor(both, 1.0)["seconds"] == 3 * 2 * 2 * 3 * 20 * (9 + 15) * 2
heads = Case("gru", 2, 3, 4, 6, mode="infer", num_heads=3)
assert limit.cpu_floor(heads, 1.0)["seconds"] == 2 * 2 * 3 * 18 * (4 + 2)
"""
    run(code)


def test_records_are_written_as_they_come_and_can_be_read(tmp_path, run):
    """Also what was not run, and why."""
    code = f"""
from pathlib import Path
from bench import files
from bench.conftest import Session
path = Path({str(tmp_path)!r}, "records.json")
session = Session(path)
class Case:
    suite = "throughput"
    def __init__(self, name): self.name = name
def measured(case, broken): return {{"suite": "throughput", "case": case.name}}
for name in ("a", "b", "a"):
    session.record(Case(name), measured)
    assert files.read(path)["cases"][-1]["case"] == max(session.records).split()[1]
session.begin["throughput"] = float("-inf")
try:
    session.record(Case("c"), measured)
except BaseException as skipped:
    assert "was spent" in str(skipped)
data = files.read(path)
assert [record["case"] for record in data["cases"]] == ["a", "b"] and list(data["not_run"]) == ["c"]
assert {{"machine", "commit", "date"}} <= data.keys() and len(path.read_text().splitlines()) == 5
"""
    run(code)


def test_the_pages_show_the_committed_results(tmp_path, run):
    """The text between the markers is what the tool writes there; it leaves the rest of a page alone."""
    code = f"""
from pathlib import Path
from bench import report
root, file = Path({str(tmp_path)!r}), report.ROOT / "bench/results/bench-cpu.json"
(root / "docs").mkdir()
assert list(report.blocks(file)) == ["docs/benchmarks.md", "README.md"]
for page, (begin, block, end) in report.blocks(file).items():
    text = (report.ROOT / page).read_text()
    assert begin + block + end in text and text.count(begin) == 1, f"{{page}}: python -m bench.report {{file}} --write"
    (root / page).write_text(text.replace(block, "old"))
report.write(file, root)
for page in report.blocks(file):
    assert (root / page).read_text() == (report.ROOT / page).read_text()
(root / "README.md").write_text("no markers")
try:
    report.write(file, root)
except ValueError as error:
    assert "has no <!-- bench:cpu:begin -->" in str(error)
else:
    raise AssertionError
"""
    run(code)


def test_goals_name_the_reason_only_where_they_are_missed(run):
    code = """
from bench import goals

def case(suite, ours, features=()):
    times = {"torch.nn": 4.0, "fastrnn": ours}
    entries = {one: {"seconds": {"median": seconds}} for one, seconds in times.items()}
    return {"suite": suite, "cell": "lstm", "mode": "train", "features": features, "contestants": entries}

def row(*cases):
    return [cell.strip() for cell in goals.table(list(cases)).splitlines()[2].split("|")[2:6]]

assert row(case("short", 1.0), case("short", 2.0)) == ["0.5", "0.35", "0.50", "–"]
assert row(case("short", 3.0), case("short", 3.5, ["clip"])) == ["0.5", "0.75", "0.75", goals.BY_CALL]
assert row(case("packed", 1.0, ["packed"])) == ["0.6", "0.25", "0.25", "–"]
"""
    run(code)
