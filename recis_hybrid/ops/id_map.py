"""Operators of the IDMap: (member table, id) → row.

Shapes: N ids of a call over all features, S slots, R rows ever made. ``slots`` is int64 ``[S, 2]`` with S a power of
two; ``counters`` is int64 ``[5]``, indexed by the constants below. The callers in ``embedding`` keep the load at or
below 0.75 and the buffers large enough; nothing here grows anything or waits for a device.
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

FRESH, ROWS, FREE, USED_SLOTS, LIVE, COUNTERS = range(6)
"""What each counter counts: rows handed out since the last commit, rows ever made, free rows, slots that are
full or erased, ids that have a row; and how many counters there are."""


def find(
    slots: Tensor,
    ids: Sequence[Tensor],
    members: Sequence[int],
    rows: Tensor,
    *,
    used: Sequence[Tensor] = (),
    numbers: bool = False,
) -> None:
    """Write the row of each id into ``rows``, -1 for an id that has none.

    Args:
        slots: int64 ``[S, 2]``.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table, 0 to 65,535.
        rows: int64 ``[N]``, written.
        used: For each feature, int64, whose last element says how many of its ids there are, on their device, where the
            host knows but a bound: the others have no row. An empty tensor: all; an empty list: all of all.
        numbers: Writes the numbers of the slots instead of the rows.
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
    """Like :func:`find`, and gives every id that has no row one: a free one, else the next. :func:`commit` must follow.

    Args:
        slots: int64 ``[S, 2]``, written. At most 0.75 S entries may be in use afterwards.
        counters: int64 ``[5]``; FRESH grows by the number of new rows.
        free_rows: int64, rows to use again; the last FREE of the first ones go first.
        admitted: uint8 ``[N]``: 0 where an id without a row must not get one; None: all may.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table.
        rows: int64 ``[N]``, written.
        fresh: int64 ``[N]``; for each new row a position in ``rows`` that holds it.
        used: As in :func:`find`.
    """
    torch.ops.recis.id_map_find_or_insert(slots, counters, free_rows, admitted, ids, members, used, rows, fresh)


def commit(counters: Tensor) -> None:
    """Count the rows that a find-or-insert handed out as old, once they have their first values."""
    torch.ops.recis.id_map_commit(counters)


def rehash(slots: Tensor, fresh_slots: Tensor) -> None:
    """Copy all entries of ``slots`` that are not erased into ``fresh_slots``, which is zeroed and large enough."""
    torch.ops.recis.id_map_rehash(slots, fresh_slots)


def list_ids(slots: Tensor, ids: Tensor, members: Tensor, rows: Tensor, numbers: Tensor, count: Tensor) -> None:
    """Write all ids, their member tables, rows and slots, in no particular order.

    Args:
        slots: int64 ``[S, 2]``.
        ids: int64, an upper bound of what is there; written.
        members: As ``ids``; written.
        rows: As ``ids``; written.
        numbers: As ``ids``; written with the slots' numbers.
        count: int64 ``[1]``, zeroed; becomes the number written.
    """
    torch.ops.recis.id_map_list(slots, ids, members, rows, numbers, count)


def erase(slots: Tensor, numbers: Tensor, counters: Tensor, free_rows: Tensor | None) -> None:
    """Erases the ids in the slots ``numbers`` (int64 ``[n]``; below 0: none) and puts their rows on the free list.

    ``free_rows`` (int64) must have room for every row ever made; without it rows are forgotten. A slot named twice is
    erased once.
    """
    torch.ops.recis.id_map_erase(slots, numbers, counters, free_rows)


def set_rows(slots: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """Give the ids in the distinct slots ``numbers`` (int64 ``[n]``) the rows ``rows`` (int64 ``[n]``)."""
    torch.ops.recis.id_map_set(slots, numbers, rows)


def move(slots: Tensor, moved: Tensor) -> None:
    """Give the id of each row another row: ``moved[row]`` (int64 ``[R]``)."""
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
    """Count ids whose row (int64 ``[N]``) is below 0, in a map whose entries hold counts in place of rows."""
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
    """Write (uint8 ``[N]``) whether each id has a row or was counted ``least`` times by :func:`count`."""
    torch.ops.recis.id_map_admit(slots, ids, members, used, rows, least, admitted)


def bucket_of(ids: Tensor) -> Tensor:
    """Return which of the 65,536 buckets owns each id.

    Args:
        ids: int64 ``[N]``, contiguous.

    Returns:
        int64 ``[N]``, 0 to 65,535; the same on every device, rank and version.
    """
    buckets = torch.empty_like(ids)
    torch.ops.recis.bucket_ids(ids, buckets)
    return buckets


def bucket_order(ids: Tensor, members: Tensor | None = None) -> Tensor:
    """Return the order of distinct ids by (bucket, id), or by (member table, bucket, id).

    Args:
        ids: int64 ``[N]``.
        members: int64 ``[N]``, numbers of the ids' member tables; None: all are of one.

    Returns:
        int64 ``[N]``: indices into ``ids``.
    """
    order = ids.argsort()
    place = bucket_of(ids[order])
    if members is not None:
        place |= members[order] << 16
    return order[place.argsort(stable=True)]


def file_order(ids: Tensor, members: Tensor, rows: Tensor, member_count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Put rows in the order in which they lie in files: by (member table, bucket, id).

    Args:
        ids: int64 ``[N]``, contiguous, on the CPU.
        members: int64 ``[N]``, numbers of the member tables, from 0 to ``member_count`` - 1.
        rows: int64 ``[N]``.
        member_count: How many member tables there are.

    Returns:
        Ids, rows and buckets in that order, int64 ``[N]`` each.
    """
    ordered = torch.empty(3, ids.numel(), dtype=torch.int64)
    torch.ops.recis.file_order(ids, members, rows, member_count, ordered)
    return ordered[0], ordered[1], ordered[2]
