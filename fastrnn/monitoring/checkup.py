"""What the doctor found: trainings under each prescription, compared with the model as it is."""

import math
import statistics
from dataclasses import dataclass

from .diagnosis import Record, Report
from .listing import table
from .prescription import SEVERITY, Prescription

AS_IT_IS = "as it is"
LAST = 0.1
"""The loss that is compared is the mean over this share of the steps, the last ones."""
LOWER = 0.98
"""A loss is lower if it is under this share of the other: less is within the noise of a few steps."""
STUCK = 0.9
"""A training is stuck at a loss above this share of the constant answer's."""
OVERFITS = 1.5
"""A training overfits if the loss on held-out data is this many times that on the batches of the training."""
OVERFIT_FROM = 0.25
"""Below this share of the constant answer's loss, a training does not count as overfitting."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Some steps of training under one prescription.

    Attributes:
        name: of the prescription, or "as it is".
        prescription: None where nothing was changed.
        before, after: the reports at the first and at the last step.
        losses: one per step; a training ends at the first that is not finite.
        held_out: the loss on held-out data after the training; None without them.
        error: why the prescription could not be applied; then there are no losses and the reports are empty.
    """

    name: str
    prescription: Prescription | None
    before: Report
    after: Report
    losses: list[float]
    held_out: float | None = None
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
    if record.verdict == "unknown" and record.longest == 1 and record.forward_nonfinite is None:
        return len(SEVERITY), 0.0  # it has no step to go, as one direction where the loss is at an end
    reach = 0.0 if record.horizon is None else record.horizon / max(record.longest, 1)
    return SEVERITY.index(record.verdict), reach


class Checkup(list):
    """A list of `Trial`, the one without a change first; prints as a table.

    Attributes:
        constant: the loss of the best answer that does not look at the sequence; see `doctor`.
    """

    def __init__(self, trials=(), constant: float = math.nan):
        super().__init__(trials)
        self.constant = constant

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

    def outlook(self, trial: Trial) -> str:
        """What the losses say about a training: "learns", "stuck", "overfits", "diverges", or "unknown".

        In docs/clinic.md this tells which trainings fail, which the verdict on the gradient alone does not. The verdict
        says whether the gradient is the reason.
        """
        if not math.isfinite(trial.loss):
            return "diverges"
        if math.isnan(self.constant):
            return "unknown"
        bound = self.constant - (1 - STUCK) * abs(self.constant)
        if min(trial.loss, trial.loss if trial.held_out is None else trial.held_out) > bound:
            return "stuck"
        limit = max(OVERFITS * abs(trial.loss), OVERFIT_FROM * self.constant)
        if trial.held_out is not None and not trial.held_out <= limit:  # NaN is no good loss either
            return "overfits"
        return "learns"

    def explanation(self) -> str:
        """One sentence on the training of the model as it is: its outlook, and whether the gradient is the reason."""
        trial, outlook = self.base, self.outlook(self.base)
        verdict = trial.worst.verdict if trial.worst else "unknown"
        sick = verdict in ("vanishing", "exploding")
        numbers = f"loss {trial.loss:.4g}"
        if not math.isnan(self.constant):
            numbers += f", {self.constant:.4g} with a constant answer"
        if trial.held_out is not None:
            numbers += f", {trial.held_out:.4g} on held-out data"
        reason = f"its gradient is {verdict}" if trial.worst else "no gradient was recorded"
        if outlook == "stuck" and not sick:
            reason += ", so look elsewhere: the learning rate, more steps, the data"
        elif outlook == "overfits":
            reason = "no gradient mends that: more data, regularisation, or an earlier end"
        elif outlook == "learns" and sick:
            reason = f"although its gradient is {verdict}: the task may not need more"
        verb = {"stuck": "is stuck", "unknown": "has no loss to be compared with"}.get(outlook, outlook)
        return f"{verb} after {len(trial.losses)} steps ({numbers}); {reason}"

    def best(self) -> Trial:
        """The trial with the lowest loss."""
        return min(self, key=lambda trial: trial.loss)

    def __str__(self) -> str:
        rows = [("treatment", "loss, first", "last", "outlook", "verdict", "gain", "horizon", "better than as it is")]
        for trial in self:
            record = trial.worst
            if trial.error:
                rows.append((trial.name, "-", "-", "-", "-", "-", "-", f"not tried: {trial.error}"))
                continue
            better = [name for name, yes in self.helps(trial).items() if yes]
            rows.append((
                trial.name, f"{trial.losses[0]:.4g}", f"{trial.loss:.4g}", self.outlook(trial),
                record.verdict if record else "-",
                f"{record.gain_median:.3f}" if record else "-",
                "-" if record is None or record.horizon is None else f"{record.horizon} of {record.longest}",
                "" if trial is self.base else ", ".join(better) or "nothing",
            ))  # fmt: skip
        advice = [f"{trial.name}: {trial.prescription.advice}" for trial in self if trial.prescription]
        return "\n".join((f"As it is, it {self.explanation()}.", "", table(rows), "", *advice)).rstrip()

    def plot(self, path) -> None:
        """Writes the losses, and the norm of the gradient at every time step after the training, as a picture.

        Args:
            path: of the picture; folders are created.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from . import plots

        plots.checkup(path, self)
