"""What users write into configs, checked where they write it."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real

import torch


def described(value: object) -> str:
    """Return a phrase for a value of a wrong kind, such as ``a list`` or ``the class Adam (an instance is needed)``."""
    if isinstance(value, type):
        return f"the class {value.__name__} (an instance is needed, as {value.__name__}(...))"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def refuse_no_number(owner: str, name: str, value: object) -> None:
    """Raise TypeError if a setting is not a number.

    Args:
        owner: What it is a setting of.
        name: Of the setting.
        value: Of the setting.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a number, got {described(value)}")


def refuse_no_flag(owner: str, name: str, value: object) -> None:
    """Raise TypeError if a setting is neither True nor False.

    Args:
        owner: What it is a setting of.
        name: Of the setting.
        value: Of the setting.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {described(value)}")


def refuse_no_configs(configs: object) -> None:
    """Raise TypeError if configs are not given by feature name."""
    if not isinstance(configs, Mapping):
        raise TypeError(
            f"EmbeddingEngine: configs must be a mapping from features to configs, as "
            f"{{'item': EmbeddingConfig(dim=16)}}, got {described(configs)}"
        )
    for name in configs:
        if not isinstance(name, str):
            raise TypeError(f"EmbeddingEngine: the names of features must be strings, got {name!r}")


def state_fields(owner: str, fields: object, kind: type) -> tuple[object, ...]:
    """Return the parts of optimizer state that a row keeps.

    Args:
        owner: What they are a setting of.
        fields: A tuple or a list.
        kind: What each must be: StateField.

    Raises:
        TypeError: If it is neither, or one of them is no StateField.
    """
    if not isinstance(fields, tuple | list) or not all(isinstance(field, kind) for field in fields):
        raise TypeError(
            f"{owner} must be what the optimizer keeps for a row, as optim.Adam.row_state(), got {described(fields)}"
        )
    return tuple(fields)


def refuse_no_integer(owner: str, name: str, value: object, example: int) -> None:
    """Raise TypeError if a setting is no integer.

    Args:
        owner: What it is a setting of.
        name: Of the setting.
        value: Of the setting.
        example: A good value, for the message.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an integer, as {name}={example}, got {value!r}")


def refuse_no_rule(owner: str, name: str, value: object, method: str, example: str) -> None:
    """Raise TypeError if a setting is no object with a method.

    Args:
        owner: What it is a setting of.
        name: Of the setting.
        value: Of the setting; a class is none, as it has the method and is not yet the object.
        method: What it must have.
        example: A good value, for the message.
    """
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise TypeError(f"{owner}: {name} must be an object with a method {method}, as {example}, got {value!r}")


def beyond(dtype: torch.dtype) -> float:
    """Return the least number that a floating-point dtype rounds to infinity."""
    greatest, spacing = torch.finfo(dtype).max, torch.finfo(dtype).eps
    return greatest * ((2 - spacing / 2) / (2 - spacing))
