"""Operators of the IDMap, (member table, id) → row, and of sketches, which count ids approximately.

Shapes: N ids of a call over all features, S slots, R rows ever created. ``header`` is int64 ``[HEADER_WORDS + C]``:
words of ``csrc/core/table.h``, then the addresses of the C chunks that hold the slots; operators that change the slots
are declared to write it. ``counters`` is int64 ``[6]``, indexed by the constants below. Callers in ``embedding`` keep
the load factor at or below 0.75 and the buffers large enough; no function here grows a buffer or waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned

nothing_returned(
    "id_map_find",
    "id_map_find_or_insert",
    "id_map_commit",
    "id_map_rehash",
    "id_map_move_lines",
    "id_map_list",
    "id_map_list_marked",
    "id_map_erase",
    "id_map_set",
    "id_map_count",
    "id_map_admit",
    "bucket_ids",
    "file_order",
    "sketch_admit",
    "sketch_halve",
)

FRESH, ROWS, FREE, USED_SLOTS, LIVE, OVERFLOW, COUNTERS = range(7)
"""Indices of the counters: rows added since the last commit, rows ever created, free rows, slots in use or erased, ids
with a row, whether an insert found the map full; and the number of counters."""

LINES, OLD_LINES, LAST_OLD, CHUNK_SHIFT = range(4)
STUCK = 8
HEADER_WORDS = 16
"""Words of a header that the host writes or reads, and where the addresses begin; see ``csrc/core/table.h``."""

LINE_SLOTS = 4
FULL = 2
"""State of a slot that holds an id."""

SKETCH_ROWS = 4
"""Cells of an id in a count-min sketch; see ``csrc/core/sketch.h``."""
SKETCH_WORDS = 8
"""Words of a block of a sketch."""
CELL_BITS = (2, 4, 8, 16)
"""Bits that a cell of a sketch may have."""


def find(
    header: Tensor,
    ids: Sequence[Tensor],
    members: Sequence[int],
    rows: Tensor,
    *,
    used: Sequence[Tensor] = (),
    numbers: bool = False,
) -> None:
    """Write the row of each id into ``rows``, -1 for an id without one.

    Args:
        header: Header of the map.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table, 0 to 65,535.
        rows: int64 ``[N]``, written.
        used: For each feature, an int64 tensor on the device of its ids whose last element is the number of ids in use,
            for callers that only know a bound; ids after them have no row. Empty tensors or an empty list: all ids.
        numbers: Whether to write slot numbers instead of rows.
    """
    torch.ops.recis.id_map_find(header, ids, members, used, numbers, rows)


def find_or_insert(
    header: Tensor,
    counters: Tensor,
    free_rows: Tensor,
    admitted: Tensor | None,
    ids: Sequence[Tensor],
    members: Sequence[int],
    rows: Tensor,
    fresh: Tensor,
    *,
    used: Sequence[Tensor] = (),
) -> None:
    """Find the row of each id, or add one: a free row, otherwise the next row. :func:`commit` must follow.

    Args:
        header: Header of the map, which is written. At most 0.75 S slots may be in use afterwards.
        counters: int64 ``[6]``; FRESH grows by the number of new rows.
        free_rows: int64: rows to reuse; the first FREE are in use, taken from their end.
        admitted: uint8 ``[N]``: 0 for ids that must not get a row; None: admit all.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table.
        rows: int64 ``[N]``, written.
        fresh: int64 ``[N]``, written: for each new row, a position in ``rows`` that holds it.
        used: As in :func:`find`.
    """
    torch.ops.recis.id_map_find_or_insert(header, counters, free_rows, admitted, ids, members, used, rows, fresh)


def commit(counters: Tensor) -> None:
    """Count the rows added by :func:`find_or_insert` as initialized."""
    torch.ops.recis.id_map_commit(counters)


def rehash(header: Tensor, slots: int, fresh_header: Tensor) -> None:
    """Copy the entries of the S ``slots`` of a map, except erased ones, into another, empty and large enough."""
    torch.ops.recis.id_map_rehash(header, slots, fresh_header)


def decode(entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return state, member table and row of the second words of slots (int64 ``[n]``); see ``csrc/core/table.h``."""
    return entries >> 62 & 3, entries >> 46 & 0xFFFF, entries >> 6 & (1 << 40) - 1


