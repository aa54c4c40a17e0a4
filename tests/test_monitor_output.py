"""What GradientMonitor shows: the printed table, scalars, pictures."""

import math
import sys

import pytest
import torch
from setups import linear_rnn, watched

import fastrnn
from fastrnn import GradientMonitor
from fastrnn.monitoring import plots

T, B, I, H = 12, 4, 3, 6


def test_report_prints_as_a_table():
    watch = watched(fastrnn.LSTM(I, H, bidirectional=True, clip_state_grad_norm=1.0), torch.randn(T, B, I))
    assert watch.report().records[0].name == "lstm.l0"
    table, *findings = str(watch.report()).split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 5 and lines[0].startswith("layer")
    assert [f.splitlines()[0].split(":")[0] for f in findings] == ["lstm.l0", "lstm.l0_reverse"]
    assert [line.split()[:2] for line in lines[1:]] == [[f"lstm.l0{d}", s] for d in ("", "_reverse") for s in "hc"]
    assert all(line.endswith(("healthy", "vanishing", "exploding")) for line in lines[1:])
    assert "no gradient recorded" in str(GradientMonitor(fastrnn.LSTM(I, H)).report())


def test_scalars_are_flat_and_numbers():
    scalars = watched(linear_rnn(0.5), torch.rand(40, B, 4) + 0.1).scalars()
    assert all(type(v) is float and k.startswith("fastrnn/rnn.l0/h/") for k, v in scalars.items())
    assert scalars["fastrnn/rnn.l0/h/gain_median"] == pytest.approx(0.5, rel=1e-6)
    assert scalars["fastrnn/rnn.l0/h/vanishing"] == 1.0 and scalars["fastrnn/rnn.l0/h/horizon"] == 6.0
    assert "fastrnn/rnn.l0/h/clipped" not in scalars


def is_picture(path):
    image = pytest.importorskip("matplotlib.image").imread(path)  # decodes the PNG
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and min(image.shape[:2]) > 200 and image.std() > 0.01


def test_plot_writes_a_picture(tmp_path):
    watch = watched(fastrnn.LSTM(I, H, bidirectional=True), torch.randn(T, B, I), lambda y: y[-1].sum())
    watch.plot(tmp_path / "new" / "norms.png")
    assert is_picture(tmp_path / "new" / "norms.png")
    watch.plot(tmp_path / "norms.epoch3")
    assert is_picture(tmp_path / "norms.epoch3")
    watch.plot(tmp_path / "norms.pdf")
    assert (tmp_path / "norms.pdf").read_bytes()[:5] == b"%PDF-"
    with pytest.raises(ValueError, match="no gradient to plot"):
        GradientMonitor(fastrnn.LSTM(I, H)).plot(tmp_path / "none.png")


def test_plot_copes_with_zeros_and_nan(tmp_path):
    for factor in (0.0, math.nan):
        watch = watched(linear_rnn(0.9), torch.rand(T, B, 4), lambda y, factor=factor: (y * factor).sum())
        watch.plot(tmp_path / "norms.png")
        assert is_picture(tmp_path / "norms.png")


def test_learning_curves_write_a_picture(tmp_path):
    row = {"train_loss": 2.0, "test_loss": 2.1, "train_accuracy": 0.3, "test_accuracy": 0.25}
    plots.learning_curves(tmp_path / "curves.png", [row, row], "title")
    assert is_picture(tmp_path / "curves.png")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install fastrnn\[plots\]"):
        watched(fastrnn.RNN(I, H), torch.randn(T, B, I)).plot(tmp_path / "norms.png")
