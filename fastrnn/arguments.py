"""The arguments and results of one scan, by name: shapes, dtypes, the order, the place of the batch.

A scan takes one layer through all steps in one direction; or in both directions at once: then every tensor but
`clip_norm`, and every result, has a leading dimension D. From these named tuples `ops.py` derives the raw ops' schemas
and fakes, `scan.py` the flat lists that autograd wants and the batch dimensions for vmap. A further tensor is a further
field.

T steps, B batch, H hidden, P projection (else H), G gates, S states, K saved planes, Q parameters and N inputs of the
cell (`cell_table.py`). "acc" is float32 for the half types and the input's own dtype otherwise; the other tensors have
the input's dtype. Planes lie side by side in the last dimension, `[.., K*H]`. Index t is the input's own t, in
whichever direction the scan walks.
"""

from typing import NamedTuple, get_type_hints

from torch import Tensor

from .cell_table import spec_of
from .equations import LN_EPS, accumulate_dtype


class ScanInputs(NamedTuple):
    """The tensors that a scan reads. A backward gets them without gx, because it has `saved`,
    unless a layer norm is of W_ih x + W_hh h."""

    gx: Tensor | None  # [T, B, G*H]: W_ih x + b_ih for all steps
    w_hh: Tensor | None  # [G*H, P], or in heads (`heads.py`) [N, G*H/N, H/N]; None where the cell is not recurrent
    h0: Tensor  # [B, P]
    c0: Tensor | None = None  # [B, (S-1)*H] acc: the states beyond h, a plane each
    b_hh: Tensor | None = None  # [G*H]
    w_hr: Tensor | None = None  # [P, H]: projection
    ln_hh: Tensor | None = None  # [G*H]: weight of the layer norm on W_hh h, or on the sum with W_ih x
    ln_c_weight: Tensor | None = None  # [H]: layer norm on c inside the tanh
    ln_c_bias: Tensor | None = None  # [H]
    flags: Tensor | None = None  # uint8 [T, B]: PAD, RESET, START of cell_table.py
    recurrent_mask: Tensor | None = None  # [B, P]: multiplies the operand of W_hh; [B, G*P]: one for each gate
    zone_h: Tensor | None = None  # [T, B, P]: the share of the previous h that zoneout keeps (0, 1 or the expectation)
    zone_c: Tensor | None = None  # [T, B, (S-1)*H]: the same of the states beyond h
    decay_h: Tensor | None = None  # [T, B, P]: multiplies h before each step; 1 at padding and resets
    decay_c: Tensor | None = None  # [T, B, (S-1)*H]: the same of the states beyond h
    parameters: Tensor | None = None  # [Q*H]: a plane for each parameter of the cell
    step_inputs: Tensor | None = None  # [T, B, N*H]: the planes that a user's cell is given at every step
    clip_norm: Tensor | None = None  # [] acc: bound of the state gradients' joint norm, per sample and step


MASKS = ("flags", "recurrent_mask", "zone_h", "zone_c")
"""The inputs that act on the states beside the cell. They have no gradient."""


class Walk(NamedTuple):
    """The constants of a call."""

    cell: str  # a name of the cell table, or the text of a user's cell
    reverse: bool  # whether the (first) direction walks from the last step to the first
    backend: str
    clip_value: float | None = None  # bound of each element of the state gradients, applied before clip_norm
    ln_eps: float = LN_EPS  # what the layer norms add to the variance
    ln_of: str = "separate"  # W_hh h; or W_ih x + W_hh h: "sum", or "gates", each gate by itself. They need gx backward
    ln_c_carried: bool = False  # whether the layer norm is of the c that is carried on, not inside the tanh


class ScanOutputs(NamedTuple):
    """None, or from a raw op an empty tensor, where an output does not exist."""

    y: Tensor  # [T, B, P], zero at padding
    c: Tensor | None = None  # [T, B, (S-1)*H] acc, zero at padding; only where the backward's planes are saved
    h_n: Tensor | None = None  # [B, P]
    c_n: Tensor | None = None  # [B, (S-1)*H] acc
    saved: Tensor | None = None  # [T, B, K*H], zero at padding


class Kept(NamedTuple):
    """The outputs of the forward that the backward reads."""

    y: Tensor
    c: Tensor | None
    saved: Tensor


class IncomingGradients(NamedTuple):
    """The gradients of ScanOutputs; None where no gradient arrives."""

    dy: Tensor | None = None
    dc: Tensor | None = None
    dh_n: Tensor | None = None
    dc_n: Tensor | None = None
    dsaved: Tensor | None = None  # only under create_graph


class ScanGradients(NamedTuple):
    """The results of a backward; zero at padding. None, or from a raw op an empty tensor, where one does not exist."""

    dgx: Tensor  # [T, B, G*H]
    dgh: Tensor | None = None  # [T, B, G*H]: of W_hh h_prev, before its layer norm; only where it differs from dgx
    dh0: Tensor | None = None  # [B, P]
    dc0: Tensor | None = None  # [B, (S-1)*H] acc
    dh_new: Tensor | None = None  # [T, B, P]: dL/dh after clipping and zoneout, before the projection; only with w_hr
    db_hh: Tensor | None = None  # [B, G*H] acc: of each sequence, over its steps; this and dln_hh only with ln_hh
    dln_hh: Tensor | None = None  # [B, G*H] acc
    dln_c_weight: Tensor | None = None  # [B, H] acc
    dln_c_bias: Tensor | None = None  # [B, H] acc
    dcell: Tensor | None = None  # [T, B, (Q+N)*H]: of the cell's parameters, at each step, and of step_inputs
    ddecay_h: Tensor | None = None  # [T, B, P]
    ddecay_c: Tensor | None = None  # [T, B, (S-1)*H]
    norms: Tensor | None = None  # [2, S, T, B] acc: total and carried; only where asked for


