"""The floor under the time of one layer on a device, from the device's figures.

    time = input GEMM + T steps that cannot overlap (+ for training: T steps back, then three GEMMs: dX, dW_ih, dW_hh)
    GEMM = its operations / (0.65 peak)
    step = max(its arithmetic, its exchange of h) + the latency until every CTA knows that h is complete

W_hh stays on the chip where it fits; then n CTAs share the gate rows of one tile of the batch, and only these n have to
agree. The floor is the best over all n and tiles. Where W_hh does not fit, every step reads it again and ends in a
kernel edge. Everything else (pointwise work, memory traffic of gx and of the saved planes) counts as free: this is a
floor, not a forecast.

On a CPU the floor is that of the products alone, at the best rate that a product of PyTorch reaches in the same run.

`python -m bench.limit` prints the model's times of two layers, one after the other and as a wavefront.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from . import latency, machine
from .cases import DEVICE, GPU_SIZES

RESULTS = Path(__file__).with_name("results")
GEMM_EFFICIENCY = 0.65  # estimate: the share of the data sheet's peak that a library GEMM reaches at the sizes here


@dataclass(frozen=True)
class Device:
    """The figures of one GPU. Times in seconds, rates per second; `source` says where each figure comes from."""

    match: str  # in the device's name
    sms: int
    shared_memory: int  # bytes per SM that a kernel can have
    cluster: int  # CTAs of the largest cluster
    peak: dict[str, float]  # operations per second, by kind of arithmetic
    memory_rate: float  # bytes
    exchange_rate: float  # bytes that one SM can receive
    agree: dict[str, float]  # latency, by means
    source: dict[str, str]


H100 = Device(
    match="H100",
    sms=132,
    shared_memory=227 * 1024,
    cluster=16,
    peak={"half": 989e12, "tf32": 494e12, "fp32": 67e12},
    memory_rate=3.35e12,
    exchange_rate=64 * 1.755e9,
    agree={"none": 0.0, "cluster": 0.25e-6, "flag": 0.55e-6, "kernel edge": 1.3e-6},
    source={
        "sms, shared_memory, cluster, memory_rate": "the vendor's data sheet (SXM)",
        "peak": "the vendor's data sheet, dense; a large bf16 GEMM on random data was measured at 790e12 on an H200",
        "exchange_rate": "estimate: 64 bytes per SM and clock",
        "agree": "estimates, not measured yet",
    },
)
H200 = replace(
    H100, match="H200", memory_rate=4.3e12, source=H100.source | {"memory_rate": "measured: device-to-device copy"}
)
DEVICES = (H100, H200)


def device_model(name: str) -> Device | None:
    """The model of the device with this name; None where there is no model, as for every CPU.

    Latencies of agreement that were measured on such a device (see `latency.py`) replace the estimates."""
    device = next((device for device in DEVICES if device.match in name), None)
    measured = latency.typical(RESULTS, name) if device else {}
    if not measured:
        return device
    source = device.source | {"agree": f"measured ({', '.join(measured)}): python -m bench.latency"}
    return replace(device, agree=device.agree | measured, source=source)


def _gates(cell: str) -> int:
    return {"lstm": 4, "gru": 3}.get(cell, 1)


def _on_chip(device: Device, B: int, weight: int, operations: int, exchanged: int, peak: float):
    """Seconds of one step with `weight` bytes on the chip, and the means of agreement, for every size of a group.

    operations: of the whole batch; exchanged: bytes that a CTA receives per row of the batch; peak: of all of `device`.
    """
    for ctas in range(1, device.sms + 1):
        if weight / ctas > device.shared_memory:
            continue
        means = "none" if ctas == 1 else "cluster" if ctas <= device.cluster else "flag"
        rows = -(-B // max(1, device.sms // ctas))  # of the batch, in each group's tile
        arithmetic = operations * rows / B / (ctas * peak / device.sms)
        exchange = 0.0 if ctas == 1 else rows * exchanged / device.exchange_rate
        yield max(arithmetic, exchange) + device.agree[means], means


def step_floor(device: Device, cell: str, B: int, H: int, itemsize: int, peak: float) -> tuple[float, str]:
    """Seconds of one step of one direction, and the means by which its CTAs agree."""
    weight, operations = _gates(cell) * H * H * itemsize, 2 * B * _gates(cell) * H * H
    read = weight / device.memory_rate if weight > device.sms * device.shared_memory else 0.0
    streamed = max(operations / (GEMM_EFFICIENCY * peak), read) + device.agree["kernel edge"], "kernel edge"
    return min([streamed, *_on_chip(device, B, weight, operations, H * itemsize, peak)])


def two_layers(device: Device, cell: str, B: int, T: int, H: int, itemsize: int = 2) -> tuple[float, float | None]:
    """Seconds of the forward of two layers, I = H: one after the other; and as a wavefront, each on half of the SMs, a
    step apart, the upper one's input product inside its steps. None where its two matrices do not fit."""
    weight, operations, peak = _gates(cell) * H * H * itemsize, 2 * B * _gates(cell) * H * H, device.peak["half"]
    gemm = T * operations / (GEMM_EFFICIENCY * peak)
    half = replace(device, sms=device.sms // 2)
    steps = [step for step, _ in _on_chip(half, B, 2 * weight, 2 * operations, 2 * H * itemsize, peak / 2)]
    in_turn = 2 * (gemm + T * step_floor(device, cell, B, H, itemsize, peak)[0])
    return in_turn, gemm + (T + 1) * min(steps) if steps else None


def floor(device: Device | None, case) -> dict | None:
    """The floor of a `cases.Case` in seconds with its parts, or None where there is no model of the device."""
    if device is None:
        return None
    half = case.dtype in (torch.bfloat16, torch.float16)
    kind = "half" if half else "tf32" if case.tf32 else "fp32"
    peak, rows, directions = device.peak[kind], _gates(case.cell) * case.H, 2 if case.bidirectional else 1
    step, means = step_floor(device, case.cell, case.B, case.H, case.dtype.itemsize, peak)
    train = case.mode == "train"
    # Both directions of a layer can run side by side; layers can overlap as a wavefront, one step after another.
    steps = (case.T + case.num_layers - 1) * step * (2 if train else 1)
    gemms = 0.0
    for layer in range(case.num_layers):
        width = case.I if layer == 0 else case.H * directions
        forward, recurrent = (2 * case.B * case.T * rows * size * directions for size in (width, case.H))
        gemms += (3 * forward + recurrent if train else forward) / (GEMM_EFFICIENCY * peak)
    return {
        "device": device.match,
        "seconds": gemms + steps,
        "gemms": gemms,
        "steps": steps,
        "step": step,
        "agreement": means,
        "source": device.source,
    }


@cache
def cpu_rate(dtype: torch.dtype) -> float:
    """Multiplications and additions per second of the fastest of some products: MKL's, and oneDNN's where it is."""
    size = 1024
    x, weight = (torch.randn(size, size).to(dtype) for _ in range(2))
    products = [lambda: F.linear(x, weight)]
    multiplies = dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if torch.backends.mkldnn.is_available() and multiplies:
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    least = math.inf
    for _ in range(15):
        for product in products:
            begin = time.perf_counter()
            product()
            least = min(least, time.perf_counter() - begin)
    return 2 * size**3 / least


def cpu_floor(case, rate: float) -> dict:
    """The time of a case's products at this rate, in seconds; a backward has twice as many as the forward."""
    directions = 2 if case.bidirectional else 1
    widths = [case.I, *(directions * case.H for _ in range(case.num_layers - 1))]
    steps, rows, recurrent = case.B * case.T * directions, _gates(case.cell) * case.H, case.H // case.num_heads
    forward = sum(2 * steps * rows * (width + recurrent) for width in widths)
    work = forward * (3 if case.mode == "train" else 1)
    return {
        "seconds": work / rate,
        "operations": work,
        "rate": rate,
        "source": "PyTorch's fastest product, 1024 x 1024",
    }


def floor_here(case) -> dict | None:
    """The floor of a case on the device at hand."""
    if DEVICE == "cpu":
        return cpu_floor(case, cpu_rate(case.dtype))
    return floor(device_model(machine.device_name(DEVICE)), case)


def main():
    device = H200
    print(f"{device.match}, bfloat16, forward, ms (model; latencies of agreement: {device.source['agree']})")
    print(f"{'':20}{'in turn':>10}{'wavefront':>12}")
    for cell in ("lstm", "gru"):
        for B, T, H in GPU_SIZES:
            in_turn, wavefront = (f"{1e3 * t:.2f}" if t else "-" for t in two_layers(device, cell, B, T, H))
            print(f"{f'{cell} {B}, {T}, {H}':20}{in_turn:>10}{wavefront:>12}")


if __name__ == "__main__":
    main()
