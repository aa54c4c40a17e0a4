"""From the norms of a backward to gains, horizons and verdicts: one record per layer, direction and state.

    gain_t = carried_t / total_{t+1}          t + 1: the next step of the scan (t - 1 in the reverse direction)

the factor by which one step back in time changes the norm. A product of gains well below 1 is a vanishing gradient, one
well above 1 an exploding one (R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural
networks", 2013, eq. 5-7). The totals alone cannot tell: a loss at every step keeps them level where nothing is carried.
"""

import math
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..cell_table import spec_of
from ..modules import _Recurrent
from .listing import text

HORIZON_FRACTION = 0.01
"""The share of its norm that a gradient must keep to count as arriving. With 1 % of it, a step that matters as much as
the last one moves the weights a hundred times less, which is below the noise between minibatches."""
VANISHING_SPAN = 0.5
"""Vanishing: the horizon covers less than this part of the longest way back that a gradient could have taken, so the
network cannot relate one half of such a sequence to the other."""
EXPLODING_GROWTH = 1 / HORIZON_FRACTION
"""Exploding: on its way back the gradient outgrows its start by this factor, the reciprocal of the horizon's; the late
steps then have as little effect beside the early ones as early steps have beyond the horizon."""
LOG_NOTHING = -1e4
"""In place of the logarithm of a gain of 0, which is infinite; the logarithm of no positive float64 is this low."""
GAIN_RESOLUTION = 1e-6
"""A mean log gain this close to 0 does not count as shrinking: float32 norms round at about 1e-7 a step."""


@dataclass(frozen=True, eq=False)
class Record:
    """The norms of one state tensor of one layer and direction in the last backward; T steps, index t is the input's.

    Every number is the median over the samples (of all calls of the module) that a gradient reached: padding, where
    both norms are exactly zero, does not count. The gain, and the fields that follow from it, are taken over all states
    of the cell together, so an LSTM's h and c share them.

    A way back begins where the loss, or h_n, enters a sequence, and ends at its start or at a reset. The horizon is the
    median over these ways. A short way only tells that the gradient was kept to its end, so the median is estimated
    after E. Kaplan and P. Meier ("Nonparametric estimation from incomplete observations", 1958): among the ways that
    are at least k steps long, the share that survives step k, multiplied up over k. A padded batch thereby has the
    horizon of its long sequences, not that of its padding.

    The verdict counts the same way: vanishing, where the horizon is under half of `longest`; exploding, where half of
    the ways grow by EXPLODING_GROWTH, or a norm is not finite; unknown, where no gradient passed from one step to
    another, or the forward pass itself was not finite.
    """

    module: str
    layer: int
    direction: str  # "forward" or "reverse"
    state: str  # "h", "c", or the name that a user's cell gives
    total: Tensor  # float64 [T], ||dL/ds_t|| before clipping
    carried: Tensor  # float64 [T], the part that came back from the next step (at the last one, from h_n or c_n)
    gain: Tensor  # float64 [T], the network's own (clipping undone); NaN without a next step or a gradient there
    gain_median: float  # geometric mean over a sample's steps, of which each counts in the median; NaN without any gain
    valid: Tensor  # int64 [T], samples that a gradient reached
    half_life: float | None  # steps in which a gradient halves; None when it does not shrink
    horizon: int | None  # steps back until under HORIZON_FRACTION is left; longest if never, None where unknown
    longest: int  # steps of the longest way back in the batch; 0 where no gradient arrives
    growth: float  # the largest factor by which the gradient outgrew its start on the way; at least 1
    clipped: int | None  # (step, sample) pairs over clip_state_grad_norm; None without it
    clip_rate: float | None  # their share of the pairs that a gradient reached
    first_nonfinite: int | None  # the step of the first infinite or NaN norm, walking back
    forward_nonfinite: int | None  # if there is one: the first step whose output (the module's) was not finite, if any
    verdict: str  # "vanishing", "exploding", "healthy" or "unknown"
    cut: bool = False  # whether the gradient went on into a call before this one, where it was not followed

    @property
    def name(self) -> str:
        """`module.l0`, `module.l0_reverse`: as in the names of the parameters."""
        return name_of(self.module, self.layer, self.direction)


def name_of(module: str, layer: int, direction: str) -> str:
    return f"{module}.l{layer}" + ("_reverse" if direction == "reverse" else "")


class Kind(NamedTuple):
    """What the records of a module depend on beside its calls."""

    layers: int
    directions: tuple[str, ...]  # of each layer
    states: tuple[str, ...]

    def names(self, module: str) -> list[tuple[str, str]]:
        """`Record.name` and state of every record of a module."""
        return [
            (name_of(module, layer, direction), state)
            for layer in range(self.layers)
            for direction in self.directions
            for state in self.states
        ]


