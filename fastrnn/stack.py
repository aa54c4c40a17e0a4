"""Layers, directions and masks: a whole network over `scan`, on input that `checks.py` has checked.

Everything here is plain PyTorch around the scan: the input GEMM and its layer norm, weight dropout, the masks that the
scan applies, residual connections, dropout between the layers.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import export
from .arguments import ScanInputs, ScanOutputs, Walk
from .cell_table import PAD, RESET, START, spec_of, suffixes
from .dispatch import row
from .equations import LN_EPS, accumulate_dtype
from .linear import linear, recorded
from .packing import pack, packed_positions, pad
from .reference import as_planes
from .scan import scan


class Options(NamedTuple):
    """How a network is built and regularised; the meaning of each field is in `modules.py`."""

    cell: str
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    training: bool = False
    residual: bool = False
    locked_dropout: bool = False
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, ...] = (0.0,)  # for each state
    weight_dropout: float = 0.0
    clip_norm: float | Tensor | None = None
    clip_value: float | None = None
    layer_norm_eps: float = LN_EPS
    layer_norm_cell: str | None = "inside"
    layer_norm: str = "separate"  # where there is any
    recurrent_dropout_per_gate: bool = False

    # Methods, not properties: the compiler of torch 2.10 cannot read a property of a named tuple.
    def features(self) -> tuple[str, ...]:
        """Which of `dispatch.FEATURES` are on by these options."""
        between = self.num_layers > 1
        found = (
            (self.clip_norm is not None or self.clip_value is not None) and "clip",
            any(self.zoneout) and "zoneout",
            self.recurrent_dropout > 0 and "recurrent_dropout",
            self.recurrent_dropout > 0 and self.recurrent_dropout_per_gate and "recurrent_dropout_per_gate",
            between and self.locked_dropout and self.dropout > 0 and "locked_dropout",
            between and self.residual and "residual",
        )
        return tuple([name for name in found if name])


def fold_flags(T: int, batch: int, lengths: Tensor | None, reset_mask: Tensor | None, reverse: bool) -> Tensor | None:
    """`lengths [B]` and `reset_mask [T, B]` as the flags `uint8 [T, B]` of one direction (see `cell_table.py`)."""
    if lengths is None and reset_mask is None:
        return None
    device = (lengths if lengths is not None else reset_mask).device
    flags = torch.zeros(T, batch, dtype=torch.uint8, device=device)
    start = torch.zeros(T, batch, dtype=torch.bool, device=device)
    if lengths is not None:
        t = torch.arange(T, device=device).unsqueeze(1)
        flags = flags + PAD * (t >= lengths)
        if reverse:
            start = t == lengths - 1
    if reset_mask is not None:
        if reverse:
            # Entering t from t + 1 starts from zero where t + 1 begins a segment, unless t is the last step.
            ahead = torch.cat((reset_mask[1:], torch.zeros_like(reset_mask[:1])))
            reset_mask = ahead & ~start
        flags = flags + RESET * reset_mask
    return (flags + START * start).to(torch.uint8)


def fold_decay(decay: Tensor, flags: Tensor | None, reverse: bool) -> Tensor:
    """`decay [T, B, ..]` for the walk of one direction: its factor between two steps is the same in both.

    The backward direction enters t from t + 1 with the factor of t + 1; before its first step there is none. The factor
    is 1 at padding and resets, whatever it was, so that it has no gradient there.
    """
    if reverse:
        decay = torch.cat((decay[1:], torch.ones_like(decay[:1])))
    if flags is None:
        return decay
    return decay.masked_fill((flags & (PAD | RESET | START)).bool().unsqueeze(-1), 1)


def _zoneout(probability: float, training: bool, like: Tensor, shape) -> Tensor | None:
    """The share of the previous state that each unit keeps: drawn in training, its expectation otherwise."""
    if probability == 0:
        return None
    if not training:
        return like.new_full((), probability).expand(shape)
    # Of a tensor that is new, not of `like`: under vmap with one mask for all samples, torch draws from no batched one.
    return torch.bernoulli(torch.full((), probability, dtype=like.dtype, device=like.device).expand(shape))


class Masks(NamedTuple):
    """What acts on the states of one layer in one direction. They have no gradient."""

    recurrent: Tensor | None = None  # [B, P], or [B, G*P]: one for each gate
    zone_h: Tensor | None = None  # [T, B, P]
    zone_c: Tensor | None = None  # [T, B, (S-1)*H]


NO_MASKS = Masks()


class Direction(NamedTuple):
    """Parameters, masks and states of one layer in one direction."""

    w_ih: Tensor  # [G*H, I]
    b_ih: Tensor | None  # [G*H]
    ln_ih: Tensor | None  # [G*H]
    inputs: ScanInputs  # without gx
    tap: Tensor | None  # [2, S, T, B]


def _zoneout_of_others(options: Options, h0: Tensor, c0: Tensor, T: int) -> Tensor | None:
    """`_zoneout` for the states beyond h."""
    others = options.zoneout[1:]
    if len(others) == 1 or len(set(others)) == 1:
        return _zoneout(others[0], options.training, h0, (T, *c0.shape))
    shape = (T, len(c0), c0.shape[-1] // len(others))
    each = (_zoneout(p, options.training, h0, shape) for p in others)
    return torch.cat([h0.new_zeros(shape) if one is None else one for one in each], -1)


def draw_masks(options: Options, T: int, h0: Tensor, c0: Tensor | None = None) -> Masks:
    """The masks of one layer in one direction, whose initial states are `h0 [B, P]` and `c0 [B, (S-1)*H]`."""
    recurrent = zone_h = zone_c = None
    if options.recurrent_dropout and options.training:
        like = h0
        if options.recurrent_dropout_per_gate:
            gates = spec_of(options.cell).gates
            like = h0.new_empty(*h0.shape[:-1], len(gates) * h0.shape[-1])
        recurrent = F.dropout(torch.ones_like(like), options.recurrent_dropout)
    if any(options.zoneout):
        zone_h = _zoneout(options.zoneout[0], options.training, h0, (T, *h0.shape))
        zone_c = None if c0 is None else _zoneout_of_others(options, h0, c0, T)
    return Masks(recurrent, zone_h, zone_c)


def _direction(
    T: int, params: Mapping[str, Tensor], name: str, options: Options, h0, c0, flags, clip_norm, tap, step_inputs,
    decay, masks: Masks | None,
) -> Direction:  # fmt: skip
    """The parameters of one direction, and its masks, drawn if there are none; `decay [T, B, 1 or H]`, folded."""
    spec = spec_of(options.cell)
    b_ih, b_hh = params.get(f"bias_ih_{name}"), params.get(f"bias_hh_{name}")
    if options.layer_norm != "separate" and f"ln_hh_{name}" in params:
        b_ih, b_hh = None, b_hh if b_ih is None else b_ih + b_hh  # added after the layer norm of the sum
    elif b_hh is not None and not spec.distinct_dgh:
        b_ih, b_hh = b_ih + b_hh, None  # only their sum is used, and outside of the recursion it costs less
    masks = draw_masks(options, T, h0, c0) if masks is None else masks
    decay_h = decay_c = None
    if decay is not None:
        decay_h = decay.expand(T, *h0.shape)
        if c0 is not None:
            planes = decay if decay.shape[-1] == 1 else decay.repeat(1, 1, len(spec.states) - 1)
            decay_c = planes.expand(T, *c0.shape)
    inputs = ScanInputs(
        gx=None,
        w_hh=params.get(f"weight_hh_{name}"),
        h0=h0,
        c0=c0,
        b_hh=b_hh,
        w_hr=params.get(f"weight_hr_{name}"),
        ln_hh=params.get(f"ln_hh_{name}"),
        ln_c_weight=params.get(f"ln_c_{name}"),
        ln_c_bias=params.get(f"ln_c_bias_{name}"),
        flags=flags,
        recurrent_mask=masks.recurrent,
        zone_h=masks.zone_h,
        zone_c=masks.zone_c,
        decay_h=decay_h,
        decay_c=decay_c,
        parameters=torch.cat([params[f"{one}_{name}"] for one in spec.parameters]) if spec.parameters else None,
        step_inputs=step_inputs,
        clip_norm=clip_norm,
    )
    return Direction(params[f"weight_ih_{name}"], b_ih, params.get(f"ln_ih_{name}"), inputs, tap)


def _layer_norm(gx: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Over the last dimension; on a CPU in acc, because PyTorch sums the weights' gradients in a half type there."""
    if gx.device.type != "cpu":
        return F.layer_norm(gx, weight.shape, weight, bias, eps)
    acc = accumulate_dtype(gx.dtype)
    bias = None if bias is None else bias.to(acc)
    return F.layer_norm(gx.to(acc), weight.shape, weight.to(acc), bias, eps).to(gx.dtype)


