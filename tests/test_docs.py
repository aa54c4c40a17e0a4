"""README, docs/ and the other pages: their Python blocks run as pasted, print what they show, and their links exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/*.md")])
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
NEEDED = {"docs/deployment.md": ("onnx", "onnxscript", "onnxruntime")}
"""Packages that a page's blocks import."""
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


def form(printed: str) -> list[str]:
    """The lines without their numbers, which differ a little between machines, and the spaces that follow from them."""
    return [" ".join(NUMBER.sub("0", line).split()) for line in printed.strip().splitlines()]


def links(page: Path) -> list[tuple[str, str]]:
    """The relative links of a page outside of code: path and anchor, either of which may be empty."""
    return LINK.findall(re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_python_blocks_run_and_print_what_the_page_shows(page, tmp_path, monkeypatch, capsys):
    """A block marked `text` shows the output of the Python block before it."""
    for package in NEEDED.get(name(page), ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)  # a block may write a picture
    torch.manual_seed(0)
    names, printed = {}, None
    text = page.read_text()
    for found in BLOCK.finditer(text):
        language, block = found.groups()
        if language == "python":
            lines = "\n" * text.count("\n", 0, found.start(2))  # torch.jit.script reads the source, in its place
            exec(compile(lines + block, str(page), "exec"), names)
            printed = capsys.readouterr().out
        else:
            assert form(printed) == form(block)


@every_page
def test_relative_links_lead_somewhere(page):
    for path, anchor in links(page):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@every_page
def test_the_tests_that_a_page_names_exist(page):
    known = {path.stem for path in ROOT.glob("tests/test_*.py")}
    for path in ROOT.glob("tests/test_*.py"):
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    assert not set(re.findall(r"\btest_\w+", page.read_text())) - known


def test_the_pages_have_blocks_with_output():
    languages = [language for page in PAGES for language, _ in BLOCK.findall(page.read_text())]
    assert languages.count("python") >= 7
    assert languages.count("text") >= 2


def test_the_readme_is_short_and_lists_every_page_of_docs():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 90
    listed = {path for path, _ in links(readme)}
    assert {name(page) for page in PAGES if page.is_relative_to(ROOT / "docs")} <= listed


def test_every_cell_of_the_table_of_deployment_is_run_or_says_that_it_is_not():
    page = (ROOT / "docs/deployment.md").read_text()
    rows = [row.strip("|").split("|")[1:] for row in re.findall(r"^\|.*\|$", page, re.MULTILINE)[2:]]
    letters = re.split(r"\n\n", page.split("The letters are tests")[1])[0].split(":", 1)[1]
    known = {
        letter for entry in letters.split(";") for letter in re.findall(r"\b([a-m])\b(?=[, ])", entry.split("`")[0])
    }
    for cell in (cell.strip() for row in rows for cell in row):
        assert cell in ("not run", "no") or cell.removeprefix("no, ") in known, cell
