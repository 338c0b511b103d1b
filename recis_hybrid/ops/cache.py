"""Operators of a GPU cache of records, in front of blocks in host memory that the GPU can access.

The record of a row is at its *place*: the row itself, or ``first_place`` + the number of the way of the cache that
holds a copy. Kernels that work on records get places instead of rows, with an address table that continues with the
addresses of the cache. Places are valid until the next :func:`admit`.

Shapes: n rows, S sets of ``WAYS`` ways.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned
from recis_hybrid.ops.blocks import Blocks

nothing_returned("cache_admit", "cache_locate", "cache_write_back")

WAYS = 32
"""Ways of a set."""
BYTES_OF_A_WAY = 4 + 8
"""Bytes of a way's tag and state."""
COUNTER_COPIES = 64
HITS, MISSES, BYPASSED, WRITTEN_BACK, COUNTERS = range(5)
"""Indices of the counters, and their number."""
_LOOKUPS, _EPOCHS = 2**24, 2**16


class Cache(NamedTuple):
    """A cache in the form of kernel arguments."""

    tags: Tensor
    """int32 ``[S * WAYS]``: which row each way holds; zeros if empty."""
    states: Tensor
    """int64 ``[S * WAYS]``: last use and frequency of each way, and whether it must be written back; zeros if empty."""
    counters: Tensor
    """int64 ``[COUNTER_COPIES, COUNTERS]``: parts of sums, over all lookups, of distinct rows by ``HITS``, ``MISSES``
    and ``BYPASSED`` (misses that found no way), and of records by ``WRITTEN_BACK``."""
    first_place: int
    """Place of way 0: a multiple of the rows of a block."""


def admit(blocks: Blocks, cache: Cache, count: Tensor, unique: Tensor, lookup: int, epoch: int) -> None:
    """Copy the records of the rows of a lookup into the cache, as far as their sets have room for them.

    The ways that were used least often are replaced, and written back if they are newer than the blocks.

    Args:
        blocks: Written. The blocks, followed by those of the cache.
        cache: Written, except for ``first_place``.
        count: int64 ``[1]``: number of rows.
        unique: int64 ``[n]``: distinct rows, of which the first ``count`` are valid.
        lookup: Number of the lookup, different from that of the last 2^24 - 2 lookups.
        epoch: Number that increases from time to time; each increase halves the frequencies.
    """
    missing = torch.empty(unique.numel(), dtype=torch.uint8, device=unique.device)
    now = 1 + lookup % (_LOOKUPS - 1), epoch % _EPOCHS  # 0 is the state of an empty way
    torch.ops.recis.cache_admit(*blocks, *cache, count, unique, missing, *now)


def locate(cache: Cache, rows: Tensor, *, count: Tensor | None = None, writes: bool = False) -> Tensor:
    """Return the places of rows, int64 ``[n]``; a negative row is its own place.

    Args:
        cache: With ``writes``, its states are written.
        rows: int64 ``[n]``.
        count: int64 ``[1]``: only so many rows are valid, and other places are undefined; None: all are.
        writes: The records are about to be written; valid rows must be distinct.
    """
    places = torch.empty_like(rows)
    torch.ops.recis.cache_locate(*cache, rows, count, writes, places)
    return places


def write_back(blocks: Blocks, cache: Cache) -> None:
    """Copy all records that are newer than those in the blocks back to them; they stay in the cache.

    Args:
        blocks: Written. The blocks, followed by those of the cache.
        cache: States and counters are written.
    """
    torch.ops.recis.cache_write_back(*blocks, *cache)