def _one(
    x: Tensor | PackedSequence, layer: Direction, walk: Walk, positions: Tensor | None = None, keep_c: bool = False
) -> ScanOutputs:
    """One layer in one direction: `x [T, B, I]` -> ScanOutputs. `positions`: the `packed_positions` of packed rows."""
    if export.to_onnx() and layer.ln_ih is None and export.has_operator(layer.inputs, walk, keep_c):
        return export.operator(x, layer.w_ih, layer.b_ih, layer.inputs, walk)
    rows = x.data if isinstance(x, PackedSequence) else x
    gx = linear(rows, layer.w_ih, layer.b_ih if layer.ln_ih is None else None)
    if layer.ln_ih is not None:
        gx = _layer_norm(gx, layer.ln_ih, layer.b_ih, walk.ln_eps)
    if isinstance(x, PackedSequence):
        gx = pad(PackedSequence(gx, x.batch_sizes), positions)  # torch.compile loses fields in x._replace
    return scan(ScanInputs(gx, *layer.inputs[1:]), walk, tap=layer.tap, keep_c=keep_c)


def _both_directions(x: Tensor, directions: list[Direction], walk: Walk, keep_c: bool) -> list[ScanOutputs]:
    """One layer in both directions, in one scan."""

    def stacked(*each):
        return None if each[0] is None else torch.stack(each)

    w_ih, b_ih, _, inputs, tap = zip(*directions, strict=True)
    clip_norm = inputs[0].clip_norm
    w_ih, b_ih = stacked(*w_ih).mT, stacked(*b_ih)
    rows = x.flatten(0, 1).expand(len(directions), -1, -1)
    gx = rows @ w_ih if b_ih is None else torch.baddbmm(b_ih.unsqueeze(1), rows, w_ih)
    both = ScanInputs(*(stacked(*each) for each in zip(*inputs, strict=True)))
    both = both._replace(gx=gx.unflatten(1, x.shape[:2]), clip_norm=clip_norm)
    output = scan(both, walk, tap=stacked(*tap), keep_c=keep_c)
    return [ScanOutputs(*(v if v is None or v.dim() == 1 else v[d] for v in output)) for d in range(len(directions))]


