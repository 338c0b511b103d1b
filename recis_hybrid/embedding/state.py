"""Tables to and from plain state, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.changes import Changes, changed_known, changed_rows
from recis_hybrid.embedding.coalesce import COUNTS
from recis_hybrid.embedding.hash_table import HashTable
from recis_hybrid.embedding.moving import Mover
from recis_hybrid.embedding.protocols import META
from recis_hybrid.embedding.record_layout import RecordLayout
from recis_hybrid.state import JSON, PartState, TableState


def tables_state(tables: Sequence[HashTable], mover: Mover | None = None) -> PartState:
    """Returns the rows of every member table, what admission knows, steps done, and the seed of first values.

    Args:
        tables: This rank's.
        mover: Where there are several ranks: all call this together, and each gets the rows whose buckets it owns.
    """
    states: dict[str, TableState] = {}
    steps: dict[str, JSON] = {}
    for place, table in enumerate(tables):
        for number, (member, columns) in enumerate(zip(table.members, table.export_all(), strict=True)):
            if mover is not None:
                columns = mover.to_buckets(place, number, columns)
            states[member.name] = _state(columns, _meta(table.layout))
            steps[member.name] = table.step
            if table.gate is not None:
                known = table.gate.state(number)
                if mover is not None:
                    known = mover.to_buckets(place, number, in_bucket_order(known))
                states[member.name + COUNTS] = _state(known, {})
    return PartState(tables=states, meta={"seed": tables[0].seed, "steps": steps}, owned=True)


def watch_tables(tables: Sequence[HashTable]) -> list[Changes]:
    """Begins to note what changes in tables, for as long as the result lives."""
    return [table.watch() for table in tables]


def tables_changes(tables: Sequence[HashTable], since: object) -> PartState | None:
    """Returns :func:`tables_state` of the rows that changed since :func:`watch_tables`, and the ids that went.

    Args:
        tables: The tables.
        since: What :func:`watch_tables` returned.

    Returns:
        None if it was returned for other tables.
    """
    watched = since if isinstance(since, list) else []
    if len(watched) != len(tables) or not all(t.watches(c) for t, c in zip(tables, watched, strict=True)):
        return None
    states: dict[str, TableState] = {}
    steps: dict[str, JSON] = {}
    for table, changes in zip(tables, watched, strict=True):
        for number, (member, (columns, gone)) in enumerate(
            zip(table.members, changed_rows(table, changes), strict=True)
        ):
            states[member.name] = _state(columns, _meta(table.layout), gone)
            steps[member.name] = table.step
            if table.gate is not None:
                known = table.gate.state(number)
                forgotten = None
                if number not in changes.whole:
                    known, forgotten = changed_known(changes.known[number], known)
                states[member.name + COUNTS] = _state(known, {}, forgotten)
    return PartState(tables=states, meta={"seed": tables[0].seed, "steps": steps}, owned=True)


def _state(columns: dict[str, Tensor], meta: dict[str, JSON], gone: Tensor | None = None) -> TableState:
    removed = None if gone is None else _state({"ids": gone}, {})
    return TableState(columns, ops.id_map.bucket_of(columns["ids"].contiguous()), meta, removed)


def tables_layout(tables: Sequence[HashTable]) -> PartState:
    """Returns :func:`tables_state` without its rows: which tables and columns there are."""
    states: dict[str, TableState] = {}
    for table in tables:
        columns = table.export_none()
        none = columns["ids"]
        for member in table.members:
            states[member.name] = TableState(columns, none, _meta(table.layout))
            if table.gate is not None:
                states[member.name + COUNTS] = TableState({"ids": none, "count": none}, none, {})
    return PartState(tables=states)


def in_bucket_order(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns rows, ascending by id (int64 ``[n]``), by (bucket, id)."""
    order = ops.id_map.bucket_of(columns["ids"].contiguous()).argsort(stable=True)
    return {name: values[order] for name, values in columns.items()}


