"""The monitor's numbers in the loggers and trainers of others, each at the trainer's own step.

    monitor.log_to(fastrnn.integrations.MLflow())  # or TensorBoard, Wandb: sinks for a loop of one's own

`fastrnn.integrations.lightning` and `fastrnn.integrations.transformers`, which import those packages, have a
`MonitorCallback` for the trainers of Lightning and Hugging Face.
"""

from collections.abc import Callable
from typing import Any


class Sink:
    """What `GradientMonitor.log_to` takes: a function of the scalars of a training step.

    Args:
        step: a function that returns the trainer's step, for a trainer that does not count as the monitor does (a
            resumed one, say); None takes the monitor's, which counts from 0.
    """

    def __init__(self, step: Callable[[], int] | None = None):
        self.step = step

    def __call__(self, scalars: dict[str, float]) -> None:
        own = int(scalars["fastrnn/step"])
        values = {name: value for name, value in scalars.items() if name != "fastrnn/step"}
        self.log(values, own if self.step is None else int(self.step()))

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Writes the scalars of one step."""
        raise NotImplementedError


class TensorBoard(Sink):
    """Writes to a `torch.utils.tensorboard.SummaryWriter`.

    Args:
        writer: the writer.
        step: as of `Sink`.
    """

    def __init__(self, writer: Any, step: Callable[[], int] | None = None):
        super().__init__(step)
        self.writer = writer

    def log(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)


class MLflow(Sink):
    """Writes to the active mlflow run.

    Args:
        step: as of `Sink`.
    """

    def log(self, scalars: dict[str, float], step: int) -> None:
        import mlflow

        mlflow.log_metrics(scalars, step=step)


class Wandb(Sink):
    """Writes to a wandb run.

    Without `step` the scalars join the row that the trainer's next `run.log` commits, so that they are at its step and
    the run gets no rows of its own. With `step` they are logged at that step, which may not fall.

    Args:
        run: a wandb run; None takes the active one.
        step: a function that returns the trainer's step, or None.
    """

    def __init__(self, run: Any = None, step: Callable[[], int] | None = None):
        super().__init__(step)
        self.run = run

    def log(self, scalars: dict[str, float], step: int) -> None:
        import wandb

        run = wandb.run if self.run is None else self.run
        if run is None:
            raise RuntimeError("there is no active wandb run: call wandb.init first, or give Wandb a run")
        if self.step is None:
            run.log(scalars, commit=False)
        else:
            run.log(scalars, step=step)
