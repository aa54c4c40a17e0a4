"""What many tests set up: modules and their twins in torch.nn, random arguments of a scan, every backend, agreement.

Sizes: T steps, B batch, I input, H hidden, P projection (else H), G gates, S states.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn import GradientMonitor, evidence, ranking
from fastrnn.arguments import MASKS, IncomingGradients, Kept, ScanInputs, ScanOutputs
from fastrnn.cell_table import CELLS, PAD, RESET, START, spec_of
from fastrnn.dispatch import BACKENDS, Request
from fastrnn.equations import accumulate_dtype

# float64 keeps 16 digits; sums over fewer than 1e4 terms of order 1 in another order differ by some 1e-12.
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}

# ------------------------------------------------------------------------------------------------------------- backends

CPU_REASON = BACKENDS["cpu"].reason(Request("lstm", "cpu", torch.float64, 1, 1))
"""Why the C++ library cannot run a call here, or None."""
needs_cpu_library = pytest.mark.skipif(CPU_REASON is not None, reason=f"backend cpu: {CPU_REASON}")
# The rows of the table that have a scan and are taken on a CPU: they run there in every dtype.
BACKENDS_HERE = [
    pytest.param(name, marks=needs_cpu_library) if name == "cpu" else name
    for name, row in BACKENDS.items()
    if row.launcher is not None and row.takes("cpu")
]
every_backend = pytest.mark.parametrize("backend", BACKENDS_HERE)
every_choice = pytest.mark.parametrize("backend", [pytest.param(None, id="auto"), *BACKENDS_HERE])


def fewest_steps(cell, gradients, packed=None, batch=2, hidden=5, projection=0) -> int:
    """The least T at which `auto` takes the scan for a float32 call of torch.nn's on a CPU, by what is shipped."""
    request = Request(cell, "cpu", torch.float32, hidden, projection, batch=batch, packed=packed, gradients=gradients)
    taken = (T for T in evidence.STEPS if ranking.order(request._replace(steps=T))[0] == "cpu")
    return next(taken, 1 << 20)


def mostly_slow(values, *quick):
    """The values as parameters, all slow but those in `quick`."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


every_cell = pytest.mark.parametrize("cell", CELLS)

# -------------------------------------------------------------------------------------------------------------- modules

I, H = 3, 5
KINDS = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {"nonlinearity": "tanh"}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
}
"""Modules by name: class and constructor arguments."""
every_torch_kind = pytest.mark.parametrize("kind", KINDS)
every_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "RNN-relu"])


def make(kind, backend=None, **settings):
    """fastrnn's module of a kind with I inputs and H units, in float64 unless the settings say otherwise."""
    name, extra = KINDS[kind]
    torch.manual_seed(0)
    return getattr(fastrnn, name)(I, H, **{"dtype": torch.float64, **extra, **settings}, backend=backend)


def twin(kind, ours, **settings):
    """torch.nn's module with the weights of `ours`."""
    name, extra = KINDS[kind]
    theirs = getattr(nn, name)(I, H, **{"dtype": torch.float64, **extra, **settings})
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs


def pair(kind, backend=None, **settings):
    """torch.nn's module and fastrnn's with the same weights."""
    ours = make(kind, backend, **settings)
    return twin(kind, ours, **settings), ours


def random(*shape, seed=1, dtype=torch.float64, requires_grad=True):
    """A random leaf."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=requires_grad)


def initial(module, *batch):
    """Random initial states as leaves: `(h0, c0)` for an LSTM, else h0. Without `batch`: unbatched."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = random(rows, *batch, getattr(module, "proj_size", 0) or module.hidden_size, seed=2)
    return (h, random(rows, *batch, module.hidden_size, seed=3)) if type(module).__name__ == "LSTM" else h


def watched(model, x, loss=lambda y: y.sum(), **call):
    """The monitor of one forward and backward pass."""
    with GradientMonitor(model) as watch:
        out = model(x, **call)
        loss(out[0]).backward()
    return watch


def linear_rnn(alpha, size=4, **options):
    """A ReLU network that stays positive is linear: dL/dh_{t-1} = alpha dL/dh_t."""
    module = fastrnn.RNN(size, size, nonlinearity="relu", bias=False, **options)
    with torch.no_grad():
        module.weight_hh_l0.copy_(alpha * torch.eye(size))
        module.weight_ih_l0.copy_(torch.eye(size))
    return module


def flat(state):
    """The tensors of a state: of a pair, of one, or of none."""
    return () if state is None else state if isinstance(state, tuple) else (state,)


def loss_of(values):
    """A scalar in which every element has its own weight, so that a permuted gradient does not pass."""
    return sum((v * torch.linspace(0.5, 1.5, v.numel(), dtype=v.dtype).reshape(v.shape)).sum() for v in values)


