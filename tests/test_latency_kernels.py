"""The kernels of bench/latency.cu compile for the GPUs on which they are measured."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_latency_kernels_compile(architecture, tmp_path):
    code = (
        f"from bench import latency; import json; print(json.dumps(latency.compile_line('x.so', ('{architecture}',))))"
    )
    line = json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))
    subprocess.run([*line[:-1], str(tmp_path / "x.so")], check=True)
