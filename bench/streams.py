"""One step of a stream: `model.step` beside torch.nn's modules called with one step, and beside onnxruntime.

The state of each step comes from the last one. onnxruntime gets the operator of ONNX with torch.nn's weights.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fastrnn

from .cases import DEVICE, Bound, Case
from .contestants import CannotRun
from .direct import Direct, Run

YARDSTICK = "torch.nn"


def _inputs(case, dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x [B, I] and the states [1, B, H], the same in every dtype."""
    generator = torch.Generator().manual_seed(case.H)
    x = torch.randn(case.B, case.I, generator=generator).to(dtype)
    shape = (1, case.B, case.H)
    return x, tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(1 + (case.cell == "lstm")))


def _module(library, case, dtype) -> nn.Module:
    torch.manual_seed(case.H)
    options = {"nonlinearity": "tanh"} if case.cell == "rnn_tanh" else {}
    module = getattr(nn, case.cell.partition("_")[0].upper())(case.I, case.H, **options)
    if library is fastrnn:
        module = fastrnn.convert(module)
    return module.to(dtype).eval()


def _run(step: Callable, state) -> Run:
    """The state goes from call to call; the first one starts from `state`."""

    def run(_, held=[state]):  # noqa: B006 (the list is what is carried on)
        y, held[0] = step(held[0])
        return [y, *tree_leaves(held[0])]

    return run


def _of_torch(case, dtype) -> Run:
    module, (x, states) = _module(nn, case, dtype), _inputs(case, dtype)
    x = x.unsqueeze(0)

    def step(state):
        with torch.no_grad():
            return module(x, state)

    return _run(step, states if len(states) > 1 else states[0])


def _cell_of_torch(case) -> Run:
    module, (x, states) = _module(nn, case, torch.float32), _inputs(case, torch.float32)
    cell = getattr(nn, f"{type(module).__name__}Cell")(case.I, case.H)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})

    def step(state):
        with torch.no_grad():
            new = cell(x, state)
        return new[0] if isinstance(new, tuple) else new, new

    states = tree_map(lambda state: state[0], states)
    return _run(step, states if len(states) > 1 else states[0])


def _of_fastrnn(case, by_step: bool) -> Run:
    module, (x, states) = _module(fastrnn, case, torch.float32), _inputs(case, torch.float32)
    first = states if len(states) > 1 else states[0]
    if by_step:
        return _run(lambda state: module.step(x, state), first)
    x = x.unsqueeze(0)

    def step(state):
        with torch.no_grad():
            return module(x, state)

    return _run(step, first)


ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,)}
"""Where the operator's gates are among torch.nn's: i o f c, and z r h."""


def _onnx_model(case, module: nn.Module) -> bytes:
    """A graph of one LSTM, GRU or RNN operator with the module's weights; its states go in and come out."""
    from onnx import TensorProto, helper, numpy_helper

    def in_order(weight: Tensor):
        return torch.cat([weight.chunk(len(ONNX_GATES[case.cell]))[k] for k in ONNX_GATES[case.cell]])

    biases = torch.cat((in_order(module.bias_ih_l0), in_order(module.bias_hh_l0)))
    weights = {"W": in_order(module.weight_ih_l0), "R": in_order(module.weight_hh_l0), "B": biases}
    states = ("h", "c")[: 1 + (case.cell == "lstm")]
    settings = {"linear_before_reset": 1} if case.cell == "gru" else {}
    node = helper.make_node(
        type(module).__name__, ["x", "W", "R", "B", "", *states], ["y", *(f"{name}_n" for name in states)],
        hidden_size=case.H, **settings,
    )  # fmt: skip

    def value(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [node],
        "step",
        [value("x", 1, case.B, case.I), *(value(name, 1, case.B, case.H) for name in states)],
        [value("y", 1, 1, case.B, case.H), *(value(f"{name}_n", 1, case.B, case.H) for name in states)],
        [numpy_helper.from_array(w.detach().unsqueeze(0).numpy(), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return model.SerializeToString()


def _of_onnxruntime(case) -> Run:
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            raise CannotRun(f"{package} is not installed")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = _onnx_model(case, _module(nn, case, torch.float32))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x, states = _inputs(case, torch.float32)
    x, names = x.unsqueeze(0).numpy(), ("h", "c")[: len(states)]
    held = [state.numpy() for state in states]

    def run(k):
        y, *held[:] = session.run(None, {"x": x, **dict(zip(names, held, strict=True))})
        return [torch.from_numpy(one) for one in (y, *held)] if k == 0 else []

    return run


def makers(case, truth: bool) -> dict[str, Callable[[], Run]]:
    if truth:
        return {YARDSTICK: lambda: _of_torch(case, torch.float64)}
    return {
        YARDSTICK: lambda: _of_torch(case, torch.float32),
        "torch.nn cell": lambda: _cell_of_torch(case),
        "fastrnn": lambda: _of_fastrnn(case, True),
        "fastrnn's call": lambda: _of_fastrnn(case, False),
        "onnxruntime": lambda: _of_onnxruntime(case),
    }


# Seen on a busy machine: 0.04 to 0.17 for the LSTM.
CASES = [
    Case(cell, B=1, T=1, I=H, H=H, mode="infer", suite="streams", bounds=(Bound("fastrnn", 0.3),) * (cell == "lstm"))
    for cell in ("lstm", "gru", "rnn_tanh")
    for H in (64, 128, 256, 512)
    if DEVICE == "cpu"
]
# 1e-5: some sixty float32 roundings of sums of up to a thousand terms.
SUITE = Direct(CASES, makers, (YARDSTICK,), 1e-5, session_seconds=60.0, case_seconds=0.6)
