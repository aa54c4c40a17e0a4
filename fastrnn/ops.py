"""The raw `torch.library` ops: one layer, forward and backward, with fakes and without autograd.

`scan.py` makes them differentiable. Shapes: T steps, B batch, H hidden, P projection (else H), G gates, S states,
K saved planes (`cells.py`). "acc" is float32 for the half types and the input's own type otherwise. An empty tensor
stands for an output that does not exist. Index t is the input's own t, whichever way the scan walks.

Both directions of a layer may go in one call: then every tensor but `clip_norm`, and every result, has a leading
dimension D, and direction d walks back where d is odd, or even if `reverse`. Backends that know only one direction
(`dispatch.Backend.directions`) take them one after the other.
"""

import sys

import torch
from torch import Tensor
from torch.autograd import Function

from . import dispatch
from .cells import CELLS
from .directions import each_direction
from .reference import accumulate_dtype

_library = torch.library.Library("fastrnn", "DEF")


class _Undifferentiated(Function):
    """An op whose gradient may be asked for, which says then that it has none."""

    @staticmethod
    def forward(ctx, op, keys, *args):
        ctx.op = op
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys, *args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.op} has no gradient by itself: what torch.export or torch.jit.trace wrote, and vmap inside of "
            "torch.compile, can be run and not trained; train the module"
        )


