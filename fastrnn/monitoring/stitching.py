"""Calls whose final states became the initial ones of a later call, put together as one long call."""

import torch
from torch import Tensor

from .calls import Note
from .diagnosis import Norms


def stitched(calls: list[tuple[Note, Norms]]) -> list[tuple[str, Norms]]:
    """The calls of a backward with the names of their modules, those that continue another one joined to it.

    A call is joined to the one before it if it is the only one to continue that, with as many samples and the same
    bound. If it is not joined although a gradient went there, it is marked as cut.
    """
    norms = dict(calls)
    following: dict[Note, list[Note]] = {}
    for note in norms:
        if note.before in norms:
            following.setdefault(note.before, []).append(note)
    joined = {before: after[0] for before, after in following.items() if len(after) == 1 and _fit(norms, before, after)}
    cut = {note for after in following.values() for note in after} - set(joined.values())
    cut |= {note for note in norms if note.cut}
    found = []
    for note in norms:
        if note in joined.values():
            continue
        chain = [note]
        while chain[-1] in joined:
            chain.append(joined[chain[-1]])
        whole = norms[note] if len(chain) == 1 else _join([(each, norms[each]) for each in chain])
        found.append((note.name, whole._replace(cut=note in cut)))
    return found


def _fit(norms: dict[Note, Norms], before: Note, after: list[Note]) -> bool:
    a, b = norms[before], norms[after[0]]
    shape = [*a.norms.shape]
    shape[-2] = b.norms.shape[-2]
    return shape == [*b.norms.shape] and a.bound == b.bound


def _join(chain: list[tuple[Note, Norms]]) -> Norms:
    """One call of all steps. At each seam, what is carried is the gradient of the later call's initial state.

    Where nothing of it comes back to the earlier call, as where an episode ended, there is a reset.
    """
    calls = [call for _, call in chain]
    T, N = sum(call.norms.shape[-2] for call in calls), calls[0].norms.shape[-1]
    resets, padding, parts = torch.zeros(T, N, dtype=torch.bool), torch.zeros(T, N, dtype=torch.bool), []
    begin, steps, bad = 0, torch.zeros(N, dtype=torch.long), None
    for k, (_, call) in enumerate(chain):
        end = begin + call.norms.shape[-2]
        if call.resets is not None:
            resets[begin:end] |= call.resets
        padding[begin:end] = torch.arange(end - begin).unsqueeze(1) >= call.lengths
        norms = call.norms.clone()
        if k + 1 < len(chain):
            last = (call.lengths - 1).clamp(min=0).expand(*norms.shape[:1], norms.shape[2], 1, N)
            back = norms[:, 1].gather(2, last).squeeze(2)  # [L, S, N]
            resets[end] |= (back == 0).flatten(0, 1).all(0)
            onward = chain[k + 1][0].onward
            if onward is not None:
                onward = torch.where(back == 0, 0, onward.double().cpu() / call.scale)
                norms[:, 1].scatter_(2, last, onward.unsqueeze(2))
        parts.append(norms)
        if bad is None and call.forward_nonfinite is not None:
            bad = int(steps.max()) + call.forward_nonfinite
        begin, steps = end, steps + call.lengths
    norms = torch.cat(parts, -2)
    order = padding.long().argsort(dim=0, stable=True)  # each sample's steps first, then all padding
    order = order[: max(1, int(steps.max()))]
    norms = norms.gather(3, order.expand(*norms.shape[:3], *order.shape))
    return calls[0]._replace(
        norms=norms,
        resets=resets.gather(0, order),
        lengths=steps,
        tiny=max(call.tiny for call in calls),
        forward_nonfinite=bad,
    )


def watch_states(note: Note, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Views of the initial states, of which the note gets the norms of the gradients."""

    def hooked(k: int, state: Tensor) -> Tensor:
        view = state.view_as(state)

        def arrived(grad: Tensor) -> None:
            if note.onward is None:
                note.onward = torch.zeros(
                    len(state), len(states), state.shape[1], dtype=torch.float64, device=grad.device
                )
            norms = torch.linalg.vector_norm(grad.detach(), dim=-1, dtype=torch.float64)
            note.onward[:, k] = norms if note.order is None else norms.index_select(-1, note.order)

        view.register_hook(arrived)
        return view

    return tuple(hooked(k, state) if state.requires_grad else state for k, state in enumerate(states))
