"""Coalescing of member tables into logical tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from recis_hybrid.embedding.config import TABLE_SETTINGS, EmbeddingConfig
from recis_hybrid.embedding.initializers import QUAD, refuse_unrepresentable
from recis_hybrid.embedding.placement import Placement
from recis_hybrid.embedding.planner.sharding import Sharding, columns_of, deal, sharding_of
from recis_hybrid.embedding.table.record_layout import MemberTable, RecordLayout, StateField

COUNTS = ".admission"
"""Suffix of a member table's name, for its admission state in checkpoints."""


@dataclass(frozen=True)
class TablePlan:
    """One logical table: its record layout, its member tables, and the features that read each."""

    layout: RecordLayout
    """Layout of whole rows."""
    members: tuple[MemberTable, ...]
    features: dict[str, int]
    """Number of the member table of each feature."""
    config: EmbeddingConfig
    """Config of one of its features, a trained one if there is one; all of them have the same table settings."""
    sharding: Sharding
    """Distribution of its rows over the ranks."""
    frozen: tuple[str, ...] = ()
    """Features with ``trainable=False``, if other features train the table."""


@dataclass(frozen=True)
class TableRead:
    """Features of a logical table that are looked up together."""

    table: int
    """Number of the logical table."""
    features: dict[str, int]
    """Number of the member table of each feature."""
    frozen: bool
    """True for the frozen features of a trained table, which look up as in evaluation."""


def table_reads(plans: Sequence[TablePlan]) -> list[TableRead]:
    """Return the lookups of a batch: one for each table, in order, and then those of frozen features."""
    reads = []
    for frozen in (False, True):
        for number, plan in enumerate(plans):
            features = {name: m for name, m in plan.features.items() if (name in plan.frozen) == frozen}
            if features:
                reads.append(TableRead(number, features, frozen))
    return reads


def plan_tables(
    configs: Mapping[str, EmbeddingConfig], optimizer_state: tuple[StateField, ...], *, coalesce: bool, ranks: int = 1
) -> list[TablePlan]:
    """Group features by member table, and member tables with equal settings (except initializers) by logical table.

    Args:
        configs: Configs by feature name.
        optimizer_state: Optimizer state of every row of a table without an optimizer of its own; rows of read-only
            tables have none.
        coalesce: False makes every member table a separate logical table.
        ranks: Number of ranks that share the tables.

    Raises:
        TypeError: If a feature has no EmbeddingConfig.
        ValueError: If features that share a member table have different settings, first values exceed the range of the
            dtype, or rows cannot be split by column.
    """
    first_of: dict[str, str] = {}
    lead: dict[str, EmbeddingConfig] = {}
    for name, config in configs.items():
        table = _checked_table(name, config)
        other = first_of.setdefault(table, name)
        _refuse_disagreement(table, other, configs[other], name, config)
        if not lead.setdefault(table, config).trainable:
            lead[table] = config
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in configs:
        table = configs[name].table or name
        config = lead[table]
        state = _state_of(config, optimizer_state)
        overrides = None if config.optimizer_overrides is None else tuple(sorted(config.optimizer_overrides.items()))
        key = (
            config.dim,
            config.dtype,
            _state_dtype(config),
            config.trainable,
            config.admission,
            None if (own := config.optimizer_spec) is None else own.key,
            overrides,
            config.placement,
            sharding_of(config, ranks, state),
        )
        groups.setdefault(key if coalesce else (*key, table), []).append(name)

    plans = []
    for names in groups.values():
        members: dict[str, MemberTable] = {}
        features = {}
        for name in names:
            table = configs[name].table or name
            members.setdefault(table, MemberTable(table, configs[name].initializer))
            features[name] = list(members).index(table)
        config = lead[configs[names[0]].table or names[0]]
        state = _state_of(config, optimizer_state)
        layout = RecordLayout(config.dim, state, config.dtype, _state_dtype(config))
        sharding = sharding_of(config, ranks, state)
        if sharding == "column":
            _refuse_columns(", ".join(members), layout, ranks)
        frozen = tuple(name for name in names if config.trainable and not configs[name].trainable)
        plans.append(TablePlan(layout, tuple(members.values()), features, config, sharding, frozen))
    return plans


def layout_on(plan: TablePlan, rank: int, ranks: int) -> RecordLayout:
    """Return the layout of the rows on a rank."""
    if plan.sharding != "column":
        return plan.layout
    widths = columns_of(plan.layout.dim, ranks)
    return plan.layout.columns(sum(widths[:rank]), widths[rank])


def owners_of(plans: Sequence[TablePlan], ranks: int) -> dict[tuple[int, int], int]:
    """Return the rank of each member table with the sharding ``table``, by numbers of logical and member table."""
    table_wise = [
        (number, k) for number, plan in enumerate(plans) if plan.sharding == "table" for k in range(len(plan.members))
    ]
    loads = [plans[number].layout.dim * list(plans[number].features.values()).count(k) for number, k in table_wise]
    return dict(zip(table_wise, deal(loads, ranks), strict=True))


