"""The arguments that the launches of a call hand to Triton's launch function, on a driver that only takes notes.

Kernels compile for a GPU that this machine does not have, so this runs in a process of its own, without Triton's
interpreter: this file, as a script with the cases as JSON. `python tests/test_launch.py time` measures the CPU time of
a launch.
"""

import itertools
import json
import os
import sys
import tempfile
import timeit
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastrnn.arguments import MASKS
from scripts import without_interpreter

T, B, H = 7, 2, 16
EVERYTHING = [*MASKS, "clip_norm", "clip_value", "norms"]
# Mode, cell, dtype, extras; and the launches of the forward and the backward call.
CASES = {
    "stepwise": ("stepwise", "lstm", "bfloat16", [], T, T + 1),
    "stepwise everything": ("stepwise", "gru", "float32", EVERYTHING, T, T + 1),
    "grouped": ("grouped", "lstm", "float16", [*MASKS, "norms"], -(-T // 2), -(-(T + 1) // 2)),
    "gemm": ("gemm", "gru", "bfloat16", [], T, T + 1),
    "gemm everything": (
        "gemm", "lstm", "float32", [*EVERYTHING, "layer_norm", "projection"], 2 * T, 2 * T + 1,
    ),
}  # fmt: skip


class Notes:
    """Stands in for Triton's driver of an H100: keeps what every launch hands over, and launches nothing."""

    def __init__(self, keep: bool):
        from triton.backends.compiler import GPUTarget

        self.target, self.stream, self.launched, self.keep = GPUTarget("cuda", 90, 32), 0, [], keep
        functions = itertools.count()
        self.utils = SimpleNamespace(
            # module, function, registers, spills, threads
            load_binary=lambda name, *_: (name, next(functions), 0, 0, 1024), unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )  # fmt: skip

    def take_over(self):
        """Once per process: what has been compiled stays with the driver that it was compiled for."""
        from triton.runtime import driver

        driver.set_active(self)

    def launcher_cls(self, source, metadata):
        if not self.keep:
            return lambda *arguments: None
        return lambda *arguments: self.launched.append((metadata.launch_cooperative_grid, *arguments))

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream


def run_case(mode, cell, dtype, extras, misaligned=False, directions=(True,)):
    """One forward and one backward call of the Triton backend; yields after each."""
    from fastrnn.backends import sequence
    from fastrnn.backends import triton as launcher
    from fastrnn.tiles import GemmTile, Tile
    from problems import Problem, in_one_call

    sequence.timeout_flag = lambda: torch.zeros(1, dtype=torch.int32)  # as a GPU has it, in pinned memory
    sequence.MOST_STEPS = 2  # of a grouped launch, so that there are several
    tile = GemmTile(2, 4) if mode == "gemm" else Tile(mode, 16, 16, 16, 4, 1)
    sizes, dtype = (T, B, H), getattr(torch, dtype)
    problems = [Problem(cell, "cpu", dtype, sizes, reverse, extras, seed=int(reverse)) for reverse in directions]
    problem = problems[0] if len(problems) == 1 else in_one_call(problems)
    if misaligned:
        problem.h0 = problem.h0.new_zeros(1 + problem.h0.numel())[1:].view_as(problem.h0)
    y, c, _, _, saved = problem.forward(launcher, tile=tile)
    yield
    problem.backward(launcher, y, c, saved, tile=tile)
    yield


def noted(launch: tuple) -> list:
    """The arguments of a launch in a form that compares: tensors as addresses, the metadata of hooks as its items."""
    *head, function, metadata, told, enter, leave = launch[:10]
    arguments = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in launch[10:]]
    return [*head, function, metadata, told.get(), enter, leave, *arguments]


def watch(notes: Notes, case: dict) -> dict:
    """Runs the case, and after each of our launches the same launch Triton's own way; returns what differed."""
    import triton

    from fastrnn.backends.launch import Launch

    ours, way = Launch.__call__, triton.runtime.JITFunction.run
    found = {"launches": [], "bound": [], "different": []}
    bound, functions = 0, set()

    def count(*args, **kwargs):
        nonlocal bound
        bound += 1
        return way(*args, **kwargs)

    def both(launch, **step):
        nonlocal bound
        notes.stream += 1  # a launch goes to the stream that is current when it is made
        before = bound
        notes.launched.clear()
        ours(launch, **step)
        found["bound"][-1] += bound - before
        found["launches"][-1] += 1
        launch.kernel[launch.grid](**launch.arguments, **step)
        functions.update(note[5] for note in notes.launched)
        got, want = map(noted, notes.launched)
        if got != want:
            found["different"].append([launch.kernel.__name__, repr(got), repr(want)])

    Launch.__call__, triton.runtime.JITFunction.run = both, count
    try:
        steps = run_case(**case)
        for _ in range(2):
            found["launches"].append(0)
            found["bound"].append(0)
            next(steps)
    finally:
        Launch.__call__, triton.runtime.JITFunction.run = ours, way
    return {**found, "functions": len(functions)}


def refused() -> str:
    """The argument that the kernel specialises on and that may therefore not be passed to a second launch."""
    from fastrnn.backends.launch import Launch
    from fastrnn.kernels.norms import finish_kernel

    x = torch.zeros(2, 1, 1)
    launch = Launch(finish_kernel, (1,), partial_ptr=x, norm_ptr=x, TILES=2, WIDTH=2, BLOCK_B=32)
    launch(B=1)
    try:
        launch(B=16)
    except KeyError as error:
        return error.args[0]


@pytest.mark.slow
def test_a_repeated_launch_hands_over_what_an_ordinary_one_does(tmp_path):
    """Function, grid, stream, metadata, hooks and every argument, forward and backward, in all modes but local."""
    names = ("mode", "cell", "dtype", "extras")
    cases = [dict(zip(names, case, strict=False)) for case in CASES.values()]
    cases += [{**cases[0], "misaligned": True}, {**cases[0], "directions": [False, True]}]
    found = without_interpreter(__file__, cases, tmp_path)
    for name, (*_, forward, backward), watched in zip(CASES, CASES.values(), found["watched"], strict=False):
        assert watched["different"] == [], name
        assert watched["launches"] == [forward, backward], name
    stepwise, gemm = found["watched"][0], found["watched"][4]
    # Bound by Triton: the step at either end, and each of the others the first time its pointers occur.
    assert stepwise["bound"] == [2, 3]
    assert gemm["bound"] == [2 * 4, 2 * 4 + 1]
    # A state of the caller's that is not aligned to 16 bytes has a kernel of its own; the other pointers keep theirs.
    misaligned, both_directions = found["watched"][5:]
    assert misaligned["different"] == [] and misaligned["functions"] == stepwise["functions"] + 1
    assert both_directions["different"] == [] and both_directions["launches"] == [T, T + 1]
    assert found["refused"] == "B"


def measure():
    """Prints the table of launch times in docs/design/launch.md: CPU time, with a launch function that does nothing."""
    import triton

    from fastrnn.backends.launch import Launch

    Notes(keep=False).take_over()
    ours, launches = Launch.__call__, {}

    def keep(launch, **step):
        launches[launch.kernel] = launch, step
        ours(launch, **step)

    Launch.__call__ = keep
    for name in ("stepwise", "gemm everything"):
        list(run_case(*CASES[name][:4]))
    Launch.__call__ = ours
    print(f"Triton {triton.__version__}\n\n| kernel | arguments | ordinary | repeated |\n|---|---|---|---|")
    for kernel, (launch, step) in launches.items():
        launch(**step)
        ways = partial(kernel[launch.grid], **launch.arguments, **step), partial(launch, **step)
        times = [min(timeit.repeat(way, number=100, repeat=100)) * 1e4 for way in ways]
        module = kernel.__module__.removeprefix("fastrnn.")
        columns = f"`{kernel.__name__}` of {module}", len(kernel.params), *(f"{time:.1f}" for time in times)
        print("|", " | ".join(map(str, columns)), "|", flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["time"]:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        measure()
elif __name__ == "__main__":
    notes = Notes(keep=True)
    notes.take_over()
    found = {"watched": [watch(notes, case) for case in json.load(sys.stdin)], "refused": refused()}
    json.dump(found, sys.stdout)
