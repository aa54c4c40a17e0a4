"""Launches of one kernel that differ in their steps only: the first goes Triton's own way, the others repeat it.

`kernel[grid](...)` binds, specialises and looks up some 40 arguments each time, which takes longer than a small step
takes on the GPU. Where a call launches a kernel per step, all but a step's numbers stay what they were.
"""

from torch import Tensor


class Launch:
    """A kernel, its grid and all its arguments but a step's, which every launch brings: `launch(t_begin=0, t_end=1)`.

    kernel: a `triton.jit` function. grid: one to three numbers. arguments: by name, Triton's options among them.

    The first launch specialises and compiles as Triton does it; those that follow launch what was compiled, on the
    current stream, hooks included. They would be specialised alike: addresses and numbers are the same ones, and a
    step's are integers of 32 bits that the kernel has in `do_not_specialize`; any other argument raises KeyError. So
    this lives no longer than a call, and what has other pointers is another Launch.

    In Triton's interpreter there is nothing compiled, and every launch goes the first one's way.
    """

    def __init__(self, kernel, grid: tuple[int, ...], **arguments):
        self.kernel, self.grid, self.arguments = kernel, (*grid, 1, 1)[:3], arguments
        self.repeat = None

    def __call__(self, **step: int):
        if self.repeat is None:
            self._first(step)
            return
        for name, value in step.items():
            self.values[self.places[name]] = value
        self.repeat(*self.values)

    def _first(self, step: dict[str, int]):
        compiled = self.kernel[self.grid](**self.arguments, **step)
        if compiled is None:
            return
        given, parameters = {**self.arguments, **step}, self.kernel.params
        values = [given[p.name] for p in parameters]
        # In the order of the kernel's signature, constants included. An address spares the driver a look at the tensor.
        self.values = [x.data_ptr() if isinstance(x, Tensor) else x for x in values]
        self.places = {p.name: p.num for p in parameters if p.do_not_specialize}
        self.repeat = compiled[self.grid]