def describe_plans(
    plans: Sequence[TablePlan],
    sizes: Sequence[tuple[int, int]],
    hit_rates: Sequence[float | None],
    device: torch.device,
    *,
    sharded: bool = False,
) -> str:
    """Return a line for each logical table: width, dtype, record, rows, bytes, place, member tables and their features.

    Args:
        plans: The tables.
        sizes: For each table, the number of its rows and bytes on this rank.
        hit_rates: For each table, the hit rate of its cache, NaN if it was not used; None without one.
        device: Device of tables without a placement.
        sharded: Add the sharding, if several ranks share the tables.
    """
    head = f"{'table':<6}{'dim':>5}  {'dtype':<9}{'record':>8}{'rows':>13}{'memory':>10}  {'place':<10}"
    lines = [f"{head}{'sharding':<12}members (features)" if sharded else f"{head}members (features)"]
    for number, (plan, (rows, nbytes), hit_rate) in enumerate(zip(plans, sizes, hit_rates, strict=True)):
        readers: dict[int, list[str]] = {}
        for feature, member in plan.features.items():
            readers.setdefault(member, []).append(f"{feature} frozen" if feature in plan.frozen else feature)
        members = ", ".join(f"{plan.members[member].name} ({', '.join(names)})" for member, names in readers.items())
        layout, placement = plan.layout, plan.config.placement or Placement.on(device)
        dtype, record = str(layout.dtype).removeprefix("torch."), f"{layout.record_bytes} B"
        memory = f"{nbytes / 2**20:,.1f} MiB"
        same = placement.id_map == placement.blocks
        place = placement.blocks if same else f"{placement.id_map}/{placement.blocks}"
        line = f"{number:<6}{layout.dim:>5}  {dtype:<9}{record:>8}{rows:>13,}{memory:>10}  {place:<10}"
        line += f"{plan.sharding:<12}" if sharded else ""
        notes = [] if plan.config.trainable else ["read-only"]
        if hit_rate is not None:
            used = "not used yet" if math.isnan(hit_rate) else f"hit rate {hit_rate:.1%}"
            notes.append(f"cache of {placement.cache_bytes / 2**20:,.1f} MiB, {used}")
        lines.append(line + members + "".join(f"  [{note}]" for note in notes))
    return "\n".join(lines)


def _checked_table(name: str, config: object) -> str:
    """Return the name of a feature's member table."""
    if not isinstance(config, EmbeddingConfig):
        raise TypeError(
            f"feature {name!r}: it must have an EmbeddingConfig, e.g. EmbeddingConfig(dim=16), got {config!r}"
        )
    refuse_unrepresentable(f"feature {name!r}", config.initializer, config.dim, config.dtype)
    table = config.table or name
    if table.endswith(COUNTS):
        raise ValueError(f"feature {name!r}: a table's name must not end with {COUNTS!r}, got {table!r}; rename it")
    return table


def _state_of(config: EmbeddingConfig, optimizer_state: tuple[StateField, ...]) -> tuple[StateField, ...]:
    own = config.optimizer_spec
    return own.row_state if own is not None else optimizer_state if config.trainable else ()


def _state_dtype(config: EmbeddingConfig) -> torch.dtype:
    return config.state_dtype or torch.float32


def _refuse_columns(names: str, layout: RecordLayout, ranks: int) -> None:
    if layout.dim < QUAD * ranks:
        raise ValueError(
            f"table {names}: sharding='column' needs at least {QUAD} elements of a row for each of {ranks} ranks, got "
            f"dim={layout.dim}; use sharding='row'"
        )
    shared = [field.name for field in layout.state if not field.splits_by_column]
    if shared:
        raise ValueError(
            f"table {names}: sharding='column' needs optimizer state per element, but {shared} belong to a whole row, "
            f"which no rank has; use another sharding, or an optimizer that updates elements independently, e.g. "
            f"optim.Adagrad"
        )


def _refuse_disagreement(table: str, a: str, first: EmbeddingConfig, b: str, second: EmbeddingConfig) -> None:
    differ = [name for name in TABLE_SETTINGS if getattr(first, name) != getattr(second, name)]
    if _state_dtype(first) == _state_dtype(second):
        differ = [name for name in differ if name != "state_dtype"]
    if differ:
        ours, theirs = (", ".join(f"{n}={getattr(c, n)}" for n in differ) for c in (first, second))
        raise ValueError(
            f"features {a!r} and {b!r} share the table {table!r} but have different settings: {ours} against {theirs}; "
            f"give them equal settings or separate tables"
        )
