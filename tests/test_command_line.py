"""`python -m fastrnn`: what it writes, what it says, how it ends."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn.__main__ import main, parser
from fastrnn.monitoring import flow
from fastrnn.tasks import sequential_digits

for package in ("matplotlib", "sklearn", "tqdm"):
    if find_spec(package) is None:  # no import: it takes seconds, also where these tests are only collected
        pytest.skip(f"{package} is not installed", allow_module_level=True)

TINY = ("train", "--epochs", "1", "--hidden", "4", "--batch", "512")


@pytest.fixture(autouse=True)
def threads():
    """`train` sets the number of threads of its process, which here is the tests'."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def short(monkeypatch):
    """The first 16 of the 64 steps of the images, since a Python loop takes them one by one; one picture less."""
    digits = sequential_digits()
    cut = digits._replace(x_train=digits.x_train[:16], x_test=digits.x_test[:16])
    monkeypatch.setattr("fastrnn.__main__.sequential_digits", lambda: cut)
    monkeypatch.setattr("fastrnn.monitoring.plots.learning_curves", lambda *arguments: None)


def test_train_writes_both_pictures_and_reports(tmp_path, capsys):
    from matplotlib.image import imread

    assert main([*TINY, "--out", str(tmp_path / "made")]) == 0
    for name in ("learning_curves.png", "gradient_norms.png"):
        assert min(imread(tmp_path / "made" / name).shape[:2]) > 200
    out, err = capsys.readouterr()
    assert "before training" in out and "after training" in out and "rnn.l0  c" in out
    assert "test accuracy" in out and "after 1 epochs in" in out
    assert "step/s" in err or "s/step" in err  # the progress bar
    assert "loss" in err and "test accuracy" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--cell rnn --nonlinearity elu --clip-state-norm 0.5 --init default",
        "--cell gru --bidirectional --zoneout 0.1 --recurrent-dropout 0.1 --weight-dropout 0.1",
        "--layers 2 --residual --layer-norm --backend reference",
        "--backend aten",
        "--cell li_gru --layers 2 --bidirectional --backend reference",
        "--cell leaky_rnn --init default",
    ],
)
def test_every_option_trains(short, tmp_path, options):
    assert main([*TINY, *options.split(), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "gradient_norms.png").exists()


@pytest.mark.slow
def test_one_seed_gives_one_result(short, tmp_path, capsys, monkeypatch):
    results = []
    monkeypatch.setattr("fastrnn.monitoring.plots.gradient_norms", lambda *arguments: None)
    for _ in range(2):
        main([*TINY, "--seed", "3", "--out", str(tmp_path)])
        results.append(capsys.readouterr().out.split("after training")[1].rsplit(" in ", 1)[0])
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--lr 1e9", "--lr 1e30 --cell rnn --nonlinearity relu", "--lr 1e30 --cell gru"])
def test_a_training_that_diverges_ends_in_a_report(tmp_path, capsys, options):
    assert main([*TINY, *options.split(), "--hidden", "8", "--batch", "32", "--out", str(tmp_path)]) == 0
    after = capsys.readouterr().out.split("after training")[1]
    assert "rnn.l0: " in after and "test accuracy" in after
    assert len(list(tmp_path.iterdir())) == 2


BAD = {
    "--cell transformer": "invalid choice: 'transformer'",
    "--cell ea_lstm": "invalid choice: 'ea_lstm'",
    "--cell min_gru --weight-dropout 0.1": "act on W_hh, which min_gru has not",
    "--hidden 0": "at least 1, got '0'",
    "--lr fast": "positive number, got 'fast'",
    "--frobnicate": "unrecognized arguments: --frobnicate",
    "--zoneout 2": "zoneout should be a number in range [0, 1]",
    "--backend nope": "unknown backend 'nope'",
    "--backend aten --layer-norm": "backend 'aten' cannot run this call",
    "--nonlinearity relu": "--nonlinearity is for --cell rnn",
    "--device nope": "nope",
}


@pytest.mark.parametrize("options", BAD)
def test_a_bad_option_gets_one_line_and_code_2(tmp_path, capsys, options):
    try:
        code = main([*TINY, "--out", str(tmp_path), *options.split()])
    except SystemExit as end:  # argparse's way
        code = end.code
    err = capsys.readouterr().err
    assert code == 2
    assert BAD[options] in err and len(err.splitlines()) == 1 and err.startswith("fastrnn")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*TINY, "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "flow"])
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch, command):
    """A folder where the picture has to go, since root may write into every folder."""
    monkeypatch.setattr("fastrnn.__main__.fit", lambda *arguments: pytest.fail("trained"))
    monkeypatch.setattr("fastrnn.monitoring.flow.flow", lambda *arguments: pytest.fail("compared"))
    (tmp_path / "gradient_norms.png").mkdir()
    start, out = (TINY, tmp_path) if command == "train" else (SMALL, tmp_path / "gradient_norms.png")
    assert main([*start, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastrnn {command}: ") and "gradient_norms.png" in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["gradient_norms.png"]


def test_a_reader_that_has_read_enough_ends_it_quietly():
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(Path(fastrnn.__file__).parents[1])}
    command = [sys.executable, "-m", "fastrnn", "info"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "fastrnn train: pictures need matplotlib: pip install fastrnn[plots]\n"


def test_defaults_fit_the_demo():
    options = parser().parse_args(["train"])
    assert str(options.out) == "demo" and options.cell == "lstm" and options.clip_state_norm is None


SMALL = ("flow", "--steps", "20", "--hidden", "8", "--batch", "3")


def test_flow_writes_a_picture_and_a_table(tmp_path, capsys):
    from matplotlib.image import imread

    assert main([*SMALL, "--out", str(tmp_path / "made" / "flow.png")]) == 0
    assert min(imread(tmp_path / "made" / "flow.png").shape[:2]) > 200
    out, err = capsys.readouterr()
    assert "network/s" in err or "s/network" in err  # the progress bar
    rows = [line for line in out.splitlines() if line.endswith(("vanishing", "exploding", "healthy"))]
    assert len(rows) == len(flow.ARMS) and f"picture: {tmp_path}" in out


def test_flow_takes_shipped_cells(tmp_path, capsys):
    assert main([*SMALL, "--cell", "janet", "min_gru", "--out", str(tmp_path / "flow.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[:2] for line in lines if line.startswith(("janet", "min_gru"))]
    assert found == [["janet", "torch.nn's"], ["janet", "orthogonal"], ["min_gru", "torch.nn's"]]


def test_flow_tells_the_story():
    """At a size that takes a second per arm and is long enough: what the remedies are for."""
    found = {(arm.network, arm.name): flow.flow(arm, 100, 32, 8, seed=0) for arm in flow.ARMS}
    verdicts = {key: f.record.verdict for key, f in found.items()}
    tanh, large = "tanh RNN: how W_hh starts", "tanh RNN: a large W_hh"
    for network in (tanh, "ReLU RNN", "LSTM", "GRU"):
        assert verdicts[network, "torch.nn's"] == "vanishing"
    for cured in (("ReLU RNN", "identity"), ("LSTM", "chrono"), ("LSTM", "layer norm"), ("GRU", "chrono")):
        assert verdicts[cured] == "healthy"
    reach = {key: f.record.horizon for key, f in found.items()}
    assert reach[tanh, "torch.nn's"] < reach[tanh, "orthogonal"]
    assert reach["LSTM", "torch.nn's"] < reach["LSTM", "forget bias 1"] < reach["LSTM", "chrono"]
    assert found[large, "as it is"].norms.max() > 100
    # One step of gain over the bound is what clipping leaves; 5 is far beyond the gain of any step here.
    assert found[large, "clipped in the recursion"].norms.max() < 5
    assert found[large, "layer norm"].norms.max() < 5
    stack = f"bottom of {flow.LAYERS} GRUs"
    assert found[stack, "chrono, residual"].norms.min() > 10 * found[stack, "chrono"].norms.min()


def test_flow_of_one_seed_is_one_result_and_leaves_the_global_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (flow.flow(flow.ARMS[0], 10, 4, 2, seed).norms for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), before)


FLOW_BAD = {
    "--steps 1": "expected at least 2, got '1'",
    "--hidden none": "at least 1, got 'none'",
    "--out .": "--out: ",
    "--cell lstm": "invalid choice: 'lstm'",
    "--nonlinearity relu": "unrecognized arguments",
}


@pytest.mark.parametrize("options", FLOW_BAD)
def test_a_bad_option_of_flow_gets_one_line_and_code_2(tmp_path, capsys, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    try:
        code = main([*SMALL, *options.split()])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and FLOW_BAD[options] in err and len(err.splitlines()) == 1 and err.startswith("fastrnn")
    assert not list(tmp_path.iterdir())


def test_flow_without_a_package_says_which(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main([*SMALL, "--out", str(tmp_path / "flow.png")]) == 1
    assert "pip install fastrnn[train]" in capsys.readouterr().err


def test_info_names_every_backend_and_version(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert fastrnn.__version__ in out and torch.__version__ in out
    for name in ("triton", "CUDA", "python", "GPU", "plain call", "gradient norms", *fastrnn.dispatch.BACKENDS):
        assert name in out


def test_a_backend_of_the_environment_that_is_none(capsys, monkeypatch):
    monkeypatch.setenv("FASTRNN_BACKEND", "bogus")
    assert main(["info"]) == 2
    assert capsys.readouterr().err.startswith("fastrnn info: FASTRNN_BACKEND: unknown backend 'bogus'")


@pytest.mark.parametrize("command", [["info"], list(SMALL)], ids=lambda command: command[0])
def test_a_backend_of_the_environment_that_cannot(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv("FASTRNN_BACKEND", "aten")
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert "backend 'aten' cannot run this call" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line(tmp_path):
    """SIGINT once the first epoch is done, which the progress bar tells. Before, it may meet an import: Python ends a
    process by the signal, whatever was made of it, if it came while a string was executed, as in a dataclass."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fastrnn.__file__).parents[1])}
    command = [sys.executable, "-m", "fastrnn", *TINY, "--epochs", "1000", "--out", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # What runs in the background of a shell script ignores SIGINT, unless it is told to heed it.
    with subprocess.Popen(
        command, **pipes, env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    ) as process:
        seen, until = b"", time.monotonic() + 120  # far beyond the import of torch on a busy machine
        while b"epoch" not in seen and time.monotonic() < until:
            seen += process.stderr.read1()
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.decode().splitlines()[-1] == "interrupted" and b"Traceback" not in rest
