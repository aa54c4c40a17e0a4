"""Records: what is written is read back, whatever else lies there; full disks; processes side by side."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from setups import needs_cpu_library

import fastrnn
from fastrnn import dispatch, evidence, ranking
from fastrnn.dispatch import Request
from fastrnn.evidence import records
from fastrnn.evidence.records import Entry, Key

REQUEST = Request("gru", "cpu", torch.float32, 8, steps=40, batch=2)
KEY = evidence.key_of(REQUEST)
ENTRY = Entry(KEY, "cpu", "measured", "2026-12-01", "torch.nn", (0.5, 0.4, 0.6))
HERE = records.where("cpu", torch.get_num_threads())


def kept(folder, entry=ENTRY, where=HERE):
    """The file of an entry in a cache folder."""
    (file,) = folder.rglob("*.json")
    return file


@pytest.fixture
def file(evidence_in):
    assert records.save(HERE, ENTRY) is None
    return kept(evidence_in)


def known():
    """The entries that count, after the files were read anew."""
    evidence.clear()
    return records.load(HERE)


def test_an_entry_reads_back_as_it_was_written_and_can_be_read_by_a_person(file):
    assert known() == [ENTRY]
    assert records.read(file) == (HERE, [ENTRY])
    found = json.loads(file.read_text())
    assert found["where"]["torch"] == torch.__version__ and found["entries"][0]["key"]["cell"] == "gru"
    assert "\n" in file.read_text().strip()


def test_a_later_entry_of_a_bucket_replaces_the_earlier_one(file):
    later = ENTRY._replace(verdict="broken", ratio=None, against="", reason="killed after 20 s")
    records.save(HERE, later)
    assert known() == [later]


def change(value, *place):
    """A file with something else at a place."""

    def changed(found):
        *way, last = place
        part = found
        for step in way:
            part = part[step]
        part[last] = value
        return json.dumps(found)

    return changed


FIRST = ("entries", 0)
UNBELIEVED = {
    "nothing": lambda found: "",
    "cut off": lambda found: json.dumps(found)[:-30],
    "no JSON": lambda found: "import os",
    "a list": lambda found: "[]",
    "deep": lambda found: "[" * 100_000,
    "huge": lambda found: " " * (records.LARGEST + 1) + json.dumps(found),
    "of another form": change(2, "form"),
    "older, without a form": lambda found: json.dumps({k: v for k, v in found.items() if k != "form"}),
    "of another machine": change("a rival", "where", "device"),
    "of other threads": change(64, "where", "threads"),
    "of another torch": change("1.0", "where", "torch"),
    "of another library": change("0.0.1", "where", "library"),
    "a machine with more to it": change("x", "where", "more"),
    "no entries": change(None, "entries"),
    "an entry that is none": change([1, None, "x", []], "entries"),
    "an unknown verdict": change("trusted", *FIRST, "verdict"),
    "no candidate": change("", *FIRST, "candidate"),
    "a candidate that is none": change(["cpu"], *FIRST, "candidate"),
    "an endless candidate": change("x" * 1000, *FIRST, "candidate"),
    "a time of zero": change([0, 0, 0], *FIRST, "ratio"),
    "a negative time": change([-1, -2, 1], *FIRST, "ratio"),
    "a time that is not a number": change([float("nan")] * 3, *FIRST, "ratio"),
    "an infinite time": change([float("inf")] * 3, *FIRST, "ratio"),
    "a time that is true": change([True, True, True], *FIRST, "ratio"),
    "an interval without its median": change([0.5, 0.6, 0.7], *FIRST, "ratio"),
    "no time": change(None, *FIRST, "ratio"),
    "a fractional bucket": change(1.5, *FIRST, "key", "steps"),
    "an endless bucket": change(10**400, *FIRST, "key", "batch"),
    "a key with more to it": change(1, *FIRST, "key", "more"),
    "an entry with more to it": change("rm -rf", *FIRST, "command"),
    "codes for the terminal": change("\x1b[2J", *FIRST, "reason"),
}


@pytest.mark.parametrize("name", UNBELIEVED)
def test_what_is_not_as_it_should_be_is_not_believed_and_breaks_nothing(name, file, evidence_in):
    file.write_text(UNBELIEVED[name](json.loads(file.read_text())))
    assert known() == []
    ranking.renew()
    fastrnn.explain(fastrnn.GRU(2, 8), torch.randn(40, 2, 2))
    fastrnn.GRU(2, 8)(torch.randn(4, 2, 2))
    assert records.save(HERE, ENTRY) is None and known() == [ENTRY]  # and the next record replaces it


def test_one_bad_entry_invalidates_itself_alone(file):
    other = ENTRY._replace(candidate="triton", ratio=(2.0, 1.9, 2.1))
    found = json.loads(records.text_of(HERE, [ENTRY, other]))
    found["entries"][0]["ratio"] = "fast"
    file.write_text(json.dumps(found))
    assert known() == [other]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_not_opened(file):
    for name, make in {"pipe": os.mkfifo, "folder": os.mkdir}.items():
        make(file.with_name(f"{name}.json"))
    file.with_name("nowhere.json").symlink_to(file.with_name("missing"))
    file.with_name("binary.json").write_bytes(bytes(range(256)))
    assert known() == [ENTRY]


def test_a_record_of_a_backend_that_this_release_lacks_is_ignored(recorded):
    recorded(REQUEST, "quantum", 0.01)
    assert dispatch.choose(REQUEST) != "quantum"
    assert "quantum" not in str(dispatch.explanation(REQUEST))


@pytest.mark.parametrize("obstacle", ["a file where a folder should be", "no home"])
def test_where_nothing_can_be_written_everything_works_and_the_reason_is_told(obstacle, evidence_in, monkeypatch):
    if obstacle == "no home":
        monkeypatch.delenv("FASTRNN_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        evidence_in.write_text("")
    reason = evidence.keep(ENTRY, torch.get_num_threads())
    assert reason is not None and "directory" in reason
    ranking.renew()
    assert ranking.ranked(REQUEST)[0].row.name == "cpu"  # known in this process
    assert records.forget() == 0 and records.load(HERE) == []


def test_a_full_disk_leaves_the_old_record(file, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in records.save(HERE, ENTRY._replace(verdict="verified", ratio=None))
    assert known() == [ENTRY]
    assert [path for path in file.parent.iterdir()] == [file]


def write_often():
    for k in range(60):
        for batch in (1, 16):
            key = Key("cpu", "gru", "float32", "plain", True, 8, batch, 32)
            ratio = (0.5 + k / 1000, 0.4, 0.7)
            assert records.save(HERE, Entry(key, "cpu", "measured", "2026-12-01", "torch.nn", ratio)) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the writers are forked, since another import of torch takes long")
def test_processes_that_write_at_once_leave_whole_records(evidence_in):
    writers = [multiprocessing.get_context("fork").Process(target=write_often) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.exitcode is None for writer in writers):
        assert len(records.load(HERE)) in (0, 1, 2)
        assert all(records.read(file) for file in evidence_in.rglob("*.json"))
        time.sleep(0.001)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(known()) == 2 and len(list(evidence_in.rglob("*"))) == 4  # two folders, two files, nothing left over


def test_the_folder_is_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path / "mine"))
    assert records.folder() == tmp_path / "mine"
    monkeypatch.delenv("FASTRNN_CACHE")
    platformdirs = pytest.importorskip("platformdirs")
    for base in (str(tmp_path), "", " "):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert records.folder() == platformdirs.user_cache_path("fastrnn")


# ------------------------------------------------------------------------------------------------------ what follows


def decided(request):
    return ranking.ranked(request)[0].row.name


@needs_cpu_library
def test_what_was_measured_here_goes_before_what_is_shipped(recorded):
    shipped = Request("gru", "cpu", torch.float32, 100, steps=64, batch=16, gradients=True)
    assert decided(shipped) == "cpu" and "shipped (AMD EPYC, 2 threads" in str(dispatch.explanation(shipped))
    recorded(shipped, "cpu", 1.3)
    assert decided(shipped) == "aten"
    assert "measured here 2026-12-01: 1.30 of torch.nn's time" in str(dispatch.explanation(shipped))


@pytest.mark.parametrize(("ratio", "first"), [
    ((0.5, 0.4, 0.6), "cpu"), ((0.9, 0.5, 1.2), "aten"), ((0.96, 0.95, 0.99), "aten"), ((1.0, 0.9, 1.1), "aten"),
])  # fmt: skip
def test_a_time_counts_beyond_noise_only(ratio, first, evidence_in):
    request = REQUEST._replace(dtype=torch.float64)
    evidence.keep(ENTRY._replace(key=evidence.key_of(request), ratio=ratio), torch.get_num_threads())
    ranking.renew()
    assert decided(request) == first


def test_a_gain_holds_in_longer_calls_and_between_two_sizes(recorded):
    request = REQUEST._replace(dtype=torch.float64, steps=16)
    recorded(request, "cpu", 0.5)
    assert [decided(request._replace(steps=T)) for T in (8, 15, 16, 31, 32, 1000)] == 2 * ["aten"] + 4 * ["cpu"]
    wide = request._replace(batch=40, hidden_size=100)
    assert decided(wide) == "aten"
    recorded(request._replace(batch=200, hidden_size=300), "cpu", 0.7)
    assert decided(wide) == "cpu" and decided(wide._replace(steps=8)) == "aten"
    assert decided(wide._replace(batch=1000)) == "aten" and decided(wide._replace(batch=1)) == "aten"
    recorded(wide, "cpu", 1.2)  # its own measurement decides
    assert decided(wide) == "aten"


def test_a_bucket_is_never_b_or_t_themselves():
    assert evidence.key_of(REQUEST) == evidence.key_of(REQUEST._replace(steps=41, batch=3, hidden_size=9))
    keys = {evidence.key_of(REQUEST._replace(steps=T, batch=B)) for T in range(1, 300) for B in range(1, 300, 7)}
    assert len(keys) == 6 * 5


@pytest.mark.parametrize("other", [
    {"cell": "lstm"}, {"dtype": torch.bfloat16}, {"gradients": True}, {"features": frozenset({"tap"})},
    {"packed": 0.5}, {"proj_size": 4, "features": frozenset({"projection"})}, {"hidden_size": 33}, {"batch": 17},
], ids=str)  # fmt: skip
def test_an_entry_speaks_for_its_own_kind_of_call_alone(other):
    assert evidence.key_of(REQUEST) != evidence.key_of(REQUEST._replace(**other))


def test_threads_have_records_of_their_own(recorded):
    request, before = REQUEST._replace(dtype=torch.float64), torch.get_num_threads()
    recorded(request, "cpu", 0.5)
    assert decided(request) == "cpu"
    try:
        torch.set_num_threads(before + 1)
        ranking.renew()
        assert decided(request) == "aten"
    finally:
        torch.set_num_threads(before)


def test_torchs_kernels_that_are_wrong_here_are_not_taken(recorded):
    request = REQUEST._replace(dtype=torch.float64, cell="lstm")
    recorded(request, "aten", None, "broken", reason="y is wrong")
    assert decided(request) != "aten" and "broken here: y is wrong" in str(dispatch.explanation(request))
    assert dispatch.most_steps_of_torch("lstm", 0, False, torch.float64, "cpu", 8, 2) == 0


def test_a_step_takes_no_library_that_is_broken_here(recorded):
    def chosen(cell, batch):
        return dispatch.chosen_for_step(None, cell, torch.float32, 8, 0, batch)

    assert chosen("gru", 2) == "cpu"
    recorded(Request("gru", "cpu", torch.float32, 8, steps=1, batch=2), "cpu", None, "broken", reason="y is wrong")
    assert chosen("gru", 2) is None and chosen("lstm", 2) == "cpu" and chosen("lstm", 1000) is None


@needs_cpu_library
def test_plain_calls_that_go_to_torch_directly_are_limited_by_the_evidence(recorded):
    def most(dtype, batch=2):
        return dispatch.most_steps_of_torch("lstm", 0, True, dtype, "cpu", 8, batch)

    assert most(torch.bfloat16) > 1 << 50
    recorded(REQUEST._replace(cell="lstm", dtype=torch.bfloat16, steps=8, gradients=True), "cpu", 0.3)
    assert most(torch.bfloat16) == 7
    assert most(torch.float32) > 1 << 50 and most(torch.bfloat16, batch=100) > 1 << 50


def test_the_record_of_the_same_instructions_goes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "SHIPPED", tmp_path)
    request = REQUEST._replace(dtype=torch.float64)
    here = records.where("cpu", 2)
    for name, other in (("a", {"architecture": "other"}), ("b", {"threads": 64}), ("c", {"threads": 1024})):
        entry = ENTRY._replace(key=evidence.key_of(request), ratio=(0.5, 0.5, 0.5) if name == "b" else (2.0, 2.0, 2.0))
        records.write(tmp_path / f"{name}.json", records.text_of(here._replace(**other), [entry]))
    found = evidence.Book("cpu", 2).find(evidence.key_of(request), "cpu")
    assert found.time == 0.5 and found.shipped.threads == 64


def test_half_types_need_the_same_instructions(monkeypatch, tmp_path):
    """A processor without instructions for products of bfloat16 is told of the other types alone."""
    monkeypatch.setattr(records, "SHIPPED", tmp_path)
    here = records.where("cpu", 2)
    vectors = here.architecture.partition(",")[0]
    requests = [REQUEST._replace(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    keys = [evidence.key_of(request) for request in requests]

    def write(name, architecture, time):
        entries = [ENTRY._replace(key=key, ratio=(time, time, time)) for key in keys]
        records.write(tmp_path / name, records.text_of(here._replace(architecture=architecture), entries))

    def times():
        found = [evidence.Book("cpu", 2).find(key, "cpu") for key in keys]
        return [one and one.time for one in found]

    write("a.json", "other", 0.5)
    assert times() == [0.5, None]
    write("b.json", f"{vectors}, of another kind", 0.6)
    assert times() == [0.6, None]
    write("c.json", here.architecture, 0.7)
    assert times() == [0.7, 0.7]


def test_the_shipped_records_are_whole():
    files = records.files(Path(records.__file__).with_name("shipped"))
    assert files
    for file in files:
        where, entries = records.read(file)
        found = json.loads(file.read_text())
        assert len(found["entries"]) == len(entries) > 50
        assert len({(entry.key, entry.candidate) for entry in entries}) == len(entries)
        assert {entry.verdict for entry in entries} == {"measured"}
        assert {len(Key(*entry.key)) for entry in entries} == {8} and where.device


def test_auto_takes_the_scan_only_where_it_was_measured_to_take_less_time():
    """By the measurements that the shipped record was made of: beyond noise, which a busy machine widens."""
    calls = json.loads((Path(__file__).parents[1] / "bench/results/auto-cpu.json").read_text())["calls"]
    book, taken, slower, slowest = evidence.Book("cpu", 2), 0, [], {}
    for row in calls:
        projection = row["H"] // 2 if row["projected"] else 0
        features = frozenset({"layer_norm"} if row["layer_norm"] else ())
        request = Request(
            row["cell"], "cpu", torch.float32, row["H"], projection, features, row["T"], row["B"], row["packed"],
            row["mode"] == "train",
        )  # fmt: skip
        key, high = evidence.key_of(request), row["ratio"]["interval"][1]
        slowest[key] = max(high, slowest.get(key, 0.0))
        finding = book.find(key, "cpu")
        if finding is not None and finding.time < 1:
            taken += 1
            if high >= 1:
                slower.append(row)
    assert taken > len(calls) / 4
    assert not slower
    _, entries = records.read(records.SHIPPED / "cpu-2-threads.json")
    assert {entry.key: entry.ratio[2] for entry in entries} == {k: float(f"{high:.4g}") for k, high in slowest.items()}


def test_a_single_wide_step_goes_to_the_reference():
    """Where the products of one sequence share a row among the threads."""
    book = evidence.Book("cpu", 2)
    request = Request("gru", "cpu", torch.float32, 1024, features=frozenset({"layer_norm"}), steps=1, batch=1)
    assert book.find(evidence.key_of(request), "cpu").time > 1
    for other in (request._replace(hidden_size=100), request._replace(batch=30)):
        assert book.find(evidence.key_of(other), "cpu").time < 1