def kind_of(module: _Recurrent) -> Kind:
    directions = ("forward", "reverse") if module.bidirectional else ("forward",)
    return Kind(module.num_layers, directions, tuple(spec_of(module._cell).states))


@dataclass(frozen=True)
class Finding:
    """The verdict on a layer and direction in words, with advice that may help; see `advice.py`."""

    name: str  # `Record.name`
    verdict: str
    summary: str
    advice: tuple[str, ...]
    rules: tuple[str, ...] = field(default=(), repr=False)  # the templates of `advice`, which findings may share
    remedies: tuple[str, ...] = field(default=(), repr=False)  # of each line of `advice`; "" if it is no action
    quantities: tuple[str, ...] = field(default=(), repr=False)  # the fact that each line rests on
    facts: object = field(default=None, repr=False)  # the `advice.Facts` of the layer

    def __str__(self) -> str:
        return "\n".join((f"{self.name}: {self.verdict}: {self.summary}", *(f"  - {text}" for text in self.advice)))


class Report(list):
    """A list of `Record`s, and `findings` per layer and direction; prints as a table with the findings under it, in
    which the layers of a deep network that are alike share a line.

    `note`: a sentence on which batch it is about, if that one is unlike the others.
    """

    def __init__(self, records=(), findings=(), note: str = ""):
        super().__init__(records)
        self.findings: list[Finding] = list(findings)
        self.note = note

    @property
    def records(self) -> list[Record]:
        """The report itself, as a plain list."""
        return list(self)

    def __str__(self) -> str:
        if not self:
            return "no gradient recorded: run the model and loss.backward() inside the monitor"
        return text(self)

    def as_dict(self) -> dict:
        """`{"records": [..], "findings": [..]}` of plain numbers, lists and strings, as `json.dumps` takes them.

        NaN and infinity, which JSON lacks, are None.
        """
        records = [{"name": r.name, **{key: _plain(value) for key, value in vars(r).items()}} for r in self]
        findings = [
            {"name": f.name, "verdict": f.verdict, "summary": f.summary, "advice": list(f.advice)}
            for f in self.findings
        ]
        return {"records": records, "findings": findings}

    def scalars(self) -> dict[str, float]:
        """The records as numbers for a logger, under names like `fastrnn/lstm.l0/h/gain_median`.

        They are total_max and total_min (over the steps that a gradient reached), `vanishing`, `exploding` and
        `nonfinite` (0 or 1), and gain_median, half_life, horizon, clipped and clip_rate where they are known.
        """
        values: dict[str, float] = {}
        for r in self:
            reached = r.total[r.valid > 0]
            entries = {
                "gain_median": r.gain_median,
                "half_life": r.half_life,
                "horizon": r.horizon,
                "total_max": float(reached.max()) if len(reached) else 0.0,
                "total_min": float(reached.min()) if len(reached) else 0.0,
                "clipped": r.clipped,
                "clip_rate": r.clip_rate,
                "vanishing": r.verdict == "vanishing",
                "exploding": r.verdict == "exploding",
                "nonfinite": r.first_nonfinite is not None,
            }
            values |= {
                f"fastrnn/{r.name}/{r.state}/{k}": float(v) for k, v in entries.items() if v is not None and v == v
            }
        return values


def _plain(value):
    if isinstance(value, Tensor):
        return [_plain(v) for v in value.tolist()]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Norms(NamedTuple):
    """The norms of one call, on the CPU, and divided by the loss scale."""

    norms: Tensor  # float64 [L*D, 2, S, T, B], total and carried
    resets: Tensor | None  # bool [T, B]
    lengths: Tensor  # int64 [B]
    bound: float  # clip_state_grad_norm at the time of the call; infinite without one
    tiny: float  # the smallest norm that is not subnormal
    forward_nonfinite: int | None  # the first step whose output is not finite; sought only if a norm is not finite
    scale: float = 1.0  # the loss scale
    cut: bool = False  # whether the gradient goes on into an earlier call that is not followed


def unscaled(
    norms: Tensor,
    bound: float | Tensor | None,
    scale: float,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    bad_outputs: Tensor | None = None,
) -> Norms:
    """A tap's gradient as `Norms`, divided by the loss scale.

    Args:
        norms: `[L*D, 2, S, T, B]`.
        bound: clip_state_grad_norm.
        scale: the loss scale.
        resets: bool `[T, B]`, or None.
        lengths: integer `[B]`, or None: all are T.
        bad_outputs: bool `[T]`, True where the output is not finite; None where that is not known.
    """
    on_cpu, T = norms.to("cpu", torch.float64, copy=True), norms.shape[-2]
    if scale != 1:
        on_cpu = on_cpu / scale
    # A sum that overflows only makes the search find nothing.
    finite = bad_outputs is None or math.isfinite(on_cpu.sum())
    bad = [] if finite else bad_outputs.nonzero().flatten().tolist()
    return Norms(
        on_cpu,
        None if resets is None else resets.to("cpu", copy=True),  # the user may change it before the report is made
        torch.full(norms.shape[-1:], T) if lengths is None else lengths.cpu().long().clamp(0, T),
        math.inf if bound is None else float(bound) / scale,
        torch.finfo(norms.dtype).tiny / scale,
        bad[0] if bad else None,
        scale,
    )


