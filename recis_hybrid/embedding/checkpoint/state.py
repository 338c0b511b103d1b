"""Tables as plain tensors, for checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.checkpointing import JSON, PartState, TableState
from recis_hybrid.embedding.checkpoint.ownership import ALL, Buckets, BucketShares, within
from recis_hybrid.embedding.planner.coalesce import COUNTS
from recis_hybrid.embedding.table.change_log import ChangeLog, changed_admission
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.record_layout import RecordLayout


def tables_state(tables: Sequence[HashTable], shares: BucketShares | None = None) -> PartState:
    """Return the rows of every member table, the state of admission, steps, and the seed of first values.

    Args:
        tables: This rank's tables.
        shares: Buckets that this rank saves, if there are several ranks.
    """
    states: dict[str, TableState] = {}
    for place, table in enumerate(tables):
        states |= table_state(place, table, shares)
    return PartState(tables=states, meta=tables_meta(tables), owned=True)


def table_state(place: int, table: HashTable, shares: BucketShares | None) -> dict[str, TableState]:
    """Return the part of :func:`tables_state` for the logical table at a place."""
    states: dict[str, TableState] = {}
    admission = table.admission_states()
    for number, (member, columns) in enumerate(zip(table.members, table.export_all(), strict=True)):
        buckets = ALL
        if shares is not None:
            buckets, columns = shares.saved(place, number), shares.whole(place, columns)
        states[member.name] = _state(columns, table_meta(table.layout), buckets)
        if admission:
            states[member.name + COUNTS] = _state(admission[number], {}, buckets)
    return states


def tables_meta(tables: Sequence[HashTable]) -> dict[str, JSON]:
    """Return the metadata of :func:`tables_state`: seed, and steps and times of the member tables."""
    steps: dict[str, JSON] = {member.name: table.step for table in tables for member in table.members}
    times: dict[str, JSON] = {
        member.name: [[step, seconds] for step, seconds in recorded.samples]
        for table in tables
        for member, recorded in zip(table.members, table.step_times, strict=True)
        if recorded.samples
    }
    return {"seed": tables[0].store.seed, "steps": steps, **({"times": times} if times else {})}


def watch_tables(tables: Sequence[HashTable]) -> list[ChangeLog]:
    """Return logs of the changes of tables from now on, filled as long as they live."""
    return [table.watch() for table in tables]


def tables_changes(
    tables: Sequence[HashTable], since: object, whole: Collection[str] = (), shares: BucketShares | None = None
) -> PartState | None:
    """Return :func:`tables_state` for the rows that changed since :func:`watch_tables`, and the removed ids.

    Args:
        tables: The tables.
        since: The logs that :func:`watch_tables` returned.
        whole: Names of member tables whose rows are all returned.
        shares: Buckets that this rank saves, if there are several ranks.

    Returns:
        The state; None if the logs are of other tables.
    """
    watched = since if isinstance(since, list) else []
    if len(watched) != len(tables) or not all(t.watches(c) for t, c in zip(tables, watched, strict=True)):
        return None
    states: dict[str, TableState] = {}
    for place, (table, changes) in enumerate(zip(tables, watched, strict=True)):
        admission = table.admission_states()
        for number, member in enumerate(table.members):
            if member.name in whole:
                changes.note_whole(number)
        for number, (member, (columns, removed_ids)) in enumerate(
            zip(table.members, table.changed_rows(changes), strict=True)
        ):
            buckets = ALL
            if shares is not None:
                buckets, columns = shares.saved(place, number), shares.whole(place, columns)
            states[member.name] = _state(columns, table_meta(table.layout), buckets, removed_ids)
            if admission:
                known, forgotten = admission[number], None
                if number not in changes.whole:
                    known, forgotten = changed_admission(changes.admission[number], known)
                states[member.name + COUNTS] = _state(known, {}, buckets, forgotten)
    return PartState(tables=states, meta=tables_meta(tables), owned=True)


def _state(
    columns: dict[str, Tensor], meta: dict[str, JSON], wanted: Buckets, removed_ids: Tensor | None = None
) -> TableState:
    removed = None if removed_ids is None else _state({"ids": removed_ids}, {}, wanted)
    buckets = ops.id_map.bucket_of(columns["ids"].contiguous())
    columns = within(buckets, wanted, {**columns, "buckets": buckets})
    return TableState(columns, columns.pop("buckets"), meta, removed=removed)


def tables_layout(tables: Sequence[HashTable]) -> PartState:
    """Return :func:`tables_state` without its rows: the tables and their columns."""
    states: dict[str, TableState] = {}
    for table in tables:
        columns, admission = table.store.export_none(), table.admission_columns()
        none = columns["ids"]
        for member in table.members:
            states[member.name] = TableState(columns, none, table_meta(table.layout))
            if admission:
                states[member.name + COUNTS] = TableState(admission, none, {})
    return PartState(tables=states)


def table_meta(layout: RecordLayout) -> dict[str, JSON]:
    """Return the metadata of a member table."""
    layout = layout.whole
    state: list[JSON] = [
        [field.name, layout.width(field.name), _name(layout.part_dtype(field.name))] for field in layout.state
    ]
    return {"dim": layout.dim, "dtype": _name(layout.dtype), "optimizer_state": state}


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