def gradients(values, leaves):
    """The gradients of `loss_of(values)`, zeros where one does not exist."""
    found = torch.autograd.grad(loss_of(values), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def results(module, x, hx, wrap=lambda x: x):
    """Outputs, final states and the gradients of a loss over all of them, by name."""
    y, state = module(wrap(x), hx)
    found = {"y": y.data if isinstance(y, PackedSequence) else y}
    found |= {f"state{k}": s for k, s in enumerate(flat(state))}
    loss = loss_of(found.values())
    leaves = {"x": x, **{f"hx{k}": s for k, s in enumerate(flat(hx))}, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(loss, leaves.values())
    return found | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def agree(got, expected, **tolerance):
    """Values in order, or by name where both are dicts, are equal within `tolerance` (else DOUBLE)."""
    if not isinstance(expected, dict):
        got, expected = dict(enumerate(got)), dict(enumerate(expected))
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        torch.testing.assert_close(got[name], b, **(tolerance or DOUBLE), msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------- arguments of a scan

ZONES = ("zone_h", "zone_c")
FEATURES = (*MASKS, "clip_norm", "layer_norm", "projection")


def make_flags(generator, T, B, reverse):
    """uint8 `[T, B]`: lengths (one zero if there is room, one full) and resets, for the direction of the walk."""
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[:1] = T
    if B > 2:
        lengths[-1] = 0
    t = torch.arange(T)[:, None]
    flags = PAD * (t >= lengths) + RESET * (torch.rand(T, B, generator=generator) < 0.25)
    if reverse:
        flags += START * (t == lengths - 1)
    return flags.to(torch.uint8)


def random_inputs(
    cell, features=(), *, sizes, projection=None, reverse=False, dtype=torch.float64, device="cpu", bias=True, seed=0
) -> ScanInputs:
    """Random arguments of one direction. features: out of FEATURES, or "decay"; projection only for the LSTM.

    sizes: (T, B, H). projection: P; H // 2, rounded up, unless given.
    """
    (T, B, H), spec, generator = sizes, spec_of(cell), torch.Generator().manual_seed(seed)
    G, acc, others = len(spec.gates) * H, accumulate_dtype(dtype), len(spec.states) - 1
    P = (projection or (H + 1) // 2) if "projection" in features and cell == "lstm" else H
    norm, norm_c = "layer_norm" in features and spec.recurrent, "layer_norm" in features and cell == "lstm"

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def zone(width):  # 0, 0.1, ... 1: kept, mixed and new states
        return torch.rand(T, B, width, generator=generator).round(decimals=1).to(device, dtype)

    keep = (torch.rand(B, P, generator=generator) < 0.5).to(device, dtype)
    return ScanInputs(
        gx=randn(T, B, G),
        w_hh=randn(G, P) / P**0.5 if spec.recurrent else None,
        h0=randn(B, P),
        c0=randn(B, others * H, dtype=acc) if others else None,
        b_hh=randn(G) if bias and spec.recurrent else None,
        w_hr=randn(P, H) / H**0.5 if P != H else None,
        ln_hh=1 + 0.3 * randn(G) if norm else None,
        ln_c_weight=1 + 0.3 * randn(H) if norm_c else None,
        ln_c_bias=0.3 * randn(H) if norm_c else None,
        flags=make_flags(generator, T, B, reverse).to(device) if "flags" in features else None,
        recurrent_mask=2 * keep if "recurrent_mask" in features else None,
        zone_h=zone(P) if "zone_h" in features else None,
        zone_c=zone(others * H) if "zone_c" in features and others else None,
        decay_h=randn(T, B, P) if "decay" in features else None,
        decay_c=randn(T, B, others * H) if "decay" in features and others else None,
        parameters=randn(len(spec.parameters) * H) if spec.parameters else None,
        step_inputs=randn(T, B, len(spec.inputs) * H) if spec.inputs else None,
        # A bound that some of the gradients of `random_incoming` exceed.
        clip_norm=torch.tensor(0.9 * H**0.5, dtype=acc, device=device) if "clip_norm" in features else None,
    )


def random_incoming(inputs: ScanInputs, *, scale=1.0, seed=1) -> IncomingGradients:
    """Random gradients of the outputs of a scan over `inputs`."""
    generator, h0, c0 = torch.Generator().manual_seed(seed), inputs.h0, inputs.c0
    steps = inputs.gx.shape[:-1]

    def randn(like, *shape):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(like.device, like.dtype)

    return IncomingGradients(
        dy=randn(h0, *steps, h0.shape[-1]),
        dc=None if c0 is None else randn(c0, *steps, c0.shape[-1]),
        dh_n=randn(h0, *h0.shape),
        dc_n=None if c0 is None else randn(c0, *c0.shape),
    )


def kept_of(outputs: ScanOutputs) -> Kept:
    """What the backward reads; an empty tensor, which a raw op gives, is None here."""
    return Kept(outputs.y, outputs.c if outputs.c is not None and outputs.c.dim() > 1 else None, outputs.saved)