def pool(calls: list[Norms], trim: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float]:
    """Several calls as one batch of N samples, padded to the longest.

    Args:
        calls: of one module.
        trim: cut T down to the last step that a gradient reached, and take lengths from the norms.

    Returns:
        norms `[L*D, 2, S, T, N]`, resets `[T, N]` or None, lengths `[N]`, bound `[N]`, and tiny.
    """
    T = max(call.norms.shape[-2] for call in calls)
    norms = torch.cat([nn.functional.pad(c.norms, (0, 0, 0, T - c.norms.shape[-2])) for c in calls], -1)
    resets = None
    if any(call.resets is not None for call in calls):
        masks = [torch.zeros(c.norms.shape[-2:], dtype=torch.bool) if c.resets is None else c.resets for c in calls]
        resets = torch.cat([nn.functional.pad(m, (0, 0, 0, T - m.shape[0])) for m in masks], -1)
    lengths = torch.cat([call.lengths for call in calls])
    if trim:
        lengths = (torch.arange(1, T + 1).unsqueeze(1) * (norms != 0).flatten(0, 2).any(0)).amax(0)
        norms = norms[..., : max(1, int(lengths.max())), :]
    bound = torch.cat([c.norms.new_full(c.norms.shape[-1:], c.bound) for c in calls])
    return norms, resets, lengths, bound, max(call.tiny for call in calls)


def records(name: str, kind: Kind, calls: list[Norms], trim: bool = False) -> list[Record]:
    """The records of one module from its calls; `trim` cuts T down to the last step that a gradient reached."""
    norms, resets, lengths, bound, tiny = pool(calls, trim)
    forward = min((c.forward_nonfinite for c in calls if c.forward_nonfinite is not None), default=None)
    padding = torch.arange(norms.shape[-2]).unsqueeze(1) >= lengths
    found = []
    for row, norm in enumerate(norms):
        layer, d = divmod(row, len(kind.directions))
        reverse = d == 1
        joint = norm[0].norm(dim=0)
        passed_on = torch.where(joint > bound, bound / joint, 1.0)
        cuts = padding | _cuts(resets, reverse, joint)
        log_gain = log_gains(norm, cuts, reverse, tiny, passed_on)
        reached = (norm != 0).flatten(0, 1).any(0)
        backward = [v if reverse else v.flip(0) for v in (log_gain, reached, cuts)]
        mean, horizon, longest, growth, verdict = _judge(*backward)
        finite = bool(norm.isfinite().all())
        if not finite:
            horizon, verdict = None, "exploding" if forward is None else "unknown"
        clipped = None if bool(bound.isinf().all()) else int((joint > bound).sum())
        for s, state in enumerate(kind.states):
            total, carried = norm[0, s], norm[1, s]
            valid = (total != 0) | (carried != 0)
            bad = (~(total.isfinite() & carried.isfinite())).any(-1).nonzero().flatten().tolist()
            found.append(
                Record(
                    module=name,
                    layer=layer,
                    direction=kind.directions[d],
                    state=state,
                    total=_median(total, valid).where(valid.any(-1), 0),
                    carried=_median(carried, valid).where(valid.any(-1), 0),
                    gain=_median(log_gain, ~log_gain.isnan()).exp(),
                    gain_median=float(torch.tensor(mean).exp()),
                    valid=valid.sum(-1),
                    half_life=math.log(2) / -mean if mean < -GAIN_RESOLUTION else None,
                    horizon=horizon,
                    longest=longest,
                    growth=growth,
                    clipped=clipped,
                    clip_rate=None if clipped is None else clipped / max(1, int((joint != 0).sum())),
                    first_nonfinite=None if not bad else bad[0] if reverse else bad[-1],
                    forward_nonfinite=None if finite else forward,
                    verdict=verdict,
                    cut=any(call.cut for call in calls),
                )
            )
    return found


def _cuts(resets: Tensor | None, reverse: bool, like: Tensor) -> Tensor:
    """bool `[T, N]`, True where a reset keeps the gradient of the next step of the scan from coming back to this."""
    cuts = torch.zeros_like(like, dtype=torch.bool)
    if resets is not None:
        (cuts[1:] if reverse else cuts[:-1])[:] = resets[1 : len(cuts)]
    return cuts


