"""ChangeLog: changes of a table since a point in time, for incremental checkpoints.

Rows changed by lookups and updates are found by their metadata. Other changes (erasing, evicting, clearing, inserting
manually) are logged, but only while a ``ChangeLog`` is referenced.

Letters: n rows, m ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.table.store import RowStore

_FEW = 4096


class ChangeLog:
    """Ids changed since a point in time other than by lookups and updates, 8 bytes each.

    An id is stored once, however often it is inserted and erased. If there were more ids of a member table than the
    table has rows, the whole member table counts as changed.

    Args:
        step: Number of steps done on the table at that time.
        admission: For each member table, the state of its gate at that time; empty if nothing need be saved.
    """

    def __init__(self, step: int, admission: Sequence[dict[str, Tensor]]) -> None:
        self.step = step
        self.admission = admission
        self.whole: set[int] = set()
        """Member tables in which every row may have changed."""
        self._ids: dict[int, list[Tensor]] = {}
        self._limits: dict[int, int] = {}

    def note(self, member: int, ids: Tensor, rows: int) -> None:
        """Note that ids (int64 ``[m]``) of a member table got, changed or lost rows; it now has ``rows`` rows."""
        if member in self.whole or ids.numel() == 0:
            return
        parts = self._ids.setdefault(member, [])
        parts.append(ids.detach().cpu().clone())
        if sum(part.numel() for part in parts) > self._limits.get(member, _FEW):
            distinct = torch.cat(parts).unique()
            if distinct.numel() > max(rows, _FEW):
                self.note_whole(member)
                return
            self._ids[member] = [distinct]
            self._limits[member] = max(_FEW, 2 * distinct.numel())

    def note_whole(self, member: int) -> None:
        """Note that every row of a member table may have changed."""
        self.whole.add(member)
        self._ids.pop(member, None)

    def ids(self, member: int) -> Tensor:
        """Return the ids of a member table that were noted, int64 ``[m]``, ascending."""
        noted: Tensor = torch.cat([torch.empty(0, dtype=torch.int64), *self._ids.get(member, [])]).unique()
        return noted


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
