"""`GradientMonitor`: what the gradient does on its way back through time, module by module and step by step.

Inside the monitor every `fastrnn.LSTM`, `GRU` and `RNN` of a model gets a tap per call, whose "gradient" is the norms
that the backward scan reduces as it goes; `report.py` turns them into gains and verdicts.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import plots, report
from .cells import CELLS
from .modules import _Recurrent
from .reference import accumulate_dtype
from .report import Report


class GradientMonitor:
    """Watches the state gradients of every fastrnn LSTM, GRU and RNN inside `model`.

        with fastrnn.GradientMonitor(model) as monitor:
            loss_of(model(x)).backward()
        print(monitor.report())

    The report is about the last `backward()`; older ones are forgotten. Several calls of one module in it are pooled as
    further samples (a shorter call counts as padded). Calls that need no gradient are left alone. A tap that the caller
    passes himself is read along. The single-step cells have no tap. Off, it costs nothing; on, a call that could have
    gone to torch's own kernels goes through the scan.

    A compiled forward cannot create a leaf, so for `torch.compile` the taps are allocated here, for up to `max_steps`
    steps and `batch` sequences. Enter the monitor before the first call. One call per module and backward then (norms
    of several would add up), T is counted up to the last step that a gradient reached, and resets look like gain 0.

    Args:
        model: any module, compiled or not.
        max_steps, batch: largest T and B, both or neither; only for compiled models.

    Raises:
        ValueError: there is nothing to watch in the model, or only one of max_steps and batch is given.
    """

    def __init__(self, model: nn.Module, *, max_steps: int | None = None, batch: int | None = None):
        if (max_steps is None) != (batch is None):
            raise ValueError(f"max_steps and batch go together, got max_steps={max_steps}, batch={batch}")
        self._sizes = None if max_steps is None else (max_steps, batch)
        self._modules: dict[str, _Recurrent] = {}
        for name, module in model.named_modules():
            if isinstance(module, _Recurrent):
                name = name.removeprefix("_orig_mod").removeprefix(".")  # of a compiled model
                self._modules[name or type(module).__name__.lower()] = module
        if not self._modules:
            raise ValueError(
                f"{type(model).__name__} holds no fastrnn.LSTM, GRU or RNN; fastrnn.convert(model) puts them in place "
                "of torch.nn's"
            )
        self._handles: list = []
        self._backward: int | None = None  # the engine's number of the backward that `_norms` is about
        self._norms: dict[str, list[tuple[Tensor, Tensor | None]]] = {}  # per call: [L*D, 2, S, T, B], resets [T, B]

    def enable(self) -> None:
        """Installs the hooks; `with` does it for you."""
        if self._handles:
            return
        for name, module in self._modules.items():
            hook = self._fresh_tap(name) if self._sizes is None else self._sliced_tap(name, module)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

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

    def _fresh_tap(self, name: str):
        def hook(module, args, kwargs):
            sizes = _steps_and_batch(module, args, kwargs)
            if sizes is None or not _needs_gradient(module, args, kwargs):
                return None
            tap = kwargs.get("tap")
            if tap is None:
                x = _data(args, kwargs)
                tap = torch.zeros(*_rows(module), *sizes, dtype=accumulate_dtype(x.dtype), device=x.device)
                tap.requires_grad_()
            elif not tap.requires_grad:
                return None
            # Read through a view: it dies with the graph, so nothing is held for calls that never go backward.
            view = tap.view_as(tap)
            resets = _resets(module, args, kwargs)
            view.register_hook(lambda norms: self._keep(name, norms, resets))
            return args, {**kwargs, "tap": view}

        return hook

    def _sliced_tap(self, name: str, module: _Recurrent):
        weight = module.weight_hh_l0
        max_steps, max_batch = self._sizes
        dtype = accumulate_dtype(weight.dtype)
        leaf = torch.zeros(*_rows(module), max_steps, max_batch, dtype=dtype, device=weight.device, requires_grad=True)

        def collect(leaf):
            self._keep(name, leaf.grad, None)
            leaf.grad = None

        self._handles.append(leaf.register_post_accumulate_grad_hook(collect))

        def hook(module, args, kwargs):
            sizes = _steps_and_batch(module, args, kwargs)
            if sizes is None or kwargs.get("tap") is not None or not torch.is_grad_enabled():
                return None
            T, B = sizes
            if T > max_steps or B > max_batch:
                raise ValueError(f"the monitor has room for T = {max_steps}, B = {max_batch}; this call has {T}, {B}")
            return args, {**kwargs, "tap": leaf[..., :T, :B]}

        return hook

    def _keep(self, name: str, norms: Tensor, resets: Tensor | None) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            self._norms.clear()
        self._norms.setdefault(name, []).append((norms.detach(), resets))

    def report(self, *, all_ranks: bool = False) -> Report:
        """The records of the last backward, by module (in the model's order), layer, direction and state.

        Args:
            all_ranks: over the samples of all processes of torch.distributed's default group, as if they were one
                batch; B and T may differ between them, and every rank gets the same report. A collective: every rank
                must call it. The norms are those of each rank's own loss, before DDP averages the gradients.

        Raises:
            RuntimeError: all_ranks without an initialised process group.
        """
        norms = self._norms if not all_ranks else _gathered(self._norms)
        records = Report()
        for name, module in self._modules.items():
            if name in norms:
                records += report.records(name, module, *report.pool(norms[name], self._sizes is not None))
        return records

    def scalars(self, *, all_ranks: bool = False) -> dict[str, float]:
        """The report as numbers for a logger, under names like `fastrnn/lstm.l0/h/gain_median`; `all_ranks` as there.

        horizon, total_max and total_min (over the steps that a gradient reached), `vanishing`, `exploding`
        and `nonfinite` as 0 or 1; gain_median, half_life and clipped where there is one.
        """
        values: dict[str, float] = {}
        for r in self.report(all_ranks=all_ranks):
            reached = r.total[r.valid > 0]
            entries = {
                "gain_median": r.gain_median,
                "half_life": r.half_life,
                "horizon": r.horizon,
                "total_max": float(reached.max()) if len(reached) else 0.0,
                "total_min": float(reached.min()) if len(reached) else 0.0,
                "clipped": r.clipped,
                "vanishing": r.verdict == "vanishing",
                "exploding": r.verdict == "exploding",
                "nonfinite": r.first_nonfinite is not None,
            }
            values |= {
                f"fastrnn/{r.name}/{r.state}/{k}": float(v) for k, v in entries.items() if v is not None and v == v
            }
        return values

    def plot(self, path) -> None:
        """Writes the norms against the time step as a picture (needs matplotlib)."""
        plots.gradient_norms(path, {"": self.report()})


def _gathered(norms):
    """`GradientMonitor._norms` of all ranks, each module's calls in the order of the ranks."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "all_ranks=True gathers over torch.distributed, which is not initialised: call "
            "torch.distributed.init_process_group first, or leave all_ranks out for this process alone"
        )
    # On the CPU: a tensor on a GPU would arrive on the sender's.
    mine = {
        name: [(n.cpu(), None if resets is None else resets.cpu()) for n, resets in calls]
        for name, calls in norms.items()
    }
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return {name: [call for rank in ranks for call in rank.get(name, ())] for rank in ranks for name in rank}


