"""Recipes for several ranks: `train --distributed` and the program of docs/distributed.md, resumed on other numbers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist

import fastrnn
from fastrnn.__main__ import main

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch is built without gloo", allow_module_level=True)

ROOT = Path(__file__).parents[1]
# float32 sums in another order, some 1e-7 of a loss of order 1; six digits are printed.
ROUNDING = 3e-6


def printed_by(*command, folder):
    """What Python prints, given these arguments."""
    package = str(Path(fastrnn.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    run = (sys.executable, *command)
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=folder, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORKED = """
import sys
import matplotlib.figure, sklearn.datasets, torch._dynamo, torch.nn.parallel.distributed
import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from fastrnn.__main__ import main


def stream():
    exec(compile(open("stream.py").read(), "stream.py", "exec"), {"__name__": "__main__"})


standalone = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "forked"}
run = stream if sys.argv[1:] == ["stream.py"] else lambda: main(sys.argv[1:])
codes = elastic_launch(LaunchConfig(1, 1, 2, start_method="fork", **standalone), run)()
sys.exit(max(code or 0 for code in codes.values()))
"""
"""As torchrun on two ranks, which are forks: their imports take as long as their training."""


def alone(monkeypatch):
    """This process is the only rank."""
    ours = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)


def losses(printed):
    """The numbers of the lines that begin with an epoch or a chunk, by that."""
    lines = re.findall(r"^(?:epoch|chunk) (\d+): (.*)$", printed, re.MULTILINE)
    return {int(k): [float(number) for number in re.findall(r"\d+\.\d+", rest)] for k, rest in lines}


def check(resumed, whole, expected):
    assert sorted(resumed) == expected
    for k, found in resumed.items():
        assert found == pytest.approx(whole[k], abs=ROUNDING)


@pytest.mark.slow
def test_train_resumes_on_another_number_of_ranks(tmp_path, capsys, monkeypatch):
    """From DDP on two ranks to FSDP2 on one, which is this process."""
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    options = ["train", "--hidden", "4", "--batch", "512", "--epochs", "2", "--lr", "0.1", "--layers", "2"]
    options += ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path)]
    printed = printed_by("-c", FORKED, *options, "--distributed", "ddp", folder=tmp_path)
    assert "before training" in printed and "rnn.l1" in printed
    shutil.rmtree(tmp_path / "run" / "epoch-0002")
    alone(monkeypatch)
    for picture in ("learning_curves", "gradient_norms"):  # drawn by the two ranks before
        monkeypatch.setattr(f"fastrnn.monitoring.plots.{picture}", lambda *arguments: None)
    assert main([*options, "--distributed", "fsdp2", "--resume"]) == 0
    check(losses(capsys.readouterr().out), losses(printed), [2])


@pytest.mark.slow
def test_streams_resume_on_another_number_of_ranks(tmp_path, capsys, monkeypatch):
    """From two ranks to one, which is this process."""
    (program,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/distributed.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "stream.py").write_text(program)
    printed = printed_by("-c", FORKED, "stream.py", folder=tmp_path)
    assert sorted(losses(printed)) == list(range(6)) and "rnn.l0" in printed
    alone(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stream.py", "resume"])
    exec(compile(program, "stream.py", "exec"), {"__name__": "__main__"})
    check(losses(capsys.readouterr().out), losses(printed), [3, 4, 5])


BAD = {
    "--distributed ddp": "--distributed: it needs torchrun",
    "--distributed pipes": "invalid choice: 'pipes'",
    "--checkpoint x": "--checkpoint and --resume are for --distributed",
    "--distributed ddp --resume": "--resume needs --checkpoint",
}


@pytest.mark.parametrize("options", BAD)
def test_a_bad_option_gets_one_line_and_code_2(tmp_path, capsys, options):
    try:
        code = main(["train", "--out", str(tmp_path / "out"), *options.split()])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and BAD[options] in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
