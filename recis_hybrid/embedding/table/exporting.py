"""Records of rows as columns.

Letters: n ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.table.protocols import META

if TYPE_CHECKING:
    from recis_hybrid.embedding.table.hash_table import HashTable


def export_rows(table: HashTable, member: int, ids: Tensor | None) -> dict[str, Tensor]:
    """Return the records of ids (int64 ``[n]``; None for all, ascending): see :meth:`HashTable.export`."""
    table.see()
    ids = table.ids(member) if ids is None else ids.to(table.device)
    rows = table.rows(member, ids)
    if bool((rows < 0).any()):
        missing = ids[rows < 0][:5].tolist()
        raise KeyError(f"table {table.members[member].name!r}: no row for the ids {missing}; look them up first")
    return {"ids": ids, **columns_of(table, rows)}


def export_members(table: HashTable) -> list[dict[str, Tensor]]:
    """Return the records of each member table, rows by (bucket, id)."""
    table.see()
    entries = table.id_map.entries()
    order = entries.ids.argsort()
    place = entries.members[order] << 16 | ops.id_map.bucket_of(entries.ids[order])
    order = order[place.argsort(stable=True)]
    ids, rows = table.on_blocks(entries.ids[order]), table.on_blocks(entries.rows[order])
    counts = entries.members.bincount(minlength=len(table.members)).tolist()
    columns = {"ids": ids, **columns_of(table, rows)}
    parts = zip(*(values.split(counts) for values in columns.values()), strict=True)
    return [dict(zip(columns, part, strict=True)) for part in parts]


def columns_of(table: HashTable, rows: Tensor) -> dict[str, Tensor]:
    """Return every part of the records of rows (int64 ``[n]``), and their metadata."""
    parts = {part: table.blocks.read(rows, part) for part in table.layout.parts}
    return {**parts, **dict(zip(META, ops.blocks.read_meta(table.blocks.handle, rows), strict=True))}
