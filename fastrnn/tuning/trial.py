"""The child process of `tune`: compares a candidate with the reference, then times it.

`python -m fastrnn.tuning.trial` reads a job per line from its standard input and answers each with a line of JSON.
Lines that say what is running come before the answer, so that the parent knows what to blame where this process dies or
hangs.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from .. import evidence
from ..backend_table import row
from ..evidence import agreement, verification
from . import timing
from .job import Call, Job, build, torchs

RANDOM = frozenset({"zoneout", "recurrent_dropout", "locked_dropout"})
"""Features that draw masks: there two calls differ, and the scan alone is compared, on masks that are given."""
OF_TORCH = 16.0
"""The factor on the rounding floor for torch's own kernels, which set the measure for the others: oneDNN's gradient of
a bias is one float32 sum over T*B terms, with errors of up to 14 eps seen where the loop, of many small sums, had 1."""
TIMES = 3  # that the timing is taken, at most, until the two can be told apart
ROUNDS = 8  # of the timing; the interval of eight rounds leaves out one at either end
SAMPLE_SECONDS = 2e-3


# ------------------------------------------------------------------------------------------------------ the trial


class Broken(Exception):
    """A result that was right at first is wrong. It is the candidate's fault, also where it is the rival's result."""

    def __init__(self, wrong: str, name: str, candidate: str):
        super().__init__(f"after some calls, {wrong}" if name == candidate else f"after it, {name} is wrong: {wrong}")


class Trial:
    """A job made ready: the results that count as right, which all its candidates share."""

    def __init__(self, job: Job, say: Callable[[str], None]):
        self.job, self.say = job, say
        torch.set_num_threads(job.threads)
        self.dtype, self.call, self.module = getattr(torch, job.dtype), Call(job), build(job)
        self.another = self.call.at(-self.call.x)
        self.plain = job.rival == "aten"
        self.eps = verification.eps_of(self.dtype, job.device)
        self.exact: agreement.Tensors | None = None
        self.usual: list[agreement.Tensors] = []  # the results whose errors are the measure
        self.right: dict[tuple[str, ...], agreement.Tensors] = {}  # results that were found right, by their names
        if not RANDOM & set(job.features):
            say("reference")
            twin = build(job).double()
            twin.load_state_dict(self.module.state_dict())
            twin.backend = "reference"
            exact = Call(job, torch.float64)
            if agreement.has_kinks(job.cell) and self.eps <= agreement.FINE:
                near = agreement.near_kinks(lambda x: exact.at(x)(twin, True)["d x"], exact.x.detach(), self.eps)
                for call in (exact, self.call):
                    call.leave_out(near)
            self.exact = exact(twin, True)
            self.usual.append(self.call(self.on("reference"), True))
        say(job.rival)
        self.rival = torchs(job, self.module) if self.plain else self.on("reference")
        self.rival_is_wrong = None
        if self.plain and self.exact is not None:
            found = self.call(self.rival, True)
            self.rival_is_wrong = self.disagreement(found, OF_TORCH)
            self.usual.append(found)

    def on(self, backend: str) -> torch.nn.Module:
        own = type(self.module).__new__(type(self.module))
        own.__dict__.update(self.module.__dict__)
        own.backend = backend
        return own

    def disagreement(self, found: agreement.Tensors, rounding: float = 1.0) -> str | None:
        exact = {name: value for name, value in self.exact.items() if name in found}
        return agreement.disagreement(found, self.usual, exact, self.eps, rounding)

    def differ(self, results: list[agreement.Tensors]) -> str | None:
        """What is wrong with some of these results, most of which are the same bits as before."""
        if self.exact is None:
            return None
        for found in results:
            key = tuple(found)
            right = self.right.get(key, {})
            if not all(name in right and torch.equal(value, right[name]) for name, value in found.items()):
                if (reason := self.disagreement(found)) is not None:
                    return reason
                self.right[key] = found
        return None

    def wrong(self, module: torch.nn.Module) -> str | None:
        """What is wrong with a module's results, forward and backward; None where nothing is, or masks are drawn.

        Another call runs between forward and backward, and one after it: a candidate that uses the memory of its
        results again shows.
        """
        if self.exact is None:
            return None

        def another() -> None:
            self.another(module, gradients)

        for gradients in dict.fromkeys((True, self.job.gradients)):
            found = self.call(module, gradients, another)
            another()
            if (reason := self.disagreement(found)) is not None:
                return reason
        return None

    def changed(self) -> str | None:
        """What is no longer as it was in the whole process, where every further time and result would follow it."""
        for name, now, before in (
            ("the number of threads", torch.get_num_threads(), self.job.threads),
            ("the default dtype", torch.get_default_dtype(), torch.float32),
            ("the gradient mode", torch.is_grad_enabled(), True),
        ):
            if now != before:
                return f"it changes {name} from {before} to {now}"
        return None

    def run(self, candidate: str, seconds: float) -> dict[str, Any]:
        """The answer: `broken` with a reason, `blame` naming the one that is; or `ratio` and both medians."""
        job = self.job
        if self.rival_is_wrong is not None:
            return {"broken": self.rival_is_wrong, "blame": job.rival}
        self.say(candidate)
        module = self.on(candidate)
        wrong = self.wrong(module) or self.changed()
        if wrong is None and row(candidate).launcher is not None and (self.exact is None or job.device != "cpu"):
            device = torch.device(job.device)
            wrong = verification.check(row(candidate).launcher, job.request(), min(job.batch, 32), device)
        if wrong is not None:
            return {"broken": wrong, "blame": candidate}
        modules = {job.rival: self.rival, candidate: module}
        taken: dict[str, list[agreement.Tensors]] = {name: [] for name in modules}  # the results, compared later

        def timed(name: str) -> Callable[[int], None]:
            return lambda _: taken[name].append(self.call(modules[name], job.gradients))

        def look(running: str) -> None:
            self.say(running)  # a sign of life
            for name, results in taken.items():
                wrong = self.differ(results)
                results.clear()
                if wrong is not None:
                    raise Broken(wrong, name, candidate)
            if (changed := self.changed()) is not None:
                raise Broken(changed, candidate, candidate)

        calls = {name: timed(name) for name in modules}
        shares: list[float] = []
        try:
            for _ in range(TIMES):
                samples = timing.interleave(
                    calls, job.device, seconds, set(), warmup=0.0, rounds=ROUNDS, sample=SAMPLE_SECONDS, after=look
                )
                shares += timing.shares(samples[candidate], samples[job.rival])
                ratio = timing.figure(shares)
                if ratio.high < evidence.FASTER or ratio.low > 1:
                    break
            wrong = self.wrong(self.rival)
            if wrong is not None:
                raise Broken(wrong, job.rival, candidate)
        except Broken as broken:
            return {"broken": str(broken), "blame": candidate}
        return {"ratio": list(ratio), "seconds": {name: own.median for name, own in samples.items()}}


def answer(request: dict[str, Any], trials: dict[Job, Trial], say: Callable[[str], None]) -> dict[str, Any]:
    fields = request["job"]
    job = Job(**fields | {"features": tuple(fields["features"])})
    candidate = request["candidate"]
    reason = row(candidate).reason(job.request())
    if reason is not None:
        return {"cannot": reason}
    say.last = None  # type: ignore[attr-defined]
    try:
        if request.get("gpu") is not None:
            torch.get_device_module(job.device).set_device(request["gpu"])
        if job not in trials:
            trials.clear()
            trials[job] = Trial(job, say)
        return trials[job].run(candidate, request["seconds"])
    except torch.OutOfMemoryError as error:
        return {"cannot": str(error)}
    except Exception as error:
        reason, blame = f"{type(error).__name__}: {error}", getattr(say, "last", None)
        # Before anything ran, the call itself could not be made: there is no such device, or no such batch.
        return {"cannot": reason} if blame is None else {"broken": reason, "blame": blame}


def main() -> None:
    """Answers until the input ends. What libraries print goes to the standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def say(name: str) -> None:
        say.last = name  # type: ignore[attr-defined]
        send({"running": name})

    send({"ready": os.getpid()})
    trials: dict[Job, Trial] = {}
    for line in sys.stdin:
        send(answer(json.loads(line), trials, say))


if __name__ == "__main__":
    main()