def _op(kernel):
    """Registers `kernel` as the raw op of its name.

    `torch.library.custom_op` does the same, but imports the compiler at the first call, which takes a second or two, to
    keep it out of the kernel. Here it is kept out where it has been imported.
    """
    name, hidden = kernel.__name__, torch._disable_dynamo(kernel)
    _library.define(name + torch.library.infer_schema(kernel, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    op = getattr(torch.ops.fastrnn, name).default

    def run(*args):
        return (hidden if "torch._dynamo" in sys.modules else kernel)(*args)

    def run_and_refuse(keys, *args):
        keys = keys & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return _Undifferentiated.apply(op, keys, *args)
        return op.redispatch(keys, *args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, run_and_refuse, "Autograd", with_keyset=True)
    return op


def _run(scan: str, backend: str, w_hh: Tensor, tensors, *rest):
    launcher, directions = dispatch.kernels(backend), w_hh.dim() == 3
    if directions and not dispatch.BACKENDS[backend].directions:
        return each_direction(getattr(launcher, scan), tensors, *rest)
    return getattr(launcher, scan)(*tensors, *rest)


@_op
def scan_forward(
    gx: Tensor,  # [T, B, G*H]: W_ih x + b_ih for all steps
    w_hh: Tensor,  # [G*H, P]
    b_hh: Tensor | None,  # [G*H]
    h0: Tensor,  # [B, P]
    c0: Tensor | None,  # [B, H] acc; only for cells with a c
    w_hr: Tensor | None,  # [P, H]: projection
    ln_hh: Tensor | None,  # [G*H]: weight of the layer norm on W_hh h
    ln_c_weight: Tensor | None,  # [H]: layer norm on c inside the tanh
    ln_c_bias: Tensor | None,  # [H]
    flags: Tensor | None,  # uint8 [T, B]: PAD, RESET, START of cells.py
    recurrent_mask: Tensor | None,  # [B, P]: multiplies the operand of W_hh
    zone_h: Tensor | None,  # [T, B, P]: the share of the previous h that is kept
    zone_c: Tensor | None,  # [T, B, H]
    cell: str,
    reverse: bool,
    save: bool,  # keep what the backward needs
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, B, P] (zero at padding), c [T, B, H] acc (empty without c or save), h_n [B, P], c_n [B, H] acc (empty
    without c), saved [T, B, K*H] (empty without save)."""
    tensors = (
        gx, w_hh, b_hh, h0, c0, w_hr, ln_hh, ln_c_weight, ln_c_bias, flags, recurrent_mask, zone_h, zone_c
    )  # fmt: skip
    return _run("scan_forward", backend, w_hh, tensors, cell, reverse, save)


@torch.library.register_fake("fastrnn::scan_forward", lib=_library)
def _(gx, w_hh, b_hh, h0, c0, w_hr, ln_hh, ln_c_weight, ln_c_bias, flags, recurrent_mask, zone_h, zone_c,
      cell, reverse, save, backend):  # fmt: skip
    *D, T, B, _ = gx.shape
    P, H, acc = w_hh.shape[-1], w_hh.shape[-2] // len(CELLS[cell].gates), accumulate_dtype(gx.dtype)
    has_c = c0 is not None
    return (
        gx.new_empty(*D, T, B, P),
        gx.new_empty((*D, T, B, H) if has_c and save else (0,), dtype=acc),
        gx.new_empty(*D, B, P),
        gx.new_empty((*D, B, H) if has_c else (0,), dtype=acc),
        gx.new_empty((*D, T, B, len(CELLS[cell].saved) * H) if save else (0,)),
    )


@_op
def scan_backward(
    dy: Tensor | None,  # [T, B, P]; None where no gradient arrives
    dc: Tensor | None,  # [T, B, H] acc
    dh_n: Tensor | None,  # [B, P]
    dc_n: Tensor | None,  # [B, H] acc
    dsaved: Tensor | None,  # [T, B, K*H]: only under create_graph
    saved: Tensor,  # [T, B, K*H]
    y: Tensor,  # [T, B, P]
    c: Tensor | None,  # [T, B, H] acc
    h0: Tensor,  # [B, P]
    c0: Tensor | None,  # [B, H] acc
    w_hh: Tensor,  # [G*H, P]
    w_hr: Tensor | None,  # [P, H]
    ln_hh: Tensor | None,  # [G*H]
    ln_c_weight: Tensor | None,  # [H]
    ln_c_bias: Tensor | None,  # [H]
    flags: Tensor | None,  # uint8 [T, B]
    recurrent_mask: Tensor | None,  # [B, P]
    zone_h: Tensor | None,  # [T, B, P]
    zone_c: Tensor | None,  # [T, B, H]
    clip_norm: Tensor | None,  # []: bound of the joint norm per sample and step
    clip_value: float | None,  # bound of each element, applied first
    cell: str,
    reverse: bool,  # the direction of the forward
    norms: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dgx [T, B, G*H], dgh [T, B, G*H] (of W_hh h_prev; empty where it equals dgx), dh0 [B, P], dc0 [B, H] acc (empty
    without c), dh_new [T, B, P] (dL/dh behind clipping and zoneout, before the projection; empty without w_hr), db_hh
    and dln_hh [B, G*H], dln_c_weight and dln_c_bias [B, H] acc (over the steps of each sequence; empty without ln_hh,
    without ln_c), norms [2, S, T, B] acc (total and carried; empty unless asked for). All are zero at padding."""
    tensors = (
        dy, dc, dh_n, dc_n, dsaved, saved, y, c, h0, c0, w_hh, w_hr, ln_hh, ln_c_weight, ln_c_bias,
        flags, recurrent_mask, zone_h, zone_c, clip_norm, clip_value,
    )  # fmt: skip
    return _run("scan_backward", backend, w_hh, tensors, cell, reverse, norms)


@torch.library.register_fake("fastrnn::scan_backward", lib=_library)
def _(dy, dc, dh_n, dc_n, dsaved, saved, y, c, h0, c0, w_hh, w_hr, ln_hh, ln_c_weight, ln_c_bias,
      flags, recurrent_mask, zone_h, zone_c, clip_norm, clip_value, cell, reverse, norms, backend):  # fmt: skip
    *D, T, B, P = y.shape
    spec, acc = CELLS[cell], accumulate_dtype(saved.dtype)
    gates = (*D, T, B, w_hh.shape[-2])

    def of_sequences(parameter):
        return saved.new_empty((0,) if parameter is None else (*D, B, parameter.shape[-1]), dtype=acc)

    return (
        saved.new_empty(gates),
        saved.new_empty(gates if spec.split or ln_hh is not None else (0,)),
        torch.empty_like(h0, memory_format=torch.contiguous_format),
        saved.new_empty((0,), dtype=acc) if c0 is None else c0.new_empty(c0.shape),
        saved.new_empty((*D, T, B, P) if w_hr is not None else (0,)),
        of_sequences(ln_hh),
        of_sequences(ln_hh),
        of_sequences(ln_c_weight),
        of_sequences(ln_c_bias),
        saved.new_empty((*D, 2, len(spec.states), T, B) if norms else (0,), dtype=acc),
    )
