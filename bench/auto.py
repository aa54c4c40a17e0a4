"""The evidence for `auto` on a CPU: the C++ scan and torch.nn timed on a grid of calls.

`python -m bench.auto bench/results/auto-cpu.json` measures. `tests/test_dispatch.py` checks `auto` against the result:
wherever it takes the scan, the scan took less time. The calls are packed batches, projections, and plain calls of the
cells that torch runs step by step; and single steps with a layer norm, beside the reference.
"""

import argparse
import copy
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import timing

from . import files

# B, T, H: of long calls, of short ones, and of wide batches; of single steps
SIZES = ((1, 64, 16), (1, 64, 1024), (8, 64, 512), (32, 64, 32), (32, 64, 256), (64, 100, 128))
SHORT = ((1, 8, 64), (16, 8, 64), (64, 8, 512), (4, 16, 64), (16, 16, 256), (2, 32, 64), (16, 32, 64), (64, 32, 256))
LONG = ((1, 128, 16), (32, 128, 32), (256, 64, 64), (512, 64, 128))  # of packed batches
WIDE = ((64, 64, 256), (256, 64, 64), (512, 64, 64), (512, 64, 128), (256, 64, 256))
STEPS = tuple((B, 1, H) for B in (1, 16, 64) for H in (64, 256, 512, 1024))
SECONDS, ROUNDS = 0.4, 12  # of the timing of one call; the interval of 12 rounds leaves out two at either end


@dataclass(frozen=True)
class Kind:
    """A kind of call.

    `filled`: of a packed batch, the length of all sequences but the longest as a share of T, which is the worst case
    for a scan that pads; or "ragged": their lengths fall evenly from T to 1. None for a batch that is not packed.
    """

    cell: str
    projected: bool = False
    filled: float | str | None = None
    layer_norm: bool = False

    @property
    def rival(self) -> str:
        return "reference" if self.layer_norm else "torch.nn"


CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
FILLED = (0.2, 0.5, 1.0, "ragged")
KINDS = {
    **{Kind(cell): SIZES + SHORT + WIDE for cell in CELLS[1:]},
    Kind("lstm", projected=True): SIZES + SHORT + WIDE,
    **{Kind(cell, filled=filled): SIZES + SHORT + LONG for cell in CELLS for filled in FILLED},
    **{Kind("lstm", projected=True, filled=filled): SIZES + SHORT + LONG for filled in FILLED},
    **{Kind(cell, layer_norm=True): STEPS for cell in CELLS[:3]},
}


def sequence_lengths(kind: Kind, B: int, T: int) -> torch.Tensor | None:
    """`[B]`, the longest first."""
    if kind.filled is None:
        return None
    if kind.filled == "ragged":
        return torch.linspace(T, 1, B).long()
    lengths = torch.full((B,), max(1, int(T * kind.filled)))
    lengths[0] = T
    return lengths


def measure(kind: Kind, B: int, T: int, H: int, mode: str) -> dict:
    """The record of one call; I = H, and where it projects, P = H / 2."""
    options = {"proj_size": H // 2} if kind.projected else {}
    name, _, nonlinearity = kind.cell.partition("_")
    if nonlinearity:
        options["nonlinearity"] = nonlinearity
    module = getattr(fastrnn, name.upper())(H, H, layer_norm=kind.layer_norm, **options).train(mode == "train")
    x = torch.randn(T, B, H, requires_grad=mode == "train")
    lengths = sequence_lengths(kind, B, T)

    def given():
        return x if lengths is None else pack_padded_sequence(x, lengths, enforce_sorted=False)

    def rival():
        if kind.layer_norm:
            return on("reference")
        torchs = getattr(torch.nn, name.upper())(H, H, **options).train(mode == "train")
        torchs.load_state_dict(module.state_dict())
        return torchs

    def on(backend):
        own = copy.copy(module)
        own.backend = backend
        return own

    def call(own):
        def timed(_):
            with torch.set_grad_enabled(mode == "train"):
                y = own(given())[0]
                y = y if lengths is None else y.data
            if mode == "train":
                torch.autograd.grad(y, [x, *own.parameters()], dy)

        return timed

    dy = torch.randn_like(x[..., : H // 2] if kind.projected else x)
    dy = dy if lengths is None else pack_padded_sequence(dy, lengths, enforce_sorted=False).data
    calls = {kind.rival: call(rival()), "cpu": call(on("cpu"))}
    samples = timing.interleave(calls, "cpu", SECONDS, set(), warmup=0.0, rounds=ROUNDS)
    return {
        **asdict(kind), "B": B, "T": T, "H": H, "mode": mode,
        "packed": None if lengths is None else lengths.sum().item() / (T * B),
        "ratio": timing.ratio(samples["cpu"], samples[kind.rival]).record(),
        "seconds": {name: own.record() for name, own in samples.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
    torch.manual_seed(0)
    head, calls = files.head("cpu"), []
    for kind, sizes in KINDS.items():
        for B, T, H in sizes:
            for mode in ("train", "infer"):
                row = measure(kind, B, T, H, mode)
                calls.append(row)
                print(f"{kind} B {B}, T {T}, H {H}, {mode}: {row['ratio']['median']:.2f}", flush=True)
    files.write(out, head, "calls", calls)


if __name__ == "__main__":
    main()
