"""Checks of what a user gives to a ColumnDataset."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from recis_hybrid.columnio.columns import Column


def integer(name: str, value: int, least: int) -> int:
    """Return an integer that is at least `least`.

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
    """Check a word.

    Raises:
        ValueError: It is another one.
    """
    if value not in allowed:
        raise ValueError(f"ColumnDataset: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def specs(columns: Sequence[str] | Mapping[str, Column | None]) -> dict[str, Column | None]:
    """Return the spec of each column, None for one that follows from the file.

    Raises:
        TypeError: They are not names, or a single one.
        ValueError: There is none, or one twice.
    """
    if isinstance(columns, str):
        raise TypeError(f"ColumnDataset: columns must be names or specs by name, got a str; write [{columns!r}]")
    names = list(columns) if isinstance(columns, Iterable) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"ColumnDataset: columns must be names, or specs by name, got {reprlib.repr(columns)}; name the columns to "
            f"read"
        )
    found = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(names)
    if not found:
        raise ValueError("ColumnDataset: columns must name at least one column, got none")
    if len(found) != len(names):
        raise ValueError(f"ColumnDataset: columns must be named once each, got {names}")
    return found
