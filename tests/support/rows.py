"""Invariants of the rows of a table."""

from __future__ import annotations

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable


def assert_every_row_is_used_or_free(table: HashTable) -> None:
    """Check that each row is that of one id, free, or withheld from inserts by a compaction, and within the blocks."""
    id_map, compaction = table.store.id_map, table.store.compaction
    used = id_map.entries().rows.tolist()
    free = id_map.free_rows[: int(id_map.counters[ops.id_map.FREE])].tolist()
    withheld = [] if compaction is None else compaction._is_free.nonzero().view(-1).tolist()
    assert sorted([*used, *free, *withheld]) == list(range(id_map.row_count()))
    assert id_map.row_count() <= table.store.blocks.capacity
