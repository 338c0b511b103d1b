"""What a format of files has to offer, and which format a file's name says."""

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
    """Return pyarrow's name of a file's compression, by its suffix; None if uncompressed."""
    return next((codec for end, codec in _COMPRESSIONS.items() if name.lower().endswith(end)), None)


@dataclass(frozen=True)
class Contents:
    """What a file says of itself before its rows are read."""

    schema: Any
    """A `pyarrow.Schema` of all columns; None of a text file without a line of values."""
    sizes: Sequence[int | None]
    """Of each piece the number of its rows; None where only reading it tells."""
    footer: Any = None
    """What the format wants to be handed again with each read, so that it is not read from the file once more."""
    absent: frozenset[str] = frozenset()
    """Columns absent from all sampled rows, in formats whose rows may lack columns; read as nulls."""


class Format(Protocol):
    """How files of a format are read, piece by piece; a module that has these names is one."""

    NAME: str
    """The format, for messages."""
    PIECE: str
    """What a piece is, for messages."""

    def inspect(self, file: Any, types: Mapping[str, Any]) -> Contents:
        """Read what a file says of itself.

        Args:
            file: With `open()`, `stream()` and `path`.
            types: Of some columns the Arrow types in which to read them, for formats that do not hold types.

        Raises:
            OSError: The file is damaged.
            pyarrow.ArrowException: The file is damaged.
        """

    def read(
        self, file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool
    ) -> Iterator[Any]:
        """Yield the rows of a piece in order.

        Args:
            file: With `open()`, `stream()` and `path`.
            contents: What `inspect` returned.
            piece: Which.
            columns: Top-level columns to read, at least one; a batch may have them in another order.
            rows: About how many rows to decode at a time.
            threads: Whether Arrow may decode in its threads.

        Raises:
            OSError: The file is damaged.
            pyarrow.ArrowException: The file is damaged.
        """


def format_of(name: str, unknown: str = "parquet") -> Format:
    """Return the format of a file by its suffix.

    Args:
        name: A file's name or path.
        unknown: The module of the format where the name says nothing.
    """
    lower = name.lower()
    found = next((module for module, suffixes in _MODULES.items() if lower.endswith(suffixes)), unknown)
    # A module for itself, since not every build of pyarrow has all formats.
    return cast("Format", importlib.import_module(f"{__package__}.{found}"))
