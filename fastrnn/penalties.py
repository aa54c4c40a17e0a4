"""Terms to add to a loss, and a clip threshold that follows the norms.

PyTorch has the others: L1 and L2 of parameters, weight decay, `clip_grad_norm_`. docs/recipes.md shows all of them.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from . import functional
from .cell_table import spec_of
from .dispatch import backend
from .modules import _Recurrent


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """The mean of values `[T, B, ...]` over the (step, sequence) pairs that are no padding, `real` bool `[T, B]`."""
    if real is None:
        return values.mean() if values.numel() else values.sum()  # the mean of no values is 0 and not NaN
    width = values.shape[2:].numel()
    return torch.where(real.unsqueeze(-1), values, 0).sum() / (real.sum() * width).clamp(min=1)


def _real(output: Tensor, lengths: Tensor | None) -> Tensor | None:
    """bool `[T, B]`, False in the padding; None without lengths."""
    if lengths is None:
        return None
    if tuple(lengths.shape) != (output.shape[1],):
        raise ValueError(f"lengths should have shape ({output.shape[1]},), got {tuple(lengths.shape)}")
    return torch.arange(len(output), device=output.device).unsqueeze(1) < lengths.to(output.device)


def activation(output: Tensor, lengths: Tensor | None = None, *, batch_first: bool = False) -> Tensor:
    """Activation regularisation, the mean of h_t²: keeps activations small.

    S. Merity, B. McCann, R. Socher, "Revisiting activation regularization for language RNNs", 2017, where it is taken
    of the output after dropout. S. Merity, N. Keskar, R. Socher, "Regularizing and optimizing LSTM language models",
    2018, adds it to the loss with a factor of 2.

    Args:
        output: `[T, B, H]`; `[B, T, H]` with batch_first.
        lengths: integer `[B]`; the padding then does not count. The values are not read back from a GPU.

    Returns:
        A scalar, of output's dtype.

    Raises:
        ValueError: lengths has another shape.
    """
    output = output.transpose(0, 1) if batch_first else output
    return _mean(output.square(), _real(output, lengths))


def temporal_activation(
    output: Tensor, lengths: Tensor | None = None, reset_mask: Tensor | None = None, *, batch_first: bool = False
) -> Tensor:
    """Temporal activation regularisation, the mean of (h_t - h_{t-1})²: keeps the state from jumping.

    The papers are those of `activation`: they take it of the output before dropout, with a factor of 1.

    Args:
        output: `[T, B, H]`; `[B, T, H]` with batch_first. If no sequence has two steps, the result is 0.
        lengths: integer `[B]`; pairs that reach into the padding then do not count.
        reset_mask: bool `[T, B]` (`[B, T]` with batch_first); pairs across the start of a segment then do not count.

    Returns:
        A scalar, of output's dtype.

    Raises:
        ValueError: lengths or reset_mask has another shape.
    """
    output = output.transpose(0, 1) if batch_first else output
    real = _real(output[1:], None if lengths is None else lengths - 1)
    if reset_mask is not None:
        reset_mask = reset_mask.transpose(0, 1) if batch_first else reset_mask
        if reset_mask.shape != output.shape[:2]:
            raise ValueError(f"reset_mask does not fit the output: {list(reset_mask.shape)}, {list(output.shape)}")
        real = ~reset_mask[1:] if real is None else real & ~reset_mask[1:]
    return _mean((output[1:] - output[:-1]).square(), real)


def omega(module: _Recurrent, input: Tensor, loss: Callable[[Tensor], Tensor], hx=None) -> Tensor:
    """Pascanu's Ω: the deviation of every step back from keeping the norm of the gradient.

        Ω = Σ_t (‖δ_{t+1} ∂s_{t+1}/∂s_t‖ / ‖δ_{t+1}‖ - 1)²,   δ_{t+1} = ∂L/∂s_{t+1},   the mean over the samples

    s is the state, h or the pair (h, c), so that the fraction is the gain of `monitoring/diagnosis.py`. A step and
    sample whose δ_{t+1} is zero has no term. As in the paper, which calls this the immediate derivative, s_t and
    δ_{t+1} are held constant: the result can be differentiated with respect to the parameters (and the input) through
    the one step from s_t to s_{t+1}, but not through their effect on earlier states and later gradients. The paper's
    x_t is the pre-activation, ours is the state: for an RNN the paper's Jacobian is W diag(φ'(x_t)), ours is
    diag(φ'(x_{t+1})) W, and φ' is differentiated, too.

    The cost is T forward calls of one step for δ, and one call of one step on T * B samples for the Jacobians, on the
    reference backend, whose backward can be differentiated again.
    R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", 2013, eq. 9 and 10.

    Args:
        module: a fastrnn LSTM, GRU or RNN of one layer and one direction, without projection, without clipping inside
            the recursion, and without masks that are drawn (they would differ between the two passes).
        input: `[T, B, I]`.
        loss: a function of the outputs `[T, B, H]`, a scalar that is a sum or a mean over samples (a factor cancels).
        hx: the initial state, as for the module.

    Returns:
        A scalar, to be added to the loss with a factor.

    Raises:
        ValueError: the module or the input is not as described.
    """
    _check_omega(module, input)
    count = len(spec_of(module._cell).states)
    if hx is None:
        states = [(input.new_zeros(1, input.shape[1], module.hidden_size),) * count]
    else:
        states = [tuple(hx) if count > 1 else (hx,)]

    def step(x: Tensor, state):
        # Not through the module: a monitor must not take these calls for the model's own.
        _, after = functional.recurrent(
            module._cell, x, state if count > 1 else state[0], module._parameters_by_name(), module.backend,
            **module._arguments(),
        )  # fmt: skip
        return after if count > 1 else (after,)

    with torch.enable_grad():
        for x in input.detach().split(1):
            states.append(step(x, states[-1]))
        flat = [s for state in states[1:] for s in state]
        found = torch.autograd.grad(loss(torch.cat([state[0] for state in states[1:]])), flat, allow_unused=True)
        found = [torch.zeros_like(s) if g is None else g for s, g in zip(flat, found, strict=True)]
        delta = tuple(torch.cat(found[count + k :: count], 1) for k in range(count))  # [1, (T-1)*B, H], from s_2 on
        before = tuple(
            torch.cat([state[k] for state in states[1:-1]], 1).detach().requires_grad_() for k in range(count)
        )
        with backend("reference"):
            after = step(input[1:].flatten(0, 1).unsqueeze(0), before)
        carried = torch.autograd.grad(after, before, delta, create_graph=True)
    arrived, carried = (torch.linalg.vector_norm(torch.cat(g, -1), dim=-1) for g in (delta, carried))
    known = arrived > 0
    terms = torch.where(known, carried / torch.where(known, arrived, 1) - 1, 0).square()
    return terms.sum() / input.shape[1]


def _check_omega(module: _Recurrent, input: Tensor) -> None:
    if not isinstance(module, _Recurrent):
        raise ValueError(f"omega takes a fastrnn LSTM, GRU, RNN or Recurrent, got {type(module).__name__}")
    wrong = [
        name
        for name, on in {
            "num_layers": module.num_layers > 1,
            "bidirectional": module.bidirectional,
            "proj_size": module.proj_size > 0,
            "the inputs of its cell": bool(spec_of(module._cell).inputs),
            "batch_first": module.batch_first,
            "clip_state_grad_norm": module.clip_state_grad_norm is not None,
            "clip_state_grad_value": module.clip_state_grad_value is not None,
            "zoneout": module.training and module.zoneout not in (0, (0, 0)),
            "recurrent_dropout": module.training and module.recurrent_dropout > 0,
            "weight_dropout": module.training and module.weight_dropout > 0,
        }.items()
        if on
    ]
    if wrong:
        raise ValueError(f"omega is defined here for one plain layer and direction; turn off {', '.join(wrong)}")
    if input.dim() != 3 or len(input) < 2:
        raise ValueError(f"input should be [T, B, I] with T of at least 2, got {list(input.shape)}")


class AdaptiveClip:
    """A bound for `clip_state_grad_norm` that follows the norms: a percentile of those of the last training steps.

        clip = fastrnn.penalties.AdaptiveClip(percentile=90)
        model = fastrnn.LSTM(32, 128, clip_state_grad_norm=clip.threshold)
        ...
        loss.backward()
        clip.update(tap.grad)

    AutoClip (P. Seetharaman, G. Wichern, B. Pardo, J. Le Roux, "AutoClip: adaptive gradient clipping for source
    separation networks", 2020) for the state gradient. The history keeps one number per training step: of each sample
    the largest joint norm of (dL/dh_t, dL/dc_t) over t and layers, and of these the median over the samples. Norms that
    are not finite are left out. Until the first `update` nothing is clipped. A norm is that before clipping at its own
    step, and after clipping at all later steps.

    Everything stays on the device: `threshold` is a 0-d float32 tensor, overwritten in place, so that nothing waits for
    the device and nothing is compiled again. Update it between a backward and the next forward.

    Args:
        percentile: 0 to 100; the paper takes 10 for the parameters' gradient.
        window: the number of training steps in the history; the paper keeps all.
        device: that of the model.

    Attributes:
        threshold: the bound.

    Raises:
        ValueError: percentile outside [0, 100], or window below 1.
    """

    def __init__(self, percentile: float = 90.0, window: int = 1000, device=None):
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile should lie within [0, 100], got {percentile}")
        if window < 1:
            raise ValueError(f"window counts training steps and is at least 1, got {window}")
        self.percentile, self.window = percentile, window
        self.threshold = torch.full((), torch.finfo(torch.float32).max, device=device)
        self._past = torch.full((window,), torch.nan, device=device)
        self._updates = 0

    @torch.no_grad()
    def update(self, norms: Tensor) -> None:
        """Adds one training step to the history.

        Args:
            norms: `[L*D, 2, S, T, B]`, the tap's gradient, which `GradientMonitor.norms_to` also gives.

        Raises:
            ValueError: norms has another shape.
        """
        if norms.dim() != 5 or norms.shape[1] != 2 or norms.shape[2] < 1:
            raise ValueError(f"norms should be [layers * directions, 2, states, T, B], got {list(norms.shape)}")
        total = norms[:, 0].float()  # [L*D, S, T, B]
        joint = reduce(torch.hypot, total.unbind(1))  # [L*D, T, B]
        largest = torch.where(joint.isfinite(), joint, 0).amax((0, 1))  # [B]
        self._past[self._updates % self.window] = torch.where(largest > 0, largest, torch.nan).nanmedian()
        self._updates += 1
        bound = torch.nanquantile(self._past, self.percentile / 100)
        self.threshold.copy_(torch.where(bound.isnan(), self.threshold, bound))

    def state_dict(self) -> dict[str, Tensor | int]:
        """The bound and the history, for a checkpoint."""
        return {"threshold": self.threshold.clone(), "past": self._past.clone(), "updates": self._updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Restores the result of `state_dict`, in place. Raises ValueError if it is of another window."""
        if len(state["past"]) != self.window:
            raise ValueError(f"the state is of a window of {len(state['past'])} training steps, not {self.window}")
        self.threshold.copy_(state["threshold"])
        self._past.copy_(state["past"])
        self._updates = state["updates"]
