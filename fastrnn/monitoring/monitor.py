"""`GradientMonitor`: the norms of the gradient on its way back through time, by module and step.

Inside the monitor every `fastrnn.LSTM`, `GRU` and `RNN` of a model gets a tap per call: a leaf whose "gradient" is the
norms that the backward scan reduces as it goes. `diagnosis.py` turns them into gains and verdicts, `advice.py` into
advice.
"""

import math
import threading
import weakref
from collections.abc import Callable
from functools import partial
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..cell_table import spec_of
from ..convert import left_alone
from ..equations import accumulate_dtype
from ..modules import _Recurrent
from ..single_step import _Cell
from .calls import Note
from .diagnosis import Kind, Norms, Record, Report, kind_of, records, unscaled
from .history import History, Pending
from .prescription import watched
from .stitching import stitched
from .watch import Backward, Watch, Watches

SHORT = 0.5
"""A batch with less than this share of the steps of the largest one gets a note in the report: the last of an epoch."""

MOST_PENDING = 1 << 14
"""The most norms of a training step whose report is made only when somebody reads it: the history holds some hundreds
of steps, which then take no more than 32 MiB."""


class Step(NamedTuple):
    """The size of an observed training step."""

    step: int
    samples: int  # of the call with the most
    T: int
    pairs: int  # of steps and samples, in all calls