def place_of(ids: Tensor, members: Tensor) -> Tensor:
    """Return the upper half of the hash by which each id of a member table is placed in every map.

    Args:
        ids: int64 ``[N]``.
        members: int64 ``[N]``, the number of each id's member table.

    Returns:
        int64 ``[N]``, 0 to 2^32 - 1; identical on all devices and ranks. ``csrc/core/hash/mix.h`` computes the same.
    """
    x = ids + (members + 1) * -0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return _shifted(x ^ _shifted(x, 31), 32)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Return unsigned 64-bit numbers shifted to the right."""
    return x >> bits & (1 << 64 - bits) - 1


def move_lines(
    header: Tensor, counters: Tensor, lines: int, first: int, end: int, last_old: int, lifted: Tensor
) -> None:
    """Spread the ids of some lines of four slots over the whole map, which grows by that; drop erased slots.

    Calls follow one another from the last of the old lines down to line 0. Until then, ids of the lines before
    ``first`` are found among the old lines. Nothing changes, now and in later calls, if too many lines in a row are
    full for ``lifted``; the word STUCK of the header is then 1.

    Args:
        header: Header of the map, which is written.
        counters: int64 ``[6]``, written: erased slots are no longer in use.
        lines: New number of lines, which the chunks of the header must hold.
        first: First line to be moved.
        end: ``first`` of the call before; the old number of lines in the first call.
        last_old: Greatest hash of the ids that start before ``first``, as a signed number.
        lifted: int64 ``[lines, 4, 2]``: more than ``end - first``; overwritten.
    """
    torch.ops.recis.id_map_move_lines(header, counters, lines, first, end, last_old, lifted)


def list_ids(
    header: Tensor, slots: int, ids: Tensor, members: Tensor, rows: Tensor, numbers: Tensor, count: Tensor
) -> None:
    """List all ids with their member tables, rows and slot numbers, in no particular order.

    Args:
        header: Header of the map.
        slots: S.
        ids: int64, at least as long as the list; written.
        members: int64, as long as ``ids``; written.
        rows: int64, as long as ``ids``; written.
        numbers: int64, as long as ``ids``; written with slot numbers.
        count: int64 ``[1]``, zeroed; becomes the number of ids.
    """
    torch.ops.recis.id_map_list(header, slots, ids, members, rows, numbers, count)


def list_marked(header: Tensor, slots: int, marks: Tensor, ids: Tensor, members: Tensor, count: Tensor) -> None:
    """List the ids whose rows are marked, with their member tables, in no particular order.

    Args:
        header: Header of the map.
        slots: S.
        marks: uint8 ``[R]``.
        ids: int64, at least as long as the list; written.
        members: int64, as long as ``ids``; written.
        count: int64 ``[1]``, zeroed; becomes the number of ids.
    """
    torch.ops.recis.id_map_list_marked(header, slots, marks, ids, members, count)


def erase(header: Tensor, numbers: Tensor, counters: Tensor, free_rows: Tensor | None) -> None:
    """Erase ids and put their rows on the free list.

    Args:
        header: Header of the map, which is written.
        numbers: int64 ``[n]``: slot numbers; negative ones are skipped, repeated ones erased once.
        counters: int64 ``[6]``, written.
        free_rows: int64, with room for every row ever created; written. None drops the rows.
    """
    torch.ops.recis.id_map_erase(header, numbers, counters, free_rows)


def set_rows(header: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """Set the rows (int64 ``[n]``) of the ids in distinct slots (``numbers``, int64 ``[n]``)."""
    torch.ops.recis.id_map_set(header, numbers, rows)


def count(
    header: Tensor,
    counters: Tensor,
    ids: Sequence[Tensor],
    members: Sequence[int],
    rows: Tensor,
    *,
    used: Sequence[Tensor] = (),
    counts: Tensor | None = None,
) -> None:
    """Count the ids whose row (int64 ``[N]``) is negative, in a map that holds counts instead of rows.

    ``counts`` (int64 ``[N]``, at least 1) is how often each id occurs; None: once.
    """
    torch.ops.recis.id_map_count(header, counters, ids, members, used, rows, counts)


def admit(
    header: Tensor,
    ids: Sequence[Tensor],
    members: Sequence[int],
    rows: Tensor,
    least: int,
    admitted: Tensor,
    *,
    used: Sequence[Tensor] = (),
) -> None:
    """Write to ``admitted`` (uint8 ``[N]``) whether each id has a row or has been counted ``least`` times."""
    torch.ops.recis.id_map_admit(header, ids, members, used, rows, least, admitted)


def bucket_of(ids: Tensor) -> Tensor:
    """Return the bucket of each id.

    Args:
        ids: int64 ``[N]``, contiguous.

    Returns:
        int64 ``[N]``, 0 to 65,535; identical on all devices, ranks and versions.
    """
    buckets = torch.empty_like(ids)
    torch.ops.recis.bucket_ids(ids, buckets)
    return buckets


def bucket_order(ids: Tensor, members: Tensor | None = None) -> Tensor:
    """Return the sort order of distinct ids by (bucket, id), or by (member table, bucket, id).

    Args:
        ids: int64 ``[N]``.
        members: int64 ``[N]``, the member table of each id; None if all have the same.

    Returns:
        int64 ``[N]``: indices into ``ids``.
    """
    order = ids.argsort()
    place = bucket_of(ids[order])
    if members is not None:
        place |= members[order] << 16
    return order[place.argsort(stable=True)]


def file_order(ids: Tensor, members: Tensor, rows: Tensor, member_count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort rows in the order of checkpoint files: by (member table, bucket, id).

    Args:
        ids: int64 ``[N]``, contiguous, on the CPU.
        members: int64 ``[N]``, the member table of each id, 0 to ``member_count - 1``.
        rows: int64 ``[N]``.
        member_count: Number of member tables.

    Returns:
        Ids, rows and buckets, sorted, int64 ``[N]`` each.
    """
    ordered = torch.empty(3, ids.numel(), dtype=torch.int64)
    torch.ops.recis.file_order(ids, members, rows, member_count, ordered)
    return ordered[0], ordered[1], ordered[2]