# ------------------------------------------------------------------------------------------------------------ calls


def _data(args, kwargs):
    """The input tensor of a call; None where there is none."""
    x = args[0] if args else kwargs.get("input")
    return x.data if isinstance(x, PackedSequence) else x


def _rows(module: _Recurrent) -> tuple[int, int, int]:
    """`L*D, 2, S`."""
    return module.num_layers * (2 if module.bidirectional else 1), 2, len(CELLS[module._cell].states)


def _steps_and_batch(module: _Recurrent, args, kwargs) -> tuple[int, int] | None:
    """T and B of a call; None for input that the module is about to refuse."""
    x = args[0] if args else kwargs.get("input")
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes), int(x.batch_sizes[0])
    if not isinstance(x, Tensor) or x.dim() not in (2, 3) or not x.is_floating_point():
        return None
    if x.dim() == 2:
        return x.shape[0], 1
    return (x.shape[1], x.shape[0]) if module.batch_first else (x.shape[0], x.shape[1])


def _needs_gradient(module: _Recurrent, args, kwargs) -> bool:
    if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    hx = args[1] if len(args) > 1 else kwargs.get("hx")
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    tensors = (_data(args, kwargs), *states, *module.parameters())
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _resets(module: _Recurrent, args, kwargs) -> Tensor | None:
    """The call's reset mask as `[T, B]`."""
    mask, x = kwargs.get("reset_mask"), args[0] if args else kwargs.get("input")
    if mask is None or mask.dim() == 1:
        return None if mask is None else mask.unsqueeze(1)
    return mask.transpose(0, 1) if module.batch_first and isinstance(x, Tensor) and x.dim() == 3 else mask
