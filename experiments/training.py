"""One run: a recurrent network with a linear layer on top, trained on one of `fastrnn.tasks` until it has met its goal.

`train(settings, seed)` returns the record that is written to JSON. Scores are low where the network is good, and are
measured on data that training never sees. The monitor looks at the state gradient before the first step and at every
evaluation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrnn
from fastrnn import tasks

TEST_SEED = 2**40
"""Of the test data: one set per task and length, the same for every run. No run has this seed."""
TEST_BATCH = 1000
MONITORED = 100
"""The number of test sequences that the monitor looks at."""
DIVERGED = 2.0
"""A run has diverged if its test loss ends not finite, or above this multiple of the best constant answer's."""


@dataclass(frozen=True)
class Task:
    """A task, as the training loop sees it.

    Attributes:
        sizes: inputs and outputs per step.
        every_step: whether every step needs an answer, or only the last one.
        train: settings and generator -> a batch.
        test: settings -> the test data.
        loss: scores and targets -> what is minimised.
        score: scores, targets and T -> the figure in the tables.
        constant: T -> the loss of the best answer that does not look at the input.
        measure: the name of the score.
    """

    sizes: tuple[int, int]
    every_step: bool
    train: Callable[[dict, torch.Generator], tuple[Tensor, Tensor]]
    test: Callable[[dict], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor, int], float]
    constant: Callable[[int], float]
    measure: str


def _drawn(draw) -> dict:
    """`train` and `test` of a task whose every batch is new."""
    return {
        "train": lambda settings, generator: draw(settings["batch"], settings["T"], generator),
        "test": lambda settings: draw(TEST_BATCH, settings["T"], torch.Generator().manual_seed(TEST_SEED)),
    }


@cache
def _digits() -> tasks.Digits:
    """`tasks.sequential_digits` with the training pixels' mean 0 and variance 1."""
    data = tasks.sequential_digits()
    mean, std = data.x_train.mean(), data.x_train.std()
    return tasks.Digits((data.x_train - mean) / std, data.y_train, (data.x_test - mean) / std, data.y_test)


def _digits_batch(settings: dict, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    data = _digits()
    chosen = torch.randint(len(data.y_train), (settings["batch"],), generator=generator)
    x = data.x_train[:, chosen]
    return x + settings["noise"] * torch.randn(x.shape, generator=generator), data.y_train[chosen]


def _cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, -2), target.flatten())


def _errors(scores: Tensor, target: Tensor, T: int) -> float:
    return float((scores.argmax(-1) != target).float().mean())


TASKS = {
    "adding": Task(
        (2, 1), False, **_drawn(tasks.adding_problem), loss=F.mse_loss,
        score=lambda scores, target, T: float(F.mse_loss(scores, target).sqrt()),
        constant=lambda T: tasks.ADDING_BASELINE, measure="test RMSE",
    ),
    "copy": Task(
        (10, 9), True, **_drawn(tasks.copy_memory), loss=_cross_entropy,
        score=lambda scores, target, T: float(_cross_entropy(scores, target)) / tasks.copy_memory_baseline(T),
        constant=tasks.copy_memory_baseline, measure="test loss / memoryless loss",
    ),
    "order": Task(
        (6, 4), False, **_drawn(tasks.temporal_order), loss=_cross_entropy, score=_errors,
        constant=lambda T: math.log(4), measure="test error",
    ),
    "digits": Task(
        (1, 10), False, train=_digits_batch, test=lambda settings: _digits()[2:], loss=_cross_entropy, score=_errors,
        constant=lambda T: math.log(10), measure="test error",
    ),
}  # fmt: skip


class Model(nn.Module):
    """`[T, B, I] -> [B, outputs]`, or `[T, B, outputs]` where every step needs an answer."""

    def __init__(self, settings: dict):
        super().__init__()
        task, cell = TASKS[settings["task"]], getattr(fastrnn, settings["cell"])
        self.rnn = cell(task.sizes[0], settings["hidden"], **settings["module"])
        self.out = nn.Linear(settings["hidden"], task.sizes[1])
        self.every_step = task.every_step
        for name, arguments in settings["init"].items():
            getattr(fastrnn.init, name)(self.rnn, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.out(y if self.every_step else y[-1])


def diagnose(model: Model, settings: dict, x: Tensor, target: Tensor) -> tuple[str, float | None, int | None]:
    """The monitor on some sequences: verdict, gain per step, horizon. It leaves no gradients."""
    with fastrnn.GradientMonitor(model) as monitor:
        TASKS[settings["task"]].loss(model(x), target).backward()
    model.zero_grad()
    record = monitor.report()[0]
    return record.verdict, _number(record.gain_median), record.horizon


@torch.no_grad()
def evaluate(model: Model, settings: dict, x: Tensor, target: Tensor) -> tuple[float, float]:
    """Loss and score on the test data."""
    task, scores = TASKS[settings["task"]], model.eval()(x)
    model.train()
    return float(task.loss(scores, target)), task.score(scores, target, settings["T"])


def train(settings: dict, seed: int, progress: Callable[[int, str], None] = lambda steps, text: None) -> dict:
    """Trains one network.

    Args:
        settings: a row of the table, see `table.py`.
        seed: of the weights, the batches and the masks.
        progress: called at every evaluation with the steps since the last and a line of text.

    Returns:
        solved: the first evaluated step at which the score met `goal`, where the run stops; None if it never did.
        diverged: see `DIVERGED`.
        score, steps: at the end.
        curve: `[step, mean training loss since the last row, test loss, test score]` per evaluation.
        monitor: `[step, verdict, gain per step, horizon]` per evaluation, from before the first step on.
    """
    task = TASKS[settings["task"]]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model(settings)
    optimizer = getattr(torch.optim, settings["optimizer"])(model.parameters(), **settings["optimizer_settings"])
    x_test, y_test = task.test(settings)
    sample = x_test[:, :MONITORED], y_test[..., :MONITORED] if task.every_step else y_test[:MONITORED]
    monitor = [[0, *diagnose(model, settings, *sample)]]
    curve, losses, solved, finite = [], [], None, True
    for step in range(1, settings["steps"] + 1):
        x, target = task.train(settings, generator)
        loss = task.loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        if settings["clip_grad_norm"] is not None:
            nn.utils.clip_grad_norm_(model.parameters(), settings["clip_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        finite = math.isfinite(losses[-1])
        if finite and step % settings["every"] and step < settings["steps"]:
            continue
        test_loss, score = evaluate(model, settings, x_test, y_test)
        curve.append([step, _number(sum(losses) / len(losses)), _number(test_loss), _number(score)])
        progress(len(losses), f"test loss {test_loss:.3g}, {task.measure} {score:.3g}")
        losses = []
        if not finite:
            break
        monitor.append([step, *diagnose(model, settings, *sample)])
        if score <= settings["goal"]:
            solved = step
            break
    return {
        "solved": solved, "diverged": not test_loss <= DIVERGED * task.constant(settings["T"]),
        "score": curve[-1][3], "steps": step, "curve": curve, "monitor": monitor,
    }  # fmt: skip


def _number(value: float) -> float | None:
    """JSON has neither NaN nor infinity; five digits are more than any figure here is worth."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
