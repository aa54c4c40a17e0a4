"""The experiments, as data: what is trained, on what, from which seeds, and what is claimed of it.

A run's settings are `BASE`, then the experiment's `base`, its arm's, its grid point's, and with --full its `full`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

BASE = {
    "task": "adding",  # a row of training.TASKS
    "T": 100,
    "batch": 50,
    "cell": "LSTM",
    "hidden": 64,
    "module": {},  # further arguments of the constructor
    "init": {},  # functions of fastrnn.init and their arguments, in order, after torch.nn's default
    "input_std": None,  # W_ih from N(0, std²) instead of the default
    "clip_grad_norm": 1.0,  # torch.nn.utils.clip_grad_norm_; None: not at all
    "optimizer": "Adam",
    "optimizer_settings": {"lr": 0.01},
    "steps": 3000,  # at most
    "every": 100,  # steps between evaluations
    "goal": 0.03,  # the score at which a run stops
    "noise": 0.0,  # on the training pixels of the digits, in standard deviations
}


class Run(NamedTuple):
    """One training to do."""

    arm: str
    point: str
    seed: int
    settings: dict


@dataclass(frozen=True)
class Experiment:
    """One row of the programme.

    Attributes:
        title, about: for the report; `about` says what is new to the reader, and what was tried where it failed.
        arms: what is compared, `{label: settings}`.
        points: where each arm is tried, `{label: settings}`.
        claims: `(text, check)`: what is expected, and a function of `report.Results` that tells whether it came true.
        seeds: how many the programme asks for.
    """

    title: str
    about: str
    base: dict
    arms: dict[str, dict]
    claims: tuple = ()
    points: dict[str, dict] = field(default_factory=lambda: {"": {}})
    seeds: int = 5
    full: dict = field(default_factory=dict)


def plan(experiment: Experiment, full: bool = False) -> list[Run]:
    """All runs, seed by seed, so that a programme cut short has the same seeds in every arm."""
    return [
        Run(arm, point, seed, BASE | experiment.base | change | at | (experiment.full if full else {}))
        for seed in range(experiment.seeds)
        for arm, change in experiment.arms.items()
        for point, at in experiment.points.items()
    ]


CHRONO = {"orthogonal_": {}, "chrono_": {"t_max": 100}}
RNN = {"cell": "RNN"}

EXPERIMENTS = {
    "adding": Experiment(
        title="Adding problem, T = 100",
        about="The cells with torch.nn's default initialisation, and two remedies.",
        base={},
        arms={
            "tanh RNN": RNN,
            "tanh RNN, lr 0.001": RNN | {"optimizer_settings": {"lr": 0.001}},
            "tanh RNN, orthogonal": RNN | {"init": {"orthogonal_": {}}, "optimizer_settings": {"lr": 0.001}},
            "LSTM": {},
            "LSTM, orthogonal and chrono": {"init": CHRONO},
            "GRU": {"cell": "GRU"},
        },
        full={"T": 400, "hidden": 128, "steps": 20_000},
    ),
}
