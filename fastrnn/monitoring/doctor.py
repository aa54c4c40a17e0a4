"""`doctor`: some steps of training in a copy, a diagnosis, and each prescription tried from the same start."""

import copy
import importlib.util
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .diagnosis import Record, Report
from .listing import table
from .monitor import GradientMonitor
from .prescription import SEVERITY, Prescription, prescribe

AS_IT_IS = "as it is"
LAST = 0.1
"""The loss that is compared is the mean over this share of the steps, the last ones."""
LOWER = 0.98
"""A loss is lower if it is under this share of the other: less is within the noise of a few steps."""

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, eq=False)
class Trial:
    """Some steps of training under one prescription.

    Attributes:
        name: of the prescription, or "as it is".
        prescription: None where nothing was changed.
        before, after: the reports at the first and at the last step.
        losses: one per step; a training ends at the first that is not finite.
        error: why the prescription could not be applied; then there are no losses and the reports are empty.
    """

    name: str
    prescription: Prescription | None
    before: Report
    after: Report
    losses: list[float]
    error: str = ""

    @property
    def loss(self) -> float:
        """The mean loss over the last tenth of the steps; infinite where it is not finite."""
        last = self.losses[-max(1, round(LAST * len(self.losses))) :]
        return statistics.fmean(last) if last and math.isfinite(last[-1]) else math.inf

    @property
    def worst(self) -> Record | None:
        """The record with the gravest verdict after the training, and of these the one with the shortest horizon."""
        return min(self.after, key=_gravity, default=None)


def _gravity(record: Record) -> tuple[int, float]:
    reach = 0.0 if record.horizon is None else record.horizon / max(record.longest, 1)
    return SEVERITY.index(record.verdict), reach


