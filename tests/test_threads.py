"""When csrc/cpu leaves its threads: after a call that took longer than its threads worked (csrc/cpu/threads.h)."""

import ctypes
import shutil
import time

import pytest
from cpp_programs import compiled

MILLISECOND = 1_000_000
SOURCE = """
#include "cpu/threads.cpp"
extern "C" bool alone(int64_t now) { return fastrnn::crowding.alone(now); }
extern "C" void note(int64_t now, int64_t took, int64_t worked) { fastrnn::crowding.note(now, took, worked); }
extern "C" int64_t work() { return fastrnn::work_clock(); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("threads"), SOURCE, "-O1", "-shared", "-fPIC")


@pytest.fixture
def threads(library, tmp_path):
    """With no call noted yet: a copy of the library is a library of its own."""
    loaded = ctypes.CDLL(str(shutil.copy(library, tmp_path)))
    loaded.alone.argtypes, loaded.alone.restype = [ctypes.c_int64], ctypes.c_bool
    loaded.note.argtypes = [ctypes.c_int64] * 3
    loaded.work.restype = ctypes.c_int64
    return loaded


def pause_after(threads, now, took=10.0, worked=2.0):
    """Milliseconds until the threads are tried again, after a call that ended at `now`."""
    threads.note(now, int(took * MILLISECOND), int(worked * MILLISECOND))
    return next(ms for ms in range(10_000) if not threads.alone(now + ms * MILLISECOND))


@pytest.mark.parametrize(("took", "worked"), [(5.0, 9.0), (5.0, 5.0), (0.4, 0.05)])
def test_calls_that_threads_shared_well(threads, took, worked):
    """They were faster than one thread, or lost less than a thread takes to wake up."""
    assert pause_after(threads, 10**12, took, worked) == 0


@pytest.mark.parametrize(("took", "worked"), [(10.0, 2.0), (2.0, 1.0), (0.7, 0.1)])
def test_a_call_that_waited_for_a_core(threads, took, worked):
    assert not threads.alone(10**12)
    assert pause_after(threads, 10**12, took, worked) > 0


def test_the_pause_grows_while_tries_fail_and_shrinks_again(threads):
    now, pauses = 10**12, []
    for _ in range(8):
        pauses.append(pause_after(threads, now))
        now += pauses[-1] * MILLISECOND
    assert pauses[:3] == [20, 80, 320] and pauses[-1] == 4000
    for _ in range(120):
        threads.note(now, MILLISECOND, 2 * MILLISECOND)
    assert pause_after(threads, now) == 20


def test_work_is_that_of_the_thread(threads):
    """Waiting is no work."""
    before, begin = threads.work(), time.perf_counter()
    time.sleep(0.05)
    assert threads.work() - before < 0.5 * (time.perf_counter() - begin) * 1e9
