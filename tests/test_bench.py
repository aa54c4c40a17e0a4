"""What can be held of the benchmarks without timing anything."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    """In a process of its own, because the tests do not put the repository on sys.path."""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_latency_kernels_compile(architecture, tmp_path):
    code = (
        f"from bench import latency; import json; print(json.dumps(latency.compile_line('x.so', ('{architecture}',))))"
    )
    subprocess.run([*json.loads(run(code))[:-1], str(tmp_path / "x.so")], check=True)


def test_measured_latencies_replace_the_estimates(tmp_path):
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


def test_a_wavefront_needs_the_matrices_of_both_layers_on_the_chip():
    code = """
from bench import limit
in_turn, wavefront = limit.two_layers(limit.H200, "lstm", 16, 2048, 256)
assert in_turn / 2 < wavefront < in_turn
assert limit.two_layers(limit.H200, "lstm", 64, 512, 1024)[1] is None
"""
    run(code)


def test_the_search_knows_every_mode_and_prints_the_best_of_each():
    code = """
import torch
from bench import search
found = search.candidates("lstm", torch.bfloat16, 128, 64)
assert {tile.mode for tile in found} == {"local", "grouped", "stepwise", "gemm"} and len(set(found)) == len(found)
rows = [{"mode": "grouped", "tile": [1], "forward_us": 1.0, "backward_us": 2.0}, {"mode": "gemm", "failed": "wrong"}]
print(search.report({"cell": "lstm", "dtype": "bfloat16", "H": 128, "B": 64, "not tried": 3, "tiles": rows}))
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
    run(code)


def test_what_lost_the_gpu_is_left_out_of_the_features():
    code = """
from bench import features
from bench.feature_cases import FEATURES, FeatureCase
case = FeatureCase(FEATURES[0], 2, 3, 4, 5)
problem, x, gradients = features.given(case)
entries, broken = {}, {name: "gone" for name in ("fastrnn:cpu", "fastrnn:reference")}
right = features._agreeing(problem, x, gradients, broken, entries)
assert right and not right.keys() & broken.keys()
assert {name: entries[name]["failed"] for name in broken} == broken
"""
    run(code)


def test_records_are_written_as_they_come_and_can_be_read(tmp_path):
    code = f"""
from pathlib import Path
from bench import report
from bench.conftest import Session
path = Path({str(tmp_path)!r}, "records.jsonl")
session = Session(path)
class Case:
    def __init__(self, name): self.name = name
def measured(case, broken): return {{"suite": "throughput", "case": case.name}}
for name in ("a", "b", "a"):
    session.record(Case(name), measured)
data, records = report.load(path)
assert [record["case"] for record in records] == ["a", "b"]
assert {{"machine_info", "commit_info", "datetime"}} <= data.keys()
"""
    run(code)
