"""What a module has of the monitors that watch it: its `forward` tells a `Watches` of every call, however it is called.

Copies and pickles of a module carry none; the replicas of DataParallel share that of their original.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import recomputation
from ..checks import Call
from ..functional import steps_and_batch, with_tap
from ..linear import transformed
from .calls import Note, leave, note_of
from .stitching import watch_states


class Watch:
    """One monitor's watch over one module."""

    def __init__(self, monitor, name: str, leaf: Tensor | None):
        self.monitor, self.name = monitor, name  # a GradientMonitor, and the module's name there
        self.leaf = leaf  # [L*D, 2, S, max_steps, batch], of which calls get a part; None: each call gets its own tap

    def has_room(self, T: int, B: int) -> bool:
        return self.leaf is not None and T <= self.leaf.shape[-2] and B <= self.leaf.shape[-1]

    def slice(self, T: int, B: int) -> Tensor:
        if not self.has_room(T, B):
            max_steps, batch = self.leaf.shape[-2:]
            raise ValueError(f"the monitor has room for T = {max_steps}, B = {batch}; this call has {T}, {B}")
        return self.leaf[..., :T, :B]


class Watches:
    """All watches over one module."""

    def __init__(self, watches: tuple[Watch, ...]):
        self.watches = watches

    def __deepcopy__(self, memo) -> None:
        """A copy of a module is not watched."""

    def __reduce__(self):
        return type(None), ()

    def is_idle(self) -> bool:
        """Whether no call is to be tapped now."""
        return all(watch.leaf is None and not watch.monitor.observing for watch in self.watches)

    def begin(self, call: Call) -> tuple[Call, list[Note] | None]:
        """The call with a tap, where its norms are wanted, and a note for each monitor that wants them."""
        if not torch.compiler.is_compiling():
            return self._begin(call)
        T, B = steps_and_batch(call)
        for watch in self.watches:
            if not watch.has_room(T, B):
                # An error that is raised here would only make the compiler give up.
                torch._dynamo.graph_break(
                    "a GradientMonitor in a compiled graph needs max_steps= and batch= for the call"
                )
                return _begin_uncompiled(self, call)
            if call.tap is None and torch.is_grad_enabled():
                call = with_tap(call, watch.slice(T, B))
        return call, None

    def _begin(self, call: Call) -> tuple[Call, list[Note] | None]:
        wanted, again = self._wants(call), False
        if not torch.is_grad_enabled():
            for watch in self.watches:
                watch.monitor.running_backward()  # of which a checkpoint inside a checkpoint is a part
        else:
            wanted, again = recomputation.held("tapped", wanted, False)
        if not wanted:
            return call, None
        notes = []
        for watch in self.watches:
            if watch.leaf is not None:
                if call.tap is None:
                    call = with_tap(call, watch.slice(*steps_and_batch(call)))
                continue
            if call.tap is None:
                call = with_tap(call)
            if not again and watch.monitor.observing:
                note = note_of(watch.name, call, id(watch.monitor))
                call = with_tap(call, _followed(call.tap, note, watch.monitor))
                if note.before is not None:
                    call = call._replace(states=watch_states(note, call.states))
                notes.append(note)
        return (with_tap(call) if call.tap is None else call), notes

    def _wants(self, call: Call) -> bool:
        """Whether a backward may follow that a tap sees, which it does not under torch.func."""
        can = call.request.gradients or (call.tap is not None and torch.is_grad_enabled())
        return can and not self.is_idle() and not transformed() and steps_and_batch(call)[1] > 0

    def end(self, notes: list[Note] | None, call: Call, y: Tensor, states: tuple[Tensor, ...]) -> None:
        """Called with the call's outputs."""
        if torch.compiler.is_compiling():
            if any(watch.leaf is None for watch in self.watches):
                _end_uncompiled(self, notes, call, y, states)
            return
        self._end(notes, call, y, states)

    def _end(self, notes, call: Call, y: Tensor, states: tuple[Tensor, ...]) -> None:
        for note in notes or ():
            leave(note, call, y, states)
        self.count((y, states))

    def count(self, outputs) -> None:
        """In the steps that `every` leaves out, a hook on the outputs' nodes detects a backward."""
        monitors = [watch.monitor for watch in self.watches if watch.leaf is None and not watch.monitor.observing]
        if not monitors or transformed():
            return
        y, states = outputs
        states = states if isinstance(states, tuple) else (states,)
        nodes = {t.grad_fn for t in (y.data if isinstance(y, PackedSequence) else y, *states)} - {None}
        for monitor in monitors if nodes else ():
            outer = monitor.running_backward()

            def enter(grads, monitor=monitor, outer=outer) -> None:
                monitor.enter_backward(outer)

            for node in nodes:
                node.register_prehook(enter)


# Hidden from the compiler, which is running where these are called.
_begin_uncompiled = torch._disable_dynamo(Watches._begin)
_end_uncompiled = torch._disable_dynamo(Watches._end)


def _followed(tap: Tensor, note: Note, monitor) -> Tensor:
    """A view of a tap, whose gradient goes to the GradientMonitor. It dies with the graph, also without a backward."""
    view, outer = tap.view_as(tap), monitor.running_backward()
    view.register_hook(lambda norms: monitor.keep(note, norms, outer))
    return view


class Backward:
    """A running backward. Only the engine holds it, as the callback at the end, so that one that fails vanishes."""

    def __init__(self, leave):
        self.leave = leave  # called with it at the end
        self.taps: list[tuple[Note, Tensor]] = []  # the norms [L*D, 2, S, T, B]
        self.counts = False  # whether a gradient has come to a watched call

    def __call__(self) -> None:
        self.leave(self)
