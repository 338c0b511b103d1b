"""Tables to and from plain state, for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from recis_hybrid import ops
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
            states[member.name] = TableState(columns, ops.id_map.bucket_of(columns["ids"]), _meta(table.layout))
            steps[member.name] = table.step
            if table.gate is not None:
                known = table.gate.state(number)
                if mover is not None:
                    known = mover.to_buckets(place, number, in_bucket_order(known))
                states[member.name + COUNTS] = TableState(known, ops.id_map.bucket_of(known["ids"]), {})
    return PartState(tables=states, meta={"seed": tables[0].seed, "steps": steps}, owned=True)


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
        if _meta(table.layout) != state.tables[name].meta:
            raise ValueError(f"table {name!r}: the state has {state.tables[name].meta}, this one {_meta(table.layout)}")
    seed, steps = state.meta["seed"], state.meta["steps"]
    assert isinstance(seed, int)
    assert isinstance(steps, dict)
    for table in tables:
        table.discard()
        table.reseed(seed)
    for name, (table, number) in members.items():
        columns = state.tables[name].columns
        place = tables.index(table)
        if mover is not None:
            columns = mover.from_buckets(place, number, columns)
        table.load(number, columns["ids"], {part: columns[part] for part in (*table.layout.parts, *META)})
        step = steps[name]
        assert isinstance(step, int)
        table.step = max(table.step, step) if number else step
        if table.gate is not None:
            known = state.tables[name + COUNTS].columns
            table.gate.load(number, known if mover is None else mover.from_buckets(place, number, known))


def _meta(layout: RecordLayout) -> dict[str, JSON]:
    state: list[JSON] = [
        [field.name, layout.width(field.name), _name(layout.part_dtype(field.name))] for field in layout.state
    ]
    return {"dim": layout.dim, "dtype": _name(layout.dtype), "optimizer_state": state}


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
