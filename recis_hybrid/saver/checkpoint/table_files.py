"""Writes the rows of tables to files as planned by ``table_plan``, and reads them back.

Each file is written by one rank, to which the others send their rows. Once a table has more files than ranks, at most W
- 1 of its files have rows of several of the W ranks. With one writer per file, neither network file systems, which
separate concurrent writers only by whole pages, nor object stores, which cannot write at an offset, need special
treatment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from recis_hybrid.checkpointing import BUCKETS, JSON, TableState
from recis_hybrid.saver.checkpoint.local_table import LocalTable
from recis_hybrid.saver.checkpoint.table_plan import PlannedFile, plan_files
from recis_hybrid.saver.format.file_io import encode_name
from recis_hybrid.saver.format.header import Place, places, views
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import FileEntry, RangeEntry, TableEntry
from recis_hybrid.saver.format.row_file import Reads, Rows, file_specs, read_rows, row_tag
from recis_hybrid.saver.format.tensor_file import write_assembled
from recis_hybrid.saver.runtime.ranks import Ranks
from recis_hybrid.saver.runtime.workers import Workers

WRITERS = 2
"""Threads that assemble and write files, and as many that wait for the disk, so that it is never idle."""


def write_tables(
    root: Location, ranks: Ranks, part: str, tables: Sequence[LocalTable], folder: str = "sparse"
) -> dict[str, TableEntry]:
    """Write and sync the tables of a part; collective.

    Args:
        root: Directory of the checkpoint.
        ranks: This rank and the others.
        part: Name of the part.
        tables: This rank's rows of each table.
        folder: Folder in ``root`` for the files.

    Returns:
        Manifest entries by table.

    Raises:
        CheckpointError: The ranks hold different tables, or one of them cannot write a file.
    """
    if not tables:
        return {}
    plan = plan_files(ranks, part, tables)
    written = ranks.together(lambda: _Writer(root, ranks, part, tables, plan, folder).write())
    entries = {
        number: FileEntry(path, size, tuple(sums)) for of_rank in written for number, path, size, sums in of_rank
    }
    ranges: list[list[RangeEntry]] = [[] for _ in tables]
    for file in plan:
        ranges[file.table].append(RangeEntry(file.first_bucket, file.last_bucket, sum(file.rows), entries[file.number]))
    return {
        table.name: TableEntry(sum(item.rows for item in of_table), table.specs, table.meta, tuple(of_table))
        for table, of_table in zip(tables, ranges, strict=True)
    }


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


class _Writer:
    """Writes this rank's files of a plan. Failures are raised only after all rows for other ranks are sent."""

    def __init__(
        self,
        root: Location,
        ranks: Ranks,
        part: str,
        tables: Sequence[LocalTable],
        plan: Sequence[PlannedFile],
        folder: str,
    ) -> None:
        self._folder = folder
        self._root, self._ranks, self._part, self._tables, self._plan = root, ranks, part, tables, plan
        counts = Counter(file.table for file in plan)
        self._cuts = [table.cuts(counts[number]) for number, table in enumerate(tables)]
        self._written: list[JSON] = []
        self._syncing: list[Future[None]] = []

    def write(self) -> list[JSON]:
        """Write the files.

        Returns:
            Number in the plan, path, size and checksums of each.
        """
        failures: list[BaseException] = []
        running: list[Future[None]] = []
        with Workers(WRITERS) as disk, Workers(WRITERS) as pool:
            # Files of several ranks first, in the same order everywhere: no rank waits for one that writes its own.
            for file in sorted(self._plan, key=lambda file: (sum(rows > 0 for rows in file.rows) < 2, file.number)):
                if file.writer == self._ranks.rank:
                    received = self._receive(file)
                    if not failures:
                        running.append(pool.submit(partial(self._write_file, file, received, disk)))
                    if len(running) > WRITERS:
                        failures += _errors([running.pop(0)])
                elif file.rows[self._ranks.rank]:
                    failures += self._send(file)
            failures += _errors(running)
        failures += _errors(self._syncing)
        try:
            if failures:
                raise failures[0]
        finally:  # break the cycle of the error and this frame, which keeps the saver's lease alive
            failures.clear()
            running.clear()
            self._syncing.clear()
        return self._written

    def _receive(self, file: PlannedFile) -> dict[int, Tensor]:
        """Receive the rows of a file from other ranks; return them by rank."""
        others = [rank for rank, rows in enumerate(file.rows) if rows and rank != self._ranks.rank]
        return {rank: self._ranks.receive(_size(self._packed(file, rank)), rank, file.number) for rank in others}

    def _send(self, file: PlannedFile) -> list[BaseException]:
        """Send this rank's rows of a file; return errors of reading them, despite which a message is sent."""
        found, failures = self._packed(file, self._ranks.rank), []
        data = torch.zeros(_size(found), dtype=torch.uint8)
        try:
            self._read(file, views(data, found))
        except BaseException as error:
            failures.append(error)
        self._ranks.send(data, file.writer, file.number)
        return failures

    def _write_file(self, file: PlannedFile, received: dict[int, Tensor], disk: Workers) -> None:
        table = self._tables[file.table]
        relative = _path(self._folder, self._part, table.name, file)
        path = self._root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        specs = file_specs(table.specs, sum(file.rows), sum(file.present))
        tag = row_tag(self._part, table.name, file.first_bucket, file.last_bucket)
        written = write_assembled(path, specs, tag, partial(self._assemble, file, received))
        self._syncing.append(disk.submit(written.sync))
        if len(self._syncing) > 4 * WRITERS:
            self._syncing[-4 * WRITERS].exception()  # limits the number of open files
        self._written.append([file.number, relative, written.size, list(written.crc32)])

    def _assemble(self, file: PlannedFile, received: dict[int, Tensor], out: dict[str, Tensor]) -> None:
        """Write the rows of all ranks in order, and their index."""
        row = bucket = 0
        out["bucket_offsets"][:1] = 0
        for rank, (rows, present) in enumerate(zip(file.rows, file.present, strict=True)):
            if not rows:
                continue
            part = {name: out[name][row : row + rows] for name in self._tables[file.table].specs}
            part["buckets"] = out["buckets"][bucket : bucket + present]
            part["bucket_offsets"] = out["bucket_offsets"][bucket : bucket + present + 1]
            if rank == self._ranks.rank:
                self._read(file, part)
            else:
                for name, values in views(received[rank], self._packed(file, rank)).items():
                    part[name].copy_(values)
            part["bucket_offsets"] += row  # until now relative to the rank's own first row
            row, bucket = row + rows, bucket + present

    def _read(self, file: PlannedFile, out: dict[str, Tensor]) -> None:
        """Write this rank's rows of a file, and their index."""
        table, (rows, present) = self._tables[file.table], self._cuts[file.table]
        first, begin, end = rows[file.range], present[file.range], present[file.range + 1]
        table.read(first, rows[file.range + 1], out)
        out["buckets"].copy_(table.present[begin:end])
        out["bucket_offsets"].copy_(table.offsets[begin : end + 1] - first)

    def _packed(self, file: PlannedFile, rank: int) -> dict[str, Place]:
        """Return the layout of a rank's rows of a file in its message."""
        return places(file_specs(self._tables[file.table].specs, file.rows[rank], file.present[rank]))


def _errors(futures: Sequence[Future[None]]) -> list[BaseException]:
    errors = [future.exception() for future in futures]
    return [error for error in errors if error is not None]


def _size(found: dict[str, Place]) -> int:
    return max(place.stop for place in found.values())


def _path(folder: str, part: str, table: str, file: PlannedFile) -> str:
    table_folder = f"{folder}/{encode_name(part)}/{encode_name(table)}"
    return f"{table_folder}/{file.first_bucket:05d}-{file.last_bucket:05d}.safetensors"
