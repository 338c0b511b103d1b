"""Keep tables out of the graphs of torch.compile, torch.export and TorchScript."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

REASON = (
    "Embedding tables give new ids rows while they look them up, which no graph can record. torch.compile runs them "
    "between its graphs: leave out fullgraph=True, or compile the towers alone, as model.tower.compile(fullgraph=True)."
)
EXPORT_REMEDY = (
    "Save the model with Saver and write it for serving with `recis-hybrid export`, or export the tower alone, which "
    "takes the engine's outputs"
)


class _Function(Generic[_P, _R]):
    """A function, and from the first table on the same one where dynamo does not follow it."""

    def __init__(self, function: Callable[_P, _R]) -> None:
        self.call = function


_functions: list[_Function[..., object]] = []
_prepared = False


def outside_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function that torch.compile is to run between its graphs, and refuse under ``fullgraph=True``.

    What torch.compile calls is never traced, nor is what it calls in turn: tables compare and count with Python
    integers, which dynamo may replace by symbols, and for those ``1 in [0, 1]`` is False (seen in torch 2.13).
    """
    held = _Function(function)
    _functions.append(held)
    if _prepared:
        _disable(held)

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return held.call(*args, **kwargs)

    return run


def prepare() -> None:
    """Hide the decorated functions from dynamo, which must find them so when it traces a caller.

    It loads torch's compiler, as any torch optimizer does; hence not while the package is imported.
    """
    global _prepared
    if not _prepared:
        _prepared = True
        for held in _functions:
            _disable(held)


def _disable(held: _Function[..., object]) -> None:
    held.call = torch.compiler.disable(held.call, reason=REASON)


def refuse_export(where: str) -> None:
    """Raise NotImplementedError under torch.export and torch.jit.trace: a graph would keep addresses of this process.

    Args:
        where: what was to be exported, for the message.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        what = "torch.jit.trace" if torch.jit.is_tracing() else "torch.export"  # type: ignore[no-untyped-call]
        raise NotImplementedError(f"{where}: {what} cannot record embedding tables. {EXPORT_REMEDY}.")
