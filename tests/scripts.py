"""Tests of compiled kernels, in processes of their own: Triton's interpreter is on or off for a whole process."""

import json
import os
import subprocess
import sys


def without_interpreter(script: str, cases: list[dict], cache):
    """What the test file `script`, run with the cases as JSON, prints as JSON. Triton's cache lies in `cache`."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, script], input=json.dumps(cases), env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)
