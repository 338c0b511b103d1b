"""Columns that lie in the names of folders, as in `day=7/country=fr/part-0.parquet` (Hive's way)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias
from urllib.parse import unquote

Partition: TypeAlias = dict[str, int | str | None]
"""Values by column."""

_NULL = "__HIVE_DEFAULT_PARTITION__"


def with_partitions(paths: Sequence[str]) -> list[Partition]:
    """Returns the columns that the folders of each path hold.

    A column is of int64 where every file's value is written as such a number, and of strings otherwise.

    Args:
        paths: Of files, with `/` between their parts.

    Returns:
        For each path its values by column.

    Example:
        >>> with_partitions(["clicks/day=7/country=fr/a.parquet", "clicks/day=8/country=a%2Fb/b.parquet"])
        [{'day': 7, 'country': 'fr'}, {'day': 8, 'country': 'a/b'}]
    """
    found = [
        {key: unquote(value) for key, _, value in (part.partition("=") for part in path.split("/")[:-1]) if key and _}
        for path in paths
    ]
    texts: dict[str, set[str]] = {}
    for values in found:
        for key, value in values.items():
            texts.setdefault(key, set()).add(value)
    whole = {key for key, values in texts.items() if all(map(_is_int64, values - {_NULL}))}
    return [
        {key: None if text == _NULL else int(text) if key in whole else text for key, text in values.items()}
        for values in found
    ]


def _is_int64(text: str) -> bool:
    try:
        # A day written as 07 stays text: as a number it would be another name.
        return str(int(text)) == text and -(2**63) <= int(text) < 2**63
    except ValueError:
        return False
