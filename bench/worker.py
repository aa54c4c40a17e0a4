"""A process of its own for the cases on a GPU: after a kernel has hung or failed, its process cannot use the GPU again.

The process stays from case to case, and is replaced when that has happened.
"""

import multiprocessing
from collections.abc import Callable


class GpuLost(Exception):
    """After a contestant's error the process can no longer use the GPU."""

    def __init__(self, contestant: str, reason: str):
        super().__init__(contestant, reason)
        self.contestant, self.reason = contestant, reason


def raise_if_lost(contestant: str, reason: str) -> None:
    """After an error of a contestant: raises GpuLost where this process can no longer use the GPU."""
    import torch  # late: a process that replaces another one is ready sooner

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise GpuLost(contestant, reason) from error


class Worker:
    def __init__(self):
        self.pool = None

    def measure(self, measure: Callable, case, seconds: float) -> dict:
        """The record `measure(case, broken)`, with those contestants in `broken` that lost the GPU before.

        Raises what `measure` raises, and multiprocessing.TimeoutError where it takes longer than `seconds`.
        """
        broken: dict[str, str] = {}
        while True:
            self.pool = self.pool or multiprocessing.get_context("spawn").Pool(1)
            try:
                return self.pool.apply_async(measure, (case, broken)).get(seconds)
            except GpuLost as lost:
                self.close()
                if lost.contestant in broken:  # it was to be left out
                    raise
                broken[lost.contestant] = f"the GPU was lost: {lost.reason}"
            except Exception:
                self.close()
                raise

    def close(self) -> None:
        if self.pool is not None:
            self.pool.terminate()
            self.pool = None
