"""Operators of the IDMap: (member table, id) → row.

Shapes: N ids of a call over all features, S slots, R rows ever created. ``slots`` is int64 ``[S, 2]`` with S a power of
two; ``counters`` is int64 ``[6]``, indexed by the constants below. Callers in ``embedding`` keep the load factor at or
below 0.75 and the buffers large enough; no function here grows a buffer or waits for a device.
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
    "id_map_list",
    "id_map_erase",
    "id_map_set",
    "id_map_move",
    "id_map_count",
    "id_map_admit",
    "bucket_ids",
    "file_order",
)

FRESH, ROWS, FREE, USED_SLOTS, LIVE, OVERFLOW, COUNTERS = range(7)
"""Indices of the counters: rows added since the last commit, rows ever created, free rows, slots in use or erased, ids
with a row, whether an insert found the map full; and the number of counters."""


def find(
    slots: Tensor,
    ids: Sequence[Tensor],
    members: Sequence[int],
    rows: Tensor,
    *,
    used: Sequence[Tensor] = (),
    numbers: bool = False,
) -> None:
    """Write the row of each id into ``rows``, -1 for an id without one.

    Args:
        slots: int64 ``[S, 2]``.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table, 0 to 65,535.
        rows: int64 ``[N]``, written.
        used: For each feature, an int64 tensor on the device of its ids whose last element is the number of ids in use,
            for callers that only know a bound; ids after them have no row. Empty tensors or an empty list: all ids.
        numbers: Whether to write slot numbers instead of rows.
    """
    torch.ops.recis.id_map_find(slots, ids, members, used, numbers, rows)


def find_or_insert(
    slots: Tensor,
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
        slots: int64 ``[S, 2]``, written. At most 0.75 S entries may be in use afterwards.
        counters: int64 ``[6]``; FRESH grows by the number of new rows.
        free_rows: int64: rows to reuse; the first FREE are in use, taken from their end.
        admitted: uint8 ``[N]``: 0 for ids that must not get a row; None: admit all.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table.
        rows: int64 ``[N]``, written.
        fresh: int64 ``[N]``, written: for each new row, a position in ``rows`` that holds it.
        used: As in :func:`find`.
    """
    torch.ops.recis.id_map_find_or_insert(slots, counters, free_rows, admitted, ids, members, used, rows, fresh)


def commit(counters: Tensor) -> None:
    """Count the rows added by :func:`find_or_insert` as initialized."""
    torch.ops.recis.id_map_commit(counters)


def rehash(slots: Tensor, fresh_slots: Tensor) -> None:
    """Copy the entries of ``slots``, except erased ones, into ``fresh_slots``, which is zeroed and large enough."""
    torch.ops.recis.id_map_rehash(slots, fresh_slots)


def list_ids(slots: Tensor, ids: Tensor, members: Tensor, rows: Tensor, numbers: Tensor, count: Tensor) -> None:
    """List all ids with their member tables, rows and slot numbers, in no particular order.

    Args:
        slots: int64 ``[S, 2]``.
        ids: int64, at least as long as the list; written.
        members: int64, as long as ``ids``; written.
        rows: int64, as long as ``ids``; written.
        numbers: int64, as long as ``ids``; written with slot numbers.
        count: int64 ``[1]``, zeroed; becomes the number of ids.
    """
    torch.ops.recis.id_map_list(slots, ids, members, rows, numbers, count)


def erase(slots: Tensor, numbers: Tensor, counters: Tensor, free_rows: Tensor | None) -> None:
    """Erase ids and put their rows on the free list.

    Args:
        slots: int64 ``[S, 2]``, written.
        numbers: int64 ``[n]``: slot numbers; negative ones are skipped, repeated ones erased once.
        counters: int64 ``[6]``, written.
        free_rows: int64, with room for every row ever created; written. None drops the rows.
    """
    torch.ops.recis.id_map_erase(slots, numbers, counters, free_rows)


def set_rows(slots: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """Set the rows (int64 ``[n]``) of the ids in distinct slots (``numbers``, int64 ``[n]``)."""
    torch.ops.recis.id_map_set(slots, numbers, rows)


def move(slots: Tensor, moved: Tensor) -> None:
    """Set the row of each id to ``moved[row]`` (int64 ``[R]``)."""
    torch.ops.recis.id_map_move(slots, moved)


def count(
    slots: Tensor,
    counters: Tensor,
    ids: Sequence[Tensor],
    members: Sequence[int],
    rows: Tensor,
    *,
    used: Sequence[Tensor] = (),
) -> None:
    """Count the ids whose row (int64 ``[N]``) is negative, in a map that holds counts instead of rows."""
    torch.ops.recis.id_map_count(slots, counters, ids, members, used, rows)


def admit(
    slots: Tensor,
    ids: Sequence[Tensor],
    members: Sequence[int],
    rows: Tensor,
    least: int,
    admitted: Tensor,
    *,
    used: Sequence[Tensor] = (),
) -> None:
    """Write to ``admitted`` (uint8 ``[N]``) whether each id has a row or has been counted ``least`` times."""
    torch.ops.recis.id_map_admit(slots, ids, members, used, rows, least, admitted)


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
