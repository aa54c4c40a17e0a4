"""Imports point one way, and `import fastrnn` is light. Read from the sources, and measured in fresh processes."""

import ast
import os
import sys
from pathlib import Path

import pytest
import torch

import fastrnn
from scripts import Forks

PACKAGE = Path(fastrnn.__file__).parent
# installed beside each other in a wheel, side by side in the repository
KERNELS = next((p for p in (PACKAGE.parent / "kernels", PACKAGE / "kernels") if p.is_dir()), None)

# What each module may import of fastrnn.
# modules -> functional -> checks -> stack -> scan -> ops -> dispatch -> ranking -> aten and the backends.
BELOW = {
    "program": set(),
    "building": {"program"},
    "adjoint": {"building", "cell_table", "program"},
    "arcs": {"building"},
    "lowering": {"arcs", "building"},
    "tracing": {"building", "lowering", "program"},
    "user_cells": {"adjoint", "cell_table", "tracing"},
    "cells": {"user_cells"},
    "activations": {"user_cells"},
    "cell_table": {"program"},
    "directions": set(),
    "tiles": {"cell_table"},
    "tasks": set(),
    "packing": set(),
    "linear": {"aten", "backends"},
    "heads": set(),
    "equations": {"adjoint", "cell_table", "program"},
    "arguments": {"cell_table", "equations"},
    "reference": {"arguments", "cell_table", "equations", "heads"},
    "aten": {"cell_table"},
    "backends": {
        *("arguments", "cell_table", "directions", "equations", "tiles", "reference", "kernels", "_C", "backends"),
        *("heads", "program"),
    },
    "recomputation": set(),
    "evidence.agreement": {"cell_table"},
    "evidence.records": set(),
    "evidence.lookup": {"cell_table", "evidence.records"},
    "evidence": {"evidence.lookup"},
    "evidence.verification": {
        *("evidence", "evidence.agreement", "evidence.records", "arguments", "backends", "cell_table", "equations"),
    },
    "backend_table": {"backends", "aten", "arguments", "tiles"},
    "ranking": {"backend_table", "evidence", "evidence.records", "evidence.verification", "aten", "backends"},
    "network": {"aten", "backends", "cell_table", "linear", "network_extras", "network_function"},
    "network_extras": {"backend_table", "cell_table", "checks", "equations", "network_function", "stack"},
    "network_function": {"cell_table", "equations", "linear", "packing", "scan", "stack"},
    "dispatch": {"backend_table", "cell_table", "ranking", "evidence", "backends", "aten", "recomputation", "linear"},
    "ops": {"dispatch", "arguments", "directions", "linear"},
    "vmapping": set(),
    "export": {"ops", "dispatch", "linear", "arguments", "cell_table", "directions", "reference"},
    "scan": {
        *("export", "ops", "vmapping", "linear", "arguments", "cell_table", "directions", "equations", "reference"),
        "heads",
    },
    "stack": {"export", "scan", "linear", "arguments", "cell_table", "dispatch", "packing", "equations", "reference"},
    "call_tensors": {"packing", "linear", "cell_table", "equations"},
    "checks": {"activations", "call_tensors", "stack", "dispatch", "aten", "linear", "cell_table", "equations"},
    "network_call": {"cell_table", "checks", "equations", "linear", "network", "network_function", "stack"},
    "functional": {
        *("checks", "stack", "packing", "scan", "export", "dispatch", "aten", "recomputation", "equations", "linear"),
        *("activations", "network_call"),
    },
    "with_lengths": set(),
    "torch_nn": set(),
    "weights": set(),
    "subclassing": set(),
    "modules": {
        *(
            "activations",
            "functional",
            "checks",
            "dispatch",
            "network",
            "aten",
            "linear",
            "cell_table",
            "subclassing",
            "equations",
        ),
    },
    "single_step": {"modules", "functional", "checks", "dispatch", "cell_table", "equations"},
    "recurrent": {"modules", "functional", "checks", "user_cells"},
    "compat": {"modules", "single_step", "torch_nn"},
    "convert": {"modules", "single_step", "compat", "torch_nn", "with_lengths", "functional", "checks", "dispatch"},
    "init": {"modules", "single_step", "torch_nn", "cell_table"},
    "tuning.timing": set(),
    "tuning.job": {"cell_table", "recurrent", "modules", "torch_nn", "backend_table", "evidence.agreement"},
    "tuning.trial": {
        *("backend_table", "evidence", "evidence.agreement", "evidence.verification", "tuning.job", "tuning.timing"),
    },
    "tuning.search": {
        *("cell_table", "tuning.job", "modules", "checks", "backend_table", "ranking", "evidence", "evidence.records"),
    },
    "tuning.command": {"tuning.search", "evidence", "evidence.records"},
    "tuning": {"tuning.search"},
    # on top of everything: they may see all below, and nothing below sees them
    "penalties": {"modules", "functional", "dispatch", "cell_table"},
    "monitoring.listing": set(),
    "monitoring.diagnosis": {"cell_table", "modules", "monitoring.listing"},
    "monitoring.advice": {"cell_table", "modules", "monitoring.diagnosis"},
    "monitoring.history": {"monitoring.diagnosis"},
    "monitoring.prescription": {"monitoring.advice", "convert", "init", "modules", "monitoring.diagnosis"},
    "monitoring.checkup": {
        *(f"monitoring.{name}" for name in ("diagnosis", "listing", "plots", "prescription")),
    },
    "monitoring.doctor": {
        *(f"monitoring.{name}" for name in ("checkup", "diagnosis", "monitor", "prescription")),
    },
    "monitoring.calls": {"checks", "functional", "packing"},
    "monitoring.watch": {"recomputation", "checks", "functional", "linear", "monitoring.calls", "monitoring.stitching"},
    "monitoring.stitching": {"monitoring.calls", "monitoring.diagnosis"},
    "monitoring.steps": set(),
    "monitoring.plots": {"monitoring.history", "monitoring.steps"},
    "monitoring.monitor": {
        "modules",
        "single_step",
        "equations",
        "cell_table",
        "convert",
        *(f"monitoring.{name}" for name in ("plots", "diagnosis", "advice", "history", "calls", "watch", "stitching")),
        "monitoring.prescription",
    },
    "monitoring.flow": {
        *("recurrent", "user_cells", "modules", "init"),
        *(f"monitoring.{name}" for name in ("monitor", "diagnosis", "listing")),
    },
    "monitoring": {
        "monitoring.monitor",
        "monitoring.diagnosis",
        "monitoring.history",
        "monitoring.prescription",
        "monitoring.doctor",
    },
    "integrations": {"monitoring"},
    "distributed": {"monitoring"},
    "training": {"cells", "init", "monitoring", "tasks"},
    "__main__": {
        "dispatch",
        "cell_table",
        "distributed",
        "cells",
        "tasks",
        "training",
        "monitoring",
        "monitoring.doctor",
        "monitoring.flow",
        "monitoring.plots",
        "tuning.command",
    },
    "__init__": {
        "monitoring.doctor",
        "modules",
        "single_step",
        "recurrent",
        "user_cells",
        "cells",
        "compat",
        "functional",
        "dispatch",
        "convert",
        "init",
        "integrations",
        "monitoring",
        "penalties",
        "tuning",
        "weights",
    },
}
FOLDERS = ("evidence", "monitoring", "tuning")
LATE = {"matplotlib", "sklearn", "tqdm"}


