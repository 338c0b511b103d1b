"""Argument validation: what pipelines say to a wrong kind of argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn


def described(value: object) -> str:
    """Return a phrase for what was given, such as ``a list`` or ``the class Adam (an instance is needed)``."""
    if isinstance(value, type):
        return f"the class {value.__name__} (an instance is needed, as {value.__name__}(...))"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def refuse_other_than(where: str, name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Check that an argument is an instance of one of some types.

    Args:
        where: The function or class, for the message.
        name: Of the argument.
        value: The argument.
        kinds: The types.
        expected: What the argument must be, with an example.

    Raises:
        TypeError: It is not; the message names what was expected and what was given.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{where}: {name} must be {expected}, got {described(value)}")


def refuse_no_callable(where: str, name: str, value: object, expected: str) -> None:
    """Check that an argument is a function, or an object that can be called; a class is neither.

    Raises:
        TypeError: It is not.
    """
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{where}: {name} must be {expected}, got {described(value)}")


def refuse_no_name(where: str, name: str, value: object) -> None:
    """Check that an argument is the name of a column, or None.

    Raises:
        TypeError: It is not.
        ValueError: It is an empty name.
    """
    if not isinstance(value, str | None):
        raise TypeError(f"{where}: {name} must be the name of a column, or None, got {described(value)}")
    if value == "":
        raise ValueError(f"{where}: {name} must be the name of a column, or None, got an empty name")


def refuse_no_count(where: str, name: str, value: Any, least: int = 1) -> None:
    """Check that an argument is an integer of at least ``least``.

    Raises:
        TypeError: It is no integer.
        ValueError: It is less.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be an integer, got {described(value)}")
    if int(value) < least:
        raise ValueError(f"{where}: {name} must be at least {least}, got {value}")


def refuse_no_number(where: str, name: str, value: Any) -> None:
    """Check that an argument is a number.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be a number, got {described(value)}")


def modules_of(where: str, name: str, value: Iterable[nn.Module], example: str) -> list[nn.Module]:
    """Return the modules of an argument, which is a sequence of them.

    Raises:
        TypeError: It is a single module, or has something else in it.
    """
    # nn.Sequential can be iterated and would pass as its own layers.
    if isinstance(value, nn.Module | str | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{where}: {name} must be a sequence of modules, as {example}, got {described(value)}")
    modules = list(value)
    for number, module in enumerate(modules):
        refuse_other_than(where, f"{name}[{number}]", module, nn.Module, "a torch.nn.Module")
    return modules


def optimizers_of(where: str, value: Any) -> dict[str, torch.optim.Optimizer]:
    """Return optimizers by name; ``optimizer0`` and so on where they come in a sequence.

    Raises:
        TypeError: It is no sequence or mapping, or has something else than optimizers in it.
        ValueError: One of them comes twice, or a name is empty.
    """
    expected = "a sequence or a mapping of optimizers, as [dense, sparse] or {'dense': dense, 'sparse': sparse}"
    if not isinstance(value, Iterable) or isinstance(value, str | nn.Module):
        hint = "; put it into a list" if hasattr(value, "param_groups") and not isinstance(value, type) else ""
        raise TypeError(f"{where}: optimizers must be {expected}, got {described(value)}{hint}")
    if _is_optax(value):
        raise TypeError(f"{where}: optimizers must be {expected}, got a transformation of optax; {_OPTAX}")
    named = dict(value) if isinstance(value, Mapping) else {f"optimizer{n}": each for n, each in enumerate(value)}
    for name, optimizer in named.items():
        if not isinstance(name, str):
            raise TypeError(f"{where}: the names of optimizers must be strings, got {name!r}")
        if _is_optax(optimizer):
            raise TypeError(f"{where}: {name!r} must be a torch optimizer, got a transformation of optax; {_OPTAX}")
        refuse_other_than(
            where, f"the optimizer {name!r}", optimizer, torch.optim.Optimizer,
            "an optimizer of torch.optim or recis_hybrid.optim",
        )  # fmt: skip
    if len({id(optimizer) for optimizer in named.values()}) < len(named):
        raise ValueError(f"{where}: an optimizer comes twice among {sorted(named)}, and would update twice a step")
    return named


_OPTAX = "wrap it in recis_hybrid.bridge.OptaxOptimizer(tower.named_parameters(), transformation)"


def _is_optax(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "init") and hasattr(value, "update")
