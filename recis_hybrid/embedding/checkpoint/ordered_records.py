"""OrderedRecords: records of a table on disk in the order of a checkpoint's files.

Letters: n rows.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import IO

import numpy as np
import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.table.disk_blocks import DiskSnapshot

_PIECE_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_MOST_SLICES = 1 << 16
_CPU = torch.device("cpu")
_Move = Callable[[int, list[memoryview], int], int]


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
        self.piece_rows = max(1, _PIECE_BYTES // self._each)
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
        records = ops.memory.empty((rows.numel(), self._each), torch.uint8, _CPU)
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
        n, starts = self._rows.numel(), np.arange(0, self._rows.numel() + self.piece_rows, self.piece_rows)
        slots = self._snapshot.slots(self._rows).numpy()
        slices = slots // max(self.piece_rows, -(-int(slots.max() + 1) // _MOST_SLICES))
        # Stable, so that rows stay in order within a slice of the log.
        order = slices.astype(np.uint16).argsort(kind="stable")
        ends = np.bincount(slices).cumsum()
        del slots, slices
        filled = np.zeros(len(starts), np.int64)
        file = tempfile.TemporaryFile(dir=self._snapshot.path)
        try:
            for begin, end in zip([0, *ends.tolist()], ends.tolist(), strict=False):
                for first in range(begin, end, self.piece_rows):
                    self._distribute(file, order[first : min(end, first + self.piece_rows)], starts, filled)
            assert int(filled.sum()) == n
        except BaseException:
            file.close()
            raise
        return file

    def _distribute(self, file: IO[bytes], index: np.ndarray, starts: np.ndarray, filled: np.ndarray) -> None:
        """Append the records of some rows, given by ascending index, to the pieces that they belong to."""
        records = self._snapshot.read(self._rows[torch.from_numpy(index)]).numpy()
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
