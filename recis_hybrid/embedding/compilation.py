"""Keep tables out of the graphs of torch.compile, and refuse torch.export and TorchScript."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_C = TypeVar("_C", bound=type)

_INSTEAD = (
    "save the model with Saver and export it for serving with `recis-hybrid export`, or export only the tower, which "
    "takes the engine's outputs"
)
_REASON = (
    "embedding tables insert new ids during a lookup, which a graph cannot record. torch.compile runs them "
    "between its graphs: omit fullgraph=True, or compile only the towers, as in "
    f"model.tower = torch.compile(model.tower, fullgraph=True). Instead of torch.export, {_INSTEAD}"
)

_methods: list[tuple[type, str]] = []
_prepared = False
_preparing = threading.Lock()


def outside_graphs(*names: str) -> Callable[[_C], _C]:
    """Mark methods of a class to run between torch.compile's graphs; ``fullgraph=True`` refuses them.

    Neither the methods nor their callees are traced. Tables change in place and branch on Python integers. Dynamo may
    replace those by symbols, for which ``1 in [0, 1]`` fails (torch 2.13).

    Args:
        *names: The methods, static methods and properties.
    """

    def decorate(cls: _C) -> _C:
        _methods.extend((cls, name) for name in names)
        if _prepared:
            _hide()
        return cls

    return decorate


def prepare() -> None:
    """Hide the methods of decorated classes from Dynamo; called before the first table can be compiled.

    This imports torch's compiler, as any torch optimizer does, so it must not run on package import.
    """
    global _prepared
    with _preparing:
        _prepared = True
        _hide()


def refuse_recording() -> None:
    """Refuse a lookup that torch.export or torch.jit.trace is recording.

    The recorded program would contain addresses of this process and read from them in another process.

    Raises:
        NotImplementedError: If the lookup is being recorded.
    """
    if torch.compiler.is_exporting():
        raise not_recorded("torch.export")
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise not_recorded("torch.jit.trace")


def not_recorded(by: str) -> NotImplementedError:
    """Return the error for exporting a program with tables.

    Args:
        by: The recording function.
    """
    return NotImplementedError(
        f"{by} cannot record embedding tables, whose rows are in this process's memory; {_INSTEAD}"
    )


def _hide() -> None:
    while _methods:
        cls, name = _methods.pop()
        method = vars(cls)[name]
        # The methods are replaced, not wrapped: Dynamo would trace a wrapper once for each object.
        if isinstance(method, staticmethod):
            setattr(cls, name, staticmethod(_hidden(method.__func__)))
        elif isinstance(method, property):
            setter = None if method.fset is None else _hidden(method.fset)
            setattr(cls, name, property(_hidden(method.fget), setter, doc=method.__doc__))
        else:
            setattr(cls, name, _hidden(method))


def _hidden(function: Any) -> Any:
    return torch.compiler.disable(function, reason=_REASON)
