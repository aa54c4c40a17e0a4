"""The backend table: which backends there are, and what the properties of a call are that decide among them.

`why_not(request)` of a backend says only whether it **can** run the call; `ranking.py` says whether it should.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import aten, tiles
from .arguments import ScanInputs, Walk
from .backends import cpu, cuda, reference, triton
from .backends.triton_mode import Mode


class Request(NamedTuple):
    """The properties of a call that decide which backends can run it, and which one should."""

    cell: str  # a name of the cell table, or the text of a user's cell
    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype
    hidden_size: int
    proj_size: int = 0
    features: frozenset[str] = frozenset()  # out of FEATURES: what goes beyond torch.nn's plain call
    steps: int = 0  # T; 0 where it is not known (tracing)
    batch: int = 0  # B, likewise
    packed: float | None = None  # of a PackedSequence, the share of T*B that is no padding; None of other input
    gradients: bool = False  # whether a backward may follow
    subclass: bool = False  # whether a tensor's class overrides torch's functions; it knows torch's own, not the scan
    heads: int = 1  # blocks of W_hh


FEATURES = (
    "tap", "clip", "lengths", "resets", "decay", "return_cells", "return_layers", "layer_norm", "projection",
    "heads",
    "layer_norm_sum",  # of W_ih x + W_hh h
    "layer_norm_gates",  # the same, of each gate by itself
    "layer_norm_carried",  # of the c that is carried on
    "recurrent_dropout_per_gate",
    "zoneout", "recurrent_dropout", "locked_dropout", "residual",
    "eval_gradient",  # a backward in eval mode on a GPU, which cuDNN refuses
    "autocast_lstm",  # an LSTM that autocast makes half on a CPU whose oneDNN has no half LSTM
    "tracing",  # under torch.compile, torch.export or a torch.func transform
)  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    `auto` names the device types on which `choose` takes this backend without evidence from this machine (None: all);
    `about` says why. `directions`: one call of its scan can run both directions of a layer, side by side.
    """

    name: str
    auto: tuple[str, ...] | None
    about: str
    why_not: Callable[[Request], str | None]
    launcher: Any = None  # has forward and backward; aten takes whole calls instead
    directions: bool = False

    def takes(self, device: str) -> bool:
        return self.auto is None or device in self.auto

    def reason(self, request: Request) -> str | None:
        return self.why_not(request)


UNPROVEN = "nothing is known of it here"
# In the order in which `choose` takes them where nothing was measured.
BACKENDS: dict[str, Backend] = {
    row.name: row
    for row in (
        Backend("aten", None, "torch's own kernels, the yardstick", aten.why_not),
        Backend("triton", (), UNPROVEN, triton.why_not, triton, True),
        Backend("cuda", (), UNPROVEN, cuda.why_not, cuda, True),
        Backend("cpu", ("cpu",), "tested on every kind of CPU", cpu.why_not, cpu),
        Backend("reference", None, "runs everything", reference.why_not, reference),
    )
}
MODES: dict[str, Backend] = {
    f"triton:{name}": Backend(f"triton:{name}", (), UNPROVEN, mode.why_not, mode, True)
    for name in tiles.MODES
    for mode in (Mode(name),)
}
"""The modes of the Triton scan as rows. `choose` looks at those of which something is known here."""


def row(name: str) -> Backend:
    """The row of a backend, or of a mode of one."""
    return BACKENDS.get(name) or MODES[name]


def launcher(name: str) -> Any:
    """The module that runs a backend's scan: it has `forward` and `backward`."""
    return row(name).launcher


def takes_directions(name: str, inputs: ScanInputs, walk: Walk) -> bool:
    """Whether one launch of a backend takes both directions of these inputs."""
    found = row(name)
    return found.directions and found.launcher.takes_directions(inputs, walk)
