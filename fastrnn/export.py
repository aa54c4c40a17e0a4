"""A scan as it is written into a program that leaves Python: by torch.export, AOTInductor or the ONNX exporter.

- For ONNX (`torch.onnx.export(.., dynamo=True)`) a layer for which ONNX has an operator (LSTM, GRU, RNN) becomes that
  operator, and every other layer torch's `scan` operator over the steps of the reference, which becomes ONNX's Scan.
- torch.export gets the C++ library's op on a CPU (`fastrnn_c::scan_forward`): the program runs wherever that library is
  loaded, without Python's fastrnn. Backend `reference` gives torch's `scan` operator, and needs no library at all.

A program is for inference: nothing is saved for a backward.
"""

from functools import cache

import torch
from torch import Tensor

from . import dispatch, ops
from .arguments import ScanInputs, ScanOutputs, Walk, has_directions
from .cell_table import PAD, spec_of
from .directions import each_direction
from .dispatch import Request
from .linear import recorded
from .reference import forward as reference_forward

STEPWISE = ("gx", "flags", "zone_h", "zone_c", "decay_h", "decay_c", "step_inputs")
BY_STEP = tuple(name for name in STEPWISE if name in ScanInputs._fields)
"""The inputs that have a row for each step; the others are the same in all of them."""


def exporting() -> bool:
    """Whether torch.export runs, also as a part of an exporter that is built on it."""
    return torch.compiler.is_exporting()


def to_onnx() -> bool:
    """Whether the program is for ONNX, by way of torch.export."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def choose(request: Request, argument: str | None) -> str:
    """`dispatch.choose`, also where a program is written.

    Raises:
        RuntimeError: the ONNX exporter that traces (`dynamo=False`) meets a call for which ONNX has no operator; else
            as `dispatch.choose`.
    """
    if to_onnx():
        return "reference"  # whatever was forced: a file of ONNX holds no backend
    name = dispatch.choose(request, argument)
    if name != "aten" and recorded() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"torch.onnx.export with dynamo=False has no operator for this {spec_of(request.cell).name} (on backend "
            f"{name!r}): use dynamo=True (docs/deployment.md)"
        )
    return name


# ------------------------------------------------------------------------------------------------- every cell, any step


def scan(inputs: ScanInputs, walk: Walk, keep_c: bool) -> ScanOutputs:
    """`scan.scan` inside a program; an empty tensor stands for an output that does not exist."""
    if walk.backend not in ("cpu", "reference"):
        return ScanOutputs(*ops.scan_forward(*inputs, *walk, keep_c))
    run = _in_cpp if walk.backend == "cpu" else _in_torch
    if not has_directions(inputs.gx):
        return run(inputs, walk, keep_c)

    def one(inputs, reverse):
        return run(inputs, walk._replace(reverse=reverse), keep_c)

    return each_direction(one, len(inputs.gx), walk.reverse, inputs)


@cache
def _prepare_op() -> None:
    """Gives the C++ library's op what an exporter asks for: a fake; and the refusal of its gradient."""
    library = torch.library.Library("fastrnn_c", "FRAGMENT")
    torch.library.register_fake("fastrnn_c::scan_forward", ops.fake_forward, lib=library)
    ops.refuse_gradient(library, "scan_forward", torch.ops.fastrnn_c.scan_forward.default)
    _libraries.append(library)


_libraries: list[torch.library.Library] = []
"""What a library registers ends with it."""


def _in_cpp(inputs: ScanInputs, walk: Walk, keep_c: bool) -> ScanOutputs:
    _prepare_op()
    return ScanOutputs(*torch.ops.fastrnn_c.scan_forward(*inputs, *walk, keep_c))


