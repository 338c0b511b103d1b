"""Tables to and from plain state, for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from recis_hybrid import ops
from recis_hybrid.embedding.coalesce import COUNTS
from recis_hybrid.embedding.hash_table import HashTable
from recis_hybrid.embedding.protocols import META
from recis_hybrid.embedding.record_layout import RecordLayout
from recis_hybrid.state import JSON, PartState, TableState


def tables_state(tables: Sequence[HashTable]) -> PartState:
    """Returns the rows of every member table, what admission knows, steps done, and the seed of first values."""
    states: dict[str, TableState] = {}
    for table in tables:
        for number, (member, columns) in enumerate(zip(table.members, table.export_all(), strict=True)):
            states[member.name] = TableState(columns, ops.id_map.bucket_of(columns["ids"]), table_meta(table.layout))
            if table.gate is not None:
                known = table.gate.state(number)
                states[member.name + COUNTS] = TableState(known, ops.id_map.bucket_of(known["ids"]), {})
    return PartState(tables=states, meta=tables_meta(tables), owned=True)


def tables_meta(tables: Sequence[HashTable]) -> dict[str, JSON]:
    """Returns what :func:`tables_state` has beside rows: the seed of first values, and the steps of each member."""
    steps: dict[str, JSON] = {member.name: table.step for table in tables for member in table.members}
    return {"seed": tables[0].seed, "steps": steps}


def tables_layout(tables: Sequence[HashTable]) -> PartState:
    """Returns :func:`tables_state` without its rows: which tables and columns there are."""
    states: dict[str, TableState] = {}
    for table in tables:
        columns = table.export_none()
        none = columns["ids"]
        for member in table.members:
            states[member.name] = TableState(columns, none, table_meta(table.layout))
            if table.gate is not None:
                states[member.name + COUNTS] = TableState({"ids": none, "count": none}, none, {})
    return PartState(tables=states)


def load_tables_state(tables: Sequence[HashTable], state: PartState) -> None:
    """Replaces the rows of every member table.

    Raises:
        ValueError: If tables are missing or too many, or their width or optimizer state differ; nothing is changed.
    """
    members = {member.name: (table, number) for table in tables for number, member in enumerate(table.members)}
    wanted = set(members) | {name + COUNTS for name, (table, _) in members.items() if table.gate is not None}
    if wanted != set(state.tables):
        raise ValueError(
            f"the state is of other tables: missing {sorted(wanted - set(state.tables))}, "
            f"unknown {sorted(set(state.tables) - wanted)}"
        )
    for name, (table, _) in members.items():
        if table_meta(table.layout) != state.tables[name].meta:
            raise ValueError(
                f"table {name!r}: the state has {state.tables[name].meta}, this one {table_meta(table.layout)}"
            )
    seed, steps = state.meta["seed"], state.meta["steps"]
    assert isinstance(seed, int)
    assert isinstance(steps, dict)
    for table in tables:
        table.discard()
        table.reseed(seed)
    for name, (table, number) in members.items():
        columns = state.tables[name].columns
        table.load(number, columns["ids"], {part: columns[part] for part in (*table.layout.parts, *META)})
        step = steps[name]
        assert isinstance(step, int)
        table.step = max(table.step, step) if number else step
        if table.gate is not None:
            table.gate.load(number, state.tables[name + COUNTS].columns)


def table_meta(layout: RecordLayout) -> dict[str, JSON]:
    """Returns what a member table is, beside its rows."""
    state: list[JSON] = [
        [field.name, layout.width(field.name), _name(layout.part_dtype(field.name))] for field in layout.state
    ]
    return {"dim": layout.dim, "dtype": _name(layout.dtype), "optimizer_state": state}


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
