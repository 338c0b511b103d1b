"""Columns that lie in the names of folders, as in `day=7/country=fr/part-0.parquet` (Hive's way)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias
from urllib.parse import unquote

Partition: TypeAlias = dict[str, int | str | None]
"""Values by column."""

_NULLS = {"__HIVE_DEFAULT_PARTITION__", ""}


def with_partitions(paths: Sequence[str]) -> list[Partition]:
    """Return the columns that the folders of each path hold.

    A column is of int64 where every file's value is written as such a number, and of strings otherwise. An empty value
    is a null, as `__HIVE_DEFAULT_PARTITION__` is. Keys and values are url-decoded, and keys that differ by case are
    different columns.

    Args:
        paths: Of files, with `/` between their parts.

    Returns:
        For each path its values by column.

    Raises:
        ValueError: Two folders of a path have the same key and different values.

    Example:
        >>> with_partitions(["clicks/day=7/country=fr/a.parquet", "clicks/day=8/country=a%2Fb/b.parquet"])
        [{'day': 7, 'country': 'fr'}, {'day': 8, 'country': 'a/b'}]
    """
    found = [_texts(path) for path in paths]
    texts: dict[str, set[str]] = {}
    for values in found:
        for key, value in values.items():
            texts.setdefault(key, set()).add(value)
    whole = {key for key, values in texts.items() if all(map(_is_int64, values - _NULLS))}
    return [
        {key: None if text in _NULLS else int(text) if key in whole else text for key, text in values.items()}
        for values in found
    ]


def _texts(path: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for part in path.split("/")[:-1]:
        key, equals, value = part.partition("=")
        if not (key and equals):
            continue
        key, value = unquote(key), unquote(value)
        if texts.setdefault(key, value) != value:
            raise ValueError(
                f"columnio: the folders of {path} say {key}={texts[key]} and {key}={value}; a file has one value of a "
                f"key: rename one of the folders"
            )
    return texts


def _is_int64(text: str) -> bool:
    try:
        # A day written as 07 stays text: as a number it would be another name.
        return str(int(text)) == text and -(2**63) <= int(text) < 2**63
    except ValueError:
        return False
