"""The features beyond torch.nn's plain call that are timed against the Python loop, as data; see `features.py`."""

from dataclasses import dataclass, field

import torch

from .cases import DEVICE

P = 0.5  # of every random mask: its inverse is exact in every dtype


@dataclass(frozen=True)
class Feature:
    """A row. `module`: arguments of fastrnn's constructor; `call`: what the call gets besides x.

    `clip` counts in units of sqrt(H), the size of dL/dy_t. `cells`: torch.nn's cell can do it, so that loop runs too.
    `overhead`: also timed against the same backend's plain call.
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
    # A fused cell (torch.nn's on a GPU) hides the way from c to h inside the step, so hooks cannot see all of dL/dc.
    Feature("tap", call=frozenset({"tap"}), cells=False, overhead=True),
    Feature("layer norm", module={"layer_norm": True}, cells=False),
    Feature("zoneout", module={"zoneout": P}),
    Feature("recurrent dropout", module={"recurrent_dropout": P}),
    Feature("weight dropout", module={"weight_dropout": P}),
    # The LSTM's joint norm over h and c is not within a hook's reach; the GRU's is.
    Feature("clipping by norm", "gru", module={"clip_state_grad_norm": 0.9}),
    Feature("clipping by value", module={"clip_state_grad_value": 0.05}),
    Feature("return_cells", call=frozenset({"return_cells"})),
    Feature("leaky ReLU", "rnn_leaky_relu", cells=False),
    Feature("ELU", "rnn_elu", cells=False),
    Feature("projection", module={"proj_size": 0.5}, cells=False),
)


@dataclass(frozen=True)
class FeatureCase:
    """A feature at a size and in a dtype; fields as in `cases.Case`."""

    feature: Feature
    B: int
    T: int
    I: int
    H: int
    dtype: torch.dtype = torch.float32
    tf32: bool = False

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.feature.name.replace(' ', '_')}-B{self.B}-T{self.T}-I{self.I}-H{self.H}-{dtype}"


def _cases() -> list[FeatureCase]:
    if DEVICE == "cpu":
        return [FeatureCase(feature, 32, 100, 128, 128) for feature in FEATURES]
    dtypes = (torch.bfloat16, torch.float32)
    return [FeatureCase(feature, 64, 512, 512, 512, dtype) for dtype in dtypes for feature in FEATURES]


CASES = _cases()
# As in cases.py: of all features together, and of the timing within one case.
SESSION_SECONDS = {"cpu": 70.0, "cuda": 240.0}[DEVICE]
CASE_SECONDS = {"cpu": 1.0, "cuda": 2.0}[DEVICE]
LOOPS = ("loop", "loop of cells")
PLAIN = "plain "  # before a backend's name: its plain call
# The rounding floor, in units of agreement.FLOOR. In float32 the gradient of a bias is one sum over T*B in torch.nn and
# in fastrnn and T small sums in the loop, which err less: seen at 8 eps against 1.4.
ROUNDING = {torch.float32: 4.0}
OVERHEAD = 1.03  # what a feature marked so may cost on a GPU, against the plain call
