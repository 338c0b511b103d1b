"""ChangeLog: changes of a table since a point in time, for incremental checkpoints.

Rows changed by lookups and updates are found by their metadata. Other changes (erasing, evicting, clearing, inserting
manually) are logged, but only while a ``ChangeLog`` is referenced.

Letters: n rows, m ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.checkpointing import BUCKETS
from recis_hybrid.embedding.table.store import RowStore

_FEW = 4096
_PARTS = 256
_MOST_ADDED = 1 << 16
_SORTED_PER_ID = 3
_BUCKETS_OF_A_PART = BUCKETS // _PARTS


class _DistinctIds:
    """Ids without most of their duplicates, which are removed a part at a time, so that no call takes long.

    A part has the ids of some buckets. It is sorted when it has grown to 1.5 to 2.5 times its distinct ids; the factor
    differs by part, so that the parts are not all sorted in the same call.
    """

    def __init__(self) -> None:
        self._added: list[Tensor] = []
        """Ids in no part yet."""
        self._added_size = 0
        self._parts: list[list[np.ndarray]] = [[] for _ in range(_PARTS)]
        self._sizes = np.zeros(_PARTS, np.int64)
        self._limits = np.array([self._limit(number, 0) for number in range(_PARTS)])
        self._distinct = np.zeros(_PARTS, np.int64)

    @property
    def distinct(self) -> int:
        """A lower bound of the number of distinct ids."""
        return int(self._distinct.sum())

    def add(self, ids: Tensor) -> None:
        """Add ids, int64 ``[m]``."""
        self._added.append(ids)
        self._added_size += ids.numel()
        if self._added_size >= min(max(int(self._sizes.sum()), _FEW), _MOST_ADDED):
            self._split()

    def sorted(self) -> Tensor:
        """Return the distinct ids, int64 ``[n]``, ascending."""
        parts = [torch.from_numpy(each) for part in self._parts for each in part]
        found: Tensor = torch.cat([torch.empty(0, dtype=torch.int64), *parts, *self._added]).unique()
        return found

    def _split(self) -> None:
        """Move the added ids to parts, and remove duplicates from those that have grown."""
        ids = torch.cat(self._added)
        self._added, self._added_size = [], 0
        numbers = (ops.id_map.bucket_of(ids).numpy() // _BUCKETS_OF_A_PART).astype(np.uint8)
        counts = np.bincount(numbers, minlength=_PARTS)
        ordered = ids.numpy()[numbers.argsort(kind="stable")]
        for part, some in zip(self._parts, np.split(ordered, counts.cumsum()[:-1]), strict=True):
            part.append(some.copy())  # a view would keep the ids of all parts
        self._sizes += counts
        # Each id is sorted again twice on the average, so this keeps up and bounds the time of a call.
        left = _SORTED_PER_ID * ids.numel()
        for number in (self._limits - self._sizes).argsort(kind="stable").tolist():
            if left <= 0 or self._sizes[number] <= self._limits[number]:
                break
            left -= int(self._sizes[number])
            self._remove_duplicates(number)

    def _remove_duplicates(self, number: int) -> None:
        ids = np.sort(np.concatenate(self._parts[number]))
        distinct = ids[np.concatenate(([True], ids[1:] != ids[:-1]))]
        self._parts[number] = [distinct]
        self._sizes[number] = self._distinct[number] = distinct.size
        self._limits[number] = self._limit(number, distinct.size)

    @staticmethod
    def _limit(number: int, distinct: int) -> int:
        return int(max(distinct, _FEW // _PARTS) * (1.5 + number / _PARTS))


class ChangeLog:
    """Ids changed since a point in time other than by lookups and updates, 8 bytes each.

    However often an id is inserted and erased, it is stored a few times at most. If there were more ids of a member
    table than the table has rows, the whole member table counts as changed.

    Args:
        step: Number of steps done on the table at that time.
        admission: For each member table, the state of its gate at that time; empty if nothing need be saved.
    """

    def __init__(self, step: int, admission: Sequence[dict[str, Tensor]]) -> None:
        self.step = step
        self.admission = admission
        self.whole: set[int] = set()
        """Member tables in which every row may have changed."""
        self._ids: dict[int, _DistinctIds] = {}

    def note(self, member: int, ids: Tensor, rows: int) -> None:
        """Note that ids (int64 ``[m]``) of a member table got, changed or lost rows; it now has ``rows`` rows."""
        if member in self.whole or ids.numel() == 0:
            return
        noted = self._ids.setdefault(member, _DistinctIds())
        noted.add(ids.detach().cpu().clone())
        if noted.distinct > max(rows, _FEW):
            self.note_whole(member)

    def note_whole(self, member: int) -> None:
        """Note that every row of a member table may have changed."""
        self.whole.add(member)
        self._ids.pop(member, None)

    def ids(self, member: int) -> Tensor:
        """Return the ids of a member table that were noted, int64 ``[m]``, ascending."""
        return self._ids.get(member, _DistinctIds()).sorted()


def changed_rows(store: RowStore, log: ChangeLog) -> list[tuple[dict[str, Tensor], Tensor | None]]:
    """Return the rows that changed since a log was created.

    Args:
        store: Rows of the table that created the log.
        log: The log.

    Returns:
        For each member table, the rows that may have changed, in the form of ``HashTable.export`` but ordered by
        (bucket, id); and the ids (int64 ``[m]``) that may have lost their row, or None if these are all rows.
    """
    ids, members = store.touched(log.step)
    result: list[tuple[dict[str, Tensor], Tensor | None]] = []
    for member in range(len(store.members)):
        if member in log.whole:
            own = store.ids(member)
            result.append((store.export(member, own[ops.id_map.bucket_order(own)]), None))
            continue
        noted = log.ids(member).to(store.device)
        live = store.rows(member, noted) >= 0
        own = torch.cat([ids[members == member], noted[live]]).unique()
        result.append((store.export(member, own[ops.id_map.bucket_order(own)]), noted[~live]))
    return result


def changed_admission(before: dict[str, Tensor], now: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Compare two admission states of one member table.

    Args:
        before: Columns ``[n]``, ``ids`` ascending.
        now: Columns ``[n]``, ``ids`` ascending.

    Returns:
        The new or changed entries of ``now``, and the ids (int64 ``[m]``) that are missing in ``now``.
    """
    if before["ids"].numel() == 0:
        return now, before["ids"]
    at = torch.searchsorted(before["ids"], now["ids"]).clamp_(max=before["ids"].numel() - 1)
    same = before["ids"][at] == now["ids"]
    for name, values in now.items():
        equal = before[name][at] == values
        same &= equal if equal.dim() == 1 else equal.all(1)
    return {name: values[~same] for name, values in now.items()}, _without(before["ids"], now["ids"])


def _without(ids: Tensor, others: Tensor) -> Tensor:
    """Return the ids that are not in ``others``; both are ascending."""
    if others.numel() == 0:
        return ids
    at = torch.searchsorted(others, ids).clamp_(max=others.numel() - 1)
    return ids[others[at] != ids]
