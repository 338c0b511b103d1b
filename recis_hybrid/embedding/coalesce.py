"""Coalescing: which member tables share one HashTable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recis_hybrid.embedding.config import EmbeddingConfig
from recis_hybrid.embedding.hash_table import MemberTable
from recis_hybrid.embedding.record_layout import RecordLayout, StateField


@dataclass(frozen=True)
class TablePlan:
    """One logical table: its record layout, its member tables, and the features that read each."""

    layout: RecordLayout
    members: tuple[MemberTable, ...]
    features: dict[str, int]
    """Feature name → number of its member table."""


def plan_tables(
    configs: Mapping[str, EmbeddingConfig], optimizer_state: tuple[StateField, ...], *, coalesce: bool
) -> list[TablePlan]:
    """Groups features by member table, and member tables of one record layout into logical tables.

    Raises:
        ValueError: If features that share a member table disagree about it.
    """
    first_of: dict[str, str] = {}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, config in configs.items():
        table = config.table or name
        other = first_of.setdefault(table, name)
        ours, theirs = (config.dim, config.initializer), (configs[other].dim, configs[other].initializer)
        if ours != theirs:
            raise ValueError(
                f"features {other!r} and {name!r} share the table {table!r} but want different ones: "
                f"dim={theirs[0]}, {theirs[1]} against dim={ours[0]}, {ours[1]}; "
                f"give them equal settings or tables of their own"
            )
        groups.setdefault((config.dim,) if coalesce else (config.dim, table), []).append(name)

    plans = []
    for names in groups.values():
        members: dict[str, MemberTable] = {}
        features = {}
        for name in names:
            table = configs[name].table or name
            members.setdefault(table, MemberTable(table, configs[name].initializer))
            features[name] = list(members).index(table)
        layout = RecordLayout(configs[names[0]].dim, optimizer_state)
        plans.append(TablePlan(layout, tuple(members.values()), features))
    return plans
