"""The loops of the cells over a row are compiled to vectors, not to scalar code."""

import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest
from setups import needs_cpu_library

from fastrnn.backends import extension

pytestmark = [
    needs_cpu_library,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="for the instructions of x86-64"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump"),
]
OF_A_ROW = 2
"""The scalar divisions that a layer norm has beside those of its loops."""


def divisions():
    """The divisions of float32 in the functions that walk over rows of a cell: those of one number and of a vector."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", str(extension.path("_C"))]
    text = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    of_one, of_vectors, name = Counter(), Counter(), None
    for line in text.splitlines():
        if line.endswith(">:"):
            found = re.search(r"<void fastrnn::(walk_\w+<fastrnn::RowByRow<fastrnn::\w+Row<.*float.*?>) >", line)
            name = found and found[1]
        elif name is not None:
            of_one[name] += "divss " in line
            of_vectors[name] += "divps " in line
    return of_one, of_vectors


def test_activations_are_computed_by_vectors():
    """They divide. What is left over after the last whole vector divides once more for each division of a loop."""
    of_one, of_vectors = divisions()
    cells = [name for name in of_one if of_one[name] + of_vectors[name] > 0 and re.search("LSTM|GRU|Tanh", name)]
    assert {re.search(r"(\w+)<", name)[1] for name in cells} == {"walk_avx512", "walk_avx2", "walk_baseline"}
    scalar = [name for name in cells if of_one[name] > of_vectors[name] + OF_A_ROW]
    assert not scalar
