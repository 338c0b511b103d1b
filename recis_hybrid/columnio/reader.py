"""From row groups to batches: decoding, shuffling, cutting. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa

from recis_hybrid.ragged import Batch

from .numbers import Array
from .order import Batches, permutation
from .parquet import ParquetFiles, Piece

# The first number of a permutation's path.
_PIECES, _BLOCKS = 0, 1

Chunks: TypeAlias = Iterator[tuple[int, Array]]
"""RecordBatches in the order of the epoch, each with the number of its first row; some rows may be left out."""


@dataclass(frozen=True)
class Reader:
    """The rows of files in the order of an epoch."""

    files: ParquetFiles
    """What to read."""
    decoded_rows: int
    """How many rows to decode at a time."""
    seed: int
    """Of the order, where shuffled."""
    block: int | None
    """How many rows are permuted together; None keeps the order of the files."""

    @property
    def rows(self) -> int:
        """The number of rows in all files."""
        return sum(piece.rows for piece in self.files.pieces)

    def batches(self, epoch: int, ranges: Batches) -> Generator[Batch, None, None]:
        """Yields a batch for each of the ranges, without reading the row groups that none of them needs."""
        chunks = self._decoded(epoch, ranges.wants) if self.block is None else self._shuffled(epoch, ranges, self.block)
        for _, rows in cut(chunks, ranges):
            columns = zip(self.files.converters.items(), rows.columns, strict=True)
            yield {name: converter.tensor(array) for (name, converter), array in columns}

    def _decoded(self, epoch: int, wants: Callable[[int, int], bool]) -> Chunks:
        first = 0
        for piece in self._pieces(epoch):
            if wants(first, first + piece.rows):
                done = first
                for rows in self.files.read(piece, self.decoded_rows):
                    yield done, rows
                    done += rows.num_rows
            first += piece.rows

    def _shuffled(self, epoch: int, ranges: Batches, block: int) -> Chunks:
        blocks = Batches(self.rows, block)

        def wants(first: int, stop: int) -> bool:
            # A row may go to any place of its block, so that what counts is the blocks as a whole.
            return ranges.wants(first // block * block, min(-(-stop // block) * block, self.rows))

        wanted = (each for each in blocks if ranges.wants(*each))
        for first, rows in cut(self._decoded(epoch, wants), wanted):
            yield first, rows.take(pa.array(permutation(rows.num_rows, self.seed, epoch, _BLOCKS, first // block)))

    def _pieces(self, epoch: int) -> list[Piece]:
        pieces = list(self.files.pieces)
        if self.block is None:
            return pieces
        return [pieces[index] for index in permutation(len(pieces), self.seed, epoch, _PIECES)]


def cut(chunks: Chunks, ranges: Iterable[tuple[int, int]]) -> Chunks:
    """Cuts ranges of rows out of a stream of RecordBatches.

    A range inside one RecordBatch is a slice of it, which copies nothing; the rows of one that spans several are copied
    once.

    Args:
        chunks: Hold all rows of all ranges.
        ranges: First row and the row after the last; ascending, none empty, none overlapping another.

    Yields:
        For each range its first row and its RecordBatch.
    """
    chunk: Array = None
    first, stop = 0, 0
    for low, high in ranges:
        parts, row = [], low
        while row < high:
            while stop <= row:
                first, chunk = next(chunks)
                stop = first + chunk.num_rows
            parts.append(chunk.slice(row - first, min(high, stop) - row))
            row += parts[-1].num_rows
        yield low, parts[0] if len(parts) == 1 else pa.Table.from_batches(parts).combine_chunks().to_batches()[0]
