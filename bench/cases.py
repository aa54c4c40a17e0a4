"""What is timed beside torch.nn, as data: one `Case` per size, cell, dtype and set of features, for the device at hand.

Order matters: when the suite's time is spent, the remaining cases are recorded as not run. `feature_cases.py` has the
cases of the features that torch.nn lacks; the engine reads the same fields and properties from both types.
"""

import os
from dataclasses import dataclass, field, replace
from itertools import product

import torch

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("FASTRNN_TEST_DEVICE") != "cpu" else "cpu"
# The bound of the state gradient's norm in cases that clip, in units of sqrt(H), the average norm of dL/dy_t: low
# enough that most steps are clipped. The cost of clipping does not depend on it.
CLIP = 0.9


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Bound:
    """A requirement: `contestant` takes at most `ratio` times as long as what its suite compares with, beyond noise."""

    contestant: str
    ratio: float


@dataclass(frozen=True)
class Case:
    """One timing. `T, B, I, H` as everywhere; `features` go beyond torch.nn's plain call.

    `mode`: "train" is forward and backward with gradients of the input and of all parameters; "infer" is the forward
    alone, without gradients. `without`: contestants that are left out, each with the reason.
    """

    cell: str  # a key of fastrnn.cell_table.CELLS
    B: int
    T: int
    I: int
    H: int
    num_layers: int = 1
    bidirectional: bool = False
    dtype: torch.dtype = torch.float32
    tf32: bool = False
    mode: str = "train"
    features: frozenset[str] = frozenset()  # of "tap", "clip"
    without: dict[str, str] = field(default_factory=dict, hash=False)
    bounds: tuple[Bound, ...] = ()
    suite: str = "throughput"  # a key of suites.SUITES
    num_heads: int = 1  # of the contestant with the fewest products

    differentiated = ("y", "h_n", "c_n")  # the outputs that have a gradient where results are compared

    @property
    def options(self) -> dict:
        """Arguments of fastrnn's constructor beyond the sizes."""
        found = {"num_layers": self.num_layers, "bidirectional": self.bidirectional}
        if "_" in self.cell:
            found["nonlinearity"] = self.cell.partition("_")[2]
        if "clip" in self.features:
            found["clip_state_grad_norm"] = CLIP * self.H**0.5
        return found

    @property
    def call(self) -> frozenset[str]:
        """What the call gets besides x."""
        return self.features & {"tap"}

    def describe(self) -> dict:
        """The fields of a record."""
        names = ("cell", "B", "T", "I", "H", "num_layers", "bidirectional", "mode", "tf32")
        fields = {name: getattr(self, name) for name in names}
        return fields | {"dtype": dtype_name(self.dtype), "features": sorted(self.features)}

    @property
    def name(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        parts = [self.cell, f"B{self.B}-T{self.T}-I{self.I}-H{self.H}"]
        parts += [f"{self.num_layers}layers"] * (self.num_layers > 1) + ["bidirectional"] * self.bidirectional
        parts += ["tf32" if self.tf32 else short, *sorted(self.features), self.mode]
        return "-".join(parts)


# ------------------------------------------------------------------------------------------------------------ CPU

# A plain call costs what torch.nn costs; `auto` may add its checks.
PLAIN = (Bound("fastrnn", 1.05),)
# The norms and the clipping may cost so much on a CPU against torch.nn's plain call, which has neither.
FEATURED = (Bound("fastrnn:cpu", 1.5), Bound("fastrnn:reference", 3.0))


def _cpu_cases() -> list[Case]:
    size = {"B": 32, "T": 100, "I": 256, "H": 256}
    small = {"B": 16, "T": 64, "I": 128, "H": 128}
    tiny = {"B": 16, "T": 16, "I": 32, "H": 32}  # shows the cost of a call before any arithmetic; not bounded
    features = [frozenset({"tap"}), frozenset({"clip"}), frozenset({"tap", "clip"})]
    return [
        Case("lstm", **size, bounds=PLAIN),
        *(Case("lstm", **size, features=on, bounds=FEATURED) for on in features),
        Case("gru", **size, bounds=PLAIN),
        *(Case("gru", **size, features=on, bounds=FEATURED) for on in features[:2]),
        Case("rnn_tanh", **size, bounds=PLAIN),
        *(Case("rnn_tanh", **size, features=on, bounds=FEATURED) for on in features[:2]),
        *(Case(cell, **small, bounds=PLAIN) for cell in ("lstm", "gru", "rnn_tanh")),
        # The shortest plain calls for which `auto` takes the C++ scan, at the sizes that gain least.
        Case("gru", B=1, T=64, I=1024, H=1024, mode="infer", bounds=PLAIN),
        Case("rnn_tanh", B=8, T=64, I=16, H=16, mode="infer", bounds=PLAIN),
        Case("lstm", **small, features=features[2], bounds=FEATURED[:1]),
        Case("lstm", **size, mode="infer", bounds=PLAIN),
        # A call of one step takes as long as the code around its arithmetic.
        *(Case(cell, B=1, T=1, I=64, H=64, mode="infer", bounds=PLAIN) for cell in ("lstm", "gru", "rnn_tanh")),
        Case("lstm", **small, num_layers=2, bidirectional=True, bounds=PLAIN),
        Case("lstm", **small, num_layers=2, bidirectional=True, features=features[2], bounds=FEATURED[:1]),
        Case("gru", **small, num_layers=2, bidirectional=True, bounds=PLAIN),
        Case("lstm", **tiny),
        Case("lstm", **tiny, features=features[2]),
    ]


# ------------------------------------------------------------------------------------------------------------ GPU

# (B, T, H), I = H: from bound by latency to bound by arithmetic.
GPU_SIZES = ((64, 512, 256), (64, 512, 512), (64, 512, 1024), (128, 1024, 1024), (16, 2048, 256), (256, 256, 2048))
GPU_DTYPES = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False))
_LOOPS = ("loop", "fastrnn:reference")
_SLOW = dict.fromkeys(_LOOPS, "left out for time: its loop is timed at the first two sizes in bf16")


def _gpu_cases() -> list[Case]:
    def at(k: int, cell: str, dtype: torch.dtype, tf32: bool, **rest) -> Case:
        B, T, H = GPU_SIZES[k]
        keep_loops = k < 2 and dtype == torch.bfloat16
        return Case(cell, B, T, H, H, dtype=dtype, tf32=tf32, without={} if keep_loops else _SLOW, **rest)

    cases = []
    for k, (dtype, tf32), cell in product(range(len(GPU_SIZES)), GPU_DTYPES, ("lstm", "gru")):
        cases.append(at(k, cell, dtype, tf32, bounds=PLAIN))
        if dtype == torch.bfloat16 and k < 3:
            cases.append(at(k, cell, dtype, tf32, features=frozenset({"tap", "clip"})))
    cases += [at(k, "lstm", torch.bfloat16, False, mode="infer", bounds=PLAIN) for k in range(4)]
    # Sizes where torch.nn is at its best (small H), and shapes that it runs on its standard algorithm.
    small = Case("lstm", 64, 512, 128, 128, dtype=torch.bfloat16, without=_SLOW, bounds=PLAIN)
    return [*cases, small, replace(small, cell="gru"), replace(small, num_layers=2, bidirectional=True)]


CASES: list[Case] = _gpu_cases() if DEVICE == "cuda" else _cpu_cases()
