"""The monitor as a callback of Hugging Face's Trainer."""

from typing import Any

from transformers import TrainerCallback

from ..monitoring import GradientMonitor


class MonitorCallback(TrainerCallback):
    """Watches the model while it is trained; logs by `trainer.log`, so at the trainer's step and wherever it reports.

        callback = MonitorCallback(trainer, every=50)
        trainer.add_callback(callback)
        trainer.train()
        print(callback.monitor.report())

    The backwards of a training step are `gradient_accumulation_steps`; those of an incomplete last step of an epoch are
    counted to the next. The norms are divided by the accelerator's loss scale.

    Args:
        trainer: the trainer, which a callback is not told.
        every: observe the first of every so many training steps.
        options: further options of `GradientMonitor`.

    Attributes:
        monitor: the `GradientMonitor` of the last training, or None.
    """

    def __init__(self, trainer: Any, every: int = 50, **options: Any):
        self.trainer, self.every, self.options = trainer, every, options
        self.monitor: GradientMonitor | None = None
        self._scalars: dict[str, float] = {}  # of the step that is not over yet

    def on_train_begin(self, args, state, control, **others) -> None:
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        settings = {"accumulate": args.gradient_accumulation_steps, "loss_scale": 1.0 if scaler is None else scaler}
        self.monitor = GradientMonitor(self.trainer.model, every=self.every, **{**settings, **self.options})
        self.monitor.log_to(self._scalars.update)
        self.monitor.enable()

    def on_step_end(self, args, state, control, **others) -> None:
        if self._scalars:
            should_log = control.should_log
            self.trainer.log({name: value for name, value in self._scalars.items() if name != "fastrnn/step"})
            control.should_log = should_log  # `log` has taken it back, and the trainer's own loss is still to come
            self._scalars.clear()

    def on_train_end(self, args, state, control, **others) -> None:
        self.monitor.disable()
