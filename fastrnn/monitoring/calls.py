"""What the monitor notes of a call that it taps: the sequences, the bound, and the calls that its states came from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import Call
from ..functional import steps_and_batch
from ..packing import packed_lengths

KEY = "fastrnn.monitoring"
"""Under this and the monitor's id a note is left in the metadata of an autograd node, for the next call; beside it, by
the numbers of the node's outputs, whether each is a state."""
NEARBY = 32
"""How many autograd nodes are searched from an initial state back to the call that it came from."""


@dataclass(eq=False)
class Note:
    """What a call was like; tensors are on its device, and samples in the user's order."""

    name: str  # of the module
    key: str = KEY
    lengths: Tensor | None = None  # int [B]; None: all are T
    resets: Tensor | None = None  # bool [T, B]
    bound: float | Tensor | None = None  # clip_state_grad_norm, a copy
    bad_outputs: Tensor | None = None  # bool [T]: the steps whose output is not finite
    order: Tensor | None = None  # [B]: where the samples are in the order in which a packed batch is run
    before: "Note | None" = None  # the call whose final states became the initial ones of this call
    onward: Tensor | None = None  # [L*D, S, B]: the norms of the initial states' gradients, if `before` is known
    cut: bool = False  # whether the gradient goes on into a call that cannot be put before this one


def note_of(name: str, call: Call, monitor: int) -> Note:
    """A note of a call that is about to run; `monitor`: the id."""
    lengths, resets, order = call.lengths, call.reset_mask, None
    if call.packed is not None:
        lengths, order = packed_lengths(call.packed.batch_sizes, steps_and_batch(call)[1]), call.packed.unsorted_indices
        if order is not None:
            lengths = lengths.to(order.device).index_select(0, order)
            resets = None if resets is None else resets.index_select(1, order)
    bound = call.options.clip_norm
    bound = bound.detach().clone() if isinstance(bound, Tensor) else bound
    note = Note(name, f"{KEY}.{monitor}", lengths, resets, bound, order=order)
    sources = {source for state in call.states for source in _sources(state, note.key)}
    notes = {source for source, _ in sources if source.name == name}
    if len(notes) == 1 and all(of_state for _, of_state in sources) and not call.options.bidirectional:
        note.before = notes.pop()
    else:
        note.cut = bool(notes)
    return note


def _sources(state: Tensor, key: str) -> set[tuple[Note, bool]]:
    """The tapped calls from whose states (True) or outputs (False) a state was made."""
    found, seen, ahead = set(), set(), [(state.grad_fn, state.output_nr)]
    while ahead and len(seen) < NEARBY:
        node, number = ahead.pop(0)
        if node is None or (node, number) in seen:
            continue
        seen.add((node, number))
        if key in node.metadata:
            note, of_state = node.metadata[key]
            found.add((note, of_state.get(number, False)))
        else:
            ahead += node.next_functions
    return found


def leave(note: Note, call: Call, y: Tensor, states: tuple[Tensor, ...]) -> None:
    """Completes a note when its call has run, and leaves it where the next call may find it."""
    note.bad_outputs = _bad_steps(call, y.detach())
    for tensor, of_state in ((y, False), *((state, True) for state in states)):
        if tensor.grad_fn is not None:
            tensor.grad_fn.metadata.setdefault(note.key, (note, {}))[1][tensor.output_nr] = of_state


def _bad_steps(call: Call, y: Tensor) -> Tensor:
    """bool `[T]`: the steps of `y [T, B, N]`, or of packed rows, at which something is not finite."""
    bad = (y * 0).flatten(1).sum(-1) != 0  # 0 times infinity is NaN, too, and the sum of zeros cannot overflow
    if call.packed is None:
        return bad
    sizes = call.packed.batch_sizes
    steps = torch.arange(len(sizes)).repeat_interleave(sizes).to(bad.device)
    return torch.zeros(len(sizes), dtype=torch.bool, device=bad.device).index_put((steps[bad],), bad[bad])
