"""Reads the rows of tables from their files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from recis_hybrid.checkpointing import BUCKETS, TableState
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import RangeEntry, TableEntry
from recis_hybrid.saver.format.row_file import Reads, Rows, read_rows
from recis_hybrid.saver.runtime.workers import Workers


def read_table(
    root: Location,
    part: str,
    name: str,
    entry: TableEntry,
    wanted: tuple[int, int] = (0, BUCKETS),
    reads: Reads | None = None,
) -> TableState:
    """Read the rows of some buckets of a table and verify their checksums.

    Args:
        root: Directory of the checkpoint.
        part: Name of the part.
        name: Name of the table.
        entry: Manifest entry of the table.
        wanted: The first bucket to read, and the one after the last.
        reads: Counts the bytes that are read.

    Returns:
        The rows, sorted by (bucket, id), in new memory; each column starts at a multiple of 64 bytes.

    Raises:
        CorruptCheckpoint: A file differs from the manifest, or its rows are not sorted.
    """
    return concatenate(entry, list(read_pieces(root, part, name, entry, wanted, reads or Reads())))


def concatenate(entry: TableEntry, pieces: Sequence[Rows]) -> TableState:
    """Concatenate pieces of a table.

    Args:
        entry: Manifest entry of the table.
        pieces: Rows of the table, in order.

    Returns:
        The rows, in new memory; each column starts at a multiple of 64 bytes.
    """
    columns: dict[str, Tensor] = {}
    for column, spec in entry.columns.items():
        # As bytes, because torch cannot concatenate every dtype.
        data_of = [piece.columns[column].reshape(-1).view(torch.uint8) for piece in pieces]
        size = sum(data.numel() for data in data_of)
        data = torch.cat(data_of) if data_of else torch.empty(0, dtype=torch.uint8)
        rows = size // max(math.prod(spec.shape) * spec.itemsize, 1) if size else sum(p.buckets.numel() for p in pieces)
        columns[column] = data.view(getattr(torch, spec.dtype)).view(rows, *spec.shape)
    buckets = torch.cat([piece.buckets for piece in pieces]) if pieces else torch.empty(0, dtype=torch.int64)
    return TableState(columns, buckets, entry.meta)


def read_pieces(
    root: Location, part: str, name: str, entry: TableEntry, wanted: tuple[int, int], reads: Reads
) -> Iterator[Rows]:
    """Read the rows of some buckets of a table file by file; prefetch the next file.

    Args:
        root: Directory of the checkpoint.
        part: Name of the part.
        name: Name of the table.
        entry: Manifest entry of the table.
        wanted: The first bucket to read, and the one after the last.
        reads: Counts the bytes that are read.

    Yields:
        Rows, in order of (bucket, id).

    Raises:
        CorruptCheckpoint: A file differs from the manifest, or its rows are not sorted.
    """
    items = [item for item in entry.ranges if item.first_bucket < wanted[1] and wanted[0] <= item.last_bucket]

    def read(item: RangeEntry) -> Rows:
        return read_rows(root / item.file.path, part, name, entry, item, wanted, reads)

    with Workers(1) as pool:
        ahead: Future[Rows] | None = None
        try:
            for number, item in enumerate(items):
                rows = (ahead or pool.submit(partial(read, item))).result()
                ahead = pool.submit(partial(read, items[number + 1])) if number + 1 < len(items) else None
                yield rows
                del rows  # so that the memory can be reused
        finally:
            if ahead is not None:
                ahead.cancel()
