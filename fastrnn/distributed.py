"""Training on several ranks, as `torchrun -m fastrnn train --distributed` does it; docs/distributed.md has the recipe.

The batch of a training step is shared out among the ranks. Its losses and gradients are those of one process on the
whole batch, so a run may be resumed on another number of ranks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .monitoring import GradientMonitor, Report

KINDS = ("ddp", "fsdp2")


class Ranks(NamedTuple):
    """The place of this process among all."""

    rank: int
    world: int

    def share(self, indices: Tensor) -> Tensor:
        """This rank's part of the indices of a batch; it may be empty."""
        return indices[self.rank :: self.world]

    def sum(self, *values: float) -> list[float]:
        """The sums over all ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """The process group of torchrun.

    Raises:
        RuntimeError: torchrun did not start the process, or torch has no torch.distributed.
    """
    if not dist.is_available() or "RANK" not in os.environ:
        raise RuntimeError("it needs torchrun: torchrun --nproc-per-node 2 -m fastrnn train --distributed ddp")
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")  # gloo for the sums of numbers
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    """The model under DistributedDataParallel ("ddp"), or sharded by fully_shard ("fsdp2")."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device.type
    return fully_shard(model, mesh=init_device_mesh(device, (dist.get_world_size(),)))


def _state(model: nn.Module, optimizer, schedule, epoch: int) -> dict:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    parameters, moments = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": moments, "schedule": schedule.state_dict(), "epoch": epoch}


def save(folder: Path, model: nn.Module, optimizer, schedule, epoch: int) -> None:
    """Writes `folder/epoch-0001`, each rank its own part, for any number of ranks and either kind to read."""
    from torch.distributed import checkpoint

    checkpoint.save(_state(model, optimizer, schedule, epoch), checkpoint_id=folder / f"epoch-{epoch:04}")


def load(folder: Path, model: nn.Module, optimizer, schedule) -> int:
    """Reads the last epoch that `save` wrote, and returns its number.

    Raises:
        RuntimeError: the folder has none.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    written = sorted(path.parent for path in folder.glob("epoch-*/.metadata"))  # which is written last
    if not written:
        raise RuntimeError(f"--resume: there is no checkpoint in {folder}")
    state = _state(model, optimizer, schedule, 0)
    checkpoint.load(state, checkpoint_id=written[-1])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["epoch"]


def _step(model, x: Tensor, y: Tensor, whole: int, world: int) -> tuple[Tensor, Tensor]:
    """The loss of this rank's share of `whole` samples, and its scores.

    Both wrappers average the gradients over the ranks, so with this scale they are those of the whole batch's mean.
    """
    scores = model(x)
    return nn.functional.cross_entropy(scores, y, reduction="sum") * world / whole, scores


def watch(model: nn.Module, data, ranks: Ranks, samples: int) -> Report:
    """The monitor's report on the first test sequences, of which each rank takes a share; gradients are discarded."""
    mine = ranks.share(torch.arange(samples, device=data.y_test.device))
    with GradientMonitor(model) as monitor:
        _step(model, data.x_test[:, mine], data.y_test[mine], samples, ranks.world)[0].backward()
    model.zero_grad()
    return monitor.report(all_ranks=True)


@torch.no_grad()
def evaluate(model: nn.Module, data, ranks: Ranks) -> tuple[float, float]:
    """Cross entropy and accuracy on the test set, in eval mode."""
    mine, whole = ranks.share(torch.arange(len(data.y_test), device=data.y_test.device)), len(data.y_test)
    model.eval()
    loss, scores = _step(model, data.x_test[:, mine], data.y_test[mine], whole, 1)
    model.train()
    right = (scores.argmax(-1) == data.y_test[mine]).sum()
    loss, right = ranks.sum(loss.item(), right.item())
    return loss, right / whole


def fit(
    model: nn.Module, data, ranks: Ranks, *, epochs: int, batch: int, lr: float, warm_up: float, clip_norm: float,
    noise: float, seed: int, checkpoint: Path | None, resume: bool, bar,
) -> list[dict[str, float]]:  # fmt: skip
    """Trains with Adam, one learning rate cycle and clipping; returns the history for `plots.learning_curves`.

    The order and the noise of an epoch come from its number, the same on every rank, whatever their number.

    Args:
        model: of `wrapped`.
        data: `x_train [T, N, 1]`, `y_train [N]`, and the same of the test set, whole on every rank.
        checkpoint: a folder that gets a checkpoint after every epoch, or None.
        resume: begin with what is in that folder.
        bar: has `update()`, which is called after every step.
    """
    N, device = len(data.y_train), data.y_train.device
    optimizer, steps = torch.optim.Adam(model.parameters(), lr=lr), -(-N // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps * epochs, pct_start=warm_up)
    done = load(checkpoint, model, optimizer, schedule) if resume else 0
    bar.update(done * steps)
    history = []
    for epoch in range(done + 1, epochs + 1):
        rng = torch.Generator().manual_seed((seed << 20) + epoch)
        losses, right = 0.0, 0.0
        for chosen in torch.randperm(N, generator=rng).split(batch):
            noises = noise * torch.randn(len(data.x_train), len(chosen), 1, generator=rng)
            mine = ranks.share(torch.arange(len(chosen)))
            x = data.x_train[:, chosen[mine].to(device)] + noises[:, mine].to(device)
            target = data.y_train[chosen[mine].to(device)]
            loss, scores = _step(model, x, target, len(chosen), ranks.world)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            schedule.step()
            losses += loss.item() * len(chosen) / ranks.world
            right += float((scores.argmax(-1) == target).sum())
            bar.update()
        losses, right = ranks.sum(losses, right)
        test_loss, test_accuracy = evaluate(model, data, ranks)
        history.append({
            "train_loss": losses / N, "train_accuracy": right / N,
            "test_loss": test_loss, "test_accuracy": test_accuracy,
        })  # fmt: skip
        if checkpoint is not None:
            save(checkpoint, model, optimizer, schedule, epoch)
    return history
