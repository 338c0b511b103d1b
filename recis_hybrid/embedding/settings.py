"""What users write into configs, checked where they write it."""

from __future__ import annotations

from numbers import Integral

import torch


def refuse_no_integer(owner: str, name: str, value: object, example: int) -> None:
    """Raises TypeError if a setting is no integer.

    Args:
        owner: What it is a setting of.
        name: Of the setting.
        value: Of the setting.
        example: A good value, for the message.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an integer, as {name}={example}, got {value!r}")


def refuse_no_rule(owner: str, name: str, value: object, method: str, example: str) -> None:
    """Raises TypeError if a setting is no object with a method.

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
    """Returns the least number that a floating-point dtype rounds to infinity."""
    greatest, spacing = torch.finfo(dtype).max, torch.finfo(dtype).eps
    return greatest * ((2 - spacing / 2) / (2 - spacing))
