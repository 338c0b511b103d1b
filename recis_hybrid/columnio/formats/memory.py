"""Tables in memory, read in slices; batches of a function, read whole. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from recis_hybrid.columnio.formats.protocol import Contents

NAME, PIECE = "in-memory", "piece"

# Rows of a piece, whatever chunks a table has: the order of an epoch is the same for the same rows.
_ROWS = 65_536


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See `Format`."""
    if file.table is None:
        return Contents(next(file.tables()).schema, [None])
    rows = file.table.num_rows
    return Contents(file.table.schema, [min(_ROWS, rows - first) for first in range(0, rows, _ROWS)])


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See `Format`."""
    for table in file.tables():
        wanted = table.select(columns)
        if file.table is not None:
            wanted = wanted.slice(piece * _ROWS, _ROWS)
        for first in range(0, wanted.num_rows, rows):
            part = wanted.slice(first, rows)
            # Small chunks are put together once, not anew for each batch that spans several.
            chunks = max(column.num_chunks for column in part.columns)
            yield from (part if chunks == 1 else part.combine_chunks()).to_batches()
