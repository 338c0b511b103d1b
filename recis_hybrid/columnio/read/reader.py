"""From pieces of files to batches: decoding, shuffling, cutting. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa

from recis_hybrid.columnio.convert.row_slice import Rows, joined
from recis_hybrid.columnio.files.file_set import Files, Piece
from recis_hybrid.columnio.files.paths import places
from recis_hybrid.columnio.read.prefetch import chained
from recis_hybrid.columnio.read.sampler import Batches, permutation

# The first number of a permutation's path.
_PIECES, _BLOCKS = 0, 1

Chunks: TypeAlias = Generator[tuple[int, Rows], None, None]
"""Rows decoded together, in the order of the epoch, each with the number of its first row; some may be left out."""


@dataclass(frozen=True)
class Reader:
    """The rows of files in the order of an epoch."""

    files: Files
    """What to read."""
    decoded_rows: int
    """How many rows to decode at a time."""
    seed: int
    """Of the order, where shuffled."""
    block: int | None
    """How many rows are permuted together; None keeps the order of the files."""
    decoders: int = 1
    """How many pieces to decode at once."""
    threads: int = 1
    """How many threads may decode."""

    @property
    def rows(self) -> int:
        """The number of rows in all files."""
        return sum(piece.rows for piece in self.files.pieces)

    @property
    def places(self) -> list[str]:
        """Where the file of each piece lies, from the folder on that all files have in common."""
        files = {piece.opened.file.path: piece.opened.file for piece in self.files.pieces}
        found = dict(zip(files, places(list(files.values())), strict=True))
        return [found[piece.opened.file.path] for piece in self.files.pieces]

    def batches(self, epoch: int, ranges: Batches) -> Generator[tuple[Rows, int], None, None]:
        """Yield the rows of each batch, without reading the pieces that none of them needs.

        Yields:
            The rows, and how many of them are the batch's own; those after them fill it up.
        """
        own = self._cut(epoch, ranges)
        for low, high in ranges:
            rows = next(own)[1] if high > low else self.files.empty()
            count = rows.num_rows
            parts = [rows]
            for fill in ranges.filling(low, high):
                parts += [part for _, part in self._cut(epoch, Batches(fill[1], fill[1] - fill[0], fill[0]))]
            yield joined(parts, self.files.converters), count

    def _cut(self, epoch: int, ranges: Batches) -> Chunks:
        chunks = self._decoded(epoch, ranges.wants) if self.block is None else self._shuffled(epoch, ranges, self.block)
        return cut(chunks, (each for each in ranges if each[0] < each[1]), self._join)

    def _join(self, parts: list[Rows]) -> Rows:
        return joined(parts or [self.files.empty()], self.files.converters)

    def _decoded(self, epoch: int, wants: Callable[[int, int], bool]) -> Chunks:
        yield from chained(self._sources(epoch, wants), self.decoders)

    def _sources(self, epoch: int, wants: Callable[[int, int], bool]) -> Iterator[Chunks]:
        wanted, first = [], 0
        for piece in self._pieces(epoch):
            if wants(first, first + piece.rows):
                wanted.append((piece, first))
            first += piece.rows
        # A thread of ours for each piece is faster than Arrow's, which wait for each other at each column; both at once
        # are more than there are cores for.
        threads = self.threads > min(self.decoders, len(wanted))
        for piece, first in wanted:
            yield self._numbered(piece, first, threads)

    def _numbered(self, piece: Piece, first: int, threads: bool) -> Chunks:
        for rows in self.files.read(piece, self.decoded_rows, threads):
            yield first, rows
            first += rows.num_rows

    def _shuffled(self, epoch: int, ranges: Batches, block: int) -> Chunks:
        blocks = Batches(self.rows, block)

        def wants(first: int, stop: int) -> bool:
            # A row may go to any place of its block, so that what counts is the blocks as a whole.
            return ranges.wants(first // block * block, min(-(-stop // block) * block, self.rows))

        wanted = (each for each in blocks if ranges.wants(*each))
        for first, rows in cut(self._decoded(epoch, wants), wanted, self._join):
            order = permutation(rows.num_rows, self.seed, epoch, _BLOCKS, first // block)
            yield first, Rows.of(rows.arrow().take(pa.array(order)), self.files.converters)

    def _pieces(self, epoch: int) -> list[Piece]:
        pieces = list(self.files.pieces)
        if self.block is None:
            return pieces
        return [pieces[index] for index in permutation(len(pieces), self.seed, epoch, _PIECES)]


def cut(chunks: Chunks, ranges: Iterable[tuple[int, int]], join: Callable[[list[Rows]], Rows]) -> Chunks:
    """Cuts ranges of rows out of a stream of them.

    A range inside one chunk is a slice of it, which copies nothing; the rows of one that spans several are copied
    once. Rows that the stream leaves out are missing in the range.

    Args:
        chunks: Hold all rows of all ranges, but those that could not be read.
        ranges: First row and the row after the last; ascending, none empty, none overlapping another.
        join: Makes one of the parts of a range, of which there are none where no row could be read.

    Yields:
        For each range its first row and its rows.
    """
    wanted = iter(ranges)
    now = next(wanted, None)
    parts: list[Rows] = []
    while now is not None:
        if (item := next(chunks, None)) is None:
            # What is left of the ranges could not be read.
            yield now[0], join(parts)
            parts, now = [], next(wanted, None)
            continue
        first, chunk = item
        stop = first + chunk.num_rows
        here = []
        while now is not None and now[0] < stop:
            here.append(now)
            if now[1] > stop:
                break
            now = next(wanted, None)
        # Rows that were left out before this chunk may be all that a range has: then nothing of it is here.
        ends = [(max(low, first), max(min(high, stop), low, first)) for low, high in here]
        slices = chunk.slices([(begin - first, end - first) for begin, end in ends])
        for (low, high), part in zip(here, slices, strict=True):
            parts.append(part)
            if high <= stop:
                yield low, join(parts)
                parts = []