class Checkup(list):
    """A list of `Trial`, the one without a change first; prints as a table."""

    @property
    def base(self) -> Trial:
        """The training of the model as it is."""
        return self[0]

    @property
    def prescriptions(self) -> list[Prescription]:
        """What was tried, in the order of `prescribe`."""
        return [trial.prescription for trial in self if trial.prescription is not None]

    def helps(self, trial: Trial) -> dict[str, bool]:
        """Whether `horizon`, `verdict` and `loss` are better than those of the model as it is."""
        old, new = self.base.worst, trial.worst
        if old is None or new is None:
            return {"horizon": False, "verdict": False, "loss": trial.loss < LOWER * self.base.loss}
        (old_rank, old_reach), (new_rank, new_reach) = _gravity(old), _gravity(new)
        return {
            "horizon": new_reach > old_reach,
            "verdict": new_rank > old_rank,
            "loss": trial.loss < self.base.loss - (1 - LOWER) * abs(self.base.loss),
        }

    def best(self) -> Trial:
        """The trial with the lowest loss."""
        return min(self, key=lambda trial: trial.loss)

    def __str__(self) -> str:
        rows = [("treatment", "loss, first", "last", "verdict", "gain", "horizon", "better than as it is")]
        for trial in self:
            record = trial.worst
            if trial.error:
                rows.append((trial.name, "-", "-", "-", "-", "-", f"not tried: {trial.error}"))
                continue
            better = [name for name, yes in self.helps(trial).items() if yes]
            rows.append((
                trial.name, f"{trial.losses[0]:.4g}", f"{trial.loss:.4g}", record.verdict if record else "-",
                f"{record.gain_median:.3f}" if record else "-",
                "-" if record is None or record.horizon is None else f"{record.horizon} of {record.longest}",
                "" if trial is self.base else ", ".join(better) or "nothing",
            ))  # fmt: skip
        advice = [f"{trial.name}: {trial.prescription.advice}" for trial in self if trial.prescription]
        return "\n".join((table(rows), "", *advice)).rstrip()

    def plot(self, path) -> None:
        """Writes the losses, and the norm of the gradient at every time step after the training, as a picture.

        Args:
            path: of the picture; folders are created.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from . import plots

        plots.checkup(path, self)


def doctor(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int = 50,
    optimizer: Optimizer | None = None,
    clip_grad_norm: float | None = None,
    seed: int = 0,
) -> Checkup:
    """Trains a copy of the model for some steps, diagnoses it, and tries every prescription from the same start.

        checkup = fastrnn.doctor(model, (x, target), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
        print(checkup)
        model = checkup.prescriptions[0].apply(model)

    Every trial starts with the weights of `model` and the same random numbers. The prescriptions are those of the
    report after the steps, or of the one before them where that one has none. `model`, its gradients and its mode, and
    the random state of torch and Python, are as before when this returns. The tensors of a batch are detached.

    Args:
        model: with at least one fastrnn LSTM, GRU or RNN; compiled models have to be passed as they were before.
        batch: what `loss_fn` takes; or a callable that gets the step, from 0, and returns the batch for it.
        loss_fn: `(model, batch) -> loss`, a scalar.
        steps: of training per trial.
        optimizer: a function of the parameters; Adam with a learning rate of 1e-3 where it is None.
        clip_grad_norm: for `torch.nn.utils.clip_grad_norm_`, if the training uses it.
        seed: of dropout, of batches that are drawn from torch's global generator, and of the prescriptions.

    Returns:
        A `Checkup`: print it, `plot(path)` it, take `prescriptions` from it.

    Raises:
        ValueError: steps is below 1, or the model has no recurrent module of fastrnn's.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is a count and at least 1, got {steps!r}")
    make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    draw = batch if callable(batch) else lambda step: batch

    def trained(patient: nn.Module) -> tuple[Report, Report, list[float]]:
        _seed(seed)
        return _train(patient.train(), draw, loss_fn, make(patient.parameters()), steps, clip_grad_norm)

    with _random_state_kept():
        checkup = Checkup([Trial(AS_IT_IS, None, *trained(_copied(model)))])
        for prescription in prescribe(checkup.base.after) or prescribe(checkup.base.before):
            _seed(seed)
            try:
                patient = prescription.apply(_copied(model))
            except ValueError as error:
                trial = Trial(prescription.name, prescription, Report(), Report(), [], str(error))
            else:
                trial = Trial(prescription.name, prescription, *trained(patient))
            checkup.append(trial)
    return checkup


def _train(model, draw, loss_fn, optimizer, steps: int, clip: float | None) -> tuple[Report, Report, list[float]]:
    """Some steps of training in place: the reports at the first and at the last step, and the losses."""
    before = after = Report()
    monitor, losses = GradientMonitor(model), []
    for step in range(steps):
        batch = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, draw(step))
        optimizer.zero_grad()
        observed = step in (0, steps - 1)
        if observed:
            monitor.enable()
        try:
            loss = loss_fn(model, batch)
            losses.append(loss.item())
            finite = math.isfinite(losses[-1])
            if not finite and not observed:
                monitor.enable()  # once more, for the report
                loss = loss_fn(model, batch)
            loss.backward()
        finally:
            monitor.disable()
        if observed or not finite:
            after = monitor.report()
            before = after if step == 0 else before
        if not finite:
            break
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return before, after, losses


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy without gradients; `model` is not touched."""
    patient = copy.deepcopy(model)
    patient.zero_grad(set_to_none=True)
    return patient


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)


@contextmanager
def _random_state_kept():
    state = random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)


def load(place: str) -> tuple[nn.Module, Any, Callable]:
    """`(model, batch, loss_fn)`, from calling the factory that `path/to/script.py:factory` names.

    The script is imported, not run: what is under `if __name__ == "__main__"` is left out.

    Raises:
        ValueError: there is no such file or function, or it returns something else.
    """
    path, _, name = place.rpartition(":")
    file = Path(path)
    if not path or not file.is_file():
        raise ValueError(f"expected SCRIPT.py:FACTORY with a file that exists, got {place!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))  # as `python SCRIPT.py` does
    sys.modules.setdefault(file.stem, module)
    spec.loader.exec_module(module)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ValueError(f"{path} has no function {name!r}")
    made = factory()
    if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], nn.Module) or not callable(made[2]):
        raise ValueError(f"{name}() should return (model, batch, loss_fn), got {type(made).__name__}")
    return made
