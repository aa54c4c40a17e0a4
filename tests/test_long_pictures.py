"""Pictures of long sequences and deep networks: what is drawn, and how many points."""

import math

import pytest
import torch

import fastrnn
from fastrnn.monitoring import plots, steps

pytest.importorskip("matplotlib")


def report_of(module, x, loss):
    with fastrnn.GradientMonitor(module) as monitor:
        loss(module(x)[0]).backward()
    return monitor


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


@pytest.fixture(scope="module")
def vanishing():
    torch.manual_seed(0)
    return report_of(fastrnn.RNN(1, 2, 5), torch.randn(2000, 1, 1), lambda y: y[-1].sum())


def test_only_the_part_where_a_gradient_is_left_is_drawn(vanishing):
    report = vanishing.report()
    shown = steps.steps_shown(report)
    assert shown.is_zoomed and shown.end == shown.T == 2000 and 0 < 2000 - shown.first < 500
    largest = max(float(r.total.max()) for r in report)
    before = max(float(r.total[: shown.first].max()) for r in report)
    assert before < largest * 10.0**-steps.MAX_DECADES
    assert f"the last {2000 - shown.first} of 2000" in steps.steps_label(shown)


def test_five_layers_share_two_columns(vanishing, drawn):
    vanishing.plot("unused")
    (figure,) = drawn
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 5 and len({round(axes.get_position().x0, 1) for axes in panels}) == 2
    left, right = panels[0].get_xlim()
    assert 1500 < left < right < 2020
    # row by row: the last panel of each column has the label and the numbers
    assert [bool(axes.get_xlabel()) for axes in panels] == [False, False, False, True, True]
    assert [axes.xaxis.get_tick_params()["labelbottom"] for axes in panels[-2:]] == [True, True]


def test_a_level_gradient_is_drawn_whole_in_few_points():
    shown = steps.steps_shown(report_of(fastrnn.RNN(1, 2), torch.randn(3000, 1, 1), torch.sum).report())
    assert not shown.is_zoomed
    values = torch.rand(3000, dtype=torch.float64)
    values[7], values[1234], values[2000:2100] = 50.0, -3.0, math.nan
    where, what = steps.thinned(values, shown)
    assert len(where) == len(what) <= steps.MAX_COLUMNS and where == sorted(where)
    known = [v for v in what if v == v]
    assert max(known) == 50.0 and min(known) == -3.0 and len(known) < len(what)
    assert steps.thinned(values[:50], steps.StepsShown(0, 50, 50)) == (
        [float(t) for t in range(50)],
        values[:50].tolist(),
    )


def test_a_heat_map_of_a_long_sequence_has_few_columns(drawn):
    torch.manual_seed(0)
    monitor = report_of(fastrnn.RNN(1, 2), torch.randn(2500, 1, 1), torch.sum)
    monitor.plot_layers("unused")
    (figure,) = drawn
    (mesh,) = [
        c for axes in figure.axes for c in axes.collections if hasattr(c, "get_coordinates") and axes.get_xlabel()
    ]
    columns = mesh.get_coordinates()[0, :, 0]
    assert len(columns) - 1 == math.ceil(2500 / 3) and columns[0] == -0.5 and columns[-1] == 2499.5
    assert float(mesh.get_array().max()) == pytest.approx(float(monitor.report()[0].total.max().log10()))


def test_the_doctor_shows_a_cliff_against_the_steps_to_the_end(drawn):
    torch.manual_seed(0)
    model, x = fastrnn.RNN(1, 2), torch.randn(2000, 1, 1)
    checkup = fastrnn.doctor(model, x, lambda model, x: model(x)[0][-1].square().mean(), steps=1)
    assert {trial.worst.verdict for trial in checkup} == {"vanishing", "healthy"}
    checkup.plot("unused")
    norms = drawn[0].axes[1]
    assert norms.get_xscale() == "log" and norms.get_xlim()[0] > 2000 > 1 > norms.get_xlim()[1]
    assert "to the end" in norms.get_xlabel()
    line = norms.lines[0]
    assert line.get_xdata()[-1] == 1 and line.get_ydata()[-1] == pytest.approx(1)  # the loss is at the last step
