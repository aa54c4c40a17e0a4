"""From a record to words: a summary of a layer's gradient, and advice that quotes the numbers it rests on.

The advice is a table, `RULES`: a rule is about some cells, under a condition on the numbers. Where it is an action on
the model, it names one of `prescription.REMEDIES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..cell_table import spec_of
from ..modules import _Recurrent
from .diagnosis import HORIZON_FRACTION, Finding, Record

MEMORY_GATE = {"lstm": "f", "gru": "z"}
"""The gate whose sigmoid is the share of the state that a step keeps."""
KEEPS_LENGTH = 0.95
"""A W_hh whose mean singular value is above this does not explain a vanishing gradient: 0.95^90 is 1 %."""
CLIPPED_THROUGHOUT = 0.9
"""Where more than this share of the (step, sample) pairs is clipped, the bound decides the norm of the gradient."""


@dataclass(frozen=True)
class Facts:
    """The numbers that the rules test and quote, about one layer in one direction."""

    cell: str  # as in the cell table
    bias: bool
    layer_norm: bool
    T: int  # the longest way back, in steps
    gain: float  # geometric mean over the steps; NaN without any
    half_life: float  # infinite where the gradient does not shrink
    horizon: int | None
    growth: float
    clip_rate: float | None
    start: float  # the norm at the first step, walking back, to which a gradient comes; exploding: of any layer
    nonfinite: int | None  # the first step, walking back, whose norm was not finite
    forward: int | None  # the first step whose output was not finite
    finite_weights: bool  # of the weights that this process can read
    sigma: float  # largest singular value of W_hh, of any gate's block; NaN where it is sharded or not finite
    mean_sigma: float  # root mean square of all singular values: the gain of a vector of random direction
    ln_gain: float  # mean size of the layer norm's weight on W_hh h; NaN without one
    memory: float  # 1 / (1 - sigmoid(b)) in steps, of the unit whose bias b keeps its state longest; or NaN

    @property
    def doubling(self) -> float:
        """Steps in which the gradient doubles."""
        return math.log(2) / math.log(self.gain)


class Rule(NamedTuple):
    """A piece of advice, and where it applies."""

    verdict: str
    cells: str | tuple[str, ...]  # prefixes of names in the cell table
    applies: Callable[[Facts], bool]
    text: str  # a format string; `f` is the facts
    remedy: str = ""  # of `prescription.REMEDIES`, where the advice is an action on the model
    quantity: str = ""  # the field of the facts that it rests on, where there is a remedy


ANY, GATED, ONE_SIDED = "", ("lstm", "gru"), ("rnn_relu", "rnn_leaky_relu", "rnn_elu")
USERS = "cell "  # the beginning of the text of a cell that a user wrote
VANISHING, EXPLODING, HEALTHY, UNKNOWN = "vanishing", "exploding", "healthy", "unknown"


def _always(facts: Facts) -> bool:
    return True


SUMMARIES = (
    Rule(
        UNKNOWN, ANY, lambda f: f.forward is not None,
        "the forward pass is not finite from step {f.forward} on, so nor is its gradient",
    ),
    Rule(UNKNOWN, ANY, lambda f: f.T == 0, "no gradient arrives at all"),
    Rule(
        UNKNOWN, ANY, lambda f: f.T == 1,
        "the gradient has no step to travel: it begins where its sequence does. Pass whole sequences in one call, with "
        "reset_mask= where an episode begins",
    ),
    Rule(UNKNOWN, ANY, _always, "the norms are too small to have a gain ({f.start:.1e} where the backward starts)"),
    Rule(EXPLODING, ANY, lambda f: f.nonfinite is not None, "the norm is not finite from step {f.nonfinite} back"),
    Rule(
        EXPLODING, ANY, lambda f: f.gain > 1,
        "the carried gradient doubles every {f.doubling:.1f} steps and grows {f.growth:.1e}-fold on its way back",
    ),
    Rule(EXPLODING, ANY, _always, "the carried gradient grows {f.growth:.1e}-fold on its way back before it shrinks"),
    Rule(VANISHING, ANY, lambda f: f.gain == 0, "nothing is carried back from one step to the one before"),
    Rule(
        VANISHING, ANY, lambda f: f.half_life < math.inf,
        "the carried gradient halves every {f.half_life:.1f} steps: beyond {f.horizon} of {f.T} steps this layer "
        f"learns nothing (under {100 * HORIZON_FRACTION:.0f} % is left)",
    ),
    Rule(
        VANISHING, ANY, _always,
        "the carried gradient is lost after {f.horizon} of {f.T} steps, although on average it does not shrink",
    ),
    Rule(HEALTHY, ANY, _always, "gain {f.gain:.3f} a step, {f.horizon} of {f.T} steps within reach"),
)  # fmt: skip
"""The first rule that applies is the summary."""

CUT = (
    "; the gradient goes on into an earlier call, where it is not followed, and this is about each call's own steps: "
    "pass the whole sequence in one call, with reset_mask= where an episode begins"
)
"""Added to the summary where calls could not be put together."""

RULES = (
    # A step back multiplies by W_hh and by slopes of at most 1 (Pascanu, Mikolov & Bengio 2013, section 2.1).
    Rule(
        VANISHING, "rnn_tanh", lambda f: f.mean_sigma < KEEPS_LENGTH and not f.layer_norm,
        "W_hh alone shortens a vector to {f.mean_sigma:.2f} of its length a step (mean singular value; the largest is "
        "{f.sigma:.2f}): fastrnn.init.orthogonal_ makes them all 1",
        "orthogonal", "mean_sigma",
    ),
    Rule(
        VANISHING, "rnn_tanh", lambda f: f.mean_sigma >= KEEPS_LENGTH and not f.layer_norm,
        "W_hh does not shorten (mean singular value {f.mean_sigma:.2f}) and the gain is still {f.gain:.2f}, so tanh is "
        "saturated: smaller inputs, or layer_norm=True",
        "layer_norm", "gain",
    ),
    Rule(
        VANISHING, ONE_SIDED, lambda f: not f.layer_norm,
        "units that are off pass nothing back and W_hh does not make up for it (gain {f.gain:.2f}): "
        "fastrnn.init.identity_ starts at 1 (Le et al. 2015)",
        "identity", "gain",
    ),
    Rule(
        VANISHING, "rnn", _always,
        "a gated state can carry a gradient over {f.T} steps: fastrnn.LSTM or GRU, with fastrnn.init.chrono_ and "
        "t_max = {f.T}",
        "gated", "T",
    ),
    Rule(
        VANISHING, GATED, lambda f: f.bias and f.memory < f.T / 2 and not f.layer_norm,
        "the gates remember at most {f.memory:.1f} of {f.T} steps: layer_norm=True with fastrnn.init.chrono_ and "
        "t_max = {f.T} cured the most in docs/clinic.md",
        "normed", "memory",
    ),
    Rule(
        VANISHING, "lstm", lambda f: f.bias and f.memory < f.T / 2,
        "by their biases the forget gates remember at most {f.memory:.1f} of {f.T} steps: fastrnn.init.chrono_ with "
        "t_max = {f.T}, or the milder fastrnn.init.forget_bias_",
        "chrono", "memory",
    ),
    Rule(
        VANISHING, "gru", lambda f: f.bias and f.memory < f.T / 2,
        "by their biases the update gates remember at most {f.memory:.1f} of {f.T} steps: fastrnn.init.chrono_ with "
        "t_max = {f.T}",
        "chrono", "memory",
    ),
    Rule(
        VANISHING, GATED, lambda f: not f.bias,
        "a gate without bias is half open, which is a memory of {f.memory:.0f} of {f.T} steps: bias=True, then "
        "fastrnn.init.chrono_ with t_max = {f.T}",
        "biased", "memory",
    ),
    Rule(
        VANISHING, GATED, lambda f: f.memory >= f.T / 2 and not f.layer_norm,
        "the biases alone would remember {f.memory:.4g} steps, so input and state close the gates (largest singular "
        "value of W_hh {f.sigma:.2f}): smaller inputs, or layer_norm=True",
        "layer_norm", "sigma",
    ),
    # What a user's cell does with its states is not known here, only that it is no built-in one.
    Rule(
        VANISHING, USERS, lambda f: f.mean_sigma < KEEPS_LENGTH and not f.layer_norm,
        "W_hh shortens a vector to {f.mean_sigma:.2f} of its length a step (mean singular value; the largest is "
        "{f.sigma:.2f}): fastrnn.init.orthogonal_ makes them all 1",
        "orthogonal", "mean_sigma",
    ),
    Rule(
        VANISHING, USERS, _always,
        "over {f.T} steps a state lasts by what multiplies it in the cell: start a forget gate near 1 by its bias, "
        "about log {f.T}, or a leak near 1 / {f.T}",
    ),
    Rule(
        EXPLODING, ANY, lambda f: f.nonfinite is None and f.clip_rate is None,
        "clip inside the recursion: clip_state_grad_norm={f.start:.1e} is the norm where it starts, before it grew "
        "{f.growth:.1e}-fold",
        "clip", "start",
    ),
    Rule(
        EXPLODING, ANY, lambda f: f.sigma > 1 and not f.layer_norm,
        "the largest singular value of W_hh is {f.sigma:.2f}: fastrnn.init.orthogonal_ makes it 1, a lower learning "
        "rate keeps it near",
        "orthogonal", "sigma",
    ),
    Rule(
        EXPLODING, ANY, lambda f: f.layer_norm,
        "under layer norm the size of W_hh cancels and its weight ln_hh decides (now {f.ln_gain:.2f} on average): "
        "start it lower",
        "smaller_norm", "ln_gain",
    ),
    Rule(
        EXPLODING, ANY, lambda f: f.nonfinite is not None,
        "look at what step {f.nonfinite} meets: lower the learning rate or the loss scale; "
        "torch.autograd.set_detect_anomaly(True) names the operation",
    ),
    Rule(
        UNKNOWN, ANY, lambda f: f.forward is not None and not f.finite_weights,
        "the weights are not finite any more: go back to some that are, with a lower learning rate, and look for the "
        "first training step whose output is not finite, here from step {f.forward} on",
    ),
    Rule(
        UNKNOWN, ANY, lambda f: f.forward is not None and f.finite_weights,
        "the weights are finite (largest singular value of W_hh {f.sigma:.2f}): look at the input, the initial state "
        "and how large the state has grown by step {f.forward}",
    ),
    *(
        Rule(
            verdict, ANY, lambda f: f.clip_rate is not None and f.clip_rate > CLIPPED_THROUGHOUT,
            "clip_state_grad_norm shortens {f.clip_rate:.0%} of the gradients: a larger bound keeps their proportions",
        "larger_bound", "clip_rate",
        )
        for verdict in (VANISHING, EXPLODING, HEALTHY)
    ),
)  # fmt: skip


def findings(modules: dict[str, _Recurrent], records: list[Record]) -> list[Finding]:
    """One finding per module, layer and direction, in the order of the records. Reads the weights as they are now."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record.name, []).append(record)
    all_facts = {name: facts_of(modules[states[0].module], states) for name, states in by_name.items()}
    found = []
    for name, states in by_name.items():
        facts, verdict = all_facts[name], states[0].verdict
        if verdict == EXPLODING:  # a bound is for all layers, and in the lower ones the gradient is the smaller
            same = [all_facts[other].start for other in by_name if by_name[other][0].module == states[0].module]
            facts = replace(facts, start=max(filter(math.isfinite, same), default=facts.start))
        summary, *_ = matching(SUMMARIES, verdict, facts)
        rules = matching(RULES, verdict, facts)
        text = summary.text.format(f=facts) + (CUT if states[0].cut else "")
        advice = tuple(rule.text.format(f=facts) for rule in rules)
        found.append(
            Finding(
                name,
                verdict,
                text,
                advice,
                tuple(rule.text for rule in rules),
                tuple(rule.remedy for rule in rules),
                tuple(rule.quantity for rule in rules),
                facts,
            )
        )
    return found


