"""What a call chose from its surroundings, kept for the recomputation of the call by an activation checkpoint.

`torch.utils.checkpoint.checkpoint(use_reentrant=False)` runs a forward again inside the backward, perhaps outside of
the `with` block that the forward was in, or in another thread. The recomputation has to save the same tensors, so it
must choose the same backend. A checkpoint puts hooks on the stack of `torch.autograd.graph.saved_tensors_hooks`; they
lead to its frame, which is one object for the forward and the recomputation, and counts the tensors that were saved
before the call. The choice is stored under that count.

The variant with use_reentrant=True builds its graph in the recomputation alone, and leaves no trace in the forward.
"""

import inspect
import weakref
from typing import Any, NamedTuple

import torch

some = False
"""Whether anything is stored. A short call asks for no more than that."""

_stored: dict[int, dict] = {}  # by the id of the frame


class _Level(NamedTuple):
    """A checkpoint around the call."""

    frame: object
    saved: int  # tensors that it has seen
    again: bool  # whether this is the recomputation


def _level(pack) -> _Level | None:
    """The checkpoint to which a hook on saved tensors belongs; None for a hook of another kind."""
    pack = inspect.unwrap(pack) if callable(pack) else pack
    code, cells = getattr(pack, "__code__", None), getattr(pack, "__closure__", None) or ()
    if code is None:
        return None
    names = dict(zip(code.co_freevars, cells, strict=True))
    try:
        if "target_frame_ref" in names and "gid" in names:
            frame = names["target_frame_ref"].cell_contents()
            return _Level(frame, frame.recomp_counter[names["gid"].cell_contents], True)
        if "frame" in names:
            frame = names["frame"].cell_contents
            return _Level(frame, len(frame.weak_holders), False)
    except (AttributeError, TypeError, ValueError):  # a hook of another kind, with variables of these names
        return None
    return None


def _levels() -> list[_Level]:
    """The checkpoints around the running code, the outermost first."""
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
    return [level for pack, _ in reversed(hooks) if (level := _level(pack)) is not None]


def _store(frame, key, value) -> None:
    global some
    if id(frame) not in _stored:
        _stored[id(frame)] = {}
        weakref.finalize(frame, _forget, id(frame)).atexit = False
    _stored[id(frame)][key] = value
    some = True


def _forget(frame: int) -> None:
    global some
    _stored.pop(frame, None)
    some = bool(_stored)


def held(kind: str, value: Any, usual: Any) -> tuple[Any, bool]:
    """What the forward chose, and whether this call recomputes it.

    Args:
        kind: what is chosen.
        value: the choice as it would be now; it holds, and is stored, unless this is a recomputation.
        usual: the choice of a forward of which nothing was stored.
    """
    levels = _levels()
    depth = next((k for k, level in enumerate(levels) if level.again), None)
    if depth is not None:
        outer = levels[depth]
        value = _stored.get(id(outer.frame), {}).get((kind, *(level.saved for level in levels[depth:])), usual)
    if value is not usual:
        for k, level in enumerate(levels):
            if not level.again:  # a checkpoint inside one that is recomputed has a new frame
                _store(level.frame, (kind, *(inner.saved for inner in levels[k:])), value)
    return value, depth is not None