def drop_weights(params: Mapping[str, Tensor], options: Options) -> Mapping[str, Tensor]:
    """DropConnect on every W_hh, before any backend sees it."""
    if not (options.weight_dropout and options.training):
        return params
    return {n: F.dropout(p, options.weight_dropout) if n.startswith("weight_hh") else p for n, p in params.items()}


def _locked_dropout(y: Tensor, probability: float, training: bool) -> Tensor:
    return y * F.dropout(torch.ones_like(y[:1]), probability, training)


def to_next_layer(y: Tensor, sizes: Tensor | None, positions: Tensor | None, options: Options):
    """y `[T, B, N]` after the dropout between layers: the next layer's input, and the tensor that `residual` adds."""
    drop = (options.dropout, options.training)
    if options.dropout and options.locked_dropout:
        y = _locked_dropout(y, *drop)
    elif options.dropout and sizes is None:
        y = F.dropout(y, *drop)
    if sizes is None:
        return y, y
    x = pack(y, sizes, positions)
    if options.dropout and not options.locked_dropout:
        # Masks for the packed rows only, as in torch.nn: one seed gives the same masks.
        x = PackedSequence(F.dropout(x.data, *drop), sizes)
        y = pad(x, positions) if options.residual else y
    return x, y


def run(
    x: Tensor | PackedSequence,  # [T, B, I]; packed only on backend cpu, where the products then leave out the padding
    states: tuple[Tensor, ...],  # h [L*D, B, P], c [L*D, B, H]
    params: Mapping[str, Tensor],
    options: Options,
    *,
    lengths: Tensor | None,  # [B], on x's device, within [0, T]
    reset_mask: Tensor | None,  # bool [T, B]
    tap: Tensor | None,  # [L*D, 2, S, T, B]
    step_inputs: tuple[Tensor, ...] = (),  # [L*D, T, B, H] each
    decay: Tensor | None = None,  # [T, B, 1 or H]
    masks: tuple[Masks, ...] | None = None,  # of each layer and direction; None: to be drawn
    keep_c: bool,
    keep_layers: bool,
    backend: str,
):
    """y `[T, B, D*P]` of the last layer, the final states as `states`, c `[T, B, D*H]` of that layer, the other ys.

    c is acc, and None without `keep_c`; a tuple where there are more than two states. The other ys are those of the
    layers below, before dropout; None without `keep_layers`.
    """
    by_rows = isinstance(x, PackedSequence)
    # Not len(): torch.export before 2.13 makes a constant of it.
    sizes = x.batch_sizes if by_rows else None
    positions = packed_positions(sizes) if by_rows else None
    T, B, dtype = (sizes if by_rows else x).shape[0], states[0].shape[1], states[0].dtype
    acc = accumulate_dtype(dtype)
    directions = range(2 if options.bidirectional else 1)
    flags = [fold_flags(T, B, lengths, reset_mask, reverse=bool(d)) for d in directions]
    if lengths is not None and not by_rows:
        # The padding's values, NaN included, must reach neither the weights' gradients nor the states.
        x = x.masked_fill((flags[0] & PAD).bool().unsqueeze(-1), 0)
    decays = [None if decay is None else fold_decay(decay.to(dtype), flags[d], reverse=bool(d)) for d in directions]
    clip_norm = options.clip_norm
    if isinstance(clip_norm, Tensor):
        clip_norm = clip_norm.detach().to(states[0].device, acc)
    elif clip_norm is not None:  # not copied from the host, which would wait for the GPU and fail in a CUDA graph
        clip_norm = torch.full((), clip_norm, dtype=acc, device=states[0].device)
    # With these, a scan takes one direction at a time.
    whole_rows = "weight_hr_l0" in params or "ln_ih_l0" in params or "ln_hh_l0" in params
    side_by_side = options.bidirectional and row(backend).directions and not whole_rows
    norms = (options.layer_norm_eps, options.layer_norm, options.layer_norm_cell == "carried")
    walks = [Walk(options.cell, bool(d), backend, options.clip_value, *norms) for d in directions]
    final, outputs, before, below = [], [], None, []
    apart = states[0].device.type == "cpu" and (torch.is_grad_enabled() or recorded())
    for layer, names in enumerate(suffixes(options.num_layers, options.bidirectional)):
        each = []
        for d, name in enumerate(names):
            k = layer * len(names) + d
            h0, c0 = states[0][k], as_planes([state[k].to(acc) for state in states[1:]])
            tap_k = None if tap is None else tap[k]
            given = as_planes([one[k] for one in step_inputs]) if step_inputs else None
            own = (flags[d], clip_norm, tap_k, given, decays[d], None if masks is None else masks[k])
            each.append(_direction(T, params, name, options, h0, c0, *own))
        if side_by_side:
            outputs = _both_directions(x, each, walks[0], keep_c)
        else:
            outputs = [_one(x, one, walk, positions, keep_c) for one, walk in zip(each, walks, strict=True)]
        final += outputs
        y = torch.cat([out.y for out in outputs], -1) if len(outputs) > 1 else outputs[0].y
        if options.residual and layer > 0:
            y = y + before
        if layer < options.num_layers - 1:
            if keep_layers:
                below.append(y.clone() if apart else y)
            x, before = to_next_layer(y, sizes, positions, options)
    if y is outputs[0].y and apart:
        y = y.clone()  # the scan keeps y for its backward; torch's CPU kernels give memory that the user may change
    h_n = torch.stack([out.h_n for out in final])
    others = ()
    if len(states) > 1:
        c_n = torch.stack([out.c_n for out in final])
        others = (c_n,)
        if len(states) > 2:  # no views, which could neither be changed in place nor detached
            others = tuple(part.clone() for part in c_n.chunk(len(states) - 1, -1))
    c = None
    if keep_c and len(states) == 2:
        c = torch.cat([out.c for out in outputs], -1)
    elif keep_c:
        each = (out.c.chunk(len(states) - 1, -1) for out in outputs)
        c = tuple(torch.cat(planes, -1) for planes in zip(*each, strict=True))
    return y, (h_n, *others), c, below if keep_layers else None
