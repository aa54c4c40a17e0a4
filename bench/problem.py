"""A case as tensors: what all its contestants are given, and how one of them is called."""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

import fastrnn

from .cases import DEVICE, Case
from .feature_cases import FeatureCase

SEED = 2013
NAMES = ("y", "h_n", "c_n", "c")  # of the outputs, in their order
TIMED = ("y", "c")  # the outputs that have a gradient while a call is timed


class Outcome(NamedTuple):
    """The outputs in the order of NAMES; the norms as a leaf that receives them, or as a function to call later."""

    outputs: tuple[Tensor, ...]
    tap: Tensor | None = None
    norms: Callable[[], Tensor] | None = None


class Model(NamedTuple):
    """A contestant ready for one problem. `run` takes x; `environment` is set during forward and backward."""

    run: Callable[[Tensor], Outcome]
    note: str = ""
    takes: str = ""  # of fastrnn: the backend that runs it
    environment: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Inputs:
    """x [T, B, I], and the gradients of the outputs by name: y [T, B, D*P], h_n and c_n [L*D, B, .], c [T, B, H]."""

    x: Tensor
    gradients: dict[str, Tensor]


class Problem:
    """The module of a case with random parameters, lengths and resets. `double()` is the same problem in float64."""

    def __init__(self, case: Case | FeatureCase):
        self.case, self.options, self.dtype = case, case.options, case.dtype
        self.kind = case.cell.partition("_")[0].upper()
        self.module = getattr(fastrnn, self.kind)(case.I, case.H, **self.options, device=DEVICE, dtype=case.dtype)
        self.module.train(case.mode == "train")
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if name.startswith("ln_"):  # neither ones nor zeros
                    parameter.add_(0.1 * torch.randn_like(parameter))
                if (
                    name == "ln_hh_l0"
                ):  # with gains of one the network is chaotic, and rounding errors grow step by step
                    parameter.mul_(0.3)
        self.parameters = dict(self.module.named_parameters())
        self.lengths = torch.randint(1, case.T + 1, (case.B,), device=DEVICE) if "lengths" in case.call else None
        self.reset_mask = torch.rand(case.T, case.B, device=DEVICE) < 0.05 if "resets" in case.call else None

    def double(self) -> "Problem":
        twin = copy.copy(self)
        twin.module, twin.dtype = copy.deepcopy(self.module).double(), torch.float64
        twin.parameters = dict(twin.module.named_parameters())
        return twin

    @property
    def outputs(self) -> set[str]:
        """The names of what a call returns."""
        optional = {"c_n": self.states == 2, "c": "return_cells" in self.case.call}
        return {"y", "h_n", *(name for name, there in optional.items() if there)}

    @property
    def states(self) -> int:
        return 2 if self.case.cell == "lstm" else 1

    @property
    def walks(self) -> int:
        """Layers times directions."""
        return self.case.num_layers * (1 + self.case.bidirectional)

    def keywords(self) -> dict:
        """The arguments of the module's call besides x; the tap is new every time."""
        found = {"lengths": self.lengths, "reset_mask": self.reset_mask}
        if "return_cells" in self.case.call:
            found["return_cells"] = True
        if "tap" in self.case.call:
            dtype = torch.promote_types(self.dtype, torch.float32)
            shape = (self.walks, 2, self.states, self.case.T, self.case.B)
            found["tap"] = torch.zeros(shape, dtype=dtype, device=DEVICE, requires_grad=True)
        return found

    def inputs(self) -> Inputs:
        """Random ones, in the case's dtype."""
        case, P = self.case, self.options.get("proj_size", self.case.H)
        x = torch.randn(case.T, case.B, case.I, device=DEVICE).to(case.dtype).requires_grad_(case.mode == "train")
        shapes = {
            "y": (case.T, case.B, (1 + case.bidirectional) * P),
            "h_n": (self.walks, case.B, P),
            "c_n": (self.walks, case.B, case.H),
            "c": (case.T, case.B, case.H),
        }
        names = [name for name in case.differentiated if name in self.outputs]
        return Inputs(x, {name: torch.randn(shapes[name], device=DEVICE).to(case.dtype) for name in names})

    def widened(self, inputs: Inputs) -> Inputs:
        """The same inputs in the problem's own dtype."""
        return Inputs(inputs.x.detach().to(self.dtype).requires_grad_(inputs.x.requires_grad), inputs.gradients)


def call(problem: Problem, model: Model, inputs: Inputs, differentiated=TIMED):
    """Forward, and in training the gradients of x and of all parameters, and the norms, from those of some outputs."""
    with environment(model.environment) if model.environment else nullcontext():
        if problem.case.mode == "infer":
            with torch.no_grad():
                return model.run(inputs.x).outputs, ()
        outcome = model.run(inputs.x)
        outputs = dict(zip(NAMES, outcome.outputs, strict=False))
        used = {name: g.to(outputs[name].dtype) for name, g in inputs.gradients.items() if name in differentiated}
        leaves = [inputs.x, *problem.parameters.values()] + ([] if outcome.tap is None else [outcome.tap])
        found = torch.autograd.grad([outputs[name] for name in used], leaves, list(used.values()))
        return outcome.outputs, found if outcome.norms is None else (*found, outcome.norms())


def results(problem: Problem, model: Model, inputs: Inputs) -> dict[str, Tensor]:
    """All outputs and gradients by name, from a fixed seed: contestants that draw masks draw the same ones."""
    torch.manual_seed(SEED)
    outputs, found = call(problem, model, problem.widened(inputs), NAMES)
    names = ["dx", *(f"d {name}" for name in problem.parameters), "norms"]
    outputs = [out.detach() for out in outputs]
    return dict(zip(NAMES, outputs, strict=False)) | dict(zip(names, found, strict=False))


@contextmanager
def environment(values: Mapping[str, str]):
    """os.environ with these set, within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
