"""Checks of what a user gives to a ColumnDataset."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .columns import Column


def integer(name: str, value: int, least: int) -> int:
    """Returns an integer that is at least `least`.

    Raises:
        TypeError: It is no integer.
        ValueError: It is less.
    """
    if not isinstance(value, int):
        raise TypeError(f"ColumnDataset: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"ColumnDataset: {name} must be at least {least}, got {value}")
    return value


def one_of(name: str, value: str | None, allowed: Collection[str | None]) -> None:
    """Checks a word.

    Raises:
        ValueError: It is another one.
    """
    if value not in allowed:
        raise ValueError(f"ColumnDataset: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def specs(columns: Sequence[str] | Mapping[str, Column | None]) -> dict[str, Column | None]:
    """Returns the spec of each column, None for one that follows from the file.

    Raises:
        TypeError: It is a single name.
        ValueError: There is none, or one twice.
    """
    if isinstance(columns, str):
        raise TypeError(f"ColumnDataset: columns must be names or specs by name, got a str; write [{columns!r}]")
    found = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns)
    if not found:
        raise ValueError("ColumnDataset: columns must name at least one column, got none")
    if len(found) != len(columns):
        raise ValueError(f"ColumnDataset: columns must be named once each, got {list(columns)}")
    return found
