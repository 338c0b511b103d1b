"""The protocol of file formats, and the format of a file by its suffix."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}


def _also_compressed(*suffixes: str) -> tuple[str, ...]:
    return (*suffixes, *(f"{suffix}{packed}" for suffix in suffixes for packed in _COMPRESSIONS))


_MODULES = {
    "parquet": (".parquet", ".pq"),
    "orc": (".orc",),
    "ipc": (".arrow", ".feather", ".ipc", ".arrows"),
    "delimited": _also_compressed(".csv", ".tsv"),
    "json_lines": _also_compressed(".jsonl", ".json", ".ndjson"),
}

SUFFIXES = tuple(suffix for suffixes in _MODULES.values() for suffix in suffixes)
"""Known suffixes, in lower case."""


def is_known(name: str) -> bool:
    """Return whether a file name has a known suffix, in lower or upper case."""
    return name.lower().endswith(SUFFIXES)


def compression_of(name: str) -> str | None:
    """Return pyarrow's name of the compression of a file, by its suffix; None if uncompressed."""
    return next((codec for end, codec in _COMPRESSIONS.items() if name.lower().endswith(end)), None)


@dataclass(frozen=True)
class Contents:
    """Metadata of a file, read before its rows."""

    schema: Any
    """A ``pyarrow.Schema`` of all columns; None for a text file without rows."""
    sizes: Sequence[int | None]
    """Number of rows of each piece; None if it is known only after reading the piece."""
    footer: Any = None
    """Metadata that the format needs for each read, kept to avoid reading it again."""
    absent: frozenset[str] = frozenset()
    """Columns missing from all sampled rows, in formats whose rows may lack columns; read as nulls."""


class Format(Protocol):
    """Reading of files of a format, piece by piece; implemented by modules."""

    NAME: str
    """Name of the format, for messages."""
    PIECE: str
    """Word for a piece, for messages."""

    def inspect(self, file: Any, types: Mapping[str, Any]) -> Contents:
        """Read the metadata of a file.

        Args:
            file: A ``File``.
            types: Arrow types of some columns, for formats without types.

        Raises:
            OSError: The file is damaged.
            pyarrow.ArrowException: The file is damaged.
        """

    def read(
        self, file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool
    ) -> Iterator[Any]:
        """Yield the rows of a piece in order.

        Args:
            file: A ``File``.
            contents: The result of ``inspect``.
            piece: Number of the piece.
            columns: Top-level columns to read, at least one; a batch may have them in another order.
            rows: Approximate number of rows to decode at a time.
            threads: Allow Arrow to decode in its threads.

        Raises:
            OSError: The file is damaged.
            pyarrow.ArrowException: The file is damaged.
        """


def format_of(name: str, unknown: str = "parquet") -> Format:
    """Return the format of a file by its suffix.

    Args:
        name: Name or path of a file.
        unknown: Module of the format for an unknown suffix.
    """
    lower = name.lower()
    name_of_module = next((module for module, suffixes in _MODULES.items() if lower.endswith(suffixes)), unknown)
    # Imported on demand, because not every build of pyarrow has all formats.
    return cast("Format", importlib.import_module(f"{__package__}.{name_of_module}"))
