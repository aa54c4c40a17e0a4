"""`doctor`: some steps of training in a copy, a diagnosis, and each prescription tried from the same start."""

import copy
import importlib.util
import math
import random
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .checkup import AS_IT_IS, Checkup, Trial
from .diagnosis import Report
from .monitor import GradientMonitor
from .prescription import Prescription, prescribe, watched

CONSTANT_BATCHES, CONSTANT_STEPS = 4, 50
"""The number of batches, and the most steps of L-BFGS over them, with which the constant answer is found."""

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def doctor(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int = 50,
    optimizer: Optimizer | None = None,
    clip_grad_norm: float | None = None,
    held_out: Any = None,
    constant: float | None = None,
    seed: int = 0,
) -> Checkup:
    """Trains a copy of the model for some steps, diagnoses it, and tries every prescription from the same start.

        checkup = fastrnn.doctor(model, (x, target), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
        print(checkup)
        model = checkup.prescriptions[0].apply(model)

    Every trial starts with the weights of `model` and the same random numbers. The prescriptions are those of the
    report after the steps, or of the one before them where that one has none. `model`, its gradients and its mode, and
    the random state of torch, Python and NumPy, are as before when this returns. The tensors of a batch are detached.

    Args:
        model: with at least one fastrnn LSTM, GRU or RNN; compiled models have to be passed as they were before.
        batch: what `loss_fn` takes; or a callable that gets the step, from 0, and returns the batch for it.
        loss_fn: `(model, batch) -> loss`, a scalar.
        steps: of training per trial. Whether a training is stuck shows after 200 rather than 50 (docs/clinic.md).
        optimizer: a function of the parameters; Adam with a learning rate of 1e-3 where it is None.
        clip_grad_norm: for `torch.nn.utils.clip_grad_norm_`, if the training uses it.
        held_out: a batch that the training does not see, to tell overfitting.
        constant: the loss of the best answer that does not look at the sequence: log C for C classes that are equally
            frequent, the variance of the target for a squared error. Without it, the loss that the model reaches with
            zeros in place of the outputs of its recurrent modules.
        seed: of dropout, of batches that are drawn from torch's global generator, and of the prescriptions.

    Returns:
        A `Checkup`: print it, `plot(path)` it, take `prescriptions` from it.

    Raises:
        TypeError: an argument that should be a module or a function is none.
        ValueError: steps is below 1, the model has no recurrent module of fastrnn's or cannot be copied, or the loss is
            no scalar tensor with a gradient.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"doctor takes a module, got {model!r}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn should be a function (model, batch) -> loss, got {loss_fn!r}")
    if optimizer is not None and not callable(optimizer):
        raise TypeError(f"optimizer should be a function of the parameters, as torch.optim.SGD is, got {optimizer!r}")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm should be a positive number or None, got {clip_grad_norm!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is a count and at least 1, got {steps!r}")
    make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    draw = batch if callable(batch) else lambda step: batch

    def trial_of(patient: nn.Module, name: str, prescription: Prescription | None = None) -> Trial:
        _seed(seed)
        results = _train(patient.train(), draw, loss_fn, make(patient.parameters()), steps, clip_grad_norm)
        return Trial(name, prescription, *results, _evaluated(patient, loss_fn, held_out))

    with _random_state_kept(), torch.enable_grad():
        checkup = Checkup([trial_of(_copied(model), AS_IT_IS)])
        for prescription in prescribe(checkup.base.after) or prescribe(checkup.base.before):
            _seed(seed)
            try:
                patient = prescription.apply(_copied(model))
            except ValueError as error:
                trial = Trial(prescription.name, prescription, Report(), Report(), [], error=str(error))
            else:
                trial = trial_of(patient, prescription.name, prescription)
            checkup.append(trial)
        if constant is None:
            _seed(seed)
            batches = [draw(n % steps) for n in range(CONSTANT_BATCHES if callable(batch) else 1)]
            constant = constant_loss(_copied(model), batches, loss_fn)
        checkup.constant = constant
    return checkup


@torch.no_grad()
def _evaluated(model: nn.Module, loss_fn, batch) -> float | None:
    return None if batch is None else float(_loss(model.eval(), batch, loss_fn))


def _loss(model: nn.Module, batch: Any, loss_fn) -> Tensor:
    """The loss, which has to be one floating number."""
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        found = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"loss_fn should return a scalar tensor, got {found}")
    return loss.reshape(())


def constant_loss(model: nn.Module, batches: list, loss_fn) -> float:
    """The lowest mean loss of a model, fitted in place, whose recurrent modules give only zeros; or NaN."""

    def zeroed(module, inputs, outputs):
        return tree_map(_zeros, outputs)

    for module in watched(model).values():
        module.register_forward_hook(zeroed)
    model.train()
    losses = []

    def mean_loss() -> Tensor:
        model.zero_grad()
        loss = torch.stack([_loss(model, _detached(batch), loss_fn) for batch in batches]).mean()
        losses.append(loss.item())
        if loss.requires_grad:
            loss.backward()
        return loss

    mean_loss()
    # L-BFGS keeps many copies of its parameters: only those that still get a gradient are given to it.
    reached = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if reached:
        torch.optim.LBFGS(reached, max_iter=CONSTANT_STEPS).step(mean_loss)
    return min(filter(math.isfinite, losses), default=math.nan)


def _zeros(leaf):
    """In place of a floating tensor; the sizes of a packed batch stay."""
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _train(model, draw, loss_fn, optimizer, steps: int, clip: float | None) -> tuple[Report, Report, list[float]]:
    """Some steps of training in place: the reports at the first and at the last step, and the losses."""
    before = after = Report()
    monitor, losses = GradientMonitor(model), []
    for step in range(steps):
        batch = _detached(draw(step))
        optimizer.zero_grad()
        observed = step in (0, steps - 1)
        if observed:
            monitor.enable()
        try:
            loss = _loss(model, batch, loss_fn)
            if not loss.requires_grad:
                raise ValueError("the loss has no gradient: it depends on no parameter that requires one")
            losses.append(loss.item())
            finite = math.isfinite(losses[-1])
            if not finite and not observed:
                monitor.enable()  # once more, for the report
                loss = _loss(model, batch, loss_fn)
            loss.backward()
        finally:
            monitor.disable()
        if observed or not finite:
            after = monitor.report()
            before = after if step == 0 else before
        if not finite:
            break
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return before, after, losses


def _detached(batch):
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, batch)


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy without gradients; `model` is not touched."""
    try:
        patient = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(f"the {type(model).__name__} cannot be copied: {error}") from error
    patient.zero_grad(set_to_none=True)
    for module in watched(patient).values():
        if module.backend == "aten":  # which cannot report norms
            module.backend = None
    return patient


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


