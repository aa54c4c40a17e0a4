"""Two processes over gloo: DDP and FSDP2 train as one process does on the whole batch, and the monitor sees all ranks.

The file is its own worker: the tests start it as a script, which forks a process for each rank, since the imports take
seconds; each rank runs every scenario of `SCENARIOS` once.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

import fastrnn
from fastrnn import GradientMonitor

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch is built without gloo", allow_module_level=True)

RANKS, STEPS = 2, 3
pytestmark = pytest.mark.slow  # starts two processes per test
T, B, I, H = 7, 6, 3, 5
LENGTHS = torch.tensor([7, 2, 0, 5, 7, 1])
# float64 keeps 16 digits; sums of under 1e4 terms of order one in another order, over 3 steps, differ by some 1e-12.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
SECONDS = 120  # for processes that start in 4 s on an idle machine and work for 4


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lower = fastrnn.LSTM(I, H, 2, bidirectional=True, layer_norm=True)
        self.upper = fastrnn.GRU(2 * H, H, zoneout=0.1)
        self.out = nn.Linear(H, 1)

    def forward(self, x, lengths):
        y, _ = self.lower(x, lengths=lengths)
        # A new tensor: FSDP2 warns of views.
        return self.out(self.upper(y, lengths=lengths)[0]).clone()


class Blocks(nn.Module):
    """Users' cells, W_hh in heads, learnt parameters of cells."""

    def __init__(self):
        super().__init__()
        self.lower = fastrnn.Recurrent(fastrnn.cells.slstm, I, 6, bidirectional=True, num_heads=3)
        self.middle = fastrnn.Recurrent(fastrnn.cells.peephole_lstm, 12, 6, layer_norm=True)
        self.upper = fastrnn.RNN(6, 4, num_heads=2, leak=0.3, learn_leak=True)

    def forward(self, x, lengths):
        for each in (self.lower, self.middle, self.upper):
            x, _ = each(x, lengths=lengths)
        return x


def blocks():
    torch.manual_seed(0)
    return Blocks().double()


def model():
    torch.manual_seed(0)
    return Tagger().double().eval()  # zoneout at its expectation: ranks would draw masks of their own


