"""Whole models: fastrnn's recurrent modules in place of torch.nn's, and back; and the backend that a call takes."""

import sys
import warnings
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from torch import nn

from . import checks, dispatch, functional, modules, single_step, torch_nn
from .dispatch import Explanation
from .torch_nn import KINDS

OURS = SimpleNamespace(**{kind: getattr(single_step if kind.endswith("Cell") else modules, kind) for kind in KINDS})

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_SETTINGS = (
    "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size", "nonlinearity",
    *modules.CELL_SETTINGS,
)  # fmt: skip


NORMS = ("layer_norm_eps", "layer_norm_cell")
"""What matters only with layer norm."""
_COMPILED = "_compiled_call_impl"  # module.compile() puts it there


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile returned this module; it keeps a reference to the call of the module inside."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _is_on(setting) -> bool:
    return any(setting) if isinstance(setting, tuple) else setting is not None and bool(setting)


def _rebuilt(module: nn.Module, kind: str, library) -> nn.Module:
    """The same module in the other library, with the same parameter objects and everything its user added to it."""
    ours = isinstance(module, (modules._Recurrent, single_step._Cell))
    if library is torch_nn:
        on = [
            name for name in modules.EXTRAS if name not in ("backend", *NORMS) and _is_on(getattr(module, name, None))
        ]
        on += [name for name, usual in modules.CELL_SETTINGS.items() if getattr(module, name, usual) != usual]
        if on:
            raise ValueError(
                f"torch.nn.{kind} has no {', '.join(on)}: turn them off before converting back; torch.onnx.export with "
                "dynamo=True and torch.export take the module as it is"
            )
        if getattr(module, "nonlinearity", "tanh") not in ("tanh", "relu"):
            raise ValueError(f"torch.nn.{kind} has no nonlinearity {module.nonlinearity!r}")
    known = [name for name in _SETTINGS if library is not torch_nn or name not in modules.CELL_SETTINGS]
    settings = {name: getattr(module, name) for name in known if hasattr(module, name)}
    if not kind.startswith("LSTM") or kind == "LSTMCell":
        settings.pop("proj_size", None)
    if kind.endswith("Cell"):
        settings = {name: v for name, v in settings.items() if name in ("bias", "nonlinearity", *modules.CELL_SETTINGS)}
    elif settings["num_layers"] == 1:
        settings["dropout"] = 0.0  # set below: the constructors would warn of it
    extras = [n for n in modules.EXTRAS if hasattr(module, n)] if ours and library is not torch_nn else []
    settings |= {name: getattr(module, name) for name in ("layer_norm", *NORMS) if name in extras}
    new = getattr(library, kind)(module.input_size, module.hidden_size, **settings, device="meta")
    for name in ("dropout", *extras):
        if hasattr(module, name):
            setattr(new, name, getattr(module, name))
    for name, parameter in module._parameters.items():
        setattr(new, name, parameter)
    for name, buffer in module._buffers.items():
        new.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    own = vars(type(module)(1, 2, device="meta"))
    added = {name: value for name, value in vars(module).items() if name not in (*own, "_watch")}
    for name, value in (*module._modules.items(), *added.items()):
        setattr(new, name, value)
    new.train(module.training)
    if hasattr(new, "flatten_parameters"):
        new.flatten_parameters()
    return new


def _compiled(model: nn.Module) -> set[nn.Module]:
    """The modules inside that torch.compile was given."""
    return {module._orig_mod for module in model.modules() if _is_compiled(module)}


def _why_left(
    module: nn.Module, kinds: dict[type, str], compiled: set[nn.Module], done: tuple[type, ...] = ()
) -> str | None:
    """Why a module of these kinds cannot be replaced; one of the types `done` need not be."""
    if type(module) not in kinds:
        return "is a subclass" if isinstance(module, tuple(kinds)) and not isinstance(module, done) else None
    if modules.has_computed_weights(module):
        return "has weights that hooks or a wrapper compute"
    if methods := [n for n in vars(module) if callable(getattr(type(module), n, None))]:
        return f"has its own {', '.join(methods)}"
    return "is compiled" if getattr(module, _COMPILED) is not None or module in compiled else None


