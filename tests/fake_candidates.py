"""Candidates that misbehave, for the tests of `tune`: each is the C++ scan with one fault.

Run as a program with the path of a socket it serves `forked_child.py`, the child process of `tune`: for each it forks a
process that has these candidates in its table. An import of torch in each child would take seconds.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

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


def serve(path):
    """Forks a process for each connection, until it is killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the forks
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                run_for(connection)
            connection.close()


def run_for(connection):
    """Runs the child process of `tune` on the files that arrive, and answers how it ended; kills it when left alone."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files):
            os.dup2(file, number)
        trial.main()
        os._exit(0)
    for file in files:
        os.close(file)

    def kill_when_alone():
        with suppress(OSError):  # it has ended already
            connection.recv(1)
            os.kill(child, signal.SIGKILL)

    threading.Thread(target=kill_when_alone, daemon=True).start()
    _, status = os.waitpid(child, 0)
    with suppress(OSError):  # `tune` has killed its child process
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


if __name__ == "__main__":
    import torch.fx.experimental.symbolic_shapes  # which the first trial of each fork would import

    backend_table.BACKENDS.update(FAKES)
    serve(sys.argv[1])