def log_gains(norms: Tensor, cuts: Tensor, reverse: bool, tiny: float, passed_on: Tensor) -> Tensor:
    """log(carried_t / total_{t+1}) over all states of the cell, float64 `[T, N]`; NaN where there is no gain.

    For an LSTM it is sqrt(carried_h² + carried_c²)_t / sqrt(total_h² + carried_c²)_{t+1}, because total_c already
    contains the part through h_t. Where step t + 1 was clipped, the total after clipping is taken: the clipping must
    not look like a vanishing gradient. There is no gain at the last step (the gradient carried to it came through h_n),
    where no gradient reached the next step or only a subnormal one (below `tiny`), at a norm that is not finite, and
    where `cuts` is True.

    Args:
        norms: float64 `[2, S, T, N]`, total and carried.
        cuts: bool `[T, N]`.
        tiny: the smallest norm that is not subnormal.
        passed_on: float64 `[T, N]`, the share of the total that clipping by norm let through.
    """
    (total, carried), T = norms, norms.shape[2]
    total = reduce(torch.hypot, (total[0], *carried[1:])) * passed_on
    carried = reduce(torch.hypot, carried)
    here, ahead = (slice(1, T), slice(0, T - 1)) if reverse else (slice(0, T - 1), slice(1, T))
    carried, total = carried[here], total[ahead]
    known = (total >= tiny) & total.isfinite() & carried.isfinite() & ~cuts[here]
    log_gain = torch.full(norms.shape[2:], math.nan, dtype=norms.dtype)
    log_gain[here] = torch.where(known, carried.log() - total.log(), math.nan)
    return log_gain


def _judge(log_gain: Tensor, reached: Tensor, cuts: Tensor) -> tuple[float, int | None, int, float, str]:
    """Mean log gain (NaN without any), horizon, longest, growth and verdict; see `Record`.

    Args:
        log_gain: `[T, N]`, in backward order as all three: step k comes after step k - 1.
        reached: bool `[T, N]`, whether a gradient reached the step.
        cuts: bool `[T, N]`, True where a reset lies between k - 1 and k, and in the padding.
    """
    known = ~log_gain.isnan()
    before = reached.cumsum(0) - reached.long()
    starting = before <= torch.where(cuts, before, 0).cummax(0).values  # no gradient has reached this stretch yet
    k = torch.arange(len(log_gain)).unsqueeze(1)
    start = torch.where(starting, k, 0).cummax(0).values
    gone = k - start  # the number of steps of the way back up to k
    longest = int(gone.max()) + 1 if bool(reached.any()) else 0
    if not bool(known.any()):
        return math.nan, None, longest, 1.0, "unknown"
    # A gain of exactly 0 ends the horizon; in the mean, its logarithm would outweigh all other steps.
    mean = torch.where(log_gain.isfinite(), log_gain, math.nan).nanmean(0)
    counted = known.any(0)
    mean = torch.where(mean.isnan() & counted, -math.inf, mean)
    product = torch.where(known, log_gain.clamp(min=LOG_NOTHING), 0).cumsum(0)
    product = product - product.gather(0, start)
    ways = known, start, gone
    kept = _median_passage(product < math.log(HORIZON_FRACTION), *ways)
    exploding = _median_passage(product > math.log(EXPLODING_GROWTH), *ways) is not None
    growth = product.amax(0).clamp(min=0)
    growth = growth[growth > math.log(EXPLODING_GROWTH) if exploding else counted].median().exp()
    vanishing = kept is not None and kept < VANISHING_SPAN * (longest - 1)
    verdict = "exploding" if exploding else "vanishing" if vanishing else "healthy"
    mean = _weighted_median(mean[counted], known.sum(0)[counted])
    return mean, longest if kept is None else kept, longest, float(growth), verdict


def _weighted_median(values: Tensor, weights: Tensor) -> float:
    """The smallest of the values `[N]` up to which half of the weight is; of equal weights, torch.median."""
    order = values.argsort()
    below = weights[order].cumsum(0)
    return float(values[order][2 * below >= below[-1]][0])


def _median_passage(crossed: Tensor, known: Tensor, start: Tensor, gone: Tensor) -> int | None:
    """The number of steps that half of the ways go without crossing (see `Record`); None if fewer ever cross."""
    so_far = crossed.cumsum(0)
    at_risk = known & (so_far - crossed.long() == so_far.gather(0, start))
    there, lost = (torch.bincount(gone[v], minlength=len(gone)) for v in (at_risk, at_risk & crossed))
    left = (1 - lost.double() / there.clamp(min=1)).cumprod(0)
    passed = (left < 0.5 + 1e-9).nonzero()  # half, plus rounding
    return int(passed[0]) - 1 if len(passed) else None


def _median(values: Tensor, valid: Tensor) -> Tensor:
    """`[T, N]` -> `[T]`, over the valid values; NaN where there is none."""
    return torch.where(valid, values, math.nan).nanmedian(-1).values
