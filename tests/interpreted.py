"""Importing this makes Triton's interpreter quicker, as files do whose tests run kernels in it.

The interpreter replaces the builtin functions of its modules at every call within a kernel, and finds them by
`inspect.getmembers`, which takes half of the time of a small kernel. Here their names are looked up once.
"""

import inspect
import os
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace


@cache
def _builtins(place) -> list[str]:
    """The names of Triton's builtin functions in a module or class, which nothing has replaced at the first call."""
    from triton.language.core import is_builtin

    return [name for name, member in inspect.getmembers(place) if is_builtin(member)]


def _members(place):
    return [(name, getattr(place, name)) for name in _builtins(place)]


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from triton.runtime import interpreter

    interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": _members})
