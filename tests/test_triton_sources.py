"""The files that hold the Triton source of users' cells: where they are, and which of them are believed."""

import multiprocessing
import os
import stat
import subprocess
import sys
from dataclasses import replace

import pytest
from cell_texts import TEXTS

from fastrnn.backends import programs
from fastrnn.cell_table import spec_of

LEAKY = TEXTS["leaky"]
SOURCE = programs.source(spec_of(LEAKY))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "given"))
    return tmp_path / "given"


def test_a_file_is_readable_and_named_by_its_cell_and_content(folder):
    path = programs.written("leaky", SOURCE)
    assert path.parent == folder and path.name.startswith("leaky_") and path.suffix == ".py"
    assert path.read_text() == SOURCE and "tanh(" in SOURCE and "saved_0" in SOURCE and "param_alpha" in SOURCE
    other = programs.written("leaky", SOURCE + "\n")
    assert other != path and sorted(folder.iterdir()) == sorted((path, other))
    assert programs.written("<lambda> of a/b", SOURCE).parent == folder


def test_a_text_cannot_bring_code_with_it():
    spec = spec_of(LEAKY)
    for field in ("gates", "states", "parameters", "inputs"):
        with pytest.raises(ValueError, match="name of a plane"):
            programs.source(replace(spec, **{field: ('"""+print(1)+"""',)}))
    assert "+print" not in programs.source(replace(spec, name='"""+print(1)+"""'))


def test_the_default_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTRNN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert programs.written("leaky", SOURCE).parent == tmp_path / "xdg" / "fastrnn" / "triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert programs.written("leaky", SOURCE).parent == tmp_path / ".cache" / "fastrnn" / "triton"


@pytest.mark.parametrize("content", ["", SOURCE[: len(SOURCE) // 2], SOURCE.replace("tanh", "sigmoid"), "\0"])
def test_a_file_with_other_content_is_written_anew(content, folder):
    path = programs.written("leaky", SOURCE)
    path.write_text(content)
    module = programs.load("leaky", SOURCE)
    assert path.read_text() == SOURCE
    assert module.forward.fn.__code__.co_filename == str(path)


def test_a_right_file_is_not_written_again(folder):
    path = programs.written("leaky", SOURCE)
    before = path.stat()
    assert programs.written("leaky", SOURCE) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def unwritable(monkeypatch):
    """Nothing can be written but to the temporary folder. (Permissions do not stop root.)"""
    write = programs._write

    def refuse(path, content):
        if not str(path).startswith(programs._temporary_folder().name):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content)

    monkeypatch.setattr(programs, "_write", refuse)


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    path = programs.written("ind", programs.source(spec_of(TEXTS["ind"])))
    unwritable(monkeypatch)
    assert programs.written("ind", path.read_text()) == path  # what is there already is used
    with pytest.warns(UserWarning, match="FASTRNN_CACHE.*leaky goes to a temporary folder"):
        elsewhere = programs.written("leaky", SOURCE)
    assert elsewhere.parent != folder and elsewhere.read_text() == SOURCE
    assert stat.S_IMODE(elsewhere.parent.stat().st_mode) == 0o700
    monkeypatch.delenv("FASTRNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "other"))
    assert programs.written("leaky", SOURCE) == elsewhere  # a home of that kind is nothing to warn of


def test_a_file_in_the_place_of_the_folder(folder):
    folder.write_text("")
    with pytest.warns(UserWarning, match="FASTRNN_CACHE"):
        assert programs.written("leaky", SOURCE).read_text() == SOURCE


def test_a_temporary_folder_is_removed_at_the_end_of_the_process(folder):
    folder.write_text("")
    script = f"from fastrnn.backends import programs\nprint(programs.written('leaky', {SOURCE!r}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    path = done.stdout.strip()
    assert path.endswith(".py") and not os.path.exists(os.path.dirname(path))


def _write_often(folder, started, seen):
    os.environ["FASTRNN_CACHE"] = folder
    started.wait()
    for k in range(20_000):
        if k >= 200 and seen.is_set():
            break
        path = programs.written("leaky", SOURCE)
        if programs._content(path) not in (None, SOURCE.encode()):
            os._exit(1)
        path.unlink(missing_ok=True)
    os._exit(0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_two_processes_write_the_same_file(folder):
    """Each removes it again, so that both keep writing; a reader sees all of the file or none of it."""
    fork = multiprocessing.get_context("fork")
    started, some_seen = fork.Event(), fork.Event()
    writers = [fork.Process(target=_write_often, args=(str(folder), started, some_seen)) for _ in range(2)]
    for writer in writers:
        writer.start()
    started.set()
    path, seen = folder / programs.file_name("leaky", SOURCE), 0
    while any(writer.is_alive() for writer in writers):
        content = programs._content(path)
        assert content in (None, SOURCE.encode())
        if content is not None:
            seen += 1
            some_seen.set()
    assert seen and [writer.exitcode for writer in writers] == [0, 0]
    assert not list(folder.glob("*.tmp"))
