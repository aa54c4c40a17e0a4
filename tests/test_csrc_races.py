"""csrc's persistent CUDA kernels, emulated on the host, under ThreadSanitizer: no access races another.

Two accesses to one address race if one of them writes and nothing orders them on a GPU: no barrier of warp, block or
cluster, no release that is acquired, no delivery (`send`, `await`). A race is reported even if the result is right.
Shuffles and products of a warp order nothing here, since CUDA does not promise that they do. Runtimes newer than
g++ 12's let more than 255 threads share clocks, and may miss a race.
"""

import os
import shutil
import subprocess

import pytest
from emulated import CXX, compiled

pytestmark = pytest.mark.slow  # compiling the emulated kernels takes more than a minute
FLAGS = ("-g1", "-fsanitize=thread")
RACE = 66  # ThreadSanitizer's exit code when it has reported one
PROBE = """
#ifndef __SANITIZE_THREAD__
#error "the macro is not defined"
#endif
int main() {}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory, pytestconfig):
    """`program()` runs the kernels; `program(order)` as if that one ordered nothing."""
    made = tmp_path_factory.mktemp("races")
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler {CXX}")
    (made / "probe.cpp").write_text(PROBE)
    probe = [CXX, "-std=c++17", "-O1", *FLAGS, str(made / "probe.cpp"), "-o", str(made / "probe")]
    done = subprocess.run(probe, capture_output=True, text=True)
    # ThreadSanitizer sometimes fails when addresses are too random.
    fixed = ["setarch", "-R"]
    if shutil.which("setarch") is None or subprocess.run([*fixed, "true"], capture_output=True).returncode != 0:
        fixed = []
    if done.returncode == 0:
        done = subprocess.run([*fixed, made / "probe"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"ThreadSanitizer does not work with {CXX} here: {done.stderr[-300:]}")
    race = compiled(pytestconfig.cache, "race.cpp", *FLAGS)

    def run(*order):
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        return subprocess.run([*fixed, race, *order], env=environment, capture_output=True, text=True)

    return run


def test_nothing_races(program):
    done = program()
    assert done.returncode == 0, done.stdout + done.stderr[:5000]


@pytest.mark.parametrize("order", ["warp", "block", "grid", "cluster", "delivery"])
def test_without_any_one_order_something_races(program, order):
    """None of the orders is superfluous, and the lack of any is found."""
    done = program(order)
    assert done.returncode == RACE and "data race" in done.stderr
