"""Argument checks shared by all rooms; imports nothing from the package.

Each message names the caller, the rule, and the value that violates it. A value of the wrong type raises TypeError, a
value out of range ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


def describe_value(value: object) -> str:
    """Return a short phrase for a value in an error message.

    Example:
        >>> describe_value("16"), describe_value([1, 2]), describe_value(dict)
        ("'16'", 'a list', 'the class dict (an instance is needed, such as dict(...))')
    """
    if isinstance(value, type):
        return f"the class {value.__name__} (an instance is needed, such as {value.__name__}(...))"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def check_integer(where: str, name: str, value: Any, low: int | None = None) -> int:
    """Return an argument as an int. NumPy integers are accepted, bools are not.

    Args:
        where: Function or class, for the message.
        name: Name of the argument.
        value: The argument.
        low: Smallest allowed value; None for no limit.

    Raises:
        TypeError: If the value is not an integer.
        ValueError: If the value is below ``low``.

    Example:
        >>> check_integer("Window", "size", 8, low=1)
        8
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be an integer, got {describe_value(value)}")
    number = int(value)
    if low is not None and number < low:
        raise ValueError(f"{where}: {name} must be at least {low}, got {number}")
    return number


def check_number(where: str, name: str, value: object, *, finite: bool = False) -> None:
    """Check that an argument is a real number. Bools do not count as numbers.

    Args:
        where: Function or class, for the message.
        name: Name of the argument.
        value: The argument.
        finite: Also reject infinity and NaN.

    Raises:
        TypeError: If the value is not a number.
        ValueError: If ``finite`` is True and the value is not finite.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be a number, got {describe_value(value)}")
    if finite and not math.isfinite(value):
        raise ValueError(f"{where}: {name} must be a finite number, got {value}")


def check_flag(where: str, name: str, value: object) -> None:
    """Raise TypeError unless an argument is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be True or False, got {describe_value(value)}")


def check_choice(where: str, name: str, value: object, choices: Collection[object]) -> None:
    """Raise ValueError unless an argument is one of the choices."""
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{where}: {name} must be one of {allowed}, got {value!r}")


def check_type(where: str, name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Check that an argument is an instance of a type.

    Args:
        where: Function or class, for the message.
        name: Name of the argument.
        value: The argument.
        kinds: One type or several.
        expected: Description of a valid argument, with an example: ``"a Saver, such as Saver('run')"``.

    Raises:
        TypeError: If the value has another type.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{where}: {name} must be {expected}, got {describe_value(value)}")


def check_method(where: str, name: str, value: object, method: str, example: str) -> None:
    """Check that an argument is an object with a method. A class is rejected even if it defines the method.

    Args:
        where: Function or class, for the message.
        name: Name of the argument.
        value: The argument.
        method: Name of the method.
        example: A valid value, for the message.

    Raises:
        TypeError: If the value is a class or lacks the method.
    """
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise TypeError(f"{where}: {name} must be an object with a method {method}, such as {example}, got {value!r}")
