"""OrderedRecords: records of a table on disk in the order of a checkpoint's files.

Letters: n rows.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
import torch
from torch import Tensor

from recis_hybrid.embedding.table.disk_blocks import DiskSnapshot, rows_of_piece

_READ_BYTES = 4 << 20
_MOST_SLICES = 1 << 16
_SORTED_ROWS = 1 << 20
_Move = Callable[[int, list[memoryview], int], int]


def _by_slice(snapshot: DiskSnapshot, rows: Tensor, most: int) -> Iterator[np.ndarray]:
    """Yield the indices of rows by slice of the log, at most ``most`` at a time, ascending."""
    width = max(most, -(-(snapshot.last_slot + 1) // _MOST_SLICES))
    count = snapshot.last_slot // width + 1
    orders: list[np.ndarray] = []
    bounds: list[np.ndarray] = []
    for some in rows.split(_SORTED_ROWS):  # in parts, because sorting takes four times the memory of its result
        slices = (snapshot.slots(some).numpy() // width).astype(np.uint16)
        orders.append(slices.argsort(kind="stable").astype(np.int32))
        bounds.append(np.bincount(slices, minlength=count).cumsum())
    for number in range(count):
        parts = []
        for part, (order, ends) in enumerate(zip(orders, bounds, strict=True)):
            begin = ends[number - 1] if number else 0
            parts.append(order[begin : ends[number]].astype(np.int64) + part * _SORTED_ROWS)
        index = np.concatenate(parts)
        for first in range(0, len(index), most):
            yield index[first : first + most]


class OrderedRecords:
    """The records of rows of a snapshot, to be read in the order of these rows, a piece at a time.

    The rows of a piece lie anywhere in the log, about one to a page. So all records are read once in the order of the
    log, and written to a temporary file, which has a part for each piece. A piece is read from there in one go.

    Args:
        snapshot: The records.
        rows: int64 ``[n]``.
    """

    def __init__(self, snapshot: DiskSnapshot, rows: Tensor) -> None:
        self._snapshot, self._rows = snapshot, rows
        self._each = snapshot.layout.record_bytes
        self.piece_rows = rows_of_piece(self._each)
        """Rows of a piece: piece k has the rows from k times this number on."""
        self._file: IO[bytes] | None = None

    def read(self, piece: int) -> Tensor:
        """Return the records of a piece, uint8 ``[n, record_bytes]``.

        Raises:
            RuntimeError: If the disk fails or is full.
        """
        first = piece * self.piece_rows
        rows = self._rows[first : first + self.piece_rows]
        if rows.numel() == self._rows.numel():
            return self._snapshot.read(rows)
        if self._file is None:
            self._file = self._ordered()
        # The last piece also gets memory for a whole one, which the others have left in the pool.
        records = self._snapshot.memory(self.piece_rows)[: rows.numel()]
        target, step = records.numpy(), max(1, _READ_BYTES // self._each)
        for at in range(0, rows.numel(), step):
            n = min(step, rows.numel() - at)
            places = np.empty(n, np.int32)
            some = np.empty((n, self._each), np.uint8)
            self._transfer(self._file, os.preadv, places, self._places(piece) + 4 * at)
            self._transfer(self._file, os.preadv, some, self._places(piece) + 4 * self.piece_rows + self._each * at)
            target[places] = some
        return records

    def close(self) -> None:
        """Free the disk space of the ordered records, which are ordered again if they are read again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _places(self, piece: int) -> int:
        """Return the offset of the places of a piece in the file, int32 ``[piece_rows]``; its records follow."""
        return piece * self.piece_rows * (4 + self._each)

    def _ordered(self) -> IO[bytes]:
        """Return a file of all records, by piece."""
        starts = np.arange(0, self._rows.numel() + self.piece_rows, self.piece_rows)
        filled = np.zeros(len(starts), np.int64)
        memory = self._snapshot.memory(self.piece_rows)
        file = tempfile.TemporaryFile(dir=self._snapshot.path)
        try:
            for index in _by_slice(self._snapshot, self._rows, self.piece_rows):
                self._distribute(file, index, starts, filled, memory)
            assert int(filled.sum()) == self._rows.numel()
        except BaseException:
            file.close()
            raise
        return file

    def _distribute(
        self, file: IO[bytes], index: np.ndarray, starts: np.ndarray, filled: np.ndarray, memory: Tensor
    ) -> None:
        """Append the records of some rows, given by ascending index, to the pieces that they belong to."""
        records = self._snapshot.read(self._rows[torch.from_numpy(index)], memory).numpy()
        bounds = np.searchsorted(index, starts)
        for piece in np.flatnonzero(np.diff(bounds)).tolist():
            some = slice(bounds[piece], bounds[piece + 1])
            at, places = int(filled[piece]), (index[some] - starts[piece]).astype(np.int32)
            offset = self._places(piece)
            self._transfer(file, os.pwritev, places, offset + 4 * at)
            self._transfer(file, os.pwritev, records[some], offset + 4 * self.piece_rows + self._each * at)
            filled[piece] += len(places)

    def _transfer(self, file: IO[bytes], move: _Move, values: np.ndarray, offset: int) -> None:
        """Read or write all bytes of an array, by ``os.preadv`` or ``os.pwritev``."""
        view = values.reshape(-1).view(np.uint8).data
        where = f"table {self._snapshot.name}: a copy of its records in {self._snapshot.path}, ordered for a checkpoint"
        while view.nbytes:
            try:
                moved = move(file.fileno(), [view], offset)
            except OSError as error:
                raise RuntimeError(f"{where}: {error.strerror}; free space there, and save again") from error
            if moved == 0:
                raise RuntimeError(f"{where}: the file is shorter than it was written; check the disk")
            view, offset = view[moved:], offset + moved