def batch(step):
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(network, whole, rank=None):
    """Losses and gradients of STEPS steps on this rank's share of the batch; `whole` gathers a sharded gradient."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    losses, gradients = [], []
    for step in range(STEPS):
        x, lengths = batch(step), LENGTHS
        if rank is not None:
            x, lengths = x.chunk(RANKS, 1)[rank], lengths.chunk(RANKS)[rank]
        loss = network(x, lengths).square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name.removeprefix("module."): whole(p.grad) for name, p in network.named_parameters()})
        optimizer.step()
    return losses, gradients


def ddp(rank):
    return train(nn.parallel.DistributedDataParallel(model()), torch.clone, rank)


def ddp_of_blocks(rank):
    return train(nn.parallel.DistributedDataParallel(blocks()), torch.clone, rank)


def fsdp2(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network, mesh = model(), init_device_mesh("cpu", (RANKS,))
    for part in (network.lower, network.upper, network):
        fully_shard(part, mesh=mesh)
    sharded = sum(p.to_local().numel() for p in network.parameters())
    return *train(network, lambda gradient: gradient.full_tensor(), rank), sharded


def plain(report):
    """The records as tuples, under names without what DDP puts in front of them."""
    return [
        (r.name.removeprefix("module."), r.state, r.verdict, r.horizon, r.valid, r.total, r.carried, r.gain)
        for r in report
    ]


def loss_of(network, x, lengths):
    return network(x, lengths).square().sum()  # a sum, so that a sample's gradient does not depend on the others


def monitored(rank):
    """Ranks of unequal T and B, under DDP; and a module that only rank 0 uses, on its own."""
    network, x, lengths = nn.parallel.DistributedDataParallel(model()), batch(0), LENGTHS
    with GradientMonitor(network) as monitor:
        share = (x[:2, 5:], lengths[5:]) if rank else (x[:, :5], lengths[:5])  # the last sequence is of one step
        loss_of(network, *share).backward()
    everywhere, here = plain(monitor.report(all_ranks=True)), plain(monitor.report())
    scalars = monitor.scalars(all_ranks=True)
    network = model()
    with GradientMonitor(network) as monitor:
        if rank == 0:
            loss_of(network, x, lengths).backward()
        else:
            network.lower(x)[0].sum().backward()
    return everywhere, here, scalars, [r.name for r in monitor.report()], plain(monitor.report(all_ranks=True))


def accumulated(rank):
    """Under DDP: two backwards per training step, the first without synchronisation; every second step is observed."""
    network, logged = nn.parallel.DistributedDataParallel(model()), []
    monitor = GradientMonitor(network, every=2, accumulate=2)
    monitor.log_to(logged.append)
    with monitor:
        for step in range(STEPS):
            halves = [half.chunk(RANKS, 1)[rank] for half in batch(step).chunk(2, 1)]  # 2 or 1 sequences
            with network.no_sync():
                loss_of(network, halves[0], None).backward()
            loss_of(network, halves[1], None).backward()
    return monitor.history.steps, logged, plain(monitor.report(all_ranks=True))


def sharded(rank):
    """The words about a sharded module: its weights are not read, which would take all ranks."""
    from torch.distributed.fsdp import fully_shard

    network = model()
    fully_shard(network.lower)
    fully_shard(network)
    with GradientMonitor(network, every=2) as monitor:
        for step in range(STEPS):
            loss_of(network, batch(step), LENGTHS).backward()
    return monitor.history.steps, monitor.report().findings if rank == 0 else None


def silent(rank):
    """No rank has recorded anything."""
    return GradientMonitor(model()).report(all_ranks=True)


SCENARIOS = {f.__name__: f for f in (ddp, ddp_of_blocks, monitored, accumulated, silent, fsdp2, sharded)}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    found = {}
    for name, scenario in SCENARIOS.items():
        try:
            found[name] = scenario(rank)
        except Exception:
            found[name] = traceback.format_exc()
            break  # the other rank may wait in a collective that this one has left
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A function from the name of a scenario to its results, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    package = str(Path(fastrnn.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    worker = subprocess.Popen(
        [sys.executable, __file__, str(folder)], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = worker.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):  # none of them is left
            os.killpg(worker.pid, signal.SIGKILL)
    assert worker.returncode == 0, printed
    found = [torch.load(folder / str(rank), weights_only=False) for rank in range(RANKS)]

    def results(name):
        failed = [f[n] for f in found for n in f if isinstance(f[n], str)]
        if any(name not in f or isinstance(f[name], str) for f in found):
            pytest.fail("\n".join(failed))
        return [f[name] for f in found]

    return results


@pytest.fixture(scope="module")
def alone():
    """Losses and gradients of one process on the whole batch."""
    return train(model(), torch.clone)


def check_training(results, alone):
    losses, gradients = alone
    # Both ranks have as many samples, so the whole mean is the mean of theirs.
    torch.testing.assert_close([sum(pair) / RANKS for pair in zip(*(r[0] for r in results), strict=True)], losses,
                               **TOLERANCE)  # fmt: skip
    for result in results:
        for step in range(STEPS):
            torch.testing.assert_close(result[1][step], gradients[step], **TOLERANCE)


def test_ddp_trains_as_one_process(ranks, alone):
    check_training(ranks("ddp"), alone)


def test_ddp_of_users_cells_and_heads_trains_as_one_process(ranks):
    check_training(ranks("ddp_of_blocks"), train(blocks(), torch.clone))


def test_fsdp2_trains_as_one_process(ranks, alone):
    results = ranks("fsdp2")
    check_training(results, alone)
    # and is sharded: the ranks share the parameters out, none of them holds all
    whole = sum(p.numel() for p in model().parameters())
    assert sum(r[2] for r in results) == whole and all(r[2] < whole for r in results)


def check_reports(got, expected):
    assert [r[:4] for r in got] == [r[:4] for r in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[4:], b[4:], equal_nan=True, **TOLERANCE)


def watched(x, lengths):
    network = model()
    with GradientMonitor(network) as monitor:
        loss_of(network, x, lengths).backward()
    return monitor


def test_the_monitor_reports_over_all_ranks_as_over_one_batch(ranks):
    expected = watched(batch(0), LENGTHS)
    shares = [watched(batch(0)[:, :5], LENGTHS[:5]), watched(batch(0)[:2, 5:], LENGTHS[5:])]
    for result, share in zip(ranks("monitored"), shares, strict=True):
        everywhere, here, scalars, *_ = result
        check_reports(everywhere, plain(expected.report()))
        check_reports(here, plain(share.report()))
        wanted = expected.scalars()
        assert {key.replace("fastrnn/module.", "fastrnn/"): v for key, v in scalars.items()} == pytest.approx(wanted)
        assert int(everywhere[0][4].max()) == 5  # of the six sequences one is empty


def test_a_module_that_one_rank_left_out_is_reported_by_all(ranks):
    (*_, names, everywhere), (*_, other_names, other_everywhere) = ranks("monitored")
    lower = ["lower.l0", "lower.l0_reverse", "lower.l1", "lower.l1_reverse"]
    assert sorted(set(names)) == [*lower, "upper.l0"] and sorted(set(other_names)) == lower
    check_reports(everywhere, other_everywhere)
    valid = {r[0]: int(r[4].max()) for r in everywhere}
    assert valid["upper.l0"] == 5 and valid["lower.l1"] == 5 + B


def test_accumulation_and_logging_under_ddp(ranks):
    results = ranks("accumulated")
    wanted = watched(batch(2), None)
    for steps, logged, everywhere in results:
        assert steps == [0, 2] and [entry["fastrnn/step"] for entry in logged] == [0, 2]
        by_name = {r[:2]: r for r in everywhere}
        for r in plain(wanted.report()):  # the same samples, in another order
            torch.testing.assert_close(by_name[r[:2]][4:], r[4:], equal_nan=True, **TOLERANCE)
    assert results[0][1] != results[1][1]  # each rank logs its own samples


def test_a_sharded_module_is_watched(ranks):
    (steps, findings), (other_steps, _) = ranks("sharded")
    assert steps == other_steps == [0, 2]
    assert len(findings) == 5 and all(f.verdict and f.summary for f in findings)
    assert not any("nan" in text for f in findings for text in f.advice)


def test_a_report_of_all_ranks_without_any_backward_is_empty(ranks):
    assert ranks("silent") == [[], []]


def test_all_ranks_without_a_process_group_is_refused():
    monitor = watched(batch(0), LENGTHS)
    with pytest.raises(RuntimeError, match="init_process_group"):
        monitor.report(all_ranks=True)
    with pytest.raises(RuntimeError, match="init_process_group"):
        monitor.scalars(all_ranks=True)


if __name__ == "__main__":
    import torch.distributed.fsdp
    import torch.nn.parallel.distributed

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(rank, sys.argv[1])) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
