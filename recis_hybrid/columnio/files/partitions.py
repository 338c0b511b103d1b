"""Columns in folder names in the style of Hive: ``day=7/country=fr/part-0.parquet``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias
from urllib.parse import unquote

Partition: TypeAlias = dict[str, int | str | None]
"""Values by column."""

_NULLS = {"__HIVE_DEFAULT_PARTITION__", ""}


def partitions_of(paths: Sequence[str]) -> list[Partition]:
    """Return the columns in the folder names of each path.

    A column is int64 if every value is an integer in its shortest form, and strings otherwise. An empty value and
    ``__HIVE_DEFAULT_PARTITION__`` are nulls. Keys and values are URL-decoded; keys that differ by case are different
    columns.

    Args:
        paths: Paths of files, with ``/`` between their parts.

    Returns:
        Values by column, for each path.

    Raises:
        ValueError: Two folders of a path have the same key, but different values.

    Example:
        >>> partitions_of(["clicks/day=7/country=fr/a.parquet", "clicks/day=8/country=a%2Fb/b.parquet"])
        [{'day': 7, 'country': 'fr'}, {'day': 8, 'country': 'a/b'}]
    """
    texts_of_paths = [_texts(path) for path in paths]
    texts: dict[str, set[str]] = {}
    for values in texts_of_paths:
        for key, value in values.items():
            texts.setdefault(key, set()).add(value)
    whole = {key for key, values in texts.items() if all(map(_is_int64, values - _NULLS))}
    return [
        {key: None if text in _NULLS else int(text) if key in whole else text for key, text in values.items()}
        for values in texts_of_paths
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
                f"columnio: the folders of {path} have both {key}={texts[key]} and {key}={value}, but a file has one "
                f"value of a key; rename one of the folders"
            )
    return texts


def _is_int64(text: str) -> bool:
    try:
        # 07 stays a string: as a number it would name another folder.
        return str(int(text)) == text and -(2**63) <= int(text) < 2**63
    except ValueError:
        return False
