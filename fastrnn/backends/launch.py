"""Launches of Triton kernels that differ in the step only: the first goes Triton's own way, the others repeat it.

`kernel[grid](...)` binds, specialises and looks up some 40 arguments at each launch. That takes longer than a small
step takes on the GPU. In a call that launches a kernel per step, only the step's numbers change from step to step.
"""

import os

import torch
from torch import Tensor


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def scratch(*shape: int, like: Tensor, when: bool = True) -> Tensor | None:
    """Unwritten float32 memory on the device of `like`; None unless `when`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device) if when else None


class Launch:
    """A kernel, its grid and all arguments but the step's, which each launch brings: `launch(t_begin=0, t_end=1)`.

    kernel: a `triton.jit` function. grid: one to three numbers. arguments: by name, Triton's options among them.

    The first launch specialises and compiles as Triton does it. The later ones launch the compiled kernel, on the
    current stream, hooks included. Triton would specialise them alike: addresses and numbers are the same, and a step's
    numbers are integers of 32 bits that the kernel lists in `do_not_specialize`; any other argument raises KeyError. A
    Launch belongs to one call, and other pointers need another Launch.

    Triton's interpreter compiles nothing, so there every launch goes Triton's way.
    """

    def __init__(self, kernel, grid: tuple[int, ...], **arguments):
        self.kernel, self.grid, self.arguments = kernel, (*grid, 1, 1)[:3], arguments
        self.repeat = None

    def __call__(self, **step: int):
        if self.repeat is None:
            self._first(step)
            return
        for name, value in step.items():
            self.values[self.step_params[name]] = value
        self.repeat(*self.values)

    def _first(self, step: dict[str, int]):
        compiled = self.kernel[self.grid](**self.arguments, **step)
        if compiled is None:
            return
        given, parameters = {**self.arguments, **step}, self.kernel.params
        values = [given[p.name] for p in parameters]
        # In the order of the kernel's signature, constants included. An address spares the driver a look at the tensor.
        self.values = [x.data_ptr() if isinstance(x, Tensor) else x for x in values]
        self.step_params = {p.name: p.num for p in parameters if p.do_not_specialize}  # places in `values`
        self.repeat = compiled[self.grid]