def matching(rules: tuple[Rule, ...], verdict: str, facts: Facts) -> list[Rule]:
    """The rules that apply, in their order."""
    return [r for r in rules if r.verdict == verdict and facts.cell.startswith(r.cells) and r.applies(facts)]


@torch.no_grad()
def facts_of(module: _Recurrent, states: list[Record]) -> Facts:
    """The facts about one layer and direction, from the records of its states and from its weights."""
    record, gates = states[0], spec_of(module._cell).gates
    reverse = record.direction == "reverse"
    suffix = f"l{record.layer}" + ("_reverse" if reverse else "")
    w_hh, ln_hh, *biases = (
        _readable(getattr(module, f"{kind}_{suffix}", None)) for kind in ("weight_hh", "ln_hh", "bias_ih", "bias_hh")
    )
    memory = math.nan
    if module._cell in MEMORY_GATE and (not module.bias or all(b is not None for b in biases)):
        rows = gates.index(MEMORY_GATE[module._cell])
        bias = sum(b.chunk(len(gates))[rows] for b in biases) if module.bias else torch.zeros(1)
        memory = 1 + float(bias.max().exp())  # = 1 / (1 - sigmoid(bias)), which divides by 0 for a large bias
    sigmas = torch.full((1,), math.nan)
    if w_hh is not None:
        # [.., H, H] for each gate, or a block of each head
        sigmas = torch.linalg.svdvals(w_hh.unflatten(-2, (len(gates), -1)))
    return Facts(
        cell=module._cell,
        bias=module.bias,
        layer_norm=module.layer_norm,
        T=record.longest,
        gain=record.gain_median,
        half_life=math.inf if record.half_life is None else record.half_life,
        horizon=record.horizon,
        growth=record.growth,
        clip_rate=record.clip_rate,
        start=_first_norm(torch.stack([r.total if reverse else r.total.flip(0) for r in states]).norm(dim=0)),
        forward=record.forward_nonfinite,
        finite_weights=all(bool(p.isfinite().all()) for p in module.parameters() if not hasattr(p, "full_tensor")),
        nonfinite=next((r.first_nonfinite for r in states if r.first_nonfinite is not None), None),
        sigma=float(sigmas.max()),
        mean_sigma=float(sigmas.square().mean().sqrt()),
        ln_gain=math.nan if ln_hh is None else float(ln_hh.abs().mean()),
        memory=memory,
    )


def _first_norm(walk: Tensor) -> float:
    """Of the norms `[T]` on the way back the first that is not 0: there is one unless no gradient comes at all."""
    return float(walk[walk > 0][0] if (walk > 0).any() else walk[0])


def _readable(parameter: Tensor | None) -> Tensor | None:
    """In float64; None if it does not exist, is not finite, or is sharded over ranks (reading it is a collective)."""
    if parameter is None or hasattr(parameter, "full_tensor") or not bool(parameter.isfinite().all()):
        return None
    return parameter.double()