def sources():
    return sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts)


def place(*parts):
    """The name in BELOW of `fastrnn.part.part`: a module of such a folder for itself, else the first part."""
    if parts[0] in FOLDERS and len(parts) > 1 and (PACKAGE / parts[0] / f"{parts[1]}.py").exists():
        return ".".join(parts[:2])
    return parts[0]


def owner(path):
    """The name in BELOW of a source file."""
    return (
        place(*path.relative_to(PACKAGE).with_suffix("").parts)
        if path.stem != "__init__"
        else (path.parent.name if path.parent != PACKAGE else "__init__")
    )


def imported(path, top_level_only=False):
    """Every name that a file imports: `fastrnn.x` as ('fastrnn', 'x'), others as ('torch', None)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    folder = path.relative_to(PACKAGE).parts[:-1] if path.is_relative_to(PACKAGE) else ()
    late = set()
    if top_level_only:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                late.update(map(id, ast.walk(node)))
    found = set()
    for node in ast.walk(tree):
        if id(node) in late:
            continue
        if isinstance(node, ast.Import):
            for name in node.names:
                head, *rest = name.name.split(".")
                found.add((head, place(*rest) if rest else None) if head == "fastrnn" else (head, None))
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level == 0 and parts[0] != "fastrnn":
                found.add((parts[0], None))
                continue
            # relative to the folder of the file, or to one above it
            start = folder[: len(folder) + 1 - node.level] if node.level else parts[:1] and ()
            parts = [*start, *(parts if node.level else parts[1:])]
            found.update(("fastrnn", place(*parts, name.name)) for name in node.names)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    name = owner(path)
    assert name in BELOW, f"{name} is new: give it a place in the order above"
    inside = {module for top, module in imported(path) if top == "fastrnn"}
    modules = {owner(p) for p in sources()} | {"kernels", "_C"}
    wrong = (inside & modules) - BELOW[name] - {name}
    assert not wrong, f"{name} should not import {', '.join(sorted(wrong))}"


def test_the_order_itself_has_no_cycle():
    done: set[str] = set()
    pending = {name: {d for d in below if d in BELOW and d != name} for name, below in BELOW.items()}
    while pending:
        ready = {name for name, below in pending.items() if below <= done}
        assert ready, f"a cycle among {', '.join(sorted(pending))}"
        done |= ready
        pending = {name: below for name, below in pending.items() if name not in ready}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_imports_are_late(path):
    """matplotlib and what draws with it, and Triton, are imported inside the functions that need them."""
    tops = {top if top != "fastrnn" else module for top, module in imported(path, top_level_only=True)}
    assert not tops & LATE, "import it inside the function that needs it"
    if owner(path) != "backends":
        assert "triton" not in tops and "kernels" not in tops


def test_the_detector_sees_a_wrong_import(tmp_path, monkeypatch):
    """The reading above, on a file that breaks the order in every spelling."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "cells.py").write_text(
        "import torch.nn\nimport fastrnn.scan\nfrom fastrnn import ops\nfrom fastrnn.stack import run\n"
        "from . import functional\nfrom .modules import LSTM\ndef f():\n    from .convert import convert\n"
    )
    inside = {"scan", "ops", "stack", "functional", "modules"}
    found = imported(tmp_path / "cells.py")
    assert found == {("torch", None), *(("fastrnn", m) for m in inside | {"convert"})}
    assert ("fastrnn", "convert") not in imported(tmp_path / "cells.py", top_level_only=True)
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "cpu.py").write_text("from .. import scan\nfrom ..modules import LSTM\nfrom . import x\n")
    found = imported(tmp_path / "backends" / "cpu.py")
    assert found == {("fastrnn", "scan"), ("fastrnn", "modules"), ("fastrnn", "backends")}


