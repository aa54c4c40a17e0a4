"""Other projects' fused kernels as contestants: FlashRNN, TorchRL's Triton LSTM and GRU, and a Python loop over a cell
that `torch.compile` has fused. They run where they are installed, at the sizes of `CASES`.

`pip install flashrnn torchrl` brings the first two; FlashRNN compiles its kernels with nvcc at the first call of every
shape. Written against flashrnn 1.0.8 and torchrl 0.14.1, from their own signatures.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F

from .cases import DEVICE, Case
from .contestants import THROUGHPUT, CannotRun, Contestant
from .problem import Model, Outcome, Problem

SIZES = ((16, 1024, 768), (64, 512, 128), (64, 512, 256), (64, 512, 512))  # B, T, H; I = H
"""The size of FlashRNN's own figures, and sizes up to the largest that its Triton kernels and TorchRL's can take."""


def _one_layer(problem: Problem, cells: tuple[str, ...]) -> list[torch.Tensor]:
    """weight_ih, weight_hh, bias_ih, bias_hh of a plain one-layer network, or CannotRun."""
    case = problem.case
    if case.cell not in cells:
        raise CannotRun(f"has no {case.cell}")
    if case.num_layers > 1 or case.bidirectional:
        raise CannotRun("its kernels take one layer in one direction")
    return [problem.parameters[f"{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def _installed(package: str) -> None:
    if find_spec(package) is None:
        raise CannotRun(f"{package} is not installed")


def flashrnn(backend: str):
    """FlashRNN (Pöppel, Beck, Hochreiter 2024) with one head. Its GRU keeps W_hn h apart, so its four gates are
    `W_hn h + b_hn`, r, z, and `W_in x + b_in`."""

    def build(problem: Problem) -> Model:
        case = problem.case
        w_ih, w_hh, b_ih, b_hh = _one_layer(problem, ("lstm", "gru"))
        _installed("flashrnn")
        if DEVICE == "cpu" and backend != "vanilla":
            raise CannotRun("its kernels need a GPU")
        from flashrnn import flashrnn as run

        G, dtype = w_hh.shape[0] // case.H, str(case.dtype).removeprefix("torch.")

        def forward(x):
            T, B, _ = x.shape
            wx = F.linear(x, w_ih).view(T, B, G, 1, case.H).transpose(0, 1)
            r, (x_bias, h_bias) = w_hh.view(G, 1, case.H, case.H), (b.view(G, 1, case.H) for b in (b_ih, b_hh))
            if case.cell == "gru":
                r = torch.cat((r[2:], r[:2]))
                bias = torch.cat((h_bias[2:], x_bias[:2] + h_bias[:2], x_bias[2:]))
            else:
                bias = x_bias + h_bias
            states, last = run(wx, r, bias, function=case.cell, backend=backend, dtype=dtype)
            y = states[0].squeeze(2).transpose(0, 1)  # [S, B, T, heads, H] -> [T, B, H]
            return Outcome((y, *(last[k].transpose(0, 1).reshape(1, B, case.H) for k in range(len(last)))))

        return Model(forward, f"flashrnn, backend {backend}")

    return build


def torchrl(problem: Problem) -> Model:
    """The kernels of TorchRL's `recurrent_backend="triton"`: float32 in and out, products in the case's dtype."""
    case = problem.case
    w_ih, w_hh, b_ih, b_hh = _one_layer(problem, ("lstm", "gru"))
    _installed("torchrl")
    if DEVICE == "cpu":
        raise CannotRun("its kernels need a GPU")
    if case.dtype == torch.float16:
        raise CannotRun("its products are float32 or bfloat16")
    from torchrl.modules.tensordict_module import _rnn_triton

    kernel = getattr(_rnn_triton, f"{case.cell}_triton")
    precision = "tf32" if case.tf32 else "ieee"

    def forward(x):
        weights = [w.float() for w in (w_ih, w_hh, b_ih, b_hh)]
        states = [x.new_zeros(case.B, case.T, case.H, dtype=torch.float32)] * (2 if case.cell == "lstm" else 1)
        starts = torch.zeros(case.B, case.T, dtype=torch.bool, device=x.device)
        outputs = kernel(
            x.transpose(0, 1).float(), *states, *weights, starts, compute_dtype=case.dtype, input_precision=precision
        )
        y, final = outputs[0], outputs[len(outputs) // 2 :]
        return Outcome((y.transpose(0, 1).to(x.dtype), *(s.unsqueeze(0).to(x.dtype) for s in final)))

    return Model(forward, "torchrl's kernels; casts from and to float32 included")


def compiled_loop(backend: str):
    """One step under `torch.compile`, called T times: to trace the whole loop would take minutes."""

    def build(problem: Problem) -> Model:
        case = problem.case
        w_ih, w_hh, b_ih, b_hh = _one_layer(problem, ("lstm",))

        @torch.compile(backend=backend, fullgraph=True, dynamic=False)
        def step(gx, h, c):
            i, f, g, o = (gx + F.linear(h, w_hh, b_hh)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            return torch.sigmoid(o) * torch.tanh(c), c

        def forward(x):
            h = c = x.new_zeros(case.B, case.H)
            ys = []
            for gx in F.linear(x, w_ih, b_ih).unbind():
                h, c = step(gx, h, c)
                ys.append(h)
            return Outcome((torch.stack(ys), h.unsqueeze(0), c.unsqueeze(0)))

        return Model(forward, "one compiled step per call, T calls")

    return build


RIVALS = (
    Contestant("FlashRNN cuda_fused", flashrnn("cuda_fused")),
    Contestant("FlashRNN triton_fused", flashrnn("triton_fused")),
    Contestant("TorchRL triton", torchrl),
    Contestant("compiled loop", compiled_loop("inductor"), brief=True),
)
OURS = tuple(row for row in THROUGHPUT if row.name == "torch.nn" or row.name.startswith("fastrnn"))
CONTESTANTS = (*OURS, *RIVALS)


def _case(cell: str, B: int, T: int, H: int) -> Case:
    """In bfloat16. The reference loop is left out for time."""
    without = {"fastrnn:reference": "left out for time"}
    return Case(cell, B, T, H, H, dtype=torch.bfloat16, without=without, suite="rivals")


CASES = [_case(cell, *size) for cell in ("lstm", "gru") for size in SIZES] if DEVICE == "cuda" else []

SMALL_TOLERANCE = 64 * 2.0**-23  # 64 float32 roundings of numbers of order one


def small_case(cell: str) -> Case:
    """A tiny case in float32 that shows on any machine whether the adapters pass the right weights on."""
    return Case(cell, 3, 5, 4, 8, suite="rivals")