@contextmanager
def _random_state_kept():
    numpy = sys.modules.get("numpy")
    state, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def load(place: str) -> tuple[nn.Module, Any, Callable, Any]:
    """`(model, batch, loss_fn, held_out)`, from calling the factory that `path/to/script.py:factory` names.

    The factory may leave out `held_out`, which is then None.

    The script is imported, not run: what is under `if __name__ == "__main__"` is left out.

    Raises:
        ValueError: there is no such file or function, it raises an error, or it returns something else.
    """
    path, _, name = place.rpartition(":")
    file = Path(path)
    if not path or not file.is_file():
        raise ValueError(f"expected SCRIPT.py:FACTORY with a file that exists, got {place!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))  # as `python SCRIPT.py` does
    sys.modules.setdefault(file.stem, module)
    with errors_placed(place):
        spec.loader.exec_module(module)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ValueError(f"{path} has no function {name!r}")
    with errors_placed(place):
        made = factory()
    if (
        not isinstance(made, tuple)
        or len(made) not in (3, 4)
        or not isinstance(made[0], nn.Module)
        or not callable(made[2])
    ):
        found = type(made).__name__
        if isinstance(made, tuple):
            found = f"({', '.join(type(part).__name__ for part in made)})"
        raise ValueError(f"{name}() should return (model, batch, loss_fn[, held_out]), got {found}")
    return made if len(made) == 4 else (*made, None)


@contextmanager
def errors_placed(place: str):
    """Within it an error in or below the script of `load` becomes a ValueError with its line; an ImportError stays."""
    file = Path(place.rpartition(":")[0])
    try:
        yield
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() == file.resolve()
        ]
        if isinstance(error, SyntaxError):
            lines.append(error.lineno)
        if isinstance(error, ImportError):
            raise
        if not lines and isinstance(error, ValueError):
            raise  # of the doctor's own
        where = f"{file}, line {lines[-1]}" if lines else place
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
