"""The child process of `tune`: compares a candidate with the reference, then times it.

`python -m fastrnn.trial` reads a job per line from its standard input and answers each with a line of JSON. Lines that
say what is running come before the answer, so that the parent knows what to blame where this process dies or hangs.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from . import agreement, evidence, modules, timing, torch_nn, verification
from .backend_table import Request, row
from .cell_table import CELLS, spec_of
from .recurrent import Recurrent

RANDOM = frozenset({"zoneout", "recurrent_dropout", "locked_dropout"})
"""Features that draw masks: there two calls differ, and the scan alone is compared, on masks that are given."""
OF_TORCH = 16.0
"""The factor on the rounding floor for torch's own kernels, which set the measure for the others: oneDNN's gradient of
a bias is one float32 sum over T*B terms, with errors of up to 14 eps seen where the loop, of many small sums, had 1."""
TIMES = 3  # that the timing is taken, at most, until the two can be told apart
ROUNDS = 8  # of the timing; the interval of eight rounds leaves out one at either end
SAMPLE_SECONDS = 2e-3


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
        )  # fmt: skip

    @property
    def rival(self) -> str:
        """What the time is compared with: torch.nn, or the loop where torch.nn cannot run the call."""
        return "aten" if row("aten").reason(self.request()) is None else "reference"


# ------------------------------------------------------------------------------------------------------ the modules


def _options(job: Job) -> dict[str, Any]:
    """The options of fastrnn's module that give the job's features."""
    found: dict[str, Any] = {"proj_size": job.proj_size} if job.proj_size else {}
    by_feature = {
        "clip": {"clip_state_grad_norm": 1.0},
        "layer_norm": {"layer_norm": True},
        "zoneout": {"zoneout": 0.1},
        "recurrent_dropout": {"recurrent_dropout": 0.1},
        "locked_dropout": {"dropout": 0.1, "locked_dropout": True},
        "residual": {"residual": True},
    }
    for feature in job.features:
        found |= by_feature.get(feature, {})
    if "heads" in job.features:  # of how many, a request does not say
        found["num_heads"] = next(n for n in range(2, job.hidden_size + 1) if job.hidden_size % n == 0)
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


def _build(job: Job) -> torch.nn.Module:
    torch.manual_seed(2013)
    kind, name = (modules.RNNBase, job.cell.upper()) if job.cell in CELLS else (_OfText, job.cell)
    module = kind(
        name, job.input_size or job.hidden_size, job.hidden_size, job.num_layers,
        bidirectional=job.bidirectional, device=job.device, dtype=getattr(torch, job.dtype), **_options(job),
    )  # fmt: skip
    return module.train("eval_gradient" not in job.features)


def _torchs(job: Job, module: torch.nn.Module) -> torch.nn.Module:
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

    def _tap(self) -> Tensor:
        job = self.job
        states = len(spec_of(job.cell).states)
        walks = job.num_layers * (2 if job.bidirectional else 1)
        shape = (walks, 2, states, job.steps, job.batch)
        return torch.zeros(shape, dtype=self.acc, device=job.device, requires_grad=True)

    def __call__(self, module: torch.nn.Module, gradients: bool) -> agreement.Tensors:
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
        if gradients:
            leaves = {**self.leaves, **dict(module.named_parameters()), **({} if tap is None else {"tap": tap})}
            found |= zip(
                (f"d {name}" for name in leaves), torch.autograd.grad(y, [*leaves.values()], self.dy), strict=True
            )  # fmt: skip
        return {name: value.detach() for name, value in found.items()}


# ------------------------------------------------------------------------------------------------------ the trial


class Broken(Exception):
    """A result that was right at first is wrong. It is the candidate's fault, also where it is the rival's result."""

    def __init__(self, wrong: str, name: str, candidate: str):
        super().__init__(f"after some calls, {wrong}" if name == candidate else f"after it, {name} is wrong: {wrong}")


class Trial:
    """A job made ready: the results that count as right, which all its candidates share."""

    def __init__(self, job: Job, say: Callable[[str], None]):
        self.job, self.say = job, say
        torch.set_num_threads(job.threads)
        self.dtype, self.call, self.module = getattr(torch, job.dtype), Call(job), _build(job)
        self.plain = job.rival == "aten"
        self.eps = verification.eps_of(self.dtype, job.device)
        self.exact: agreement.Tensors | None = None
        self.usual: list[agreement.Tensors] = []  # the results whose errors are the measure
        self.right: dict[tuple[str, ...], agreement.Tensors] = {}  # results that were found right, by their names
        if not RANDOM & set(job.features):
            say("reference")
            twin = _build(job).double()
            twin.load_state_dict(self.module.state_dict())
            twin.backend = "reference"
            self.exact = Call(job, torch.float64)(twin, True)
            self.usual.append(self.call(self.on("reference"), True))
        say(job.rival)
        self.rival = _torchs(job, self.module) if self.plain else self.on("reference")
        self.rival_is_wrong = None
        if self.plain and self.exact is not None:
            found = self.call(self.rival, True)
            self.rival_is_wrong = self.disagreement(found, OF_TORCH)
            self.usual.append(found)

    def on(self, backend: str) -> torch.nn.Module:
        own = type(self.module).__new__(type(self.module))
        own.__dict__.update(self.module.__dict__)
        own.backend = backend
        return own

    def disagreement(self, found: agreement.Tensors, rounding: float = 1.0) -> str | None:
        exact = {name: value for name, value in self.exact.items() if name in found}
        return agreement.disagreement(found, self.usual, exact, self.eps, rounding)

    def differ(self, results: list[agreement.Tensors]) -> str | None:
        """What is wrong with some of these results, most of which are the same bits as before."""
        if self.exact is None:
            return None
        for found in results:
            key = tuple(found)
            right = self.right.get(key, {})
            if not all(name in right and torch.equal(value, right[name]) for name, value in found.items()):
                if (reason := self.disagreement(found)) is not None:
                    return reason
                self.right[key] = found
        return None

    def wrong(self, module: torch.nn.Module) -> str | None:
        """What is wrong with a module's results, forward and backward; None where nothing is, or masks are drawn."""
        return None if self.exact is None else self.disagreement(self.call(module, True))

    def run(self, candidate: str, seconds: float) -> dict[str, Any]:
        """The answer: `broken` with a reason, `blame` naming the one that is; or `ratio` and both medians."""
        job = self.job
        if self.rival_is_wrong is not None:
            return {"broken": self.rival_is_wrong, "blame": job.rival}
        self.say(candidate)
        module = self.on(candidate)
        wrong = self.wrong(module)
        if wrong is None and row(candidate).launcher is not None and (self.exact is None or job.device != "cpu"):
            device = torch.device(job.device)
            wrong = verification.check(row(candidate).launcher, job.request(), min(job.batch, 32), device)
        if wrong is not None:
            return {"broken": wrong, "blame": candidate}
        taken: list[agreement.Tensors] = []  # the results of a sample, compared after it

        def timed(module: torch.nn.Module) -> Callable[[int], None]:
            return lambda _: taken.append(self.call(module, job.gradients))

        def look(name: str) -> None:
            self.say(name)  # a sign of life
            wrong = self.differ(taken)
            taken.clear()
            if wrong is not None:
                raise Broken(wrong, name, candidate)

        calls = {job.rival: timed(self.rival), candidate: timed(module)}
        shares: list[float] = []
        try:
            for _ in range(TIMES):
                samples = timing.interleave(
                    calls, job.device, seconds, set(), warmup=0.0, rounds=ROUNDS, sample=SAMPLE_SECONDS, after=look
                )
                shares += timing.shares(samples[candidate], samples[job.rival])
                ratio = timing.figure(shares)
                if ratio.high < evidence.FASTER or ratio.low > 1:
                    break
            wrong = self.wrong(self.rival)
            if wrong is not None:
                raise Broken(wrong, job.rival, candidate)
        except Broken as broken:
            return {"broken": str(broken), "blame": candidate}
        return {"ratio": list(ratio), "seconds": {name: own.median for name, own in samples.items()}}


def answer(request: dict[str, Any], trials: dict[Job, Trial], say: Callable[[str], None]) -> dict[str, Any]:
    fields = request["job"]
    job = Job(**fields | {"features": tuple(fields["features"])})
    candidate = request["candidate"]
    reason = row(candidate).reason(job.request())
    if reason is not None:
        return {"cannot": reason}
    try:
        if job not in trials:
            trials.clear()
            trials[job] = Trial(job, say)
        return trials[job].run(candidate, request["seconds"])
    except torch.OutOfMemoryError as error:
        return {"cannot": str(error)}
    except Exception as error:
        return {"broken": f"{type(error).__name__}: {error}", "blame": getattr(say, "last", candidate)}


def main() -> None:
    """Answers until the input ends. What libraries print goes to the standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def say(name: str) -> None:
        say.last = name  # type: ignore[attr-defined]
        send({"running": name})

    send({"ready": os.getpid()})
    trials: dict[Job, Trial] = {}
    for line in sys.stdin:
        send(answer(json.loads(line), trials, say))


if __name__ == "__main__":
    main()
