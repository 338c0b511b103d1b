"""Rows given up, and memory given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from recis_hybrid import ops
from recis_hybrid.embedding.eviction import Eviction, Rows
from recis_hybrid.embedding.lookup import next_generation

if TYPE_CHECKING:
    from recis_hybrid.embedding.hash_table import HashTable


def evict_rows(table: HashTable, rule: Eviction) -> int:
    """Gives up the rows of a table that a rule names. Returns how many."""
    table.see()
    entries = table.id_map.entries()
    meta = ops.blocks.read_meta(table.blocks.handle, table.on_blocks(entries.rows)).to(table.map_device)
    unwanted = rule.unwanted(Rows(entries.ids, entries.members, meta[0], meta[1], meta[2], table.step))
    evicted = table.erase_slots("evict", entries.slots[unwanted])
    if table.watched:
        ids, members = entries.ids[unwanted], entries.members[unwanted]
        for member in members.unique().tolist():
            table.note(member, ids[members == member])
    return evicted


def compact_rows(table: HashTable) -> None:
    """Moves the rows of a table together, and gives blocks at the end back."""
    table.refuse_pending("compact")
    table.see()
    table.generation = next_generation()
    entries, bound, live = table.id_map.entries(), table.id_map.row_bound, len(table)
    rows = table.on_blocks(entries.rows)
    free = torch.ones(live, dtype=torch.bool, device=table.device)
    free[rows[rows < live]] = False
    source, target = rows[rows >= live].sort().values, free.nonzero().view(-1)
    ops.blocks.copy_records(table.blocks.handle, source, target)
    moved = torch.arange(bound, dtype=torch.int64, device=table.device)
    moved[source] = target
    # The new slots first: if memory runs out here, every row is still where the map says.
    table.id_map.rehash(live)
    table.id_map.move(moved.to(table.map_device), live)
    table.blocks.truncate(live)
