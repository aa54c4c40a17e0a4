"""From the norms of a backward to what they mean: gains, horizons and verdicts, one record per layer and state.

    gain_t = carried_t / total_{t+1}          t + 1: the next step of the scan (t - 1 in the reverse direction)

the factor by which one step back in time changes the norm. A product of gains well below 1 is a vanishing gradient, one
well above 1 an exploding one (R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural
networks", 2013, eq. 5-7). The totals alone cannot tell: a loss at every step keeps them level where nothing is carried.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cells import CELLS
from .modules import _Recurrent

HORIZON_FRACTION = 0.01
"""The share of its norm that a gradient must keep to count as arriving. At 1 % a step that matters as much as the last
one moves the weights a hundred times less, below the noise between minibatches."""
VANISHING_SPAN = 0.5
"""Vanishing: the horizon covers less than this part of the steps that the gradient could have travelled, so the network
cannot relate one half of the sequence to the other."""
EXPLODING_GROWTH = 1 / HORIZON_FRACTION
"""Exploding: on its way back the gradient outgrows its start by this factor, the mirror image of the horizon's; early
steps then drown the late ones as thoroughly as they would be drowned themselves."""
GAIN_RESOLUTION = 1e-6
"""A mean log gain within this of 0 is not shrinking: float32 norms round at about 1e-7 a step."""


@dataclass(frozen=True, eq=False)
class Record:
    """The norms of one state tensor of one layer and direction in the last backward; T steps, index t is the input's.

    Every number is the median over the samples (of all calls of the module) that a gradient reached: padding, where
    both norms are exactly zero, does not count. The gain, and what follows from it, is taken over all states of the
    cell together, so an LSTM's h and c share it.
    """

    module: str
    layer: int
    direction: str  # "forward" or "reverse"
    state: str  # "h" or "c"
    total: Tensor  # float64 [T], ||dL/ds_t|| before clipping
    carried: Tensor  # float64 [T], the part that came back from the next step (at the last one, from h_n or c_n)
    gain: Tensor  # float64 [T], the network's own (clipping undone); NaN without a next step or a gradient there
    gain_median: float  # geometric mean over the steps; NaN without any gain
    valid: Tensor  # int64 [T], samples that a gradient reached
    half_life: float | None  # steps in which a gradient halves; None when it does not shrink
    horizon: int  # steps back over which it keeps HORIZON_FRACTION of its norm; T if it never falls under
    clipped: int | None  # (step, sample) pairs over clip_state_grad_norm; None without it
    first_nonfinite: int | None  # where, walking back, the first infinite or NaN norm turns up
    verdict: str  # "vanishing", "exploding" or "healthy"

    @property
    def name(self) -> str:
        """`module.l0`, `module.l0_reverse`: as the parameters are called."""
        return f"{self.module}.l{self.layer}" + ("_reverse" if self.direction == "reverse" else "")


class Report(list):
    """A list of `Record`s that prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no gradient recorded: run the model and loss.backward() inside the monitor"
        head = ("layer", "state", "norm, first step", "last step", "gain", "half-life", "horizon", "clipped", "verdict")
        rows = [head]
        for r in self:
            verdict = r.verdict
            if r.first_nonfinite is not None:
                verdict += f" (not finite from step {r.first_nonfinite})"
            rows.append((
                r.name, r.state, f"{r.total[0]:.2e}", f"{r.total[-1]:.2e}", f"{r.gain_median:.3f}",
                "-" if r.half_life is None else f"{r.half_life:.1f}", f"{r.horizon} of {len(r.total)}",
                "-" if r.clipped is None else str(r.clipped), verdict,
            ))  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(f"{v:<{w}}" for v, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def pool(calls, trim: bool) -> tuple[Tensor, Tensor | None, float]:
    """The calls of one backward side by side along the batch.

    Returns norms float64 `[L*D, 2, S, T, N]`, resets bool `[T, N]` or None, and the smallest norm with full precision.
    """
    tiny = torch.finfo(calls[0][0].dtype).tiny
    T = max(norms.shape[-2] for norms, _ in calls)
    norms = torch.cat([nn.functional.pad(n.double().cpu(), (0, 0, 0, T - n.shape[-2])) for n, _ in calls], -1)
    if all(resets is None for _, resets in calls):
        resets = None
    else:
        masks = [torch.zeros(n.shape[-2:], dtype=torch.bool) if m is None else m.cpu() for n, m in calls]
        resets = torch.cat([nn.functional.pad(m, (0, 0, 0, T - m.shape[0])) for m in masks], -1)
    if trim:
        reached = (norms != 0).flatten(0, 2).any(-1).any(0).nonzero()
        norms = norms[..., : int(reached.max()) + 1 if len(reached) else 1, :]
    return norms, resets, tiny


def records(name: str, module: _Recurrent, norms: Tensor, resets: Tensor | None, tiny: float) -> list[Record]:
    directions = ("forward", "reverse") if module.bidirectional else ("forward",)
    found = []
    for row, norm in enumerate(norms):
        layer, d = divmod(row, len(directions))
        reverse = d == 1
        joint = norm[0].norm(dim=0)
        bound = module.clip_state_grad_norm
        passed_on = None if bound is None else float(bound) / joint.clamp(min=float(bound))
        log_gain = log_gains(norm, resets, reverse, tiny, passed_on)
        steps_back = log_gain if reverse else log_gain.flip(0)
        mean, horizon, verdict = _judge(steps_back, norm)
        for s, state in enumerate(CELLS[module._cell].states):
            total, carried = norm[0, s], norm[1, s]
            valid = (total != 0) | (carried != 0)
            bad = (~(total.isfinite() & carried.isfinite())).any(-1).nonzero().flatten().tolist()
            found.append(
                Record(
                    module=name,
                    layer=layer,
                    direction=directions[d],
                    state=state,
                    total=_median(total, valid).nan_to_num(0),
                    carried=_median(carried, valid).nan_to_num(0),
                    gain=_median(log_gain, ~log_gain.isnan()).exp(),
                    gain_median=float(torch.tensor(mean).exp()),
                    valid=valid.sum(-1),
                    half_life=math.log(2) / -mean if mean < -GAIN_RESOLUTION else None,
                    horizon=horizon,
                    clipped=None if bound is None else int((joint > float(bound)).sum()),
                    first_nonfinite=None if not bad else bad[0] if reverse else bad[-1],
                    verdict="exploding" if bad else verdict,
                )
            )
    return found


def log_gains(norms: Tensor, resets: Tensor | None, reverse: bool, tiny: float, passed_on: Tensor | None) -> Tensor:
    """log(carried_t / total_{t+1}) over all states of the cell, float64 `[T, N]`; NaN where there is none.

    For an LSTM sqrt(carried_h² + carried_c²)_t / sqrt(total_h² + carried_c²)_{t+1}, because total_c already holds what
    came through h_t. Where step t + 1 was clipped, the total is taken after it, so the cure does not pass for the
    network vanishing. No gain: at the last step (what is carried there came through h_n), where no gradient reached the
    next step or one too small to have all its digits (below `tiny`), at a non-finite norm, across a reset.

    Args:
        norms: float64 `[2, S, T, N]`, total and carried.
        resets: bool `[T, N]`.
        passed_on: float64 `[T, N]`, the share of the total that clipping by norm let through; None without it.
    """
    (total, carried), T = norms, norms.shape[2]
    if len(total) == 2:
        total, carried = torch.hypot(total[0], carried[1]), torch.hypot(carried[0], carried[1])
    else:
        total, carried = total[0], carried[0]
    if passed_on is not None:
        total = total * passed_on
    here, ahead = (slice(1, T), slice(0, T - 1)) if reverse else (slice(0, T - 1), slice(1, T))
    carried, total = carried[here], total[ahead]
    known = (total >= tiny) & total.isfinite() & carried.isfinite()
    if resets is not None:
        known &= ~resets[1:]
    log_gain = torch.full(norms.shape[2:], math.nan, dtype=norms.dtype)
    log_gain[here] = torch.where(known, carried.log() - total.log(), math.nan)
    return log_gain


def _judge(steps_back: Tensor, norms: Tensor) -> tuple[float, int, str]:
    """Mean log gain (NaN without any), horizon and verdict, from log gains `[T, N]` in the order of the backward."""
    T, known = len(steps_back), ~steps_back.isnan()
    steps = known.sum(0)
    if not bool(known.any()):
        return math.nan, T, "healthy" if bool((norms != 0).any()) else "vanishing"
    # A gain of exactly 0 ends the horizon, but would swallow the mean over the other steps.
    mean = torch.where(steps_back.isfinite(), steps_back, math.nan).nanmean(0)
    mean = torch.where(mean.isnan() & (steps > 0), -math.inf, mean)
    product = torch.where(known, steps_back, 0).cumsum(0)
    kept_up = (product >= math.log(HORIZON_FRACTION)).cumprod(0).bool()
    fell = ~kept_up[-1]
    kept = (kept_up & known).sum(0)
    reached = steps > 0
    horizon = torch.where(fell, kept, T)[reached].median()
    vanishing = (fell & (kept < VANISHING_SPAN * steps))[reached]
    exploding = (product.amax(0) > math.log(EXPLODING_GROWTH))[reached]
    verdict = "exploding" if _most(exploding) else "vanishing" if _most(vanishing) else "healthy"
    return float(mean[reached].median()), int(horizon), verdict


def _most(votes: Tensor) -> bool:
    return 2 * int(votes.sum()) > len(votes)


def _median(values: Tensor, valid: Tensor) -> Tensor:
    """`[T, N]` -> `[T]`, over the valid; NaN where there is none."""
    return torch.where(valid, values, math.nan).nanmedian(-1).values