class GradientMonitor:
    """Watches the state gradients of every fastrnn LSTM, GRU and RNN inside `model`.

        with fastrnn.GradientMonitor(model) as monitor:
            loss_of(model(x)).backward()
        print(monitor.report())

    A training step is one `backward()`, or `accumulate` of them. `report()` is about the last observed step, `history`
    about all of them. Other calls of one module in a step are pooled as further samples; a shorter call counts as
    padded. Calls that need no gradient are left alone. A tap that the caller passes is read, too.

    Where the final states of a call become the initial ones of the next, also through other operations (a mask at
    the end of an episode, say), the two are one sequence of the report. Where that cannot be told, because two calls
    continue the same one, or the state is made of an output, or the module is bidirectional, the report says that the
    gradient was cut there. Not seen: the single-step cells, which have no tap.

    In an observed step plain calls run on the scan instead of torch's own kernels, and the end of the step waits for
    the device. Outside the monitor, and in the steps that `every` leaves out, nothing changes. A module taps itself in
    its own `forward`, so it does not matter how it is called: by a subclass, a wrapper, under hooks, from any thread.
    What is saved inside, or copied, is not watched.

    Under DistributedDataParallel each rank's monitor sees its own samples and its own loss; `report(all_ranks=True)`
    pools them. DataParallel's replicas are pooled. Under activation checkpointing the gradient is seen once, whichever
    variant; with use_reentrant=True the backward has to be inside the monitor, too.

    A compiled forward cannot create a leaf, so for `torch.compile` the monitor allocates the taps, for up to
    `max_steps` steps and `batch` sequences; they stay in the graph whatever `every` says. Enter the monitor before the
    first call, and call each module once per backward (the norms of several calls would add up). T is then counted up
    to the last step that a gradient reached, resets look like gain 0, and where a gradient is not finite the outputs
    are not searched for the cause.

    Args:
        model: any module, compiled or not.
        every: observe the first of every so many training steps. In the others, `torch.autograd.grad` through a module
            counts as a backward.
        accumulate: backwards per training step, for gradient accumulation.
        loss_scale: the factor by which the loss was multiplied before `backward()`, a number or a
            `torch.amp.GradScaler`; the norms are divided by it.
        max_steps, batch: largest T and B, both or neither; only for compiled models.

    Raises:
        ValueError: the model holds no fastrnn LSTM, GRU or RNN, only one of max_steps and batch is given, a count is
            below 1, or loss_scale is not a positive number.
        TypeError: `model` is no module, or a count is not an int.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        accumulate: int = 1,
        loss_scale: float | torch.amp.GradScaler = 1.0,
        max_steps: int | None = None,
        batch: int | None = None,
    ):
        if (max_steps is None) != (batch is None):
            raise ValueError(f"max_steps and batch go together, got max_steps={max_steps}, batch={batch}")
        counts = {"every": every, "accumulate": accumulate, "max_steps": max_steps, "batch": batch}
        for name, count in counts.items():
            if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
                raise TypeError(f"{name} should be of type int, got: {type(count).__name__}")
            if count is not None and count < 1:
                raise ValueError(f"{name} is a count and at least 1, got {count}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"GradientMonitor takes a module, got {model!r}")
        if not hasattr(loss_scale, "get_scale") and not (
            isinstance(loss_scale, (Real, Tensor)) and 0 < loss_scale < math.inf
        ):
            raise ValueError(f"loss_scale should be a positive number or a GradScaler, got {loss_scale!r}")
        self.every, self.accumulate, self.loss_scale = every, accumulate, loss_scale
        self._sizes = None if max_steps is None else (max_steps, batch)
        self._modules = watched(model)
        if not self._modules:
            raise ValueError(f"{type(model).__name__} holds no fastrnn.LSTM, GRU or RNN; {_remedy(model)}")
        self.history = History()
        self.observing = True
        """Whether a call now belongs to a training step that is observed."""
        self._watches: dict[str, Watch] = {}  # while enabled
        self._handles: list = []
        self._sinks: list[Callable[[int, Report], None]] = []
        self._norm_sinks: list[Callable[[str, Tensor], None]] = []
        self._backwards = 0
        self._due = 0  # the training step that is to be observed next
        self._running: weakref.WeakValueDictionary[int, Backward] = weakref.WeakValueDictionary()  # by the engine's id
        self._thread = threading.local()  # .backward: a weak reference to the last one that this thread had a part in
        self._lock = threading.RLock()
        self._step: Step | None = None  # the last one that was observed
        self._largest: Step | None = None
        self._open: dict[str, list[Norms]] = {}  # of the training step that has begun
        self._norms: dict[str, list[Norms]] = {}  # of the last complete one

    def enable(self) -> None:
        """Begins to watch, as entering the `with` block does."""
        if self._watches:
            return
        for name, module in self._modules.items():
            watch = Watch(self, name, None if self._sizes is None else self._leaf(name, module))
            self._watches[name] = watch
            others = () if module._watch is None else module._watch.watches
            vars(module)["_watch"] = Watches((*others, watch))

    def disable(self) -> None:
        """Ends the watch. The records stay readable."""
        for name, watch in self._watches.items():
            module = self._modules[name]
            others = tuple(other for other in module._watch.watches if other is not watch)
            if others:
                vars(module)["_watch"] = Watches(others)
            else:
                del vars(module)["_watch"]
        for handle in self._handles:
            handle.remove()
        self._watches.clear()
        self._handles.clear()

    def __enter__(self) -> "GradientMonitor":
        self.enable()
        return self

    def __exit__(self, *exception) -> None:
        self.disable()

    def __deepcopy__(self, memo):
        raise TypeError("a GradientMonitor cannot be copied: it belongs to the modules that it watches")

    # -------------------------------------------------------------------------------- called by the watched modules

    def _leaf(self, name: str, module: _Recurrent) -> Tensor:
        """The tap from which the calls of a compiled module get their parts."""
        rows, weight = module.num_layers * (2 if module.bidirectional else 1), module.weight_hh_l0
        leaf = torch.zeros(
            rows, 2, len(spec_of(module._cell).states), *self._sizes, dtype=accumulate_dtype(weight.dtype),
            device=weight.device, requires_grad=True,
        )  # fmt: skip

        def collect(leaf):
            self.keep(Note(name, bound=module.clip_state_grad_norm), leaf.grad)
            leaf.grad = None

        self._handles.append(leaf.register_post_accumulate_grad_hook(collect))
        return leaf

    def running_backward(self) -> "weakref.ref[Backward] | None":
        """The backward in which this thread is running a forward, to recompute it; None outside of one."""
        if torch._C._current_graph_task_id() == -1:
            return None
        return weakref.ref(self._backward())

    def enter_backward(self, outer: "weakref.ref[Backward] | None" = None) -> Backward:
        """Called by every hook of a backward; `outer`: the `running_backward` of the hook's forward."""
        backward = None if outer is None else outer()
        backward = self._backward() if backward is None else backward
        backward.counts = True
        return backward

    def _backward(self) -> Backward:
        """The running backward; of nested ones, which checkpoints start, the outermost."""
        task = torch._C._current_graph_task_id()
        with self._lock:
            backward = self._running.get(task)
            if backward is None:
                backward = getattr(self._thread, "backward", lambda: None)()
                if backward is None:
                    backward = Backward(self.leave_backward)
                    torch.autograd.Variable._execution_engine.queue_callback(backward)
                self._running[task] = backward
            self._thread.backward = weakref.ref(backward)
        return backward

    def keep(self, note: Note, norms: Tensor, outer: "weakref.ref[Backward] | None" = None) -> None:
        """Takes the norms of a call, in its backward."""
        norms = norms.detach() if note.order is None else norms.detach().index_select(-1, note.order)
        self.enter_backward(outer).taps.append((note, norms))

    def leave_backward(self, backward: Backward) -> None:
        """Called at the end of a backward."""
        with self._lock:
            self._thread.backward = lambda: None
            for task in [task for task, running in self._running.items() if running is backward]:
                del self._running[task]
            if backward.counts:
                self._count(backward.taps)

    def _count(self, taps: list[tuple[Note, Tensor]]) -> None:
        """Adds a backward to its training step, which it may complete."""
        step = self._backwards // self.accumulate
        if step >= self._due:
            scaler = getattr(self.loss_scale, "get_scale", None)
            scale = float(self.loss_scale) if scaler is None else scaler()
            calls = [
                (note, unscaled(norms, note.bound, scale, note.resets, note.lengths, note.bad_outputs))
                for note, norms in taps
            ]
            for name, call in stitched(calls):
                self._open.setdefault(name, []).append(call)
            for sink in self._norm_sinks:
                for note, norms in taps:
                    sink(note.name, norms)
        self._backwards += 1
        if self._backwards % self.accumulate == 0 and self._open:
            self._norms, self._open = self._open, {}
            self._due = (step // self.every + 1) * self.every
            self._close_step(step)
        self.observing = self._backwards // self.accumulate >= self._due

    def _close_step(self, step: int) -> None:
        observed = self._pending() or Report(self._last_records())
        pairs = sum(int(call.lengths.sum()) for calls in self._norms.values() for call in calls)
        sizes = max((c.norms.shape[-1], c.norms.shape[-2]) for calls in self._norms.values() for c in calls)
        self._step = Step(step, *sizes, pairs)
        if self._largest is None or pairs >= self._largest.pairs:
            self._largest = self._step
        self.history.append(step, observed)
        for sink in self._sinks:
            sink(step, observed)

    def _pending(self) -> Pending | None:
        """The report of the last step, to be made later; None where it is wanted now, or its norms are many."""
        norms = self._norms
        if self._sinks or sum(call.norms.numel() for calls in norms.values() for call in calls) > MOST_PENDING:
            return None
        kinds = {name: kind_of(module) for name, module in self._modules.items() if name in norms}
        names = tuple(one for name, kind in kinds.items() for one in kind.names(name))
        return Pending(partial(_report, kinds, norms, self._sizes is not None), names)

    # ----------------------------------------------------------------------------------------------------- results

    def _last_records(self, all_ranks: bool = False) -> list[Record]:
        norms = _gathered(self._norms) if all_ranks else self._norms
        kinds = {name: kind_of(module) for name, module in self._modules.items() if name in norms}
        return _report(kinds, norms, self._sizes is not None).records

    def report(self, *, all_ranks: bool = False) -> Report:
        """The records of the last observed step, by module (in the model's order), layer, direction and state.

        It also has one finding per layer and direction, with advice from the weights as they are now.

        Args:
            all_ranks: pool the samples of all processes of torch.distributed's default group into one batch; B and T
                may differ between them, and every rank gets the same report. This is a collective: every rank must
                call it. The norms are those of each rank's own loss, before DDP averages the gradients.

        Raises:
            RuntimeError: all_ranks without an initialised process group.
        """
        from . import advice  # late, as plots below: `import fastrnn` stays light

        found = self._last_records(all_ranks)
        return Report(found, advice.findings(self._modules, found), "" if all_ranks else self._note())

    def _note(self) -> str:
        """A warning where the report is of a batch that is much smaller than others were."""
        last, largest = self._step, self._largest
        if last is None or last.pairs >= SHORT * largest.pairs:
            return ""
        return (
            f"this is training step {last.step}, with {last.samples} sequences of up to {last.T} steps; step "
            f"{largest.step} had {largest.samples} of up to {largest.T}: monitor.history has the steps before"
        )

    def scalars(self, *, all_ranks: bool = False) -> dict[str, float]:
        """`Report.scalars()` of the last observed step; `all_ranks` as in `report`."""
        return Report(self._last_records(all_ranks)).scalars()

    def log_to(self, sink) -> None:
        """Sends `Report.scalars()` to `sink` at the end of every observed step.

        Args:
            sink: an object with TensorBoard's `add_scalar(name, value, step)`; or a callable like `wandb.log` or
                `list.append`, which gets a dict that also holds the training step under `fastrnn/step`.

        Raises:
            TypeError: the sink is neither.
        """
        if hasattr(sink, "add_scalar"):
            self._sinks.append(lambda step, r: [sink.add_scalar(k, v, step) for k, v in r.scalars().items()])
        elif callable(sink):
            self._sinks.append(lambda step, r: sink({**r.scalars(), "fastrnn/step": step}))
        else:
            raise TypeError(f"log_to takes a callable or a SummaryWriter, got {type(sink).__name__}")

    def norms_to(self, sink: Callable[[str, Tensor], None]) -> None:
        """Calls `sink(module's name, norms [L*D, 2, S, T, B])` for every call, at the end of an observed backward.

        The norms are on the device and not yet divided by the loss scale; `penalties.AdaptiveClip.update` takes them.
        """
        self._norm_sinks.append(sink)

    def plot(self, path) -> None:
        """Writes a picture of the norms of the last observed step against the time step (needs matplotlib).

        The format is PNG, unless the ending of the path names another one, like `.pdf`.
        """
        from . import plots

        plots.gradient_norms(path, {"": self.report()})

    def plot_layers(self, folder) -> list[Path]:
        """Writes one picture per layer and direction, `folder/lstm.l0.png` (needs matplotlib).

        It shows the norms of each state in the last observed step, their heat maps over training step and time step,
        and the gain.

        Returns:
            The paths.
        """
        from . import plots

        return plots.layers(folder, self.report(), self.history)


def _report(kinds: dict[str, Kind], norms: dict[str, list[Norms]], trim: bool) -> Report:
    return Report(r for name, kind in kinds.items() for r in records(name, kind, norms[name], trim))


def _remedy(model: nn.Module) -> str:
    """What to do about a model in which there is nothing to watch."""
    if any(isinstance(module, _Cell) for module in model.modules()):
        return "its single-step cells have no norms"
    left = left_alone(model)
    if not left:
        return "fastrnn.convert(model) replaces torch.nn's"
    module, reason = left[0]
    kind = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    return (
        f"its {type(module).__name__} {reason}, so fastrnn.convert leaves it as it is: write it with fastrnn."
        f"{kind.__name__} in the place of torch.nn.{kind.__name__}"
    )


def _gathered(norms: dict[str, list[Norms]]) -> dict[str, list[Norms]]:
    """The norms of all ranks, each module's calls in the order of the ranks."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "all_ranks=True gathers over torch.distributed, which is not initialised: call "
            "torch.distributed.init_process_group first, or leave all_ranks out for this process alone"
        )
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, norms)
    return {name: [call for rank in ranks for call in rank.get(name, ())] for rank in ranks for name in rank}
