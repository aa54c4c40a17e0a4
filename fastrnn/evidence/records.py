"""Records: what is known of the backends on one machine, in files that a person can read.

A record file is JSON: the form's number, the machine (`where`), and entries. `python -m fastrnn tune` and the check
before a kernel's first use write one file per bucket of calls and candidate, in the user's cache folder;
`fastrnn/evidence/shipped` holds files of the same form that come with a release. A file is written beside its
place and moved there, so processes need no lock and a full disk leaves the old one. An entry that is not as it
should be is left out.
"""

import json
import os
import platform
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORM = 1
"""Of the files. A file of another form is not read."""
LARGEST = 1 << 22  # bytes of a file that is read
LONGEST = 300  # characters of a reason
VERDICTS = ("measured", "verified", "broken")
RIVALS = ("torch.nn", "reference")  # what a time is compared with
SHIPPED = Path(__file__).parent / "shipped"


class Key(NamedTuple):
    """A bucket of calls. The sizes are bounds of buckets (`lookup.py`), never the sizes of a call."""

    device: str  # type: "cpu", "cuda", ...
    cell: str
    dtype: str
    kind: str  # the class of the call's features
    gradients: bool
    steps: int  # the least T
    batch: int  # the largest B
    hidden: int  # the largest H


class Entry(NamedTuple):
    """What was found out about a candidate for a bucket of calls."""

    key: Key
    candidate: str  # a backend, or a backend and a mode: "triton:grouped"
    verdict: str  # of VERDICTS
    date: str  # 2026-12-01
    against: str = ""  # measured: of RIVALS
    ratio: tuple[float, float, float] | None = None  # measured: its time over the other's: median, 95 % interval
    reason: str = ""  # broken: why


class Where(NamedTuple):
    """The machine and the libraries for which a record holds."""

    device: str  # the name of the GPU or the processor
    architecture: str  # of a GPU, or a processor's `_instructions`
    threads: int  # of a CPU; 0 of a GPU
    torch: str
    triton: str
    library: str  # fastrnn's version and the checksum of its C++ library


def today() -> str:
    return date.today().isoformat()


# ------------------------------------------------------------------------------------------------------ the machine


@cache
def _cpuinfo(*fields: str) -> str:
    """The first of these fields in Linux's account of the processor; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(fields)), "")


def _processor() -> str:
    return _cpuinfo("model name", "CPU part") or platform.processor() or platform.machine()


def _instructions() -> str:
    """The processor's vectors, and the instructions that it has for products of bfloat16: "AVX512, AMX"."""
    flags = _cpuinfo("flags").split()
    of_halves = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "BF16")) if flag in flags]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *of_halves[:1]])


@cache
def _library() -> str:
    from .. import __version__

    parts = [__version__]
    for path in sorted(Path(__file__).parents[1].glob("_C*.so")):
        try:
            parts.append(f"{zlib.crc32(path.read_bytes()):08x}")
        except OSError:
            continue
    return "-".join(parts)


@cache
def _triton() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def _gpu(device: str) -> tuple[str, str]:
    """Name and architecture; of a device that is not there, or has none of its own (meta), the type."""
    try:
        properties = torch.get_device_module(device).get_device_properties()
    except (RuntimeError, AssertionError, AttributeError):
        return device, ""
    major = getattr(properties, "major", None)
    return properties.name, getattr(properties, "gcnArchName", "") or (f"sm_{major}{properties.minor}" if major else "")


@cache
def where(device: str, threads: int) -> Where:
    """This machine, for calls on a device type; `threads` counts on a CPU only."""
    if device == "cpu":
        name, architecture = _processor(), _instructions()
    else:
        name, architecture, threads = *_gpu(device), 0
    return Where(name, architecture, threads, torch.__version__, _triton(), _library())


# -------------------------------------------------------------------------------------------------------- the folder


def folder() -> Path:
    """Where records are kept: `FASTRNN_CACHE`, or where the platform keeps caches (as platformdirs says)."""
    given = os.environ.get("FASTRNN_CACHE")
    if given:
        return Path(given)
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():  # there is none; below this path nothing can be read or written
        home = Path(os.devnull)
    if sys.platform == "darwin":
        return home / "Library/Caches/fastrnn"
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else home / ".cache") / "fastrnn"


def _name(text: str) -> str:
    """A text as a part of a file's name."""
    short = "".join(c if c.isalnum() else "-" for c in text)[:40]
    return f"{short}-{zlib.crc32(text.encode()):08x}"


def place(place_of: Where) -> Path:
    """The folder of a machine's records."""
    return folder() / "records" / _name("|".join(map(str, place_of)))


