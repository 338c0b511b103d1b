"""Argument checks specific to pipelines."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from recis_hybrid.validation import check_type, describe_value

Trainable: TypeAlias = "nn.Module | nn.Parameter"
"""A parameter, or a module that stands for all of its parameters."""


def check_callable(where: str, name: str, value: object, expected: str) -> None:
    """Check that an argument is a function or a callable object.

    Raises:
        TypeError: The value is a class or not callable.
    """
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{where}: {name} must be {expected}, got {describe_value(value)}")


def check_column_name(where: str, name: str, value: object) -> None:
    """Check that an argument is the name of a column, or None.

    Raises:
        TypeError: The value is not a string.
        ValueError: The value is empty.
    """
    if not isinstance(value, str | None):
        raise TypeError(f"{where}: {name} must be the name of a column, or None, got {describe_value(value)}")
    if value == "":
        raise ValueError(f"{where}: {name} must be the name of a column, or None, got an empty name")


def check_path(where: str, path: Any) -> Path:
    """Return an argument as a path.

    Raises:
        TypeError: The argument is not a path.
    """
    check_type(where, "path", path, (str, os.PathLike), "a path")
    return Path(path)


def check_batches(where: str, name: str, data: object) -> None:
    """Check that an argument is a source of batches.

    Raises:
        TypeError: The value is not iterable, or is a path or a single batch.
    """
    expected = "a source of batches, such as a ColumnDataset or a list of dicts of columns"
    if isinstance(data, str | os.PathLike):
        raise TypeError(
            f"{where}: {name} must be {expected}, got the path {str(data)!r}; read it with ColumnDataset(path, ...)"
        )
    if isinstance(data, Mapping):
        raise TypeError(
            f"{where}: {name} must be {expected}, got {describe_value(data)}; put a single batch into a list"
        )
    if isinstance(data, type | Tensor) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise TypeError(f"{where}: {name} must be {expected}, got {describe_value(data)}")


def check_step(where: str, name: str, step: object) -> None:
    """Check that an argument has the methods of a step.

    Raises:
        TypeError: A method is missing.
    """
    methods = ("__call__", "predict", "parts")
    if isinstance(step, type) or not all(callable(getattr(step, method, None)) for method in methods):
        hint = "; wrap it: TorchStep(model, loss, [dense, sparse])" if isinstance(step, nn.Module) else ""
        raise TypeError(f"{where}: {name} must be a step, such as TorchStep(...), got {describe_value(step)}{hint}")


def check_batch(where: str, batch: object) -> None:
    """Check that an item of a source is a batch.

    Raises:
        TypeError: The item is not a mapping.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"{where}: a batch must be a dict of columns by name, got {describe_value(batch)}")


def check_modules(where: str, name: str, value: Iterable[nn.Module], example: str) -> list[nn.Module]:
    """Return a sequence of modules as a list.

    Raises:
        TypeError: The value is a single module, or an item is not a module.
    """
    # nn.Sequential is iterable: without this check, its layers would be taken as the modules.
    if isinstance(value, nn.Module | str | Mapping) or not isinstance(value, Iterable):
        raise TypeError(
            f"{where}: {name} must be a sequence of modules, such as {example}, got {describe_value(value)}"
        )
    modules = list(value)
    for number, module in enumerate(modules):
        check_type(where, f"{name}[{number}]", module, nn.Module, "a torch.nn.Module")
    return modules


def check_parameters(where: str, name: str, value: Iterable[Trainable], example: str) -> list[Trainable]:
    """Return a sequence of modules and parameters as a list.

    Raises:
        TypeError: The value is a single module or parameter, or an item is neither a module nor a parameter.
    """
    if isinstance(value, nn.Module | Tensor | str | Mapping) or not isinstance(value, Iterable):
        raise TypeError(
            f"{where}: {name} must be a sequence of modules and parameters, such as {example}, got "
            f"{describe_value(value)}"
        )
    items = list(value)
    for number, item in enumerate(items):
        expected = "a torch.nn.Module or a torch.nn.Parameter"
        check_type(where, f"{name}[{number}]", item, (nn.Module, nn.Parameter), expected)
    return items


def parameters_in(items: Iterable[Trainable]) -> list[nn.Parameter]:
    """Return the parameters among items and in modules among them, each once."""
    found: dict[int, nn.Parameter] = {}
    for item in items:
        for parameter in item.parameters() if isinstance(item, nn.Module) else [item]:
            found[id(parameter)] = parameter
    return list(found.values())


def check_optimizers(where: str, value: Any) -> dict[str, Optimizer]:
    """Return optimizers by name. Those of a sequence are named ``optimizer0``, ``optimizer1`` and so on.

    Raises:
        TypeError: The argument is neither a sequence nor a mapping of optimizers.
        ValueError: An optimizer occurs twice.
    """
    expected = "a sequence or a mapping of optimizers, such as [dense, sparse] or {'dense': dense, 'sparse': sparse}"
    if not isinstance(value, Iterable) or isinstance(value, str | nn.Module):
        hint = "; put it into a list" if hasattr(value, "param_groups") and not isinstance(value, type) else ""
        raise TypeError(f"{where}: optimizers must be {expected}, got {describe_value(value)}{hint}")
    if _is_optax(value):
        raise TypeError(f"{where}: optimizers must be {expected}, got an optax transformation; {_OPTAX}")
    named = dict(value) if isinstance(value, Mapping) else {f"optimizer{n}": each for n, each in enumerate(value)}
    for name, optimizer in named.items():
        if not isinstance(name, str):
            raise TypeError(f"{where}: the names of optimizers must be strings, got {name!r}")
        if _is_optax(optimizer):
            raise TypeError(f"{where}: {name!r} must be a torch optimizer, got an optax transformation; {_OPTAX}")
        check_type(
            where,
            f"the optimizer {name!r}",
            optimizer,
            Optimizer,
            "an optimizer of torch.optim or recis_hybrid.optim",
        )
    if len({id(optimizer) for optimizer in named.values()}) < len(named):
        raise ValueError(
            f"{where}: an optimizer occurs twice among {sorted(named)} and would update twice per step; remove one"
        )
    return named


_OPTAX = "wrap it in recis_hybrid.bridge.OptaxOptimizer(tower.named_parameters(), transformation)"


def _is_optax(value: object) -> bool:
    return isinstance(value, tuple) and hasattr(value, "init") and hasattr(value, "update")
