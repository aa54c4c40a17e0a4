"""The rule of torch.func.vmap for the scan's autograd functions: the mapped dimension joins the batch."""

import torch


def _fold(tensor, in_dim, batch_dim, size):
    """Moves a mapped dimension into the batch: `[.., V, .., B, ..]` -> `[.., V*B, ..]`."""
    if tensor is None or batch_dim is None:
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if in_dim is None else tensor.movedim(in_dim, 0)
    return tensor.movedim(0, batch_dim - 1).flatten(batch_dim - 1, batch_dim)


def vmap(function, batch_dims, out_batch_dims, info, in_dims, args):
    """Folds the mapped dimension into the batch; loops where a tensor without a batch is mapped (weights).

    batch_dims, out_batch_dims: the place of the batch in each argument and result, counted from the end, or None.
    An empty tensor of one dimension stands for a result that does not exist; it has no batch.
    """
    size = info.batch_size
    if any(dim is not None and batch_dim is None for dim, batch_dim in zip(in_dims, batch_dims, strict=True)):

        def one(v):
            return function.apply(*(a if d is None else a.select(d, v) for a, d in zip(args, in_dims, strict=True)))

        outputs = tuple(torch.stack(out) for out in zip(*map(one, range(size)), strict=True))
        return outputs, tuple(0 for _ in outputs)
    outputs = function.apply(*map(lambda a, d, b: _fold(a, d, b, size), args, in_dims, batch_dims))
    unfolded, places = [], []
    for out, dim in zip(outputs, out_batch_dims, strict=True):
        if out.ndim == 1 and out.numel() == 0:
            unfolded.append(out)
            places.append(None)
        else:
            unfolded.append(out.unflatten(dim, (size, out.shape[dim] // size)))
            places.append(unfolded[-1].dim() + dim - 1)
    return tuple(unfolded), tuple(places)
