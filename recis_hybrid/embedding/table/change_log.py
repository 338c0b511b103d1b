"""Changes: what of a table is other than at an earlier moment, for checkpoints that hold just that.

Rows that lookups and updates change say so themselves, by their metadata. What else changes rows (erasing, evicting,
clearing, inserting by hand) is noted, but only while somebody holds a `Changes`.

Letters: n rows, m ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recis_hybrid import ops

if TYPE_CHECKING:
    from recis_hybrid.embedding.table.hash_table import HashTable

_FEW = 4096


class Changes:
    """What was done to a table since a moment, beside lookups and updates: the ids, 8 bytes each.

    An id is held once, however often it comes and goes, and never more ids of a member table than the table has rows:
    beyond that the member table counts as changed whole.

    Args:
        step: Steps that the table had done at that moment.
        known: By member table that has admission, what that knew at the moment.
    """

    def __init__(self, step: int, known: Mapping[int, dict[str, Tensor]]) -> None:
        self.step = step
        self.known = known
        self.whole: set[int] = set()
        """Member tables of which every row may have changed."""
        self._ids: dict[int, list[Tensor]] = {}
        self._limits: dict[int, int] = {}

    def note(self, member: int, ids: Tensor, rows: int) -> None:
        """Note that ids (int64 ``[m]``) of a member table got, changed or lost rows; the table has ``rows`` now."""
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


def changed_rows(table: HashTable, since: Changes) -> list[tuple[dict[str, Tensor], Tensor | None]]:
    """Return what of a table changed.

    Args:
        table: The table that handed out ``since``.
        since: The moment.

    Returns:
        For each member table the rows that may have changed, as ``HashTable.export`` gives them but by (bucket, id),
        and the ids (int64 ``[m]``) that may have had a row and have none; None where the rows are all there are.
    """
    ids, members = touched_rows(table, since.step)
    result: list[tuple[dict[str, Tensor], Tensor | None]] = []
    for member in range(len(table.members)):
        if member in since.whole:
            own = table.ids(member)
            result.append((table.export(member, _by_bucket(own)), None))
            continue
        noted = since.ids(member).to(table.device)
        live = table.rows(member, noted) >= 0
        own = torch.cat([ids[members == member], noted[live]]).unique()
        result.append((table.export(member, _by_bucket(own)), noted[~live]))
    return result


def touched_rows(table: HashTable, step: int) -> tuple[Tensor, Tensor]:
    """Return ids and member tables, int64 ``[n]`` each, of rows that lookups or updates met after a step."""
    table.see()
    ids, members = torch.empty(2, len(table), dtype=torch.int64, device=table.device).unbind()
    count = torch.zeros(1, dtype=torch.int64, device=table.device)
    slots = table.on_blocks(table.id_map.slots)
    marks = torch.empty(table.id_map.row_bound, dtype=torch.uint8, device=table.device)
    ops.blocks.list_touched(table.blocks.handle, slots, step, marks, ids, members, count)
    return ids[: int(count)], members[: int(count)]


def changed_known(before: dict[str, Tensor], now: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Compare what admission knew with what it knows.

    Args:
        before: Columns ``[n]``, ``ids`` ascending.
        now: Columns ``[n]``, ``ids`` ascending.

    Returns:
        The rows of ``now`` that are new or other, and the ids (int64 ``[m]``) that are gone.
    """
    if before["ids"].numel() == 0:
        return now, before["ids"]
    at = torch.searchsorted(before["ids"], now["ids"]).clamp_(max=before["ids"].numel() - 1)
    same = before["ids"][at] == now["ids"]
    for name, values in now.items():
        same &= before[name][at] == values
    return {name: values[~same] for name, values in now.items()}, _without(before["ids"], now["ids"])


def _without(ids: Tensor, others: Tensor) -> Tensor:
    """The ids that are not among others; both ascending."""
    if others.numel() == 0:
        return ids
    at = torch.searchsorted(others, ids).clamp_(max=others.numel() - 1)
    return ids[others[at] != ids]


def _by_bucket(ids: Tensor) -> Tensor:
    """Ascending ids by (bucket, id)."""
    return ids[ops.id_map.bucket_of(ids.contiguous()).argsort(stable=True)]