def sketch_admit(
    words: Tensor,
    first_block: int,
    block_shift: int,
    cell_bits: int,
    ids: Sequence[Tensor],
    members: Sequence[int],
    rows: Tensor,
    least: int,
    admitted: Tensor,
    *,
    used: Sequence[Tensor] = (),
    counts: Tensor | None = None,
) -> None:
    """Count the ids that have no row, and then decide which of them have a count of at least ``least``.

    Args:
        words: The sketch, int64 ``[M, K, SKETCH_WORDS]``, written: K blocks of each of M member tables.
        first_block: Number of its first block among those of all buckets.
        block_shift: 64 minus log2 of the number of blocks of all buckets, at least 24.
        cell_bits: Bits of a cell, which saturates at ``2**cell_bits - 1``.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table, below M.
        rows: int64 ``[N]``: negative for an id without a row.
        least: At most ``2**cell_bits - 1``.
        admitted: uint8 ``[N]``, written: 1 for an id that has a row, or is counted often enough; 0 for ids of buckets
            that are not in the sketch.
        used: As in ``ops.id_map.find``.
        counts: int64 ``[N]``, at least 1: how often each id occurs; None: once.
    """
    torch.ops.recis.sketch_admit(
        words, first_block, block_shift, cell_bits, ids, members, used, rows, counts, least, admitted
    )


def sketch_halve(words: Tensor, cell_bits: int, times: int) -> None:
    """Halve every cell ``times`` times (1 to ``cell_bits``), rounding down."""
    torch.ops.recis.sketch_halve(words, cell_bits, times)
