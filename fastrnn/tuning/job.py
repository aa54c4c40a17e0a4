"""A call that `tune` tries: a job names it, `Call` makes it with random inputs, on fastrnn's module or torch.nn's."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .. import modules, torch_nn
from ..backend_table import Request, row
from ..cell_table import CELLS, spec_of
from ..evidence.agreement import Tensors
from ..recurrent import Recurrent


class Job(NamedTuple):
    """A call to try. `filled`: of a packed batch, the length of all sequences but the longest as a share of T."""

    device: str
    cell: str  # a name of the cell table, or the text of a user's cell
    dtype: str
    hidden_size: int
    steps: int
    batch: int
    gradients: bool
    threads: int
    proj_size: int = 0
    features: tuple[str, ...] = ()
    filled: float | None = None
    input_size: int = 0  # 0: hidden_size
    num_layers: int = 1
    bidirectional: bool = False
    num_heads: int = 1

    def lengths(self) -> Tensor:
        """`[B]`, the longest first."""
        share = 1.0 if self.filled is None else self.filled
        lengths = torch.full((self.batch,), max(1, int(self.steps * share)))
        lengths[0] = self.steps
        return lengths

    def request(self) -> Request:
        packed = None
        if self.filled is not None:
            packed = self.lengths().sum().item() / (self.steps * self.batch)
        return Request(
            self.cell, self.device, getattr(torch, self.dtype), self.hidden_size, self.proj_size,
            frozenset(self.features), self.steps, self.batch, packed, self.gradients,
            heads=self.num_heads,
        )  # fmt: skip

    @property
    def rival(self) -> str:
        """What the time is compared with: torch.nn, or the loop where torch.nn cannot run the call."""
        return "aten" if row("aten").reason(self.request()) is None else "reference"


# ------------------------------------------------------------------------------------------------------ the modules


def _options(job: Job) -> dict[str, Any]:
    """The options of fastrnn's module that give the job's features."""
    found: dict[str, Any] = {"proj_size": job.proj_size} if job.proj_size else {}
    if job.num_heads > 1:
        found["num_heads"] = job.num_heads
    by_feature = {
        "clip": {"clip_state_grad_norm": 1.0},
        "layer_norm": {"layer_norm": True},
        "layer_norm_sum": {"layer_norm": "sum"},
        "layer_norm_gates": {"layer_norm": "gates"},
        "layer_norm_carried": {"layer_norm_cell": "carried"},
        "zoneout": {"zoneout": 0.1},
        "recurrent_dropout": {"recurrent_dropout": 0.1},
        "recurrent_dropout_per_gate": {"recurrent_dropout_per_gate": True},
        "locked_dropout": {"dropout": 0.1, "locked_dropout": True},
        "residual": {"residual": True},
    }
    for feature, options in by_feature.items():
        found |= options if feature in job.features else {}
    return found


class _OfText(modules._Recurrent):
    """A network of a user's cell, of which only the text is here."""

    def __init__(self, text: str, *args: Any, **kwargs: Any):
        self._text = text
        super().__init__(*args, **kwargs)

    @property
    def _cell(self) -> str:
        return self._text

    forward = Recurrent.forward  # which takes the cell's inputs


def build(job: Job) -> torch.nn.Module:
    torch.manual_seed(2013)
    kind, name = (modules.RNNBase, job.cell.upper()) if job.cell in CELLS else (_OfText, job.cell)
    module = kind(
        name, job.input_size or job.hidden_size, job.hidden_size, job.num_layers,
        bidirectional=job.bidirectional, device=job.device, dtype=getattr(torch, job.dtype), **_options(job),
    )  # fmt: skip
    return module.train("eval_gradient" not in job.features)


def torchs(job: Job, module: torch.nn.Module) -> torch.nn.Module:
    """torch.nn's module with the same parameters."""
    kind, _, nonlinearity = job.cell.partition("_")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    if job.proj_size:
        options["proj_size"] = job.proj_size
    twin = getattr(torch_nn, kind.upper())(
        module.input_size, module.hidden_size, job.num_layers, bidirectional=job.bidirectional, device=job.device,
        dtype=getattr(torch, job.dtype), **options,
    )  # fmt: skip
    twin.load_state_dict(module.state_dict())
    return twin.train(module.training)


