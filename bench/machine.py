"""The machine that the figures were measured on: device, clocks, versions, and the algorithms that torch.nn takes.

Everything is read, nothing is set. Host names and the like are left out."""

import os
import platform
import subprocess

import torch

QUERY = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,clocks_throttle_reasons.active"
)


def _output(*command: str) -> str | None:
    """The first line that a command prints, or None where it cannot run."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else ""


def clocks(device: str) -> dict[str, str] | None:
    """The GPU's clocks, temperature and power now, as nvidia-smi reports them; None without it."""
    line = _output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader") if device == "cuda" else None
    return dict(zip(QUERY.split(","), map(str.strip, line.split(",")), strict=False)) if line else None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else _cpu_model()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def describe(device: str) -> dict:
    """Device, host and versions."""
    return {
        "device": device_name(device),
        "kind": device,
        "clocks": clocks(device),
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "load at start": os.getloadavg(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
            "triton": _triton_version(),
        },
        "fp32_precision default": {
            "cudnn.rnn": torch.backends.cudnn.rnn.fp32_precision,
            "cuda.matmul": torch.backends.cuda.matmul.fp32_precision,
        },
    }


def commit() -> dict:
    """The commit that was measured, and whether the tree differed from it."""
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"id": _output("git", "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def torch_algorithm(case, device: str) -> str:
    """The algorithm of torch.nn by the rules in ATen's sources (native/cudnn/RNN.cpp, native/RNN.cpp): not observed."""
    if device == "cpu":
        kernel = "oneDNN" if case.cell == "lstm" and torch.backends.mkldnn.is_available() else "ATen's step by step"
        return f"{kernel} (by rule, not observed)"
    lstm_or_gru = case.cell in ("lstm", "gru")
    half, plain = case.dtype == torch.float16, case.num_layers == 1 and not case.bidirectional
    batch = case.B % 8 == 0 and case.B <= 128 and case.cell != "gru"
    if not lstm_or_gru:
        batch = batch and (case.B < 96 or case.H < 896)
    persistent = half and plain and case.H % 128 == 0 and case.H <= 1024 and case.I % 128 == 0 and batch
    small = (192, 128) if lstm_or_gru else (384, 256)  # the largest H, forward and backward

    def algorithm(largest: int) -> str:
        return "persistent, small H" if case.H <= largest else "persistent" if persistent else "standard"

    forward, backward = map(algorithm, small)
    return f"cuDNN: forward {forward}, backward {backward} (by rule, not observed)"
