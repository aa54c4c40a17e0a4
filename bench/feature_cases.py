"""The features beyond torch.nn's plain call that are timed against the Python loop, as data."""

from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from .cases import CLIP, DEVICE, dtype_name

ON_CPU = DEVICE == "cpu"
P = 0.5  # of every random mask: its inverse is exact in every dtype


@dataclass(frozen=True)
class Feature:
    """A row. `module`: arguments of fastrnn's constructor; `call`: what the call gets besides x.

    `cells`: torch.nn's cell can do it, so the loop over cells runs too. `overhead`: the same backend's plain call is
    timed as well.
    """

    name: str
    cell: str = "lstm"
    module: dict = field(default_factory=dict)
    call: frozenset[str] = frozenset()  # of "lengths", "resets", "tap", "return_cells"
    cells: bool = True
    overhead: bool = False


FEATURES = (
    Feature("lengths", call=frozenset({"lengths"}), overhead=True),
    Feature("resets", call=frozenset({"resets"}), overhead=True),
    # A fused cell (torch.nn's on a GPU) computes h from c inside the step, so hooks do not see all of dL/dc.
    Feature("tap", call=frozenset({"tap"}), cells=False, overhead=True),
    Feature("layer norm", module={"layer_norm": True}, cells=False),
    Feature("zoneout", module={"zoneout": P}),
    Feature("recurrent dropout", module={"recurrent_dropout": P}),
    Feature("weight dropout", module={"weight_dropout": P}),
    # A hook cannot compute the LSTM's joint norm over h and c; the GRU has one state.
    Feature("clipping by norm", "gru", module={"clip_state_grad_norm": CLIP}, overhead=ON_CPU),  # times sqrt(H)
    Feature("clipping by value", module={"clip_state_grad_value": 0.05}, overhead=ON_CPU),
    Feature("return_cells", call=frozenset({"return_cells"})),
    Feature("leaky ReLU", "rnn_leaky_relu", cells=False),
    Feature("ELU", "rnn_elu", cells=False),
    Feature("projection", module={"proj_size": 0.5}, cells=False),
)


@dataclass(frozen=True)
class FeatureCase:
    """A feature at a size and in a dtype: a layer in one direction, in training. Fields as in `cases.Case`."""

    feature: Feature
    B: int
    T: int
    I: int
    H: int
    dtype: torch.dtype = torch.float32
    tf32: bool = False

    suite, mode, num_layers, bidirectional, num_heads, bounds = "features", "train", 1, False, 1, ()
    without = MappingProxyType({})
    differentiated = ("y", "c")

    @property
    def name(self) -> str:
        return f"{self.feature.name.replace(' ', '_')}-B{self.B}-T{self.T}-I{self.I}-H{self.H}-{dtype_name(self.dtype)}"

    @property
    def cell(self) -> str:
        return self.feature.cell

    @property
    def features(self) -> frozenset[str]:
        return frozenset({self.feature.name})

    @property
    def call(self) -> frozenset[str]:
        return self.feature.call

    @property
    def options(self) -> dict:
        found = dict(self.feature.module)
        if "_" in self.cell:
            found["nonlinearity"] = self.cell.partition("_")[2]
        if "proj_size" in found:
            found["proj_size"] = int(found["proj_size"] * self.H)
        if "clip_state_grad_norm" in found:
            found["clip_state_grad_norm"] *= self.H**0.5
        return found

    def describe(self) -> dict:
        fields = {name: getattr(self, name) for name in ("cell", "B", "T", "I", "H", "tf32")}
        return {"feature": self.feature.name, **fields, "dtype": dtype_name(self.dtype)}


def _cases() -> list[FeatureCase]:
    if DEVICE == "cpu":
        return [FeatureCase(feature, 32, 100, 128, 128) for feature in FEATURES]
    dtypes = (torch.bfloat16, torch.float32)
    return [FeatureCase(feature, 64, 512, 512, 512, dtype) for dtype in dtypes for feature in FEATURES]


CASES = _cases()
OVERHEAD = 1.03  # the most that a feature marked so may cost on a GPU, against the plain call
