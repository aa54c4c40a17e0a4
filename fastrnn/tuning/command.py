"""`python -m fastrnn tune`: measures, shows and forgets what is known of this machine."""

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from .. import evidence
from ..evidence import records
from ..evidence.records import Entry
from .search import CELLS, KINDS, Result, Results, Search, standard_set


def _device(text: str) -> torch.device:
    """A device that is there: on another one nothing can be measured, and nothing would be to blame for it."""
    try:
        torch.zeros(1, device=text).item()
        return torch.device(text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here: {str(error).splitlines()[0]}") from error


def _file(text: str) -> Path:
    """A file that can be written, which is found out before the measurement. Its folder is made when it is written."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error}") from error
    return path


def add_to(commands, formatter, count, positive) -> None:
    """Adds the command to the command line's. `count`, `positive`: argparse's types of an int and of a float."""
    command = commands.add_parser(
        "tune", formatter_class=formatter, help="measure the backends on this machine, so that auto takes the fastest"
    )
    add = command.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=_device, help="cpu, cuda, ...")
    add("--minutes", type=positive, default=2.0, metavar="M", help="the most time to spend")
    add("--threads", type=count, default=torch.get_num_threads(), metavar="N", help="CPU threads to measure with")
    add("--cell", choices=CELLS, action="append", help="only this cell; can be repeated")
    add("--dtype", choices=("float32", "bfloat16", "float16"), action="append", help="only this dtype; can be repeated")
    add("--kind", choices=KINDS, action="append", help="only calls of this kind; can be repeated")
    add("--out", type=_file, metavar="FILE", help="write one record file there, instead of the cache folder")
    add("--show", action="store_true", help="print what is known of this machine, and measure nothing")
    add("--forget", action="store_true", help="remove all records from the cache folder, and measure nothing")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.device.index is not None and options.device.type != "cpu":
        torch.get_device_module(options.device.type).set_device(options.device.index)
    options.device = options.device.type
    if options.forget:
        print(f"{records.forget()} records removed from {records.folder()}")
    elif options.show:
        _show(options)
    else:
        _tune(options)


def _show(options: argparse.Namespace) -> None:
    place = records.where(options.device, options.threads)
    found = [Result(entry, ()) for entry in sorted(records.load(place))]
    print(f"{place.device} {place.architecture}, {_threads(place)}torch {place.torch}, in {records.place(place)}")
    print(Results(found) if found else "nothing was measured here; `python -m fastrnn tune` does it")


def _threads(place: records.Where) -> str:
    return f"{place.threads} thread{'s'[: place.threads != 1]}, " if place.threads else ""


def _bar(total: int):
    """tqdm's progress bar, silent where the output is no terminal; without tqdm, a block that gives None."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext()
    return tqdm(total=total, unit="bucket", dynamic_ncols=True, disable=None, file=sys.stderr)


def _tune(options: argparse.Namespace) -> None:
    ladders = standard_set(
        options.device, options.threads, tuple(options.cell or CELLS),
        tuple(options.dtype or ("float32", "bfloat16")), tuple(options.kind or KINDS),
    )  # fmt: skip
    kept: dict[tuple, Entry] = {}

    def collect(entry: Entry, threads: int) -> None:
        if entry.verdict == "measured":  # what is broken here may be right where the file is read
            kept[entry.key, entry.candidate] = entry

    search = Search(60 * options.minutes, evidence.keep if options.out is None else collect)
    with _bar(len(ladders)) as bar:

        def progress(text: str) -> None:
            if bar is not None:
                bar.update()
                bar.set_postfix_str(text)

        found = Results(search.run(ladders, progress))
    print(found)
    faster = sum(evidence.Finding(result.entry, None).time < 1 for result in found)
    print(f"\n{len(found)} results, {faster} of them faster; {'the time is up' if search.is_over else 'all was asked'}")
    place = records.where(options.device, options.threads)
    if options.out is not None:
        records.write(options.out, records.text_of(place, sorted(kept.values())))
    if options.out is not None or any(result.unkept is None for result in found):
        print(f"kept in {options.out or records.place(place)}")
