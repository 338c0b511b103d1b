"""RecordCache: GPU memory that holds the records of a table's most frequent rows, whose blocks are in host memory.

Letters: n rows, U distinct rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ops.cache import BYTES_OF_A_WAY, WAYS, Cache
from recis_hybrid.ops.gather import RowGroups

# Frequencies are halved whenever so many ids have been looked up for each way. In simulations of a cache for 10 % of
# 200,000 rows, 16,384 ids a lookup under zipf 1.05, the hit rate is 0.58 with 32 or 64, 0.56 with 16, and 0.49 by least
# recent use; the most popular 10 % have 0.63. If 0.4 % of the rows swap popularity at each lookup, it is 0.52 with 32,
# 0.53 with 16, 0.51 with 64, and 0.48.
_IDS_OF_AN_EPOCH = 32


class CacheStatistics(NamedTuple):
    """Use of a cache since it was created or cleared; rows are the distinct ones of each training lookup."""

    hits: int
    """Rows that were in the cache."""
    misses: int
    """Rows that were not."""
    bypassed: int
    """Misses that the cache had no room for, because the lookup used all ways of their set; used in host memory."""
    written_back: int
    """Records that were copied back to host memory."""

    @property
    def hit_rate(self) -> float:
        """Hits as a share of all rows; NaN before the first training lookup."""
        rows = self.hits + self.misses
        return self.hits / rows if rows else float("nan")


def refuse_small_cache(where: str, nbytes: int, record_bytes: int) -> None:
    """Raise ValueError if a cache of ``nbytes`` cannot hold one set of records."""
    if nbytes < (least := _bytes_of_a_set(record_bytes)):
        raise ValueError(
            f"{where}: cache_bytes={nbytes} is too small for a cache, which takes at least {WAYS} records of "
            f"{record_bytes} bytes; use at least {least}, or 0 for no cache"
        )


def _bytes_of_a_set(record_bytes: int) -> int:
    return WAYS * (record_bytes + BYTES_OF_A_WAY)


def bytes_of_cache(record_bytes: int, nbytes: int) -> int:
    """Return the bytes that a cache of at most ``nbytes`` takes, counters included; 0 for no cache."""
    if not nbytes:
        return 0
    size = _bytes_of_a_set(record_bytes)
    return nbytes // size * size + 8 * ops.cache.COUNTER_COPIES * ops.cache.COUNTERS


class RecordCache:
    """A set-associative cache of records; allocated when it is first needed, at once.

    :class:`EmbeddingBlocks` decides when records are cached and written back.

    Args:
        record_bytes: Bytes of a record.
        nbytes: Bytes that the cache may take, checked by :func:`refuse_small_cache`.
        device: GPU.
    """

    def __init__(self, record_bytes: int, nbytes: int, device: torch.device) -> None:
        self.ways = nbytes // _bytes_of_a_set(record_bytes) * WAYS
        """Number of records that fit into the cache."""
        self.record_bytes = record_bytes
        self.device = device
        self.records: Tensor | None = None
        """uint8 ``[ways, record_bytes]``; None until it is allocated."""
        self.is_empty = True
        """True if it holds no record."""
        self._is_dirty = False
        self._lookups = self._ids = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        if self.records is None:
            return 0
        return self.records.nbytes + self._tags.nbytes + self._states.nbytes + self._counters.nbytes

    def allocate(self) -> None:
        """Allocate the memory. If it runs out, nothing changes."""
        # Tensors created in inference mode cannot be written outside of it.
        with torch.inference_mode(False):
            records = torch.empty(self.ways, self.record_bytes, dtype=torch.uint8, device=self.device)
            self._tags = torch.zeros(self.ways, dtype=torch.int32, device=self.device)
            self._states = torch.zeros(self.ways, dtype=torch.int64, device=self.device)
            copies, counters = ops.cache.COUNTER_COPIES, ops.cache.COUNTERS
            self._counters = torch.zeros(copies, counters, dtype=torch.int64, device=self.device)
        self.records = records

    def addresses(self, block_rows: int) -> list[int]:
        """Return the addresses of the records as blocks of ``block_rows`` rows, of which the last may be shorter."""
        if self.records is None:
            return []
        start = self.records.data_ptr()
        return [start + way * self.record_bytes for way in range(0, self.ways, block_rows)]

    def admit(self, blocks: Blocks, first_place: int, groups: RowGroups) -> None:
        """Copy the records of the rows of a lookup into the cache.

        Args:
            blocks: The blocks, followed by those of the cache.
            first_place: Capacity of the blocks alone.
            groups: The U rows.
        """
        self.is_empty = False
        self._lookups += 1
        self._ids += groups.unique.numel()
        epoch = self._ids // (_IDS_OF_AN_EPOCH * self.ways)
        cache = self._form(first_place)
        ops.cache.admit(blocks, cache, groups.count, groups.unique, self._lookups, epoch)

    def places(self, first_place: int, rows: Tensor, count: Tensor | None, *, writes: bool) -> Tensor:
        """Return the places of rows, int64 ``[n]``; arguments as in ``ops.cache.locate``."""
        self._is_dirty |= writes
        return ops.cache.locate(self._form(first_place), rows, count=count, writes=writes)

    def write_back(self, blocks: Blocks, first_place: int) -> None:
        """Copy records that are newer than those in the blocks back to them."""
        if self._is_dirty:
            ops.cache.write_back(blocks, self._form(first_place))
            self._is_dirty = False

    def empty(self) -> None:
        """Forget all records; what has not been written back is lost."""
        if not self.is_empty:
            self._tags.zero_()
            self._states.zero_()
        self.is_empty, self._is_dirty = True, False

    def statistics(self) -> CacheStatistics:
        """Return the use of the cache so far; waits for the device."""
        if self.records is None:
            return CacheStatistics(0, 0, 0, 0)
        return CacheStatistics(*self._counters.sum(0).tolist())

    def _form(self, first_place: int) -> Cache:
        return Cache(self._tags, self._states, self._counters, first_place)
