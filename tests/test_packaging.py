"""What leaves the repository: the sdist is whole, wherever it was made, and a copy that lacks a part says which."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fastrnn

pytestmark = pytest.mark.slow  # runs setup.py
ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "csrc", "docs", "experiments", "fastrnn", "kernels", "tests")
UNWANTED = shutil.ignore_patterns("__pycache__", "*.so", "*.log", "build")


def files(root):
    return {str(path.relative_to(root)) for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()}


def run(command, folder, **environment):
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_sdist_made_without_torch_holds_the_repository(tmp_path):
    source, out, hidden = tmp_path / "source", tmp_path / "out", tmp_path / "hidden"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=UNWANTED)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    want = files(source)
    (source / "fastrnn/_C.so").touch()
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError")
    run(["setup.py", "--quiet", "sdist", "--dist-dir", str(out)], source, PYTHONPATH=str(hidden))
    (made,) = out.iterdir()
    with tarfile.open(made) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert not want - found
    assert {"Makefile", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "setup.py"} <= found
    assert not any(name.endswith((".so", ".pyc")) for name in found)


def test_a_copy_without_its_kernels_and_library_says_so(tmp_path):
    """As in a checkout, when what is installed is not it."""
    package = Path(fastrnn.__file__).parent
    shutil.copytree(package, tmp_path / "fastrnn", ignore=shutil.ignore_patterns("__pycache__", "*.so", "kernels"))
    code = """
import sys
sys.modules["fastrnn.kernels"] = None  # an editable install would find them all the same
from fastrnn.__main__ import main
main(["info"])
"""
    said = run(["-c", code], tmp_path, PYTHONPATH=str(tmp_path))
    assert f"in {tmp_path / 'fastrnn'}\n" in said
    assert f"csrc's library _C is not in {tmp_path / 'fastrnn'}" in said
    assert f"fastrnn.kernels is not installed with {tmp_path / 'fastrnn'}" in said
