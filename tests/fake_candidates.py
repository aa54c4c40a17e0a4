"""Candidates that misbehave, for the tests of `tune`: each is the reference with one fault.

Run as a program it is the child process of `tune` with these candidates in its table.
"""

import os
import signal
import time

import torch

from fastrnn import backend_table
from fastrnn.backend_table import Backend
from fastrnn.backends import cpu
from fastrnn.tuning import trial

calls = {}


memory = {}


def reused(found):
    """A scan's outputs in the memory of those of the last call."""

    def kept(name, value):
        place = memory.setdefault((name, value.shape, value.dtype), torch.empty_like(value))
        place.data.copy_(value)  # past autograd, which would count a change
        return place

    return found._replace(y=kept("y", found.y), h_n=kept("h_n", found.h_n))


class Fake:
    """The C++ scan, or whatever the fault makes of it. `n`: the number of the call."""

    def __init__(self, name):
        self.name = name

    def forward(self, inputs, walk, save):
        n = calls[self.name] = calls.get(self.name, 0) + 1
        getattr(self, self.name.removeprefix("fake_"), lambda n: None)(n)
        found = cpu.forward(inputs, walk, save)
        if self.name == "fake_reuses":
            return reused(found)
        factor = {"fake_wrong": 1.01, "fake_nan": float("nan")}.get(self.name, 1.0)
        if self.name == "fake_wrong_once" and n == 5:
            factor = 1.01
        return found if factor == 1 else found._replace(y=found.y * factor)

    def backward(self, incoming, kept, inputs, walk, norms):
        found = cpu.backward(incoming, kept, inputs, walk, norms)
        return found._replace(dgx=found.dgx * 1.01) if self.name == "fake_wrong_backward" else found

    def takes_directions(self, inputs, walk):
        return False

    def raises(self, n):
        raise RuntimeError("out of\nresources\x1b[31m")

    def hangs(self, n):
        time.sleep(1000)

    def crashes(self, n):
        os.kill(os.getpid(), signal.SIGSEGV)

    def exits(self, n):
        os._exit(7)

    def slow(self, n):
        time.sleep(0.05)

    def threads(self, n):
        """The rival is slow from now on."""
        if n == 6:
            torch.set_num_threads(torch.get_num_threads() + 1)

    def noisy(self, n):
        time.sleep(0.05 * (n % 2))

    def poison(self, n):
        """Later calls of everything else are wrong."""
        if n == 6:
            real = torch._VF.gru
            torch._VF.gru = lambda *args: tuple(1.01 * x for x in real(*args))


FAULTS = (
    "wrong",
    "wrong_once",
    "nan",
    "wrong_backward",
    "raises",
    "hangs",
    "crashes",
    "exits",
    "slow",
    "noisy",
    "poison",
    "reuses",
    "threads",
)
FAKES = {
    f"fake_{name}": Backend(f"fake_{name}", (), "a fake", lambda request: None, Fake(f"fake_{name}"))
    for name in (*FAULTS, "good")
}

if __name__ == "__main__":
    backend_table.BACKENDS.update(FAKES)
    trial.main()