def left_alone(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """torch.nn's recurrent modules inside `model` that `convert` leaves as they are, with the reason."""
    from . import compat

    kinds = {getattr(torch_nn, kind): kind for kind in KINDS}
    done, compiled = tuple(getattr(compat, kind) for kind in KINDS), _compiled(model)
    found = ((module, _why_left(module, kinds, compiled, done)) for module in model.modules())
    return [(module, reason) for module, reason in found if reason is not None]


def convert(
    model: nn.Module, to: str = "fastrnn", *, keep_type: bool = False, copy: bool = False, lengths: bool = False
) -> Any:
    """Replaces every recurrent module inside `model` by its twin of the other library, parameters shared.

    Optimisers keep working: the parameters are the same objects, and so are buffers, submodules and attributes that
    were added to a module. Hooks are not carried over, with a warning. These modules are left as they are, with a
    warning: subclasses of torch.nn's (parametrized ones, say); modules whose weights a hook or a wrapper computes
    (weight_norm, pruning, weight drop); modules with a method of their own in place of the class's; and modules that
    are compiled by themselves (convert them before compiling).

    Args:
        model: any module; it is changed in place, unless it is a recurrent module itself.
        to: "fastrnn" turns torch.nn's LSTM, GRU, RNN and cells into fastrnn's; "torch" turns them back.
        keep_type: with to="fastrnn", take the classes of `fastrnn.compat`, which are subclasses of torch.nn's, too, for
            programs that ask `isinstance(module, nn.LSTM)`. `torch.compile` breaks the graph at their instances, and
            `fullgraph=True` refuses them, so they are not the default. The classes of `fastrnn` and of
            `fastrnn.compat` are turned into each other, with all options.
        copy: convert a deep copy, with parameters of its own, and leave `model` as it is.
        lengths: with to="torch", for a model that calls its networks with `lengths=`: each becomes a module around
            torch.nn's, `.rnn`, which packs and unpacks (`fastrnn.with_lengths`). torch.jit.script compiles it.

    Returns:
        The model, or the new module where `model` itself was replaced.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `to` is unknown, "torch" with keep_type, or "fastrnn" with lengths; or, on the way back, a module
            uses an extra that torch.nn does not have.
    """
    from . import compat, with_lengths  # here: `import fastrnn` stays light

    if not isinstance(model, nn.Module):
        raise TypeError(f"convert takes a module, got {model!r}")
    if to not in ("fastrnn", "torch"):
        raise ValueError(f"to should be 'fastrnn' or 'torch', got {to!r}")
    if keep_type and to == "torch":
        raise ValueError("keep_type is for to='fastrnn': what 'torch' gives is of torch.nn's own types")
    if lengths and to == "fastrnn":
        raise ValueError("lengths is for to='torch': fastrnn's networks take lengths= as they are")
    if copy:
        model = deepcopy(model)
    target = torch_nn if to == "torch" else compat if keep_type else OURS
    sources = [library for library in (torch_nn, OURS, compat) if library is not target]
    kinds = {getattr(source, kind): kind for source in sources for kind in KINDS}
    done = () if to == "torch" else tuple(getattr(target, kind) for kind in KINDS)
    replaced: dict[nn.Module, nn.Module] = {}
    compiled = _compiled(model)

    def twin(module: nn.Module) -> nn.Module:
        if module in replaced:
            return replaced[module]
        reason = _why_left(module, kinds, compiled, done)
        if reason is not None:
            warnings.warn(f"{type(module).__name__} {reason} and was left as it is", stacklevel=3)
        elif type(module) in kinds:
            if any(getattr(module, hooks) for hooks in HOOKS):
                warnings.warn(f"{type(module).__name__} has hooks, which its twin does not get", stacklevel=3)
            kind = kinds[type(module)]
            replaced[module] = _rebuilt(module, kind, target)
            if lengths and not kind.endswith("Cell"):
                around = with_lengths.LSTMWithLengths if kind == "LSTM" else with_lengths.WithLengths
                replaced[module] = around(replaced[module]).train(module.training)
        result = replaced.setdefault(module, module)
        for name, child in result._modules.items():
            if child is not None:
                result._modules[name] = twin(child)
        return result

    return twin(model)


def explain(module: nn.Module, input, hx=None, **call) -> Explanation:
    """Tells which backend `module(input, hx, **call)` runs on, and why not the others; print it to see the table.

    Args:
        module: a `fastrnn.LSTM`, `GRU`, `RNN` or one of their cells.
        input, hx, call: as in the module's forward.

    Returns:
        An `Explanation`: the request, the chosen backend, and a row per backend.

    Raises:
        TypeError: the module is of another class.
        ValueError, RuntimeError: as in the module's forward.
    """
    if isinstance(module, single_step._Cell):
        call = checks.check_step(*module._call(input, hx), **module._norms())
        return dispatch.explanation(call.request, module.backend)
    if not isinstance(module, modules._Recurrent):
        kind = type(module)
        raise TypeError(f"explain takes a fastrnn.LSTM, GRU, RNN or cell, got {kind.__module__}.{kind.__qualname__}")
    return functional.explain(
        module._cell, input, hx, module._parameters_by_name(), backend=module.backend, **call, **module._arguments()
    )
