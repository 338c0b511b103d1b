"""Rows given up, and memory given back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.eviction import Eviction, Rows
from recis_hybrid.embedding.table.lookup import next_generation

if TYPE_CHECKING:
    from recis_hybrid.embedding.table.hash_table import HashTable


class Evicted(NamedTuple):
    """Rows that are to be given up; int64 ``[n]`` each."""

    slots: Tensor
    ids: Tensor
    members: Tensor


def evicted_by(table: HashTable, rule: Eviction) -> Evicted:
    """Return the rows of a table that a rule names, and leaves them there.

    Raises:
        RuntimeError: If the table is read-only, or gradients wait for its rows.
        TypeError: If it is no rule, or does not return a tensor of bool.
        ValueError: If that does not have as many elements as the table has rows.
    """
    name = type(rule).__name__
    if isinstance(rule, type) or not callable(getattr(rule, "unwanted", None)):
        raise TypeError(f"evict: a rule must have a method unwanted(rows), as Unused(steps=1000) has, got {rule!r}")
    table.refuse_read_only("evict")
    table.refuse_pending("evict")
    table.see()
    entries = table.id_map.entries()
    meta = ops.blocks.read_meta(table.blocks.handle, table.on_blocks(entries.rows)).to(table.map_device)
    unwanted = rule.unwanted(Rows(entries.ids, entries.members, meta[0], meta[1], meta[2], table.step))
    n = entries.ids.numel()
    if not isinstance(unwanted, Tensor) or unwanted.dtype != torch.bool:
        got = unwanted.dtype if isinstance(unwanted, Tensor) else f"a {type(unwanted).__name__}"
        raise TypeError(
            f"evict: {name}.unwanted must return a tensor of bool [{n}], True for rows to give up, got {got}"
        )
    if list(unwanted.shape) != [n]:
        raise ValueError(
            f"evict: {name}.unwanted must say of each of the {n} rows whether to give it up: bool [{n}], "
            f"got bool {list(unwanted.shape)}"
        )
    unwanted = unwanted.to(table.map_device)
    return Evicted(entries.slots[unwanted], entries.ids[unwanted], entries.members[unwanted])


def erase_evicted(table: HashTable, evicted: Evicted) -> int:
    """Give up what :func:`evicted_by` returned; nothing may have changed the table since. Returns how many rows."""
    count = table.erase_slots("evict", evicted.slots)
    if table.watched:
        for member in evicted.members.unique().tolist():
            table.note(member, evicted.ids[evicted.members == member])
    return count


def compact_rows(table: HashTable) -> None:
    """Move the rows of a table together, and give blocks at the end back."""
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
