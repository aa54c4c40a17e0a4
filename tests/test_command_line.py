"""`python -m fastrnn`: what it writes, what it says, how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn.__main__ import main, parser

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

TINY = ("train", "--epochs", "1", "--hidden", "4", "--batch", "512")


@pytest.fixture(autouse=True)
def threads():
    """`train` sets the number of threads of its process, which here is the tests'."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize(
    "options",
    [
        "--cell rnn --nonlinearity elu --clip-state-norm 0.5 --init default",
        "--cell gru --bidirectional --zoneout 0.1 --recurrent-dropout 0.1 --weight-dropout 0.1",
        "--layers 2 --residual --layer-norm --backend reference",
        "--backend aten",
    ],
)
def test_every_option_trains(tmp_path, options):
    assert main([*TINY, *options.split(), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "gradient_norms.png").exists()


def test_one_seed_gives_one_result(tmp_path, capsys):
    results = []
    for _ in range(2):
        main([*TINY, "--seed", "3", "--out", str(tmp_path)])
        results.append(capsys.readouterr().out.split("after training")[1].rsplit(" in ", 1)[0])
    assert results[0] == results[1]


BAD = {
    "--cell transformer": "invalid choice: 'transformer'",
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


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "fastrnn train: pictures need matplotlib: pip install fastrnn[plots]\n"


def test_defaults_fit_the_demo():
    options = parser().parse_args(["train"])
    assert str(options.out) == "demo" and options.cell == "lstm" and options.clip_state_norm is None


def test_info_names_every_backend_and_version(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert fastrnn.__version__ in out and torch.__version__ in out
    for name in ("triton", "CUDA", "python", "GPU", "plain call", "gradient norms", *fastrnn.dispatch.BACKENDS):
        assert name in out


def test_ctrl_c_ends_in_one_line(tmp_path):
    """SIGINT once the first steps are done, which the progress bar tells."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fastrnn.__file__).parents[1])}
    command = [sys.executable, "-m", "fastrnn", "train", "--epochs", "1000", "--hidden", "8", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        seen, until = b"", time.monotonic() + 120  # far beyond the import of torch on a busy machine
        while b"step/s" not in seen and time.monotonic() < until:
            seen += process.stderr.read1()
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.decode().splitlines()[-1] == "interrupted" and b"Traceback" not in rest