NO_GRADIENT = ScanInputs(gx=None, w_hh=None, h0=None)
"""One gradient for each of ScanInputs, to be replaced by name."""

NO_GRADIENT_OF_WALK = Walk(cell=None, reverse=None, backend=None, ln_eps=None, ln_of=None, ln_c_carried=None)

# The place of the batch, counted from the end, since a dimension for the directions may lead; None where there is none.
BATCH_OF_INPUTS = ScanInputs(
    gx=-2, w_hh=None, h0=-2, c0=-2, flags=-1, recurrent_mask=-2, zone_h=-2, zone_c=-2, decay_h=-2,
    decay_c=-2, step_inputs=-2,
)  # fmt: skip
BATCH_OF_WALK = NO_GRADIENT_OF_WALK
BATCH_OF_OUTPUTS = ScanOutputs(y=-2, c=-2, h_n=-2, c_n=-2, saved=-2)
BATCH_OF_KEPT = Kept(y=-2, c=-2, saved=-2)
BATCH_OF_INCOMING = IncomingGradients(dy=-2, dc=-2, dh_n=-2, dc_n=-2, dsaved=-2)
BATCH_OF_GRADIENTS = ScanGradients(
    dgx=-2, dgh=-2, dh0=-2, dc0=-2, dh_new=-2, db_hh=-2, dln_hh=-2, dln_c_weight=-2, dln_c_bias=-2, dcell=-2,
    ddecay_h=-2, ddecay_c=-2, norms=-1,
)  # fmt: skip

_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", bool: "bool", float: "float",
    float | None: "float?",
}  # fmt: skip


def schema(*parts: type, results: type, **flags: type) -> str:
    """The schema of a raw op: the fields of `parts` in order, then `flags`; one tensor for each field of `results`."""
    arguments = {name: hint for part in parts for name, hint in get_type_hints(part).items()} | flags
    taken = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in arguments.items())
    return f"({taken}) -> ({', '.join(f'Tensor {name}' for name in results._fields)})"


def split(flat: tuple, *parts: type) -> tuple:
    """The flat arguments of an op as `parts` in order, then those that are left, one by one."""
    named, begin = [], 0
    for part in parts:
        end = begin + len(part._fields)
        named.append(tuple.__new__(part, flat[begin:end]))  # what _make does, without a Python call
        begin = end
    return *named, *flat[begin:]


def contiguous(named):
    """The named tuple, with each tensor contiguous."""
    return named._make(None if x is None else x.contiguous() for x in named)


def as_tensors(results: tuple, like: Tensor) -> tuple[Tensor, ...]:
    """An empty tensor for each result that is None: each one of its own, because results of an op must not alias."""
    return tuple([like.new_empty(0) if x is None else x for x in results])


def has_directions(x: Tensor) -> bool:
    """Whether `[.., T, B, N]` has a leading dimension for the directions."""
    return x.dim() == 4


def empty_outputs(inputs: ScanInputs, walk: Walk, save: bool) -> ScanOutputs:
    """Memory for the outputs of a forward, not yet written."""
    gx, h0, c0 = inputs.gx, inputs.h0, inputs.c0
    *steps, width = gx.shape  # [T, B] or [D, T, B]
    spec, acc = spec_of(walk.cell), accumulate_dtype(gx.dtype)
    H = width // len(spec.gates)
    return ScanOutputs(
        y=gx.new_empty(*steps, h0.shape[-1]),
        c=None if c0 is None or not save else gx.new_empty(*steps, c0.shape[-1], dtype=acc),
        h_n=gx.new_empty(h0.shape),
        c_n=None if c0 is None else gx.new_empty(c0.shape, dtype=acc),
        saved=gx.new_empty(*steps, len(spec.saved) * H) if save else None,
    )


def empty_gradients(kept: Kept, inputs: ScanInputs, walk: Walk, norms: bool) -> ScanGradients:
    """Memory for the results of a backward, not yet written."""
    y, saved = kept.y, kept.saved
    (*D, T, B, P), spec, acc = y.shape, spec_of(walk.cell), accumulate_dtype(saved.dtype)
    width = saved.shape[-1] // len(spec.saved) * len(spec.gates)

    beside = (len(spec.parameters) + len(spec.inputs)) * P

    def of_sequences(parameter):
        return None if parameter is None else saved.new_empty(*D, B, parameter.shape[-1], dtype=acc)

    return ScanGradients(
        dgx=saved.new_empty(*D, T, B, width),
        dgh=saved.new_empty(*D, T, B, width) if spec.distinct_dgh or inputs.ln_hh is not None else None,
        dh0=saved.new_empty(inputs.h0.shape),
        dc0=None if inputs.c0 is None else saved.new_empty(inputs.c0.shape, dtype=acc),
        dh_new=None if inputs.w_hr is None else saved.new_empty(*D, T, B, P),
        db_hh=of_sequences(inputs.ln_hh),
        dln_hh=of_sequences(inputs.ln_hh),
        dln_c_weight=of_sequences(inputs.ln_c_weight),
        dln_c_bias=of_sequences(inputs.ln_c_bias),
        dcell=saved.new_empty(*D, T, B, beside) if beside else None,
        ddecay_h=None if inputs.decay_h is None else saved.new_empty(inputs.decay_h.shape),
        ddecay_c=None if inputs.decay_c is None else saved.new_empty(inputs.decay_c.shape),
        norms=saved.new_empty(*D, 2, len(spec.states), T, B, dtype=acc) if norms else None,
    )
