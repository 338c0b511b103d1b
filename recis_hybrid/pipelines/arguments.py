"""Argument validation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid.validation import check_number, describe_value

described = describe_value
refuse_no_number = check_number


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


def path_of(where: str, path: Any) -> Path:
    """Return the path of an argument.

    Raises:
        TypeError: It is none.
    """
    refuse_other_than(where, "path", path, (str, os.PathLike), "a path")
    return Path(path)


def refuse_no_batches(where: str, name: str, data: object) -> None:
    """Check that an argument gives batches.

    Raises:
        TypeError: It cannot be iterated, or is a path or a single batch.
    """
    expected = "a source of batches, as a ColumnDataset or a list of dicts of columns"
    if isinstance(data, str | os.PathLike):
        raise TypeError(
            f"{where}: {name} must be {expected}, got the path {str(data)!r}; read it by ColumnDataset(path, ...)"
        )
    if isinstance(data, Mapping):
        raise TypeError(f"{where}: {name} must be {expected}, got {described(data)}; put a single batch into a list")
    if isinstance(data, type | Tensor) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise TypeError(f"{where}: {name} must be {expected}, got {described(data)}")


def refuse_no_step(where: str, name: str, step: object) -> None:
    """Check that an argument is a step.

    Raises:
        TypeError: It is not.
    """
    methods = ("__call__", "predict", "parts")
    if isinstance(step, type) or not all(callable(getattr(step, method, None)) for method in methods):
        hint = "; make one of it, TorchStep(model, loss, [dense, sparse])" if isinstance(step, nn.Module) else ""
        raise TypeError(f"{where}: {name} must be a step, as TorchStep(...), got {described(step)}{hint}")


def refuse_no_batch(where: str, batch: object) -> None:
    """Check that what a source gives is a batch.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"{where}: a batch must be a dict of columns by name, got {described(batch)}")


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
            where,
            f"the optimizer {name!r}",
            optimizer,
            torch.optim.Optimizer,
            "an optimizer of torch.optim or recis_hybrid.optim",
        )
    if len({id(optimizer) for optimizer in named.values()}) < len(named):
        raise ValueError(f"{where}: an optimizer comes twice among {sorted(named)}, and would update twice a step")
    return named


_OPTAX = "wrap it in recis_hybrid.bridge.OptaxOptimizer(tower.named_parameters(), transformation)"


def _is_optax(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "init") and hasattr(value, "update")
