"""Tables to and from plain state, for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from recis_hybrid import ops
from recis_hybrid.embedding.hash_table import HashTable
from recis_hybrid.embedding.record_layout import RecordLayout
from recis_hybrid.state import JSON, PartState, TableState


def tables_state(tables: Sequence[HashTable]) -> PartState:
    """Returns the rows of every member table, and the seed of first values."""
    states = {}
    for table in tables:
        for number, member in enumerate(table.members):
            columns = table.export(number)
            states[member.name] = TableState(columns, ops.id_map.bucket_of(columns["ids"]), _meta(table.layout))
    return PartState(tables=states, meta={"seed": tables[0].seed})


def load_tables_state(tables: Sequence[HashTable], state: PartState) -> None:
    """Replaces the rows of every member table.

    Raises:
        ValueError: If tables are missing or too many, or their width or optimizer state differ; nothing is changed.
    """
    members = {member.name: (table, number) for table in tables for number, member in enumerate(table.members)}
    if set(members) != set(state.tables):
        raise ValueError(
            f"the state is of other tables: missing {sorted(set(members) - set(state.tables))}, "
            f"unknown {sorted(set(state.tables) - set(members))}"
        )
    for name, (table, _) in members.items():
        if _meta(table.layout) != state.tables[name].meta:
            raise ValueError(f"table {name!r}: the state has {state.tables[name].meta}, this one {_meta(table.layout)}")
    seed = state.meta["seed"]
    assert isinstance(seed, int)
    for table in tables:
        table.clear()
        table.reseed(seed)
    for name, (table, number) in members.items():
        columns = state.tables[name].columns
        table.insert(number, columns["ids"], {part: columns[part] for part in table.layout.parts})


def _meta(layout: RecordLayout) -> dict[str, JSON]:
    state: list[JSON] = [[field.name, layout.width(field.name)] for field in layout.state]
    return {"dim": layout.dim, "dtype": str(layout.dtype).removeprefix("torch."), "optimizer_state": state}
