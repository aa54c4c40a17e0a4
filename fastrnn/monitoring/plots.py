"""Pictures: the state gradient's norm against the time step and over training, and learning curves.

matplotlib is imported by the functions that need it.
"""

import math
from itertools import pairwise
from pathlib import Path

import torch.nn.functional as F

from .history import History
from .steps import MAX_COLUMNS, MAX_DECADES, StepsShown, limit_steps, steps_label, steps_shown, thinned

# Two hues of Okabe & Ito's palette, which people with any colour vision can tell apart; solid and dashed say it again.
COLORS = {"h": "#0072B2", "c": "#D55E00"}
OTHER_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of the states of users' cells, by their names."""
TRAIN, TEST = "#0072B2", "#D55E00"
HEAT, NOTHING = "cividis", "#E8E8E8"  # readable without red or green; grey where no gradient arrives
# Five more of Okabe & Ito's hues and as many strokes, for the lines of one panel.
FLOW_STYLES = (("#D55E00", "-"), ("#0072B2", "--"), ("#009E73", "-."), ("#000000", ":"))
CHECKUP_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
STROKES = ("-", "--", "-.", ":")
FLOW_RANGE, FLOW_LEGEND = (1e-12, 1e12), "upper left"
GRID = {"color": "#DDDDDD", "linewidth": 0.6}
MANY_LAYERS = 4
"""More layers and directions than this share two columns, where the picture is of one report."""


