"""Rows of batches from the pieces of files: decoding, shuffling, cutting. Imports pyarrow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import pyarrow as pa

from recis_hybrid.columnio.convert.row_slice import Rows, concat_rows
from recis_hybrid.columnio.files.file_set import FileSet, Piece
from recis_hybrid.columnio.files.paths import relative_paths
from recis_hybrid.columnio.options import ReadOptions
from recis_hybrid.columnio.read.delivery import Delivery
from recis_hybrid.columnio.read.prefetch import chained, prefetched
from recis_hybrid.columnio.read.sampler import Batches, permutation
from recis_hybrid.ragged import Batch

# First number of the path of a permutation.
_PIECES, _BLOCKS = 0, 1

Chunks: TypeAlias = Generator[tuple[int, Rows], None, None]
"""Rows decoded together, in the order of the epoch, each with the number of its first row; some may be missing."""


@dataclass(frozen=True)
class Reader:
    """The rows of files in the order of an epoch."""

    files: FileSet
    """The files."""
    batch_size: int
    """Rows of a batch."""
    seed: int | None
    """Seed of the order; None keeps the order of the files."""
    delivery: Delivery
    """Conversion of rows to a batch."""
    options: ReadOptions
    """Threads and memory."""

    def __repr__(self) -> str:
        order = "order of the files" if self.seed is None else f"shuffled with seed {self.seed}"
        return (
            f"Reader({len(self.file_names)} files, {len(self.files.pieces)} pieces, {self.num_rows:,} rows, {order}; "
            f"batch_size={self.batch_size}, {self.options})"
        )

    @cached_property
    def num_rows(self) -> int:
        """Number of rows in all files."""
        return sum(piece.rows for piece in self.files.pieces)

    @property
    def file_names(self) -> list[str]:
        """Names of the files with rows, in order."""
        return list(dict.fromkeys(str(piece.opened.file) for piece in self.files.pieces))

    @cached_property
    def order(self) -> dict[str, Any]:
        """Settings that, together with the epoch, determine the order of the rows."""
        # Paths are relative to the common folder, so that the data may have moved when a job is resumed.
        pieces = [(path, piece.number, piece.rows) for path, piece in self._paths_and_pieces()]
        row_filter, shuffled = self.files.row_filter, self.seed is not None
        order: dict[str, Any] = {
            "rows": self.num_rows,
            "pieces": hashlib.blake2b(repr(pieces).encode(), digest_size=8).hexdigest(),
            "filters": None if row_filter is None else str(row_filter),
            "shuffle_buffer": self.options.shuffle_buffer if shuffled else None,
        }
        return order | {"seed": self.seed} if shuffled else order

    def shared_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that must be equal on all ranks, readable in messages.

        Args:
            settings: Settings to include.
        """
        files: dict[str, tuple[int, ...]] = {}
        for path, piece in self._paths_and_pieces():
            files[path] = (*files.get(path, ()), piece.rows)
        # The rows by file are more informative than the hash of the pieces.
        order = {name: value for name, value in self.order.items() if name != "pieces"}
        return {"rows by file": files, **settings, **order}

    def _paths_and_pieces(self) -> list[tuple[str, Piece]]:
        files = {piece.opened.file.path: piece.opened.file for piece in self.files.pieces}
        paths = dict(zip(files, relative_paths(list(files.values())), strict=True))
        return [(paths[piece.opened.file.path], piece) for piece in self.files.pieces]

    def batches(self, epoch: int, ranges: Batches) -> Generator[Batch, None, None]:
        """Return the batches of a pass, prefetched by threads; close the generator to end the threads.

        Pieces that no batch needs are not read.

        Args:
            epoch: The epoch.
            ranges: The rows of each batch.
        """
        # Creating tensors over existing memory is so cheap that several threads would only wait for each other.
        work = self.delivery.transforms is not None or self.delivery.pin_memory
        threads = self.options.num_threads if work else 1
        return prefetched(self._rows(epoch, ranges), self.delivery, self.options.prefetch, threads)

    def _rows(self, epoch: int, ranges: Batches) -> Generator[tuple[Rows, int], None, None]:
        """Yield the rows of each batch.

        Yields:
            The rows, and how many of them belong to the batch; the rest is padding.
        """
        chunks = self._cut(epoch, ranges)
        for low, high in ranges:
            rows = next(chunks)[1] if high > low else self.files.no_rows()
            count = rows.num_rows
            parts = [rows]
            for first, stop in ranges.padding(low, high):
                parts += [part for _, part in self._cut(epoch, Batches(stop, stop - first, first))]
            yield concat_rows(parts, self.files.converters), count

    def _cut(self, epoch: int, ranges: Batches) -> Chunks:
        chunks = self._decoded(epoch, ranges.wants) if self.seed is None else self._shuffled(epoch, ranges, self.seed)
        return cut(chunks, (each for each in ranges if each[0] < each[1]), self._concat)

    def _concat(self, parts: list[Rows]) -> Rows:
        return concat_rows(parts or [self.files.no_rows()], self.files.converters)

    def _decoded(self, epoch: int, wants: Callable[[int, int], bool]) -> Chunks:
        yield from chained(self._sources(epoch, wants), self._decoders)

    @property
    def decoded_rows(self) -> int:
        """Rows to decode at a time: a multiple of the batch size, so that few batches span two chunks."""
        return -(-self.options.decoded_rows // self.batch_size) * self.batch_size

    @property
    def _decoders(self) -> int:
        """Number of pieces to decode concurrently."""
        return self.options.num_threads if self.options.prefetch else 1

    def _sources(self, epoch: int, wants: Callable[[int, int], bool]) -> Iterator[Chunks]:
        wanted, first = [], 0
        for piece in self._pieces(epoch):
            if wants(first, first + piece.rows):
                wanted.append((piece, first))
            first += piece.rows
        # One thread per piece is faster than Arrow's threads, which wait for each other at each column. Both together
        # would be more threads than cores.
        threads = self.options.num_threads > min(self._decoders, len(wanted))
        for piece, first in wanted:
            yield self._numbered(piece, first, threads)

    def _numbered(self, piece: Piece, first: int, threads: bool) -> Chunks:
        for rows in self.files.read(piece, self.decoded_rows, threads):
            yield first, rows
            first += rows.num_rows

    def _shuffled(self, epoch: int, ranges: Batches, seed: int) -> Chunks:
        block = self.options.shuffle_buffer
        blocks = Batches(self.num_rows, block)

        def wants(first: int, stop: int) -> bool:
            # A row may move anywhere within its block, so whole blocks are needed.
            return ranges.wants(first // block * block, min(-(-stop // block) * block, self.num_rows))

        wanted = (each for each in blocks if ranges.wants(*each))
        for first, rows in cut(self._decoded(epoch, wants), wanted, self._concat):
            order = permutation(rows.num_rows, seed, epoch, _BLOCKS, first // block)
            yield first, Rows.of(rows.arrow().take(pa.array(order)), self.files.converters)

    def _pieces(self, epoch: int) -> list[Piece]:
        pieces = list(self.files.pieces)
        if self.seed is None:
            return pieces
        return [pieces[index] for index in permutation(len(pieces), self.seed, epoch, _PIECES)]


def cut(chunks: Chunks, ranges: Iterable[tuple[int, int]], concat: Callable[[list[Rows]], Rows]) -> Chunks:
    """Cut ranges of rows out of a stream of chunks.

    A range within one chunk is a slice of it and copies nothing; the rows of a range that spans several chunks are
    copied once. Rows missing from the stream are missing from the range.

    Args:
        chunks: All rows of all ranges, except those that could not be read.
        ranges: First row and end of each range; ascending, not empty, not overlapping.
        concat: Concatenates the parts of a range; the list is empty if no row could be read.

    Yields:
        For each range its first row and its rows.
    """
    wanted = iter(ranges)
    current = next(wanted, None)
    parts: list[Rows] = []
    while current is not None:
        if (item := next(chunks, None)) is None:
            # The remaining ranges could not be read.
            yield current[0], concat(parts)
            parts, current = [], next(wanted, None)
            continue
        first, chunk = item
        stop = first + chunk.num_rows
        started = []
        while current is not None and current[0] < stop:
            started.append(current)
            if current[1] > stop:
                break
            current = next(wanted, None)
        # All rows of a range may be missing before this chunk; its part of the chunk is then empty.
        ends = [(max(low, first), max(min(high, stop), low, first)) for low, high in started]
        slices = chunk.slices([(begin - first, end - first) for begin, end in ends])
        for (low, high), part in zip(started, slices, strict=True):
            parts.append(part)
            if high <= stop:
                yield low, concat(parts)
                parts = []
