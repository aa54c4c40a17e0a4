"""The check of a scan's results against the reference, on random inputs; and that check before a kernel's first use.

The first use is checked in the user's process: on a small problem with the call's own H and features, so that the
kernels which it compiles are those of the call. It runs in a thread of its own, where no transform, no compiler, no
autocast and no mode of the caller is active. Only kernels whose programs do not wait for each other are checked so.
"""

import logging
import os
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .. import evidence
from ..arguments import IncomingGradients, Kept, ScanInputs, Walk
from ..backends import reference, sequence
from ..cell_table import PAD, RESET, START, spec_of
from ..equations import accumulate_dtype
from . import agreement, records
from .records import Entry, Key

logger = logging.getLogger("fastrnn")
STEPS = 5  # of the small problem
PATIENCE = 60.0  # seconds to wait for another process that checks the same kernel


# ------------------------------------------------------------------------------------------------------- the check


def problem(request, batch: int, reverse: bool, device: torch.device, steps: int = STEPS) -> tuple[ScanInputs, Walk]:
    """Random arguments of a scan with the features of a call (`backend_table.Request`)."""
    spec, features, generator = spec_of(request.cell), request.features, torch.Generator().manual_seed(2013)
    H, dtype, acc = int(request.hidden_size), request.dtype, accumulate_dtype(request.dtype)
    G, P, others = len(spec.gates) * H, request.proj_size or H, (len(spec.states) - 1) * H
    w_hh_shape = (G, P) if request.heads == 1 else (request.heads, G // request.heads, H // request.heads)
    norm, zoneout = "layer_norm" in features, "zoneout" in features
    norm_c = norm and "c" in spec.states and spec.program is None
    masks = len(spec.gates) if "recurrent_dropout_per_gate" in features else 1

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def share(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).round(decimals=1).to(device, dtype)

    inputs = ScanInputs(
        gx=normal(steps, batch, G),
        w_hh=normal(*w_hh_shape) / w_hh_shape[-1] ** 0.5 if spec.recurrent else None,
        h0=normal(batch, P),
        c0=normal(batch, others, dtype=acc) if others else None,
        b_hh=normal(G) if spec.recurrent and (spec.distinct_dgh or norm) else None,
        w_hr=normal(P, H) / H**0.5 if request.proj_size else None,
        ln_hh=(1 + 0.3 * normal(G)) if spec.recurrent and norm else None,
        ln_c_weight=(1 + 0.3 * normal(H)) if norm_c else None,
        ln_c_bias=0.3 * normal(H) if norm_c else None,
        flags=_flags(generator, steps, batch, reverse).to(device)
        if features & {"lengths", "resets"} or request.packed is not None
        else None,
        recurrent_mask=2 * (share(batch, masks * P) < 0.5).to(dtype) if "recurrent_dropout" in features else None,
        zone_h=share(steps, batch, P) if zoneout else None,
        zone_c=share(steps, batch, others) if zoneout and others else None,
        decay_h=share(steps, batch, P) if "decay" in features else None,
        decay_c=share(steps, batch, others) if "decay" in features and others else None,
        parameters=normal(len(spec.parameters) * H) if spec.parameters else None,
        step_inputs=normal(steps, batch, len(spec.inputs) * H) if spec.inputs else None,
        clip_norm=torch.tensor(0.9 * H**0.5, dtype=acc, device=device) if "clip" in features else None,
    )
    walk = Walk(request.cell, reverse, "reference", 1.5 if "clip" in features else None)
    ln_of = next((kind for kind in ("sum", "gates") if f"layer_norm_{kind}" in features), walk.ln_of)
    return inputs, walk._replace(ln_of=ln_of, ln_c_carried="layer_norm_carried" in features)


def _flags(generator: torch.Generator, steps: int, batch: int, reverse: bool) -> Tensor:
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    lengths[:1] = steps
    t = torch.arange(steps)[:, None]
    flags = PAD * (t >= lengths) + RESET * (torch.rand(steps, batch, generator=generator) < 0.25)
    if reverse:
        flags = flags + START * (t == lengths - 1)
    return flags.to(torch.uint8)


def _in_dtype(named, dtype: torch.dtype):
    """A named tuple with its floating tensors in another dtype."""
    return named._make(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in named)


def results(
    launcher, inputs: ScanInputs, walk: Walk, norms: bool, dtype: torch.dtype, left_out: Tensor | None = None
) -> agreement.Tensors:
    """All outputs of a forward and a backward by name, in the order in which they are computed.

    dtype: that to which the arriving gradients are rounded, whatever the inputs' own. left_out: the sequences, bool
    `[B]`, at which none arrive.
    """
    generator = torch.Generator().manual_seed(2014)

    def incoming(like: Tensor | None) -> Tensor | None:
        if like is None or not like.numel():
            return None
        values = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        values = values.to(dtype).to(like.device, like.dtype)
        return values if left_out is None else values.masked_fill(left_out[:, None], 0)

    outputs = launcher.forward(inputs, walk, True)
    c = None if inputs.c0 is None else outputs.c
    gradients = IncomingGradients(
        incoming(outputs.y), incoming(c), incoming(outputs.h_n), None if c is None else incoming(outputs.c_n)
    )
    inputs = inputs._replace(b_hh=None, gx=None if walk.ln_of == "separate" else inputs.gx)
    found = launcher.backward(gradients, Kept(outputs.y, c, outputs.saved), inputs, walk, norms)
    named = outputs._asdict() | found._asdict()
    return {name: x for name, x in named.items() if isinstance(x, Tensor) and x.numel()}


def eps_of(dtype: torch.dtype, device: str) -> float:
    tf32 = dtype == torch.float32 and device != "cpu" and sequence.precision() == "tf32"
    return agreement.TF32_EPS if tf32 else agreement.EPS[dtype]


@torch.no_grad()
def check(launcher, request, batch: int, device: torch.device, steps: int = STEPS) -> str | None:
    """What is wrong with a scan's results, in words, in both directions; None where nothing is."""
    for reverse in (False, True):
        inputs, walk = problem(request, batch, reverse, device, steps)
        norms = "tap" in request.features
        wide, tail = _in_dtype(inputs, torch.float64), (walk, norms, request.dtype)
        eps, left_out = eps_of(request.dtype, device.type), None
        if agreement.has_kinks(request.cell) and eps <= agreement.FINE:
            left_out = agreement.near_kinks(
                lambda gx, wide=wide, tail=tail: results(reference, wide._replace(gx=gx), *tail)["dgx"], wide.gx, eps
            )
        exact = results(reference, wide, *tail, left_out)
        usual = results(reference, inputs, *tail, left_out)
        found = results(launcher, inputs, *tail, left_out)
        missing = exact.keys() - found.keys()
        if missing:
            return f"{', '.join(sorted(missing))} is missing"
        wrong = agreement.disagreement(found, [usual], exact, eps)
        if wrong is not None:
            return wrong
    return None


# ---------------------------------------------------------------------------------------------------- the first use

_lock = threading.Lock()


def capturing(device: str) -> bool:
    """Whether a graph is being captured, which nothing may disturb."""
    ask = getattr(torch.get_device_module(device), "is_current_stream_capturing", None) if device != "cpu" else None
    return ask is not None and ask()


def first_use(request, name: str, launcher, checks: dict[str, tuple[Key, int]]) -> None:
    """Checks the kernels of a backend for a call, and keeps what comes out, unless a graph is being captured.

    checks: by kernel, the bucket in which the check counts, and a batch size that takes this kernel.
    """
    if capturing(request.device):
        return
    device = torch.device(request.device)
    if device.type != "cpu":
        device = torch.device(request.device, torch.get_device_module(request.device).current_device())
    thread = threading.Thread(target=_check_all, args=(request, name, launcher, checks, device), name="fastrnn check")
    thread.start()
    thread.join()


def _check_all(request, name: str, launcher, checks: dict[str, tuple[Key, int]], device: torch.device) -> None:
    with _lock:  # another thread of this process may have checked it in the meantime
        book = evidence.book(request.device, torch.get_num_threads())
        for kernel, (key, batch) in checks.items():
            if book.find(key, name) is None:
                _check_once(request, name, launcher, kernel, key, batch, device, book)


def _check_once(request, name: str, launcher, kernel: str, key: Key, batch: int, device: torch.device, book) -> None:
    file = records.path(book.where, key, name)
    claim = file.with_suffix(".claim")
    if _is_claimed(claim):
        entry = _from_another_process(file, claim, key, name)
        if entry is not None:
            book.add(entry)
            return
    try:
        _check_and_keep(request, name, launcher, kernel, key, batch, device)
    finally:
        _release(claim)  # after the entry is written: others take a released claim without one for a failure


def _check_and_keep(request, name: str, launcher, kernel: str, key: Key, batch: int, device: torch.device) -> None:
    begin = time.perf_counter()
    try:
        wrong = check(launcher, request, min(batch, 32), device)
        if device.type != "cpu":
            torch.get_device_module(device.type).synchronize(device)
    except torch.OutOfMemoryError:
        return  # the kernel is not to blame
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    reason = records.printable(wrong) if wrong else ""
    entry = Entry(key, name, "broken" if wrong else "verified", records.today(), reason=reason)
    unkept = evidence.keep(entry, torch.get_num_threads())
    seconds, subject = time.perf_counter() - begin, f"{spec_of(request.cell).name} of {key.dtype} on {name} ({kernel})"
    note = "" if unkept is None else f"; this is not kept for the next process: {unkept}"
    if wrong:
        warnings.warn(f"fastrnn does not use {subject}: {reason}{note}", stacklevel=2)
    else:
        logger.info("verified %s against the reference in %.1f s%s", subject, seconds, note)


# One process of a machine checks and the others wait for its record. A claim is no lock: it is ignored when it is old,
# and where it cannot be made every process checks for itself.


def _is_claimed(claim: Path) -> bool:
    """Whether another process has claimed this check; if not, this one has now."""
    try:
        claim.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return True
    except OSError:
        pass
    return False


def _release(claim: Path) -> None:
    with suppress(OSError):
        claim.unlink()


def _from_another_process(file: Path, claim: Path, key: Key, name: str) -> Entry | None:
    """The entry that another process makes; None if it does not come."""
    begin = time.monotonic()
    while time.monotonic() - begin < PATIENCE:
        record = records.read(file)
        entries = [entry for entry in record[1] if entry[:2] == (key, name)] if record else []
        if entries:
            return entries[0]
        try:
            if time.time() - claim.stat().st_mtime > PATIENCE:
                return None
        except OSError:  # released, and nothing was written
            return None
        time.sleep(0.05)
    return None
