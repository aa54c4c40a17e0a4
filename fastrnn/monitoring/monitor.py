"""`GradientMonitor`: the norms of the gradient on its way back through time, by module and step.

Inside the monitor every `fastrnn.LSTM`, `GRU` and `RNN` of a model gets a tap per call: a leaf whose "gradient" is the
norms that the backward scan reduces as it goes. `diagnosis.py` turns them into gains and verdicts, `advice.py` into
advice.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..equations import accumulate_dtype
from ..modules import _Cell, _Recurrent
from . import calls
from .diagnosis import Norms, Record, Report, records, unscaled
from .history import History


class GradientMonitor:
    """Watches the state gradients of every fastrnn LSTM, GRU and RNN inside `model`.

        with fastrnn.GradientMonitor(model) as monitor:
            loss_of(model(x)).backward()
        print(monitor.report())

    A training step is one `backward()`, or `accumulate` of them. `report()` is about the last observed step, `history`
    about all of them. Several calls of one module in a step are pooled as further samples; a shorter call counts as
    padded. Calls that need no gradient are left alone. A tap that the caller passes is read, too.

    Not seen: the single-step cells, which have no tap, and the gradient between two calls, as in a decoder that is
    called step by step. Each call's way back ends at its own first step. A deep copy made inside is not watched.

    In an observed step plain calls run on the scan instead of torch's own kernels, and the end of the step waits for
    the device. Outside the monitor, and in the steps that `every` leaves out, nothing changes. Inside, save the
    `state_dict`: a module with hooks cannot be pickled.

    Under DistributedDataParallel each rank's monitor sees its own samples and its own loss; `report(all_ranks=True)`
    pools them. Under activation checkpointing the gradient is seen once, whichever variant.

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
        TypeError: a count is not an int.
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
                name = ".".join(part for part in name.split(".") if part != "_orig_mod")  # torch.compile's
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
        self._running: int | None = None  # the engine's number of the running backward
        # Of the running backward: module, norms [L*D, 2, S, T, B], and the call's arguments for `unscaled`.
        self._taps: list[tuple[str, Tensor, dict[str, Tensor | None]]] = []
        self._tapped: dict[str, Tensor | None] | None = None  # of the running forward: the arguments for `unscaled`
        self._open: dict[str, list[Norms]] = {}  # of the training step that has begun
        self._norms: dict[str, list[Norms]] = {}  # of the last complete one

    def enable(self) -> None:
        """Installs the hooks, as entering the `with` block does."""
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
        """Removes the hooks. The records stay readable."""
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
                return None  # a deep copy, which has a copy of the hook
            self._before_call()
            sizes = calls.steps_and_batch(module, args, kwargs)
            if not self._observing or sizes is None or not calls.needs_gradient(module, args, kwargs):
                return None
            tap = kwargs.get("tap")
            if tap is None:
                x = calls.data(args, kwargs)
                tap = torch.zeros(*calls.tap_shape(module), *sizes, dtype=accumulate_dtype(x.dtype), device=x.device)
                tap.requires_grad_()
            elif not getattr(tap, "requires_grad", False):
                return None  # the module refuses it
            # The hook is on a view, which dies with the graph: a call without a backward leaves nothing behind.
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
            *calls.tap_shape(module), max_steps, max_batch, dtype=dtype, device=weight.device, requires_grad=True
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
        """Marks the outputs that are not finite, without waiting for the device: read only if a norm is not finite."""
        if self._tapped is not None:
            self._tapped["bad_outputs"] = calls.bad_outputs(module, output)
            self._tapped = None

    def _count_untapped(self, module, args, output) -> None:
        """In the steps that `every` leaves out, hooks on the outputs detect a backward."""
        if self._observing or torch._C._functorch.peek_interpreter_stack() is not None:
            return
        y, *states = output
        hidden = states[0] if isinstance(states[0], tuple) else states[:1]
        for tensor in (y.data if isinstance(y, PackedSequence) else y, *hidden):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: self._enter_backward())

    def _before_call(self) -> None:
        if torch._C._current_graph_task_id() != -1:
            self._enter_backward()  # a checkpoint recomputes its forward, in a backward inside the running one
        elif self._running is not None:  # that backward has ended, in an exception
            self._running = None
            self._taps.clear()

    def _keep(self, name: str, norms: Tensor, call: dict[str, Tensor | None]) -> None:
        self._enter_backward()
        if self._observing or self._sizes is None:
            self._taps.append((name, norms.detach(), call))

    def _enter_backward(self) -> None:
        """Called by every hook of a backward; the first call registers a callback for the end of that backward."""
        task = torch._C._current_graph_task_id()
        # Another number is a nested backward (a checkpoint's); in compiled models, the one after an exception.
        nested = self._sizes is None
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
        return Report(found, advice.findings(self._modules, found))

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
