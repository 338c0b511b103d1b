"""Compaction: closes the gaps between the rows of a table, a bounded number of rows at a time.

The map finds rows by id, but not ids by row. So one pass over the ids, share by share, moves each row beyond a limit to
a free row below it. Meanwhile, ids are looked up, inserted and erased as usual: inserts get free rows below the limit,
lowest first, and raise it if there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.table.blocks import EmbeddingBlocks
from recis_hybrid.embedding.table.disk_blocks import DiskBlocks
from recis_hybrid.embedding.table.id_map import MAX_ROWS, IdMap

_PIECE = 1 << 16
"""Rows among which free ones are sought at once."""


class Compaction:
    """A compaction in progress.

    Args:
        id_map: The map.
        blocks: The records of its rows.
        unfinished: A compaction of the same table that has not been finished, which this one replaces.
    """

    def __init__(self, id_map: IdMap, blocks: EmbeddingBlocks | DiskBlocks, unfinished: Compaction | None) -> None:
        self._map, self._blocks = id_map, blocks
        self._is_free = torch.zeros(0, dtype=torch.uint8, device=id_map.device)
        """uint8 ``[R]``: 1 for the free rows that are not in the map's list."""
        if unfinished is not None:
            self._is_free = unfinished._is_free
        self._listed = 0
        """Number of the first rows of which none is marked any more, once there is a limit."""
        self._limit: int | None = None
        """Ids of the shares before ``_share`` have rows before it; None while free rows are being marked."""
        self._share = self._shares = 0
        """The next share of the ids, and their number."""
        self.done = False
        """True after the last part."""

    @property
    def nbytes(self) -> int:
        """Bytes of its marks."""
        return self._is_free.nbytes

    def advance(self, rows: int) -> int:
        """Do the next part, of about ``rows`` rows, and return how many have moved; waits for the device.

        The table may change between parts, if :meth:`provide` is called before ids are inserted, and :meth:`withhold`
        after ids are erased. If a part raises, it may be repeated.
        """
        id_map, moved = self._map, 0
        if self._limit is None and id_map.row_count() > len(id_map):
            free = id_map.free_count()
            self._mark(id_map.take_free(min(free, rows)))
            if free <= rows:
                self._grow(id_map.row_count())
                self._limit, self._shares = len(id_map), max(1, -(-len(id_map) // rows))
        elif self._share < self._shares:
            moved = self._move(self._share, self._shares)
            self._share += 1
        elif self._limit is not None and self._listed < min(self._limit, self._is_free.numel()):
            self._list(min(rows, self._limit - self._listed), rows)
        else:
            if self._limit is not None:
                id_map.truncate(min(self._limit, id_map.row_count()))
            self._blocks.truncate(id_map.row_count())
            self.done = True
        return moved

    def provide(self, more: int) -> None:
        """Make sure that ``more`` rows are in the list of free rows, as far as rows are free; waits for the device."""
        if self._limit is None:
            return
        while (missing := more - self._map.free_count()) > 0:
            if self._listed == self._is_free.numel():
                self._limit = MAX_ROWS  # no row is free, so that none can move
                return
            self._list(_PIECE, missing)
            self._limit = max(self._limit, self._listed)

    def withhold(self, count: int) -> None:
        """Take the last ``count`` rows off the list of free rows, unless inserts may get them."""
        if self._limit is None or count == 0:
            return
        rows = self._map.take_free(count)
        later = (rows >= self._listed) & (rows < self._is_free.numel())
        self._is_free[rows[later]] = 1
        self._map.add_free(rows[~later])

    def _mark(self, rows: Tensor) -> None:
        if rows.numel() > 0:
            self._grow(int(rows.max()) + 1)
            self._is_free[rows] = 1

    def _grow(self, rows: int) -> None:
        if rows > self._is_free.numel():
            grown = torch.zeros(max(rows, self._map.row_count()), dtype=torch.uint8, device=self._is_free.device)
            grown[: self._is_free.numel()] = self._is_free
            self._is_free = grown

    def _list(self, rows: int, at_most: int) -> None:
        """Add at most so many free ones, at least one, of the next rows to the map's list."""
        end = min(self._listed + rows, self._is_free.numel())
        found = self._is_free[self._listed : end].nonzero().view(-1) + self._listed
        if found.numel() >= at_most:
            found = found[:at_most]
            end = int(found[-1]) + 1
        self._map.add_free(found)
        self._is_free[found] = 0
        self._listed = end

    def _move(self, number: int, shares: int) -> int:
        """Move the rows of a share of the ids that are beyond the limit, and return their number."""
        assert self._limit is not None
        entries = self._map.share(number, shares)
        self.provide(int((entries.rows >= self._limit).count_nonzero()))
        beyond = entries.rows >= self._limit
        source, slots = entries.rows[beyond], entries.slots[beyond]
        if source.numel() > 0:
            target = self._map.last_free(source.numel())
            self._blocks.copy_records(source.to(self._blocks.device), target.to(self._blocks.device))
            # Nothing has changed so far if the disk is full.
            self._map.take_free(source.numel())
            ops.id_map.set_rows(self._map.slots.header, slots, target)
            self._is_free[source] = 1
            self._blocks.forget(source.to(self._blocks.device))
        return source.numel()
