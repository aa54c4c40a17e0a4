"""`GradientMonitor`: what the gradient does on its way back through time, module by module and step by step.

Inside the monitor every `fastrnn.LSTM`, `GRU` and `RNN` of a model gets a tap per call, whose "gradient" is the norms
that the backward scan reduces as it goes; `report.py` turns them into gains and verdicts, `advice.py` into words.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import calls
from .equations import accumulate_dtype
from .history import History
from .modules import _Cell, _Recurrent
from .report import Norms, Record, Report, records, unscaled


class GradientMonitor:
    """Watches the state gradients of every fastrnn LSTM, GRU and RNN inside `model`.

        with fastrnn.GradientMonitor(model) as monitor:
            loss_of(model(x)).backward()
        print(monitor.report())

    A training step is one `backward()`, or `accumulate` of them; `report()` is about the last one that was observed,
    `history` about all of them. Several calls of one module in a step are pooled as further samples (a shorter call
    counts as padded). Calls that need no gradient are left alone. A tap that the caller passes himself is read along.
    The single-step cells have no tap, and the gradient between two calls, as of a decoder that is called step by step,
    is not seen: each call's way back ends at its own first step. Off, and in the steps that `every` leaves out, no call
    has a tap and plain calls go to torch's own kernels; in an observed step they go through the scan, and its end waits
    for the device. A deep copy made inside is not watched. Inside, save the `state_dict`: a module with hooks on it
    cannot be pickled.

    Under DistributedDataParallel each rank's monitor sees its own samples and its own loss; `report(all_ranks=True)`
    pools them. Under activation checkpointing the gradient is seen once, whichever variant.

    A compiled forward cannot create a leaf, so for `torch.compile` the taps are allocated here, for up to `max_steps`
    steps and `batch` sequences, and stay in the graph whatever `every` says. Enter the monitor before the first call.
    One call per module and backward then (norms of several would add up), T is counted up to the last step that a
    gradient reached, resets look like gain 0, and the outputs are not looked at where a gradient is not finite.

    Args:
        model: any module, compiled or not.
        every: observe the first of every so many training steps. In those left out, `torch.autograd.grad` through a
            module counts as a backward.
        accumulate: backwards per training step, for gradient accumulation.
        loss_scale: what the loss was multiplied by before `backward()`, a number or a `torch.amp.GradScaler`; the norms
            are divided by it.
        max_steps, batch: largest T and B, both or neither; only for compiled models.

    Raises:
        ValueError: there is nothing to watch in the model, only one of max_steps and batch is given, a count is below
            1, or loss_scale is no positive number.
        TypeError: a count is no int.
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
        if not hasattr(loss_scale, "get_scale") and not 0 < float(loss_scale) < math.inf:
            raise ValueError(f"loss_scale should be a positive number or a GradScaler, got {loss_scale!r}")
        self.every, self.accumulate, self.loss_scale = every, accumulate, loss_scale
        self._sizes = None if max_steps is None else (max_steps, batch)
        self._modules: dict[str, _Recurrent] = {}
        for name, module in model.named_modules():
            if isinstance(module, _Recurrent):
                name = ".".join(part for part in name.split(".") if part != "_orig_mod")  # of what is compiled
                self._modules[name or type(module).__name__.lower()] = module
        if not self._modules:
            cells = any(isinstance(module, _Cell) for module in model.modules())
            remedy = "its single-step cells have no norms" if cells else "fastrnn.convert(model) replaces torch.nn's"
            raise ValueError(f"{type(model).__name__} holds no fastrnn.LSTM, GRU or RNN; {remedy}")
        self.history = History()
        self._handles: list = []
        self._sinks: list[Callable[[int, Report], None]] = []
        self._norm_sinks: list[Callable[[str, Tensor], None]] = []
        self._backwards = 0
        self._observing = True
        self._running: int | None = None  # the engine's number of the backward under way
        # Of that backward: module, norms [L*D, 2, S, T, B], and what `unscaled` wants to know of the call.
        self._taps: list[tuple[str, Tensor, dict[str, Tensor | None]]] = []
        self._tapped: dict[str, Tensor | None] | None = None  # the same of the call under way
        self._open: dict[str, list[Norms]] = {}  # of the training step under way
        self._norms: dict[str, list[Norms]] = {}  # of the last one

    def enable(self) -> None:
        """Installs the hooks; `with` does it for you."""
        if self._handles:
            return
        for name, module in self._modules.items():
            hook = self._fresh_tap(name) if self._sizes is None else self._sliced_tap(name, module)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            if self._sizes is None:
                self._handles.append(module.register_forward_hook(self._look_at_output))
                if self.every > 1:
                    self._handles.append(module.register_forward_hook(self._count_untapped))

    def disable(self) -> None:
        """Removes the hooks. What has been recorded stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> "GradientMonitor":
        self.enable()
        return self

    def __exit__(self, *exception) -> None:
        self.disable()

    # ------------------------------------------------------------------------------------------------------- hooks

    def _fresh_tap(self, name: str):
        def hook(module, args, kwargs):
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break("a GradientMonitor in a compiled graph needs max_steps= and batch=")
            if module is not self._modules[name]:
                return None  # a deep copy, which took the hook along
            self._before_call()
            sizes = calls.steps_and_batch(module, args, kwargs)
            if not self._observing or sizes is None or not calls.needs_gradient(module, args, kwargs):
                return None
            tap = kwargs.get("tap")
            if tap is None:
                x = calls.data(args, kwargs)
                tap = torch.zeros(*calls.rows(module), *sizes, dtype=accumulate_dtype(x.dtype), device=x.device)
                tap.requires_grad_()
            elif not getattr(tap, "requires_grad", False):
                return None  # the module refuses it
            # Read through a view: it dies with the graph, so nothing is held for calls that never go backward.
            view = tap.view_as(tap)
            call = {"resets": calls.resets(module, args, kwargs), "lengths": calls.lengths(args, kwargs)}
            self._tapped = call
            view.register_hook(lambda norms: self._keep(name, norms, call))
            return args, {**kwargs, "tap": view}

        return hook

    def _sliced_tap(self, name: str, module: _Recurrent):
        weight = module.weight_hh_l0
        max_steps, max_batch = self._sizes
        dtype = accumulate_dtype(weight.dtype)
        leaf = torch.zeros(
            *calls.rows(module), max_steps, max_batch, dtype=dtype, device=weight.device, requires_grad=True
        )

        def collect(leaf):
            self._keep(name, leaf.grad, {})
            leaf.grad = None

        self._handles.append(leaf.register_post_accumulate_grad_hook(collect))

        def hook(module, args, kwargs):
            sizes = calls.steps_and_batch(module, args, kwargs)
            if sizes is None or kwargs.get("tap") is not None or not torch.is_grad_enabled():
                return None
            T, B = sizes
            if T > max_steps or B > max_batch:
                raise ValueError(f"the monitor has room for T = {max_steps}, B = {max_batch}; this call has {T}, {B}")
            return args, {**kwargs, "tap": leaf[..., :T, :B]}

        return hook

    def _look_at_output(self, module, args, output) -> None:
        """Not waiting for the device; whoever finds a gradient that is not finite reads it."""
        if self._tapped is not None:
            self._tapped["bad_outputs"] = calls.bad_outputs(module, output)
            self._tapped = None

    def _count_untapped(self, module, args, output) -> None:
        """In the steps that `every` leaves out, a backward is known by the outputs that it comes through."""
        if self._observing or torch._C._functorch.peek_interpreter_stack() is not None:
            return
        y, *states = output
        hidden = states[0] if isinstance(states[0], tuple) else states[:1]
        for tensor in (y.data if isinstance(y, PackedSequence) else y, *hidden):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: self._enter_backward())

    def _before_call(self) -> None:
        if torch._C._current_graph_task_id() != -1:
            self._enter_backward()  # a checkpoint computes again, in a backward inside of the one under way
        elif self._running is not None:  # which therefore ended in an exception
            self._running = None
            self._taps.clear()

    def _keep(self, name: str, norms: Tensor, call: dict[str, Tensor | None]) -> None:
        self._enter_backward()
        if self._observing or self._sizes is None:
            self._taps.append((name, norms.detach(), call))

    def _enter_backward(self) -> None:
        """Called by everything that happens in a backward; the first time it asks to be told of the end."""
        task = torch._C._current_graph_task_id()
        nested = self._sizes is None  # the only way to meet another number; in compiled models one that ended early
        if self._running is None or (task != self._running and not nested):
            self._running = task
            self._taps.clear()
            torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)

    def _leave_backward(self) -> None:
        self._running = None
        scaler = getattr(self.loss_scale, "get_scale", None)
        scale = float(self.loss_scale) if scaler is None else scaler()
        for name, norms, call in self._taps:
            bound = self._modules[name].clip_state_grad_norm
            self._open.setdefault(name, []).append(unscaled(norms, bound, scale, **call))
        for sink in self._norm_sinks:
            for name, norms, _ in self._taps:
                sink(name, norms)
        self._taps.clear()
        self._backwards += 1
        if self._backwards % self.accumulate == 0 and self._open:
            self._norms, self._open = self._open, {}
            self._close_step(self._backwards // self.accumulate - 1)
        self._observing = self._backwards // self.accumulate % self.every == 0

    def _close_step(self, step: int) -> None:
        observed = Report(self._last_records())
        self.history.append(step, observed)
        for sink in self._sinks:
            sink(step, observed)

    # ----------------------------------------------------------------------------------------------------- results

    def _last_records(self, all_ranks: bool = False) -> list[Record]:
        norms, trim = _gathered(self._norms) if all_ranks else self._norms, self._sizes is not None
        return [r for name, m in self._modules.items() if name in norms for r in records(name, m, norms[name], trim)]

    def report(self, *, all_ranks: bool = False) -> Report:
        """The records of the last observed step, by module (in the model's order), layer, direction and state; and one
        finding per layer and direction, with advice from the weights as they are now.

        Args:
            all_ranks: over the samples of all processes of torch.distributed's default group, as if they were one
                batch; B and T may differ between them, and every rank gets the same report. A collective: every rank
                must call it. The norms are those of each rank's own loss, before DDP averages the gradients.

        Raises:
            RuntimeError: all_ranks without an initialised process group.
        """
        from . import advice  # late, like the pictures: `import fastrnn` stays light

        found = self._last_records(all_ranks)
        return Report(found, advice.findings(self._modules, found))

    def scalars(self, *, all_ranks: bool = False) -> dict[str, float]:
        """`Report.scalars()` of the last observed step; `all_ranks` as in `report`."""
        return Report(self._last_records(all_ranks)).scalars()

    def log_to(self, sink) -> None:
        """Sends `Report.scalars()` to `sink` at the end of every observed step.

        Args:
            sink: anything with TensorBoard's `add_scalar(name, value, step)`; or a callable, which gets a dict that
                also holds the training step under `fastrnn/step`, like `wandb.log` or `list.append`.

        Raises:
            TypeError: it is neither.
        """
        if hasattr(sink, "add_scalar"):
            self._sinks.append(lambda step, r: [sink.add_scalar(k, v, step) for k, v in r.scalars().items()])
        elif callable(sink):
            self._sinks.append(lambda step, r: sink({**r.scalars(), "fastrnn/step": step}))
        else:
            raise TypeError(f"log_to takes a callable or a SummaryWriter, got {type(sink).__name__}")

    def norms_to(self, sink: Callable[[str, Tensor], None]) -> None:
        """Calls `sink(module's name, norms [L*D, 2, S, T, B])` for every call, at the end of an observed backward.

        The norms are on the device, not yet unscaled; `penalties.AdaptiveClip.update` takes them.
        """
        self._norm_sinks.append(sink)

    def plot(self, path) -> None:
        """Writes the norms of the last observed step against the time step as a picture: PNG, or what the ending of the
        path says, as `.pdf` (needs matplotlib)."""
        from . import plots

        plots.gradient_norms(path, {"": self.report()})

    def plot_layers(self, folder) -> list[Path]:
        """Writes one picture per layer and direction, `folder/lstm.l0.png`: norms of h and of c in the last observed
        step, their heat maps over training step and time step, and the gain (needs matplotlib).

        Returns:
            The paths.
        """
        from . import plots

        return plots.layers(folder, self.report(), self.history)


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
