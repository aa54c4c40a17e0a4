"""Every Python block of the README and of docs/ runs as it stands, those of one file one after another."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
# What the README leaves to the reader's imagination.
GIVEN = {"some_model": torch.nn.Sequential(torch.nn.GRU(3, 4))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)  # a block may write a picture
    torch.manual_seed(0)
    names = dict(GIVEN)
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


def test_the_pages_have_blocks():
    assert sum(page.read_text().count("```python") for page in PAGES) >= 7
