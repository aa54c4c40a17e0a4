"""The monitor as a callback of Lightning's Trainer."""

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from ..monitoring import GradientMonitor


class MonitorCallback(Callback):
    """Watches the model while it is fitted; logs to all of the trainer's loggers at its `global_step`.

        callback = MonitorCallback(every=50)
        Trainer(callbacks=[callback]).fit(model, data)
        print(callback.monitor.report())

    The backwards of a training step are `accumulate_grad_batches`; those of an incomplete last step of an epoch are
    counted to the next. The norms are divided by the precision plugin's loss scale.

    Args:
        every: observe the first of every so many training steps.
        options: further options of `GradientMonitor`.

    Attributes:
        monitor: the `GradientMonitor` of the last fit, or None.
    """

    def __init__(self, every: int = 50, **options: Any):
        self.every, self.options = every, options
        self.monitor: GradientMonitor | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        settings = {"accumulate": trainer.accumulate_grad_batches, "loss_scale": 1.0 if scaler is None else scaler}
        self.monitor = GradientMonitor(pl_module, every=self.every, **{**settings, **self.options})

        def log(scalars: dict[str, float]) -> None:
            del scalars["fastrnn/step"]
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=trainer.global_step)

        self.monitor.log_to(log)
        self.monitor.enable()

    def on_train_end(self, trainer, pl_module) -> None:
        self.monitor.disable()

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self.monitor is not None:
            self.monitor.disable()
