"""The products with W_hh in blocks: N heads, each of which reads and writes its own K = H/N units (`num_heads`).

W_hh is `[N, G*K, K]`: the rows of head n are its gates in order, K units each, and its columns are the head's own units
of h. Every other tensor has the order of a dense cell, gate by gate, `[.., G*H]`, in which head n has units n*K to
(n+1)*K of every gate.
"""

import torch
from torch import Tensor


def number(w_hh: Tensor | None, h0: Tensor) -> int:
    """The number of heads of W_hh, which has one dimension more than a dense one; `h0 [B, P]`, or `[D, B, P]`."""
    return w_hh.shape[-3] if w_hh is not None and w_hh.dim() > h0.dim() else 1


def times_w(h: Tensor, w_hh: Tensor) -> Tensor:
    """W_hh h: `[.., H] -> [.., G*H]`; `w_hh [G*H, P]`, or in heads."""
    if w_hh.dim() == 2:
        return h @ w_hh.t()
    N, _, K = w_hh.shape
    gates = w_hh.unflatten(1, (-1, K))
    return torch.einsum("...nk,ngjk->...gnj", h.unflatten(-1, (N, K)), gates).flatten(-3)


def times_w_transposed(dgh: Tensor, w_hh: Tensor) -> Tensor:
    """W_hh^T dgh: `[.., G*H] -> [.., H]`; `w_hh [G*H, P]`, or in heads."""
    if w_hh.dim() == 2:
        return dgh @ w_hh
    N, _, K = w_hh.shape
    gates = w_hh.unflatten(1, (-1, K))
    return torch.einsum("...gnj,ngjk->...nk", dgh.unflatten(-1, (-1, N, K)), gates).flatten(-2)


def of_each_head(dgh: Tensor, h: Tensor, w_hh: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each head its gates of dgh, `[.., G*H] -> [.., G*K]`, and its units of h, `[.., H] -> [.., K]`."""
    N, _, K = w_hh.shape[-3:]
    gates = (one.flatten(-2) for one in dgh.unflatten(-1, (-1, N, K)).unbind(-2))
    return list(zip(gates, h.unflatten(-1, (N, K)).unbind(-2), strict=True))
