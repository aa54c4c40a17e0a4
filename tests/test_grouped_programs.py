"""The programs of a grouped launch side by side, walking all steps, without a GPU: each in a process of its own.

Triton's interpreter runs programs in turn, so one cannot wait for another, and it has no assembly. Here every program
of a grid is a forked process that interprets it alone. The tensors are in shared memory, and the barrier's two
functions count in the same word as the assembly of kernels/barrier.py does. Processes sleep at random times, so a tile
that is read too early, or overwritten too soon, shows.
"""

import ctypes
import itertools
import multiprocessing
import os
import random
import time
import traceback

import pytest
import torch
import triton

from fastrnn.backends import sequence
from fastrnn.kernels import scan
from fastrnn.tiles import Tile
from problems import Problem, everything, in_one_call, same_bits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="needs Triton's interpreter; on a GPU, test_kernels runs the barrier"
    ),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),  # 1 / 0; fork beside threads
]
LONGEST_WAIT = 60  # seconds


class Barrier:
    """`arrive` and `wait` of kernels/barrier.py, among processes."""

    def __init__(self):
        self.lock = multiprocessing.get_context("fork").Lock()

    @staticmethod
    def word(arrived):
        return ctypes.c_int32.from_address(int(arrived.handle.data[0]))

    @staticmethod
    def stop_somewhere():
        time.sleep(random.choice((0, 0, 0.03)))

    def arrive(self, arrived):
        if arrived is not None:
            self.stop_somewhere()
            with self.lock:
                self.word(arrived).value += 1
            self.stop_somewhere()

    def wait(self, arrived, arrivals, timeout_flag):
        if arrived is None:
            return None
        wanted, end = int(arrivals.handle.data[0]), time.time() + LONGEST_WAIT
        while self.word(arrived).value < wanted:
            assert time.time() < end, f"{wanted} arrivals did not come, only {self.word(arrived).value}"
            time.sleep(0.001)
        self.stop_somewhere()
        return arrivals >= 0


class SideBySide(triton.runtime.interpreter.GridExecutor):
    """Forks a process for each program of a scan's grid."""

    launches = []  # noqa: RUF012 (the grids, for the tests to look at)

    def __call__(self, *args, **kwargs):
        grid = self.grid
        if len(grid) < 3:  # of another kernel
            return super().__call__(*args, **kwargs)
        self.launches.append(grid)
        children = [self.fork(grid, index, args, kwargs) for index in itertools.product(*map(range, grid))]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert not any(codes), f"exit codes of the programs: {codes}"

    def fork(self, grid, index, args, kwargs):
        child = os.fork()
        if child:
            return child
        try:
            random.seed(hash(index))
            builder = triton.runtime.interpreter.interpreter_builder
            set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
            builder.set_grid_dim, builder.set_grid_idx = lambda *_: set_dim(*grid), lambda *_: set_idx(*index)
            self.grid, self._restore_args_dev = (1, 1, 1), lambda *_: None  # the memory is shared already
            super().__call__(*args, **kwargs)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


@pytest.fixture
def side_by_side(poisoned, monkeypatch):
    """Launches fork, and every tensor that the launcher makes is shared by the processes and full of NaN."""

    def share(make):
        return lambda *args, **kwargs: make(*args, **kwargs).share_memory_()

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, share(getattr(owner, name)))
    barrier = Barrier()
    monkeypatch.setattr(scan, "arrive", barrier.arrive)
    monkeypatch.setattr(scan, "wait", barrier.wait)
    monkeypatch.setattr(sequence, "interpreted", lambda: False)
    monkeypatch.setattr(sequence, "timeout_flag", lambda: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(sequence, "precision", lambda: "ieee")
    monkeypatch.setattr(SideBySide, "launches", [])
    monkeypatch.setattr(triton.runtime.interpreter, "GridExecutor", SideBySide)
    return SideBySide.launches


def stepwise(problem, tile, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sequence, "precision", lambda: "ieee")
        return everything(problem, tile._replace(mode="stepwise"))


TILE = Tile("grouped", 16, 16, 16, 4, 1)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_programs_of_a_group_walk_all_steps_together(cell, monkeypatch, request):
    """Two tiles of the batch by three of the hidden units; every mask, clipping and norms."""
    problem = Problem(cell, "cpu", sizes=(6, 17, 40), reverse=True, extras=Problem.ALL)
    want = stepwise(problem, TILE, monkeypatch)
    launches = request.getfixturevalue("side_by_side")  # launches fork from here on
    assert same_bits(everything(problem, TILE), want)
    assert launches == [(2, 3, 1)] * 2


def test_both_directions_walk_side_by_side(monkeypatch, request):
    sizes, extras = (5, 3, 40), ("norms",)
    both = in_one_call([Problem("gru", "cpu", sizes=sizes, reverse=back, extras=extras, seed=back) for back in (0, 1)])
    want = stepwise(both, TILE, monkeypatch)
    launches = request.getfixturevalue("side_by_side")  # launches fork from here on
    assert same_bits(everything(both, TILE), want)
    assert launches == [(1, 3, 2)] * 2


@pytest.mark.parametrize("extras", [("norms",), ("clip_norm",)], ids=["a group each", "all heads in one group"])
def test_heads_walk_side_by_side(extras, monkeypatch, request):
    """Two heads of two tiles each: only clipping by norm makes a head wait for another."""
    problem = Problem("rnn_tanh", "cpu", sizes=(5, 3, 40), extras=extras)
    problem.w_hh = problem.w_hh[:, :20].reshape(2, 20, 20).contiguous()
    want = stepwise(problem, TILE, monkeypatch)
    launches = request.getfixturevalue("side_by_side")  # launches fork from here on
    assert same_bits(everything(problem, TILE), want)
    assert launches == [(1, 4, 1)] * 2


@pytest.mark.usefixtures("poisoned")
def test_a_barrier_too_few_shows(monkeypatch, request):
    """Shows that this file can fail: without waiting, the programs do not agree. New memory holds NaN, since it may
    otherwise hold the very states of the run before."""
    problem = Problem("lstm", "cpu", sizes=(6, 3, 40))
    want = stepwise(problem, TILE, monkeypatch)
    request.getfixturevalue("side_by_side")  # launches fork from here on
    monkeypatch.setattr(scan, "wait", lambda arrived, arrivals, timeout_flag: arrivals >= 0)
    assert not same_bits(everything(problem, TILE), want)