def path(place_of: Where, key: Key, candidate: str) -> Path:
    """The file of an entry."""
    return place(place_of) / f"{_name('|'.join(map(str, (*key, candidate))))}.json"


# ------------------------------------------------------------------------------------------------------ reading


def _is_text(value: Any, longest: int = LONGEST) -> bool:
    return isinstance(value, str) and len(value) <= longest and value.isprintable()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40


def _is_ratio(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 3 and all(type(x) in (float, int) for x in value)
    return numbers and all(0 < x < 1e6 for x in value) and value[1] <= value[0] <= value[2]


def _is_date(value: Any) -> bool:
    try:
        return date.fromisoformat(value).isoformat() == value
    except (TypeError, ValueError):
        return False


def _key(value: Any) -> Key | None:
    if not isinstance(value, dict) or set(value) != set(Key._fields):
        return None
    key = Key(**value)
    texts = all(_is_text(text) for text in key[:4])
    return key if texts and isinstance(key.gradients, bool) and all(_is_count(n) for n in key[5:]) else None


def _entry(value: Any) -> Entry | None:
    """An entry as it is in a file; None where anything is not as `write` writes it."""
    if not isinstance(value, dict) or not set(value) <= set(Entry._fields):
        return None
    key, verdict, ratio = _key(value.get("key")), value.get("verdict"), value.get("ratio")
    texts = [value.get(name, "") for name in ("candidate", "date", "against", "reason")]
    if key is None or verdict not in VERDICTS or not all(_is_text(text) for text in texts):
        return None
    if not texts[0] or not _is_date(texts[1]) or (verdict == "measured") != _is_ratio(ratio):
        return None
    if verdict == "measured" and texts[2] not in RIVALS:
        return None
    return Entry(key, texts[0], verdict, texts[1], texts[2], tuple(ratio) if ratio else None, texts[3])


def read(file: Path) -> tuple[Where, list[Entry]] | None:
    """The machine and the entries of a file; None where it is no record."""
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST:
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("entries"), list):
        return None
    form, machine = found.get("form"), found.get("where")
    if type(form) is not int or form != FORM:
        return None
    if not isinstance(machine, dict) or set(machine) != set(Where._fields):
        return None
    place_of = Where(**machine)
    texts = all(_is_text(text) for name, text in machine.items() if name != "threads")
    if not texts or not _is_count(place_of.threads):
        return None
    return place_of, [entry for value in found["entries"] if (entry := _entry(value)) is not None]


def files(under: Path) -> list[Path]:
    """The record files of a folder, in order of their names; none where it cannot be read."""
    try:
        return sorted(under.glob("*.json"))
    except OSError:
        return []


def load(place_of: Where) -> list[Entry]:
    """What was recorded on this machine."""
    found = [record for file in files(place(place_of)) if (record := read(file)) is not None]
    return [entry for machine, entries in found if machine == place_of for entry in entries]


# ------------------------------------------------------------------------------------------------------ writing


def text_of(place_of: Where, entries: Iterable[Entry]) -> str:
    """A record file, an entry per line."""
    rows = []
    for entry in entries:
        row = {name: value for name, value in entry._asdict().items() if value not in ("", None)}
        row["key"] = entry.key._asdict()
        if entry.ratio is not None:
            row["ratio"] = [float(f"{x:.4g}") for x in entry.ratio]
        rows.append(json.dumps(row))
    head = json.dumps({"form": FORM, "where": place_of._asdict()})
    return f'{head[:-1]}, "entries": [\n' + ",\n".join(rows) + "\n]}\n"


def write(file: Path, text: str) -> None:
    """A file from one moment to the next, whole. Raises OSError where it cannot be written; the old one then stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(beside, 0o644)
        os.replace(beside, file)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def printable(text: str) -> str:
    """A reason as a record can hold it: one line, not too long."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in line)[:LONGEST]


def save(place_of: Where, entry: Entry) -> str | None:
    """Keeps an entry; the reason where the disk does not let it."""
    try:
        write(path(place_of, entry.key, entry.candidate), text_of(place_of, [entry]))
    except OSError as error:
        return str(error)
    return None


def forget() -> int:
    """Removes all records from the cache folder, and nothing else that lies there; returns how many files that were.

    Raises OSError where they cannot be removed.
    """
    try:
        folders = [one for one in (folder() / "records").iterdir() if one.is_dir()]
    except OSError:
        return 0
    count = 0
    for one in folders:
        for file in one.glob(f"*-{'[0-9a-f]' * 8}.json"):  # as `_name` has it
            file.unlink(missing_ok=True)
            count += 1
        with suppress(OSError):  # something else is in it
            one.rmdir()
    return count