def figure_class():
    """matplotlib's Figure, without pyplot: that would touch a display and global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install fastrnn[plots]") from error
    return Figure


def _clean(axes) -> None:
    axes.grid(True, **GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure, path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    ending = Path(path).suffix.removeprefix(".").lower()
    figure.savefig(path, dpi=150, format=ending if ending in figure.canvas.get_supported_filetypes() else "png")


def gradient_norms(path, reports) -> None:
    """Writes the norms of dL/dh_t (and dL/dc_t) against the time step t, log axis.

    Args:
        path: of the picture: PNG, unless its ending names another format of matplotlib's; folders are created.
        reports: `{title: report}`, the reports of a `GradientMonitor` on one model; one column of panels each, one row
            per layer and direction. The many layers of a single report are in two columns. Where the gradient vanishes
            within a small part of a long sequence, only that part is drawn.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a report is empty.
    """
    figure_type = figure_class()
    names = list(dict.fromkeys(r.name for report in reports.values() for r in report))
    if not names or not all(reports.values()):
        raise ValueError("no gradient to plot: run the model and loss.backward() inside the monitor first")
    wrapped = len(reports) == 1 and len(names) > MANY_LAYERS
    columns = 2 if wrapped else len(reports)
    lines = math.ceil(len(names) / columns) if wrapped else len(names)
    figure = figure_type(figsize=(1.2 + 5.2 * columns, 0.9 + 2.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    panels = panels.T.flatten() if wrapped else panels.flatten()
    places = [(name, title, report) for name in names for title, report in reports.items()]
    shown = steps_shown([r for report in reports.values() for r in report])
    for axes, (name, title, report) in zip(panels, places, strict=False):
        _clean(axes)
        records = [r for r in report if r.name == name]
        for r in records:
            _norm_lines(axes, r, shown)
        if records:
            axes.set_title("\n".join(filter(None, (title, _summary(records[0])))), fontsize=10, loc="left")
    for axes in panels[len(places) :]:
        axes.set_visible(False)
    axes = panels[0]
    axes.xaxis.get_major_locator().set_params(integer=True)
    _log_scale(axes, reports)
    limit_steps(axes, shown)
    for n, axes in enumerate(panels[: len(places)]):
        row, column = (n % lines, n // lines) if wrapped else divmod(n, columns)
        if row == lines - 1 or n == len(places) - 1:
            axes.set_xlabel(steps_label(shown))
            axes.tick_params(labelbottom=True)
        if column == 0:
            axes.set_ylabel("norm of dL / d state")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * columns), frameon=False, fontsize=9
    )
    _save(figure, path)


def layers(folder, report, history: History) -> list[Path]:
    """Writes one picture per layer and direction, `folder/lstm.l0.png`.

    A row per state (h, c): its norms in the last observed step, and their heat map over training step and time step.
    The last row: the gain at every time step of that step, and its mean over the time steps through training.

    Args:
        folder: of the pictures; it is created.
        report: of the last observed step.
        history: of the same monitor.

    Returns:
        The paths.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing was observed.
    """
    figure_type = figure_class()
    if not report:
        raise ValueError("no gradient to plot: run the model and loss.backward() inside the monitor first")
    paths = []
    for name in dict.fromkeys(r.name for r in report):
        records = [r for r in report if r.name == name]
        shown = steps_shown(records)
        figure = figure_type(figsize=(10.4, 0.9 + 2.6 * (len(records) + 1)), layout="constrained")
        panels = figure.subplots(len(records) + 1, 2, squeeze=False)
        for (profile, heat), record in zip(panels, records, strict=False):
            _clean(profile)
            _norm_lines(profile, record, shown)
            _log_scale(profile, {"": [record]})
            limit_steps(profile, shown)
            profile.set_ylabel(f"norm of dL / d{record.state}")
            profile.legend(frameon=False, fontsize=8)
            _heat_map(figure, heat, history, record)
        _gains(*panels[-1], history, records[0], shown)
        panels[-1, 0].set_xlabel(steps_label(shown))
        for axes in panels[:-1, 1]:
            axes.set_xlabel("time step t")
        figure.suptitle(_summary(records[0]), fontsize=11, x=0.01, ha="left")
        paths.append(Path(folder) / f"{name}.png")
        _save(figure, paths[-1])
    return paths


def _edges(steps: list[int]) -> list[float]:
    """The borders between the rows of a heat map whose centres are `steps`, and the outer borders."""
    between = [(a + b) / 2 for a, b in pairwise(steps)]
    first, last = (between[0] - steps[0], steps[-1] - between[-1]) if between else (0.5, 0.5)
    return [steps[0] - first, *between, steps[-1] + last]


def _heat_map(figure, axes, history: History, record) -> None:
    """log10 of the total norm, training step against time step; grey where it is zero, infinite or NaN.

    Of a long sequence, a column is the largest norm of a block of steps.
    """
    norms = history.map(record.name, record.state)
    T, width = norms.shape[1], math.ceil(norms.shape[1] / MAX_COLUMNS)
    if width > 1:
        norms = F.pad(norms, (0, -T % width), value=math.nan).unflatten(1, (-1, width)).nan_to_num(0).amax(-1)
    shown = norms.masked_fill(~(norms > 0) | norms.isinf(), math.nan).log10()
    known = shown[~shown.isnan()]
    axes.set_facecolor(NOTHING)
    if len(known):
        low = max(float(known.min()), float(known.max()) - MAX_DECADES)
        columns = [min(width * block, T) - 0.5 for block in range(norms.shape[1] + 1)]
        mesh = axes.pcolormesh(columns, _edges(history.steps), shown.numpy(), cmap=HEAT, vmin=low)
        figure.colorbar(mesh, ax=axes, label=f"log10 of dL / d{record.state}, total")
    axes.set_ylabel("training step")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    if history.first_nonfinite() is not None:
        axes.set_title(f"first not finite in training step {history.first_nonfinite()}", fontsize=9, loc="left")


def _gains(now, through_training, history: History, record, shown: StepsShown) -> None:
    curve = history.curve(record.name, record.state)
    few = {"marker": "o", "markersize": 4} if len(curve) < 3 else {}
    now.plot(*thinned(record.gain, shown), color=TRAIN, linewidth=1.5)
    limit_steps(now, shown)
    through_training.plot(history.steps, curve, color=TRAIN, linewidth=1.5, **few)
    for axes, label in ((now, "gain, last step seen"), (through_training, "gain, mean over t")):
        _clean(axes)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    through_training.set_xlabel("training step")


def _norm_lines(axes, record, shown: StepsShown) -> None:
    color = COLORS.get(record.state) or OTHER_COLORS[sum(map(ord, record.state)) % len(OTHER_COLORS)]
    total, carried = (v.masked_fill(~(v > 0) | ~v.isfinite(), float("nan")) for v in (record.total, record.carried))
    # A line needs two points: single norms are shown as dots.
    dots = {"marker": "o", "markersize": 3} if (total > 0).sum() < 3 else {}
    state = record.state if len(record.state) == 1 else rf"\mathrm{{{record.state}}}".replace("_", r"\_")
    label = rf"$\partial L/\partial {state}_t$"
    axes.plot(*thinned(total, shown), color=color, linewidth=3.2, alpha=0.4, label=f"{label}, total", **dots)
    axes.plot(
        *thinned(carried, shown), color=color, linewidth=1.3, linestyle="--", label=f"{label}, carried back", **dots
    )
    if record.first_nonfinite is not None:
        axes.axvline(record.first_nonfinite, color="black", linewidth=1, linestyle=":")


def _summary(record) -> str:
    """`lstm.l0: healthy, gain 0.97 a step, horizon 64 of 64 steps`."""
    text = f"{record.name}: {record.verdict}"
    if record.forward_nonfinite is not None:
        return f"{text}, forward not finite from step {record.forward_nonfinite} on"
    if record.first_nonfinite is not None:
        return f"{text}, not finite from step {record.first_nonfinite} back"
    if record.horizon is None:
        return f"{text}, no gain to be seen"
    return f"{text}, gain {record.gain_median:.2f} a step, horizon {record.horizon} of {record.longest} steps"


def _log_scale(axes, reports) -> None:
    """A log axis of at most MAX_DECADES, so that one underflow does not flatten the rest; if any norm is positive."""
    values = [v for report in reports.values() for r in report for v in (*r.total.tolist(), *r.carried.tolist())]
    values = [v for v in values if 0 < v < float("inf")]
    if values:
        low, high = max(min(values), max(values) * 10.0**-MAX_DECADES), max(values)
        axes.set_yscale("log")
        axes.set_ylim(low / 3, high * 3)


def flows(path, networks: dict[str, dict[str, list[float]]]) -> None:
    """Writes a panel per network, a line per remedy: the state gradient's norm against the time step, on one log axis.

    Args:
        path: of the picture; folders are created.
        networks: `{title of the panel: {label of the line: norms}}`, the norms by time step, relative to that at the
            loss.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = figure_class()(figsize=(11.5, 7.6), layout="constrained")
    panels = figure.subplots(math.ceil(len(networks) / 3), 3, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (title, lines) in zip(panels, networks.items(), strict=False):
        _clean(axes)
        axes.axhline(0.01, color="black", linewidth=0.8, linestyle=":")
        for (label, norms), (color, style) in zip(lines.items(), FLOW_STYLES, strict=False):
            values = [v if v > 0 else math.nan for v in norms]
            axes.plot(values, color=color, linestyle=style, linewidth=2, label=label)
        axes.set_title(title.replace("W_hh", "$W_{hh}$"), fontsize=11, loc="left", weight="bold")
        axes.legend(frameon=False, fontsize=9, loc=FLOW_LEGEND)
    first = panels[0]
    first.set_yscale("log")
    first.set_ylim(*FLOW_RANGE)
    for axes in panels[::3]:
        axes.set_ylabel("norm of dL / d state, 1 at the loss")
    for axes in panels[-3:]:
        axes.set_xlabel("time step t; the loss is at the right")
    figure.suptitle(
        "How far back a gradient comes, before any training; dotted: 1 % of it", fontsize=12, x=0.01, ha="left"
    )
    _save(figure, path)


def checkup(path, trials) -> None:
    """Writes what `fastrnn.doctor` tried: the loss at every training step, and the gradient at every time step.

    Args:
        path: of the picture; folders are created.
        trials: a `Checkup`. The right panel shows the layer with the gravest verdict of each trial, relative to the
            largest norm of its states; against the steps to the end, on a log axis, where one gradient vanishes within
            a small part of a long sequence and another does not.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = figure_class()(figsize=(11, 4.4), layout="constrained")
    loss, norms = figure.subplots(1, 2)
    worst = [trial.worst for trial in trials if trial.worst is not None]
    shown = steps_shown(worst)
    from_end = not shown.is_zoomed and any(steps_shown([record]).is_zoomed for record in worst)
    for n, trial in enumerate(trial for trial in trials if trial.losses):
        color, style = CHECKUP_COLORS[n % len(CHECKUP_COLORS)], STROKES[n % len(STROKES)]
        few = {"marker": "o", "markersize": 4} if len(trial.losses) < 3 else {}
        record, look = trial.worst, {"color": color, "linestyle": style, "linewidth": 1.8}
        loss.plot(trial.losses, label=trial.name, **look, **few)
        if record is not None:
            largest = float(record.total.nan_to_num(0, 0, 0).max())
            relative = record.total / largest if largest > 0 else record.total
            relative = relative.masked_fill(~(relative > 0) | ~relative.isfinite(), math.nan)
            steps, values = thinned(relative, shown)
            if from_end:
                steps, values = range(len(relative), 0, -1), relative.tolist()
            norms.plot(steps, values, label=f"{trial.name}: {record.verdict}", **look)
    limit_steps(norms, shown)
    for axes, label in ((loss, "training step"), (norms, steps_label(shown))):
        _clean(axes)
        axes.set_xlabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if from_end:
        norms.set_xscale("log")
        norms.set_xlim(1.15 * shown.T, 0.87)
        norms.set_xlabel("steps to the end of the sequence")
    loss.set_ylabel("loss")
    norms.set_ylabel("norm of dL / d state, 1 at its largest")
    if any(0 < value < math.inf for line in norms.lines for value in line.get_ydata()):
        norms.set_yscale("log")
        norms.set_ylim(bottom=max(norms.get_ylim()[0], FLOW_RANGE[0]))
    norms.legend(frameon=False, fontsize=9, loc="best")
    loss.legend(frameon=False, fontsize=9, loc="best")
    _save(figure, path)


def learning_curves(path, history, title: str = "") -> None:
    """Writes loss and accuracy against the epoch as a picture.

    Args:
        path: of the picture; folders are created.
        history: one dict per epoch: `train_loss` and `test_loss` (cross entropy, nats), `train_accuracy` and
            `test_accuracy` (0 to 1).
        title: one line above both panels.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history is empty.
    """
    if not history:
        raise ValueError("no epoch to plot")
    figure = figure_class()(figsize=(10, 3.8), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    few = {"marker": "o", "markersize": 4} if len(history) < 3 else {}
    for axes, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        _clean(axes)
        for part, color, style in (("train", TRAIN, "--"), ("test", TEST, "-")):
            values = [scale * row[f"{part}_{quantity}"] for row in history]
            axes.plot(epochs, values, color=color, linestyle=style, linewidth=1.8, label=part, **few)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    loss.set_ylabel("cross entropy (nats)")
    loss.set_yscale("log")
    accuracy.set_ylabel("accuracy (%)")
    accuracy.set_ylim(0, 100)
    accuracy.legend(frameon=False, loc="lower right")
    final = 100 * history[-1]["test_accuracy"]
    accuracy.set_title(f"test accuracy at the end: {final:.1f} %", fontsize=10, loc="left")
    loss.set_title(title, fontsize=10, loc="left")
    _save(figure, path)
