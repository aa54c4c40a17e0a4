"""`python -m fastrnn flow`: cells and remedies side by side, before any training, on one long sequence.

Every arm reads the same noise, N(0, 1), and has its loss at the last step only, so that the norm at step t is that of a
gradient which came back over T - 1 - t steps.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import init
from ..modules import GRU, LSTM, RNN
from ..recurrent import Recurrent
from ..user_cells import Cell
from .diagnosis import Record, Report
from .listing import table
from .monitor import GradientMonitor

INPUTS = 8
LARGE = 2.0
"""W_hh is drawn from N(0, LARGE² / H). Above 1 a wide tanh network without input is chaotic, so that its gradient
explodes (H. Sompolinsky, A. Crisanti, H. Sommers, "Chaos in random neural networks", 1988); noise at the input raises
that threshold."""
LAYERS = 4

Initialise = Callable[[nn.Module, int], object]


class Arm(NamedTuple):
    """One line of the picture and one row of the table."""

    network: str
    name: str
    cell: Callable[..., nn.Module]  # of the input size, the hidden size and the settings
    settings: dict
    initialise: Initialise  # called with the module and T


def _as_torch(module: nn.Module, T: int) -> None:
    """Leaves torch.nn's U(-1/sqrt(H), 1/sqrt(H)), drawn by the constructor."""


def _large(module: nn.Module, T: int) -> None:
    nn.init.normal_(module.weight_hh_l0, std=LARGE / math.sqrt(module.hidden_size))


def _orthogonal(module: nn.Module, T: int) -> None:
    init.orthogonal_(module)


def _identity(module: nn.Module, T: int) -> None:
    init.identity_(module)


def _forget_bias(module: nn.Module, T: int) -> None:
    init.forget_bias_(module)


def _chrono(module: nn.Module, T: int) -> None:
    init.chrono_(module, t_max=T)


ARMS = (
    Arm("tanh RNN: how W_hh starts", "torch.nn's", RNN, {}, _as_torch),
    Arm("tanh RNN: how W_hh starts", "orthogonal", RNN, {}, _orthogonal),
    Arm("tanh RNN: how W_hh starts", "large", RNN, {}, _large),
    Arm("tanh RNN: a large W_hh", "as it is", RNN, {}, _large),
    Arm("tanh RNN: a large W_hh", "clipped in the recursion", RNN, {"clip_state_grad_norm": 1.0}, _large),
    Arm("tanh RNN: a large W_hh", "layer norm", RNN, {"layer_norm": True}, _large),
    Arm("ReLU RNN", "torch.nn's", RNN, {"nonlinearity": "relu"}, _as_torch),
    Arm("ReLU RNN", "identity", RNN, {"nonlinearity": "relu"}, _identity),
    Arm("LSTM", "torch.nn's", LSTM, {}, _as_torch),
    Arm("LSTM", "forget bias 1", LSTM, {}, _forget_bias),
    Arm("LSTM", "chrono", LSTM, {}, _chrono),
    Arm("LSTM", "layer norm", LSTM, {"layer_norm": True}, _as_torch),
    Arm("GRU", "torch.nn's", GRU, {}, _as_torch),
    Arm("GRU", "orthogonal", GRU, {}, _orthogonal),
    Arm("GRU", "chrono", GRU, {}, _chrono),
    Arm(f"bottom of {LAYERS} GRUs", "chrono", GRU, {"num_layers": LAYERS}, _chrono),
    Arm(f"bottom of {LAYERS} GRUs", "chrono, residual", GRU, {"num_layers": LAYERS, "residual": True}, _chrono),
)


def arms_of(cells: dict[str, Cell]) -> list[Arm]:
    """The arms of cells that have no name in `ARMS`."""
    found = []
    for name, cell in cells.items():
        network = partial(Recurrent, cell)
        found.append(Arm(name, "torch.nn's", network, {}, _as_torch))
        if cell.recurrent:
            found.append(Arm(name, "orthogonal", network, {}, _orthogonal))
    return found


class Flow(NamedTuple):
    """The gradient of an arm."""

    arm: Arm
    norms: Tensor  # float64 [T], of the bottom layer's joint state gradient; 1 is the top layer's at the last step
    record: Record  # of the bottom layer

    @property
    def outcome(self) -> str:
        r = self.record
        if r.clip_rate is not None:
            return f"{r.clip_rate:.0%} of it clipped"
        return {"vanishing": f"1 % left after {r.horizon} steps", "exploding": f"grows {r.growth:.0e}-fold"}.get(
            r.verdict, "all the way"
        )


def flow(arm: Arm, T: int, hidden: int, batch: int, seed: int) -> Flow:
    """One forward and one backward of an arm; the seed draws the weights, the input and the readout."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, batch, INPUTS, generator=generator)
    readout = torch.randn(hidden, generator=generator)
    readout /= readout.norm()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        module = arm.cell(INPUTS, hidden, **arm.settings)
        with torch.no_grad():
            arm.initialise(module, T)
    with GradientMonitor(module) as monitor:
        (module(x)[0][-1] @ readout).sum().backward()
    bottom, top = (joint(monitor.report(), layer) for layer in (0, module.num_layers - 1))
    return Flow(arm, bottom / top[-1], monitor.report()[0])


def joint(report: Report, layer: int) -> Tensor:
    """The joint norm over all states of one layer, `[T]`."""
    return torch.stack([r.total for r in report if r.layer == layer]).norm(dim=0)


def by_network(flows: list[Flow]) -> dict[str, dict[str, list[float]]]:
    """The argument of `plots.flows`."""
    networks: dict[str, dict[str, list[float]]] = {}
    for f in flows:
        networks.setdefault(f.arm.network, {})[f"{f.arm.name}: {f.outcome}"] = f.norms.tolist()
    return networks


def as_table(flows: list[Flow]) -> str:
    """A row per arm: gain, half-life and horizon in steps, norm at the first step in units of that at the loss."""
    rows = [("network", "remedy", "gain", "half-life", "horizon", "norm at t = 0", "clipped", "verdict")]
    for f in flows:
        r = f.record
        rows.append((
            f.arm.network, f.arm.name, f"{r.gain_median:.3f}", "-" if r.half_life is None else f"{r.half_life:.1f}",
            f"{r.horizon} of {len(f.norms)}", f"{float(f.norms[0]):.1e}",
            "-" if r.clip_rate is None else f"{r.clip_rate:.0%}", r.verdict,
        ))  # fmt: skip
    return table(rows)
