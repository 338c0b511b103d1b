"""Tables as plain state, for checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.checkpointing import JSON, PartState, TableState
from recis_hybrid.embedding.checkpoint.ownership import ALL, Buckets, Shares, within
from recis_hybrid.embedding.planner.coalesce import COUNTS
from recis_hybrid.embedding.table.change_log import ChangeLog, changed_admission
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.record_layout import RecordLayout


def tables_state(tables: Sequence[HashTable], shares: Shares | None = None) -> PartState:
    """Return the rows of every member table, what admission knows, steps done, and the seed of first values.

    Args:
        tables: This rank's.
        shares: What of them is handed out, where there are several ranks.
    """
    states: dict[str, TableState] = {}
    for place, table in enumerate(tables):
        states |= table_state(place, table, shares)
    return PartState(tables=states, meta=tables_meta(tables), owned=True)


def table_state(place: int, table: HashTable, shares: Shares | None) -> dict[str, TableState]:
    """Return what :func:`tables_state` has of one logical table, which has that place among the others."""
    states: dict[str, TableState] = {}
    for number, (member, columns) in enumerate(zip(table.members, table.export_all(), strict=True)):
        handed = ALL
        if shares is not None:
            handed, columns = shares.handed(place, number), shares.whole(place, columns)
        states[member.name] = _state(columns, table_meta(table.layout), handed)
        if table.store.gate is not None:
            states[member.name + COUNTS] = _state(table.store.gate.state_dict(number), {}, handed)
    return states


def tables_meta(tables: Sequence[HashTable]) -> dict[str, JSON]:
    """Return what :func:`tables_state` has beside rows: the seed of first values, and the steps of each member."""
    steps: dict[str, JSON] = {member.name: table.step for table in tables for member in table.members}
    return {"seed": tables[0].store.seed, "steps": steps}


def watch_tables(tables: Sequence[HashTable]) -> list[ChangeLog]:
    """Begins to note what changes in tables, for as long as the result lives."""
    return [table.watch() for table in tables]


def tables_changes(
    tables: Sequence[HashTable], since: object, whole: Collection[str] = (), shares: Shares | None = None
) -> PartState | None:
    """Return :func:`tables_state` of the rows that changed since :func:`watch_tables`, and the ids that went.

    Args:
        tables: The tables.
        since: What :func:`watch_tables` returned.
        whole: Names in the state of tables of which all rows are wanted.
        shares: What of them is handed out, where there are several ranks.

    Returns:
        None if it was returned for other tables.
    """
    watched = since if isinstance(since, list) else []
    if len(watched) != len(tables) or not all(t.watches(c) for t, c in zip(tables, watched, strict=True)):
        return None
    states: dict[str, TableState] = {}
    for place, (table, changes) in enumerate(zip(tables, watched, strict=True)):
        for number, member in enumerate(table.members):
            if member.name in whole:
                changes.note_whole(number)
        for number, (member, (columns, gone)) in enumerate(
            zip(table.members, table.changed_rows(changes), strict=True)
        ):
            handed = ALL
            if shares is not None:
                handed, columns = shares.handed(place, number), shares.whole(place, columns)
            states[member.name] = _state(columns, table_meta(table.layout), handed, gone)
            if table.store.gate is not None:
                known = table.store.gate.state_dict(number)
                forgotten = None
                if number not in changes.whole:
                    known, forgotten = changed_admission(changes.admission[number], known)
                states[member.name + COUNTS] = _state(known, {}, handed, forgotten)
    return PartState(tables=states, meta=tables_meta(tables), owned=True)


def _state(
    columns: dict[str, Tensor], meta: dict[str, JSON], handed: Buckets, gone: Tensor | None = None
) -> TableState:
    removed = None if gone is None else _state({"ids": gone}, {}, handed)
    buckets = ops.id_map.bucket_of(columns["ids"].contiguous())
    columns = within(buckets, handed, {**columns, "buckets": buckets})
    return TableState(columns, columns.pop("buckets"), meta, removed=removed)


def tables_layout(tables: Sequence[HashTable]) -> PartState:
    """Return :func:`tables_state` without its rows: which tables and columns there are."""
    states: dict[str, TableState] = {}
    for table in tables:
        columns = table.store.export_none()
        none = columns["ids"]
        for member in table.members:
            states[member.name] = TableState(columns, none, table_meta(table.layout))
            if table.store.gate is not None:
                states[member.name + COUNTS] = TableState({"ids": none, "count": none}, none, {})
    return PartState(tables=states)


def table_meta(layout: RecordLayout) -> dict[str, JSON]:
    """Return what a member table is, beside its rows."""
    layout = layout.whole
    state: list[JSON] = [
        [field.name, layout.width(field.name), _name(layout.part_dtype(field.name))] for field in layout.state
    ]
    return {"dim": layout.dim, "dtype": _name(layout.dtype), "optimizer_state": state}


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
