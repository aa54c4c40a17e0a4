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