def _in_torch(inputs: ScanInputs, walk: Walk, keep_c: bool) -> ScanOutputs:
    """By torch's `scan` operator over the reference, one step at a time."""
    if isinstance(inputs.gx.shape[0], int) and inputs.gx.shape[0] == 1:  # a single-step cell
        return reference_forward(inputs, walk, keep_c)
    from torch._higher_order_ops.scan import scan_op  # late: it imports the compiler

    # Detached, or the operator would prepare for a backward, which makes sizes outputs of its steps.
    given = {name: x.detach() for name, x in inputs._asdict().items() if x is not None}
    states = [name for name in ("h0", "c0") if name in given]
    stepped = [name for name in BY_STEP if name in given]
    others = [name for name in given if name not in (*states, *stepped)]

    def step(*tensors: Tensor) -> list[Tensor]:
        """The new states, and what the outputs have of this step."""
        named = dict(zip((*states, *stepped, *others), tensors, strict=True))
        named |= {name: named[name].unsqueeze(0) for name in stepped}
        out = reference_forward(ScanInputs(**{"w_hh": None, **named}), walk, False)
        new = [out.h_n] if out.c_n is None else [out.h_n, out.c_n]
        shown = new if keep_c else new[:1]
        if "flags" in named:
            padding = (named["flags"][0] & PAD).bool().unsqueeze(-1)
            return [*new, *(state.masked_fill(padding, 0) for state in shown)]
        return [*new, *(state.clone() for state in shown)]  # the operator wants no tensor twice

    def in_order(x: Tensor) -> Tensor:
        return x.flip(0) if walk.reverse else x

    found = scan_op(step, [given[n] for n in states], [in_order(given[n]) for n in stepped], [given[n] for n in others])
    final, outputs = found[: len(states)], [in_order(x) for x in found[len(states) :]]
    return ScanOutputs(
        y=outputs[0], c=outputs[1] if keep_c else None, h_n=final[0], c_n=final[1] if final[1:] else None
    )


# ------------------------------------------------------------------------------------------------ ONNX's own operators

OPERATORS = {  # our cell: ONNX's operator, our gates in its order, further attributes
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}  # ONNX's RNN has leaky ReLU and ELU, too, but OpenVINO's does not
OF_OPERATORS = ("gx", "w_hh", "h0", "c0", "b_hh", "clip_norm")
"""The inputs of a scan that the operators can express, or that act on gradients only."""


def has_operator(inputs: ScanInputs, walk: Walk, keep_c: bool) -> bool:
    """Whether ONNX has an operator for a layer in one direction. Its LSTM does not return c of every step."""
    beyond = (x for name, x in inputs._asdict().items() if name not in OF_OPERATORS)
    in_heads = inputs.w_hh is not None and inputs.w_hh.dim() == 3
    return walk.cell in OPERATORS and not keep_c and not in_heads and all(x is None for x in beyond)


def operator(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, inputs: ScanInputs, walk: Walk) -> ScanOutputs:
    """A layer in one direction as ONNX's operator: `x [T, B, I]`, `w_ih [G*H, I]`, `b_ih [G*H]`, no gx in `inputs`."""
    name, order, attributes = OPERATORS[walk.cell]
    gates, (T, B), H = len(order), x.shape[:2], inputs.h0.shape[-1]

    def in_order(parameter: Tensor) -> Tensor:
        """`[G*H, ..]` -> `[1, G*H, ..]` with the gates in ONNX's order; the 1 is ONNX's dimension of directions."""
        parts = parameter.chunk(gates)
        return torch.cat([parts[k] for k in order]).unsqueeze(0)

    bias = None
    if b_ih is not None:
        b_hh = torch.zeros_like(b_ih) if inputs.b_hh is None else inputs.b_hh
        bias = torch.cat((in_order(b_ih), in_order(b_hh)), -1)
    states = [inputs.h0] if inputs.c0 is None else [inputs.h0, inputs.c0]
    given = [x, in_order(w_ih), in_order(inputs.w_hh), bias, None, *(state.unsqueeze(0) for state in states)]
    y, *final = torch.onnx.ops.symbolic_multi_out(
        name,
        given,
        {"hidden_size": H, "direction": "reverse" if walk.reverse else "forward", **attributes},
        dtypes=[x.dtype for _ in range(1 + len(states))],
        shapes=[(T, 1, B, H), *((1, B, H) for _ in states)],
    )
    final = [state.squeeze(0) for state in final]
    return ScanOutputs(y.squeeze(1), None, final[0], final[1] if final[1:] else None)