@pytest.mark.skipif(KERNELS is None, reason="the kernels are not installed beside the package")
def test_kernels_import_only_triton_and_themselves():
    files = sorted(KERNELS.glob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                known = ("triton", "typing")  # NamedTuple
                assert node.module.split(".")[0] in known, f"{path.name} imports {node.module}"
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, f"{path.name} reaches out of the package"
            elif isinstance(node, ast.Import):
                assert {n.name.split(".")[0] for n in node.names} <= {"triton"}, f"{path.name}: {node.names[0].name}"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """`fresh(code)`: what a program prints that can import this fastrnn and has torch, nothing of fastrnn.

    The programs are forks of one process, since an import of torch takes seconds. They may write the bytecode, which an
    installed package has, whatever the environment says.
    """
    if not hasattr(os, "fork"):
        pytest.skip("the programs are forked")
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": ""}
    forks = Forks("import torch", tmp_path_factory.mktemp("fresh"), environment)
    yield lambda code: forks.run(code).strip()
    forks.close()


def test_import_loads_nothing_heavy_and_touches_no_device(fresh):
    code = """
import sys, torch
before = set(sys.modules)
assert "fastrnn" not in before
import fastrnn
fastrnn.LSTM(2, 3)(torch.zeros(2, 2, 2))
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = new & {"triton", "matplotlib", "sklearn", "tqdm", "hypothesis"}
print(sorted(heavy), torch.cuda.is_initialized(), "fastrnn.kernels" in sys.modules)
"""
    assert fresh(code) == "[] False False"


def test_the_scan_runs_without_the_compiler(fresh):
    """Whose import takes a second or two, in the first call of every process that only computes."""
    code = """
import sys, torch, fastrnn
model = fastrnn.GRU(2, 3, layer_norm=True)
model(torch.zeros(2, 2, 2))[0].sum().backward()
print("torch._dynamo" in sys.modules)
"""
    assert fresh(code) == "False"


def test_import_is_light(fresh):
    """Under 0.1 s of processor time on top of `import torch`, the best of three."""
    code = """
import time
begin = time.process_time()
import fastrnn
print(time.process_time() - begin)
"""
    seconds = min(float(fresh(code)) for _ in range(3))
    assert seconds < 0.1, f"import fastrnn took {seconds:.3f} s"


@pytest.mark.skipif(KERNELS is None, reason="the kernels are not installed beside the package")
def test_kernels_refuse_to_be_a_top_level_package(fresh):
    code = f"""
import sys
sys.path.insert(0, {str(KERNELS.parent)!r})
try:
    import kernels
except ImportError as error:
    print("fastrnn.kernels" in str(error) and "PyPI" in str(error))
"""
    assert fresh(code) == "True"


def test_public_names_are_there():
    assert set(fastrnn.__all__) <= set(dir(fastrnn))
    assert all(isinstance(getattr(fastrnn, name), type) for name in ("LSTM", "GRU", "RNN", "LSTMCell"))
    assert issubclass(fastrnn.LSTM, torch.nn.Module)