def load_tables_state(tables: Sequence[HashTable], state: PartState, mover: Mover | None = None) -> None:
    """Replaces the rows of every member table.

    Args:
        tables: This rank's.
        state: Where there are several ranks: the rows whose buckets this one owns.
        mover: As for :func:`tables_state`.

    Raises:
        ValueError: If tables are missing or too many, their width or optimizer state differ, or steps and counts are
            none; nothing is changed.
    """
    members = {member.name: (table, number) for table in tables for number, member in enumerate(table.members)}
    wanted = set(members) | {name + COUNTS for name, (table, _) in members.items() if table.gate is not None}
    if wanted != set(state.tables):
        raise ValueError(
            f"the state is of other tables: missing {sorted(wanted - set(state.tables))}, "
            f"unknown {sorted(set(state.tables) - wanted)}"
        )
    for name, (table, _) in members.items():
        if _meta(table.layout) != state.tables[name].meta:
            raise ValueError(f"table {name!r}: the state has {state.tables[name].meta}, this one {_meta(table.layout)}")
        _refuse_counts(name, state.tables[name], META)
        if table.gate is not None:
            _refuse_counts(name + COUNTS, state.tables[name + COUNTS], ("count",))
    seed, steps = state.meta.get("seed"), state.meta.get("steps")
    if type(seed) is not int:
        raise ValueError(f"the state must have a seed that is an integer, it has {seed!r}")
    if not isinstance(steps, dict) or not all(_is_step(steps.get(name)) for name in members):
        raise ValueError(f"the state must have the steps of {sorted(members)}, each from 0 to 2**40 - 1")
    for table in tables:
        table.discard()
        table.reseed(seed)
    for name, (table, number) in members.items():
        columns = state.tables[name].columns
        place = tables.index(table)
        if mover is not None:
            columns = mover.from_buckets(place, number, columns)
        table.load(number, columns["ids"], {part: columns[part] for part in (*table.layout.parts, *META)})
        step = int(steps[name])  # type: ignore[arg-type]
        table.step = max(table.step, step) if number else step
        if table.gate is not None:
            known = state.tables[name + COUNTS].columns
            table.gate.load(number, known if mover is None else mover.from_buckets(place, number, known))


def load_some_tables(tables: Sequence[HashTable], states: Mapping[str, TableState]) -> None:
    """Replaces the rows of some member tables by those of another run's; the others stay, and so do seed and steps.

    Steps that the rows have seen count from where that run was: they become the steps that the table has done, at most,
    as if the rows had just been met. Optimizer state that is missing starts as in a new row.

    Args:
        tables: Where the member tables are.
        states: By name of the member table, or that name and ``.admission``.

    Raises:
        ValueError: If there is no such member table, or counts are negative; nothing is changed.
    """
    members = {member.name: (table, number) for table in tables for number, member in enumerate(table.members)}
    counted = {name + COUNTS: place for name, place in members.items() if place[0].gate is not None}
    unknown = sorted(set(states) - set(members) - set(counted))
    if unknown:
        raise ValueError(f"the state is of other tables: unknown {unknown}, there are {sorted(members)}")
    for name, state in states.items():
        _refuse_counts(name, state, [column for column in (*META, "count") if column in state.columns])
    for name, state in states.items():
        if name in members:
            table, number = members[name]
            columns = {column: values for column, values in state.columns.items() if column != "ids"}
            for column in META[:2]:
                if column in columns:
                    columns[column] = columns[column].clamp(max=table.step)
            table.discard(number)
            table.load(number, state.columns["ids"], columns)
    for name, (table, number) in counted.items():
        if name in states:
            assert table.gate is not None
            table.gate.clear(number)
            table.gate.load(number, states[name].columns)


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


def _refuse_counts(name: str, table: TableState, columns: Sequence[str]) -> None:
    for column in columns:
        values = table.columns[column]
        if values.numel() and int(values.min()) < 0:
            raise ValueError(f"table {name!r}: {column} must not be negative, got {int(values.min())}")


def _meta(layout: RecordLayout) -> dict[str, JSON]:
    layout = layout.whole
    state: list[JSON] = [
        [field.name, layout.width(field.name), _name(layout.part_dtype(field.name))] for field in layout.state
    ]
    return {"dim": layout.dim, "dtype": _name(layout.dtype), "optimizer_state": state}


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
