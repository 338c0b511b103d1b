"""Operators of the IDMap: (member table, id) → row.

Shapes: N ids of a call over all features, S slots. ``slots`` is int64 ``[S, 2]`` with S a power of two; ``counters`` is
int64 ``[2]``: rows handed out, and rows whose records have their first values. The callers in ``embedding`` keep the
load at or below 0.75 and the buffers large enough; nothing here grows anything or waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned

nothing_returned("id_map_find", "id_map_find_or_insert", "id_map_rehash", "id_map_list", "bucket_ids")


def find(slots: Tensor, ids: Sequence[Tensor], members: Sequence[int], rows: Tensor) -> None:
    """Writes the row of each id into ``rows``, -1 for an id that has none.

    Args:
        slots: int64 ``[S, 2]``.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table, 0 to 65,535.
        rows: int64 ``[N]``, written.
    """
    torch.ops.recis.id_map_find(slots, ids, members, rows)


def find_or_insert(
    slots: Tensor, counters: Tensor, ids: Sequence[Tensor], members: Sequence[int], rows: Tensor, fresh: Tensor
) -> None:
    """Like :func:`find`, and gives every id that has no row the next one.

    Args:
        slots: int64 ``[S, 2]``, written. At most 0.75 S entries may be in use afterwards.
        counters: int64 ``[2]``; the first grows by the number of new rows.
        ids: For each feature, int64 ``[n_f]``, contiguous.
        members: For each feature, the number of its member table.
        rows: int64 ``[N]``, written.
        fresh: int64 ``[N]``; for each new row, in the order of rows, a position in ``rows`` that holds it.
    """
    torch.ops.recis.id_map_find_or_insert(slots, counters, ids, members, rows, fresh)


def rehash(slots: Tensor, grown: Tensor) -> None:
    """Copies all entries of ``slots`` into ``grown``, larger and zeroed."""
    torch.ops.recis.id_map_rehash(slots, grown)


def list_ids(slots: Tensor, member: int, ids: Tensor, rows: Tensor, count: Tensor) -> None:
    """Writes the ids of a member table and their rows, in no particular order.

    Args:
        slots: int64 ``[S, 2]``.
        member: The member table's number.
        ids: int64, an upper bound of what is there; written.
        rows: As ``ids``; written.
        count: int64 ``[1]``, zeroed; becomes the number written.
    """
    torch.ops.recis.id_map_list(slots, member, ids, rows, count)


def bucket_of(ids: Tensor) -> Tensor:
    """Returns which of the 65,536 buckets owns each id.

    Args:
        ids: int64 ``[N]``, contiguous.

    Returns:
        int64 ``[N]``, 0 to 65,535; the same on every device, rank and version.
    """
    buckets = torch.empty_like(ids)
    torch.ops.recis.bucket_ids(ids, buckets)
    return buckets
