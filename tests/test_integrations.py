"""The monitor in other people's trainers and loggers: each point at the trainer's step; against the real packages."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastrnn
from fastrnn import GradientMonitor, integrations

T, I, H, N = 4, 3, 5, 8
NAME = "fastrnn/rnn.l0/h/total_max"
OBSERVED = [0, 2, 4]  # of six training steps, every second one


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = fastrnn.GRU(I, H, batch_first=True), nn.Linear(H, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


def data():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(N, T, I, generator=rng), torch.randn(N, 1, generator=rng)


def train(sink, after_step=lambda loss: None):
    """Six steps of a loop of one's own; the scalars that every observed step had."""
    torch.manual_seed(0)
    model, expected = Net(), []
    monitor, (x, y) = GradientMonitor(model, every=2), data()
    monitor.log_to(sink)
    monitor.log_to(lambda scalars: expected.append(scalars[NAME]))
    with monitor:
        for _ in range(6):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            after_step(loss)
    return expected


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    steps = iter((100, 110, 120))
    with SummaryWriter(tmp_path / "own") as own, SummaryWriter(tmp_path / "trainer") as trainer:
        expected = train(integrations.TensorBoard(own))
        train(integrations.TensorBoard(trainer, step=lambda: next(steps)))
    for folder, wanted in (("own", OBSERVED), ("trainer", [100, 110, 120])):
        found = EventAccumulator(str(tmp_path / folder)).Reload().Scalars(NAME)
        assert [point.step for point in found] == wanted
        assert [point.value for point in found] == pytest.approx(expected)


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow asks for a data base otherwise
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        expected = train(integrations.MLflow())
    found = mlflow.MlflowClient().get_metric_history(run.info.run_id, NAME)
    assert [point.step for point in found] == OBSERVED
    assert [point.value for point in found] == pytest.approx(expected)


def test_wandb_joins_the_rows_of_the_trainer(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    sent = []
    with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
        send = run._partial_history_callback

        def spy(data, step=None, commit=None):
            sent.append((dict(data), step, commit))
            return send(data, step, commit)

        monkeypatch.setattr(run, "_partial_history_callback", spy)
        train(integrations.Wandb(run), after_step=lambda loss: run.log({"loss": loss.item()}))
        assert run.step == 6  # rows of the trainer, none of fastrnn's
        assert [NAME in data for data, _, _ in sent] == [True, False, False] * 3  # scalars, loss, loss without scalars
        assert [commit for data, _, commit in sent if NAME in data] == [False] * 3
        step = iter((100, 110, 120))
        train(integrations.Wandb(step=lambda: next(step)))
        assert [at for data, at, _ in sent if NAME in data][3:] == [100, 110, 120]
    with pytest.raises(RuntimeError, match="no active wandb run"):
        integrations.Wandb().log({}, 0)


@pytest.mark.slow
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from fastrnn.integrations.lightning import MonitorCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Logger(lightning.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics))

    logged = []
    callback = MonitorCallback(every=2)
    trainer = lightning.Trainer(
        max_epochs=3, accumulate_grad_batches=2, logger=Logger(), callbacks=[callback], log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
        default_root_dir=tmp_path,
    )  # fmt: skip
    model = Module()
    trainer.fit(model, DataLoader(TensorDataset(*data()), batch_size=2))  # 4 batches, 2 steps an epoch
    name = NAME.replace("/rnn", "/net.rnn")
    assert [step for step, metrics in logged if name in metrics] == OBSERVED
    assert {step for step, metrics in logged if "loss" in metrics} == set(range(6))  # the same axis
    assert len(callback.monitor.report()) == 1 and model.net.rnn._watch is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_transformers(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]  # whose folder `kernels` is not the package that transformers asks for
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p).resolve() != root])
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from fastrnn.integrations.transformers import MonitorCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    settings = transformers.TrainingArguments(
        output_dir=tmp_path, num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in zip(*data(), strict=True)]
    trainer = transformers.Trainer(Model(), settings, train_dataset=rows)
    callback = MonitorCallback(trainer, every=2)
    trainer.add_callback(callback)
    trainer.train()
    name = NAME.replace("/rnn", "/net.rnn")
    # It counts a step when it is over: the monitor's steps 0, 2, 4 are its 1, 3, 5.
    assert [entry["step"] for entry in trainer.state.log_history if name in entry] == [1, 3, 5]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == list(range(1, 7))
    assert callback.monitor.history.steps == OBSERVED and trainer.model.net.rnn._watch is None
