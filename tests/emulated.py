"""csrc's CUDA ops, emulated on the host: the same source, compiled by a C++ compiler (emulator/emulated.h)."""

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "g++")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
INCLUDES = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/emulator'}")


def compiled(cache, source, *flags):
    """The emulator's `source`, compiled. pytest's cache keeps it until csrc, the emulator or the command changes."""
    command = [CXX, "-std=c++17", "-O1", *WARNINGS, *INCLUDES, *flags]
    version = subprocess.run([CXX, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(version + " ".join(command).encode())
    for path in sorted(path for folder in ("csrc", "tests/emulator") for path in (ROOT / folder).rglob("*.*")):
        key.update(path.read_bytes())
    folder = cache.mkdir("emulated")
    target = folder / f"{source}-{key.hexdigest()[:16]}"
    if not target.exists():
        for old in folder.glob(f"{source}-*"):
            old.unlink(missing_ok=True)
        making = folder / f"{os.getpid()}-{source}"
        subprocess.run([*command, str(ROOT / "tests/emulator" / source), "-o", str(making)], check=True)
        making.replace(target)
    return target


class Shape(ctypes.Structure):
    _fields_ = [("T", ctypes.c_int64), *((name, ctypes.c_int) for name in ("D", "B", "H", "reverse"))]


class Layout(ctypes.Structure):
    _fields_ = [
        ("groups", ctypes.c_int), ("seed", ctypes.c_uint), ("wait_limit", ctypes.c_int), ("missing", ctypes.c_int),
        ("timeout_flag", ctypes.c_uint32),
    ]  # fmt: skip


class Emulator:
    """csrc's ops on the emulator. `way` chooses the kernel, `room` is for how many directions at once; the other fields
    describe a launch."""

    way, groups, seed, wait_limit, missing, room, launches = "grid", 0, 0, 2**30, -1, 2, 0

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))

    def describe(self, cell, dtype, hidden_size):
        """bucket, units, rows, shared bytes forward and backward, or None."""
        sizes = (ctypes.c_int * 5)()
        name = str(dtype).split(".")[1].encode()
        found = self.library.describe(cell.encode(), name, self.way.encode(), hidden_size, sizes)
        return list(sizes) if found else None

    def persistent_group(self, w_hh, cell, ways):
        sizes = self.describe(cell, w_hh.dtype, w_hh.shape[-1])
        room = len(w_hh) <= self.room if w_hh.dim() == 3 else self.room
        allowed = ways == "all" or (ways == "cluster") == (self.way == "cluster")
        return -(-w_hh.shape[-1] // sizes[1]) if sizes and room and allowed else 0

    def call(self, function, cell, like, reverse, pointers, timeout_flag, *rest):
        *D, T, B, H = like.shape
        layout = Layout(self.groups, self.seed, self.wait_limit, self.missing, 0)
        addresses = (ctypes.c_void_p * len(pointers))(*(None if x is None else x.data_ptr() for x in pointers))
        assert function(
            cell.encode(), str(like.dtype).split(".")[1].encode(), self.way.encode(),
            ctypes.byref(Shape(T, *(D or [1]), B, H, reverse)), ctypes.byref(layout), addresses, *rest,
        )  # fmt: skip
        self.launches += 1
        timeout_flag[0] |= layout.timeout_flag

    def persistent_forward(self, gx, w_hh, h0, c0, b_hh, flags, cell, reverse, ways, y, c, h_n, c_n, saved,
                           timeout_flag):  # fmt: skip
        pointers = [gx, w_hh, b_hh, h0, c0, flags, y, h_n, c_n, c, saved]
        self.call(self.library.emulate_forward, cell, y, reverse, pointers, timeout_flag)

    def persistent_backward(self, dy, dc, dh_n, dc_n, y, c, saved, w_hh, h0, c0, flags, clip_norm, cell, reverse,
                            clip_value, ways, dgx, dgh, dh0, dc0, norms, timeout_flag):  # fmt: skip
        pointers = [dy, dc, dh_n, dc_n, saved, y, c, h0, c0, w_hh, flags, clip_norm, dgx, dgh, dh0, dc0, norms]
        bound = ctypes.c_float(float("inf") if clip_value is None else clip_value)
        self.call(self.library.emulate_backward, cell, y, reverse, pointers, timeout_flag, bound)