class Call:
    """A job as a call: `call(module)` runs it and returns its results by name."""

    def __init__(self, job: Job, dtype: torch.dtype | None = None):
        dtype = dtype or getattr(torch, job.dtype)
        self.job, generator = job, torch.Generator().manual_seed(2015)
        rounded = getattr(torch, job.dtype)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return values.to(rounded).to(job.device, dtype)

        T, B, I = job.steps, job.batch, job.input_size or job.hidden_size
        width = (job.proj_size or job.hidden_size) * (2 if job.bidirectional else 1)
        self.x, self.dy = normal(T, B, I).requires_grad_(), normal(T, B, width)
        lengths = job.lengths()
        if job.filled is not None:
            self.dy = pack_padded_sequence(self.dy, lengths, enforce_sorted=False).data
            self.packed_as = lengths
        self.keywords: dict[str, Any] = {}
        if "lengths" in job.features:
            self.keywords["lengths"] = torch.linspace(1, T, B).long().to(job.device)
        if "resets" in job.features:
            self.keywords["reset_mask"] = (torch.rand(T, B, generator=generator) < 0.1).to(job.device)
        if "decay" in job.features:
            self.keywords["decay"] = torch.rand(T, B, generator=generator).to(job.device, dtype)
        for name in ("return_cells", "return_layers"):
            if name in job.features:
                self.keywords[name] = True
        inputs = {name: normal(T, B, job.hidden_size).requires_grad_() for name in spec_of(job.cell).inputs}
        self.keywords |= inputs
        self.leaves = {"x": self.x, **inputs}
        self.acc = torch.promote_types(dtype, torch.float32)

    def at(self, x: Tensor) -> "Call":
        """The same call on another x."""
        other = copy.copy(self)
        other.x = x.detach().requires_grad_()
        other.leaves = self.leaves | {"x": other.x}
        return other

    def leave_out(self, sequences: Tensor) -> None:
        """From now on these sequences, bool `[B]`, send no gradient."""
        given = sequences[:, None].expand(self.job.steps, -1, 1)
        if self.job.filled is not None:
            given = pack_padded_sequence(given, self.packed_as, enforce_sorted=False).data
        self.dy = self.dy.masked_fill(given, 0)

    def _tap(self) -> Tensor:
        job = self.job
        states = len(spec_of(job.cell).states)
        walks = job.num_layers * (2 if job.bidirectional else 1)
        shape = (walks, 2, states, job.steps, job.batch)
        return torch.zeros(shape, dtype=self.acc, device=job.device, requires_grad=True)

    def __call__(self, module: torch.nn.Module, gradients: bool, between: Callable[[], None] = lambda: None) -> Tensors:
        """The results by name. `between` runs after the forward, before the backward."""
        job, tap = self.job, None
        keywords = self.keywords
        if "tap" in job.features:
            tap = self._tap()
            keywords = keywords | {"tap": tap}
        with torch.set_grad_enabled(gradients):
            x = self.x
            given = x if job.filled is None else pack_padded_sequence(x, self.packed_as, enforce_sorted=False)
            y, hidden, *_ = module(given, **keywords)
            y = y.data if isinstance(y, PackedSequence) else y
        hidden = hidden if isinstance(hidden, tuple) else (hidden,)
        found = {"y": y, **{f"state {k}": state for k, state in enumerate(hidden)}}
        between()
        if gradients:
            leaves = {**self.leaves, **dict(module.named_parameters()), **({} if tap is None else {"tap": tap})}
            found |= zip(
                (f"d {name}" for name in leaves), torch.autograd.grad(y, [*leaves.values()], self.dy), strict=True
            )  # fmt: skip
        return {name: value.detach() for name, value in found.items()}
