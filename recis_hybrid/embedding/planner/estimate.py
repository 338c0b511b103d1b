"""Estimate of the memory of tables and of the bytes that ranks send, from configs alone.

Letters: W ranks, U distinct ids of a rank's batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recis_hybrid.checkpointing import BUCKETS, owned_buckets
from recis_hybrid.embedding.admission import MinFrequency
from recis_hybrid.embedding.config import EmbeddingConfig, check_configs
from recis_hybrid.embedding.optimizer import OptimizerSpec
from recis_hybrid.embedding.placement import Placement, output_device
from recis_hybrid.embedding.planner.coalesce import TablePlan, layout_on, owners_of, plan_tables
from recis_hybrid.embedding.planner.sharding import columns_of
from recis_hybrid.embedding.table.blocks import blocks_for
from recis_hybrid.embedding.table.disk_blocks import bytes_of_save, bytes_on_disk
from recis_hybrid.embedding.table.id_map import bytes_for
from recis_hybrid.embedding.table.record_cache import bytes_of_cache
from recis_hybrid.embedding.table.record_layout import META_BYTES, RecordLayout
from recis_hybrid.validation import check_integer, check_number

WIRE = ("sizes", "ids", "counts", "rows", "gradients")
"""Kinds of messages, as in ``Traffic``."""


@dataclass(frozen=True, kw_only=True)
class TableEstimate:
    """Estimate for one logical table on one rank."""

    members: tuple[str, ...]
    """Names of its member tables."""
    sharding: str
    """Distribution of its rows over the ranks."""
    rows: int
    """Rows on the rank; the mean over the ranks if hashing distributes them."""
    memory: dict[str, int]
    """Bytes of each part, as ``HashTable.memory``, and of the parts of ``blocks``: ``embedding``, ``optimizer_state``,
    ``metadata``, ``padding`` and ``spare`` (room for further rows). ``disk``, which is not in ``total``, is the most
    that compaction leaves of the file; nor is ``disk_of_save``, the temporary copy that a save makes beside it."""
    wire: dict[str, int]
    """Bytes that the rank sends to others in a step, by kind of message, as in ``Traffic``, without ``sizes``."""


@dataclass(frozen=True, kw_only=True)
class RankEstimate:
    """Estimate for one rank."""

    rank: int
    tables: tuple[TableEstimate, ...]
    sizes: int
    """Bytes of the messages with sizes that the rank sends in a step, of all tables together."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of each part, over all tables."""
        return {part: sum(table.memory[part] for table in self.tables) for part in self.tables[0].memory}

    @property
    def wire(self) -> dict[str, int]:
        """Bytes that the rank sends to others in a step, by kind of message, and ``total``."""
        sent = {kind: sum(table.wire.get(kind, 0) for table in self.tables) for kind in WIRE} | {"sizes": self.sizes}
        return {**sent, "total": sum(sent.values())}


def plan(
    configs: Mapping[str, EmbeddingConfig],
    *,
    rows: Mapping[str, int],
    samples: int,
    ids: Mapping[str, float] | None = None,
    distinct: float = 1.0,
    rejected: Mapping[str, int] | None = None,
    ranks: int = 1,
    optimizer: type[Any] | OptimizerSpec | None = None,
    coalesce: bool = True,
    device: torch.device | str = "cpu",
    wire_dtype: torch.dtype = torch.float32,
) -> list[RankEstimate]:
    """Estimate the memory of an engine's tables, and the bytes that its ranks send, without building it.

    Memory is that of ``EmbeddingEngine.memory`` after training lookups have inserted the rows. IDMap and blocks have
    room for the ids of one more lookup. Batches, gradients, and buffers of transfers of a disk are not counted.
    On the wire, a count takes one byte, as long as no id occurs 256 times in a batch.

    Args:
        configs: Configs by feature, as for EmbeddingEngine.
        rows: Number of rows of each member table, over all ranks.
        samples: Samples of a rank's batch.
        ids: Mean number of ids of a sample by feature; 1 where missing.
        distinct: Distinct ids of a member table as a share of its ids in a batch; never more than it has rows.
        rejected: Number of ids that wait for admission, by member table with exact counts; 0 where missing.
        ranks: Number of ranks, W.
        optimizer: As for EmbeddingEngine.
        coalesce: As for EmbeddingEngine.
        device: As for EmbeddingEngine.
        wire_dtype: As for EmbeddingEngine.

    Returns:
        An estimate for each rank.

    Raises:
        TypeError: If a config or a number has the wrong type.
        ValueError: If the rows of a table are missing, a name is no table or feature, or a number is out of range.

    Example:
        >>> (rank,) = plan({"item": EmbeddingConfig(dim=16)}, rows={"item": 1_000_000}, samples=1000)
        >>> rank.memory["embedding"], rank.memory["metadata"], rank.memory["id_map"] // 2**20
        (64000000, 16000000, 30)
    """
    check_configs(configs)
    for name, number in (("samples", samples), ("ranks", ranks)):
        check_integer("plan", name, number, low=1)
    check_number("plan", "distinct", distinct)
    if not 0 < distinct <= 1:
        raise ValueError(f"plan: distinct must be above 0 and at most 1, got {distinct}")
    spec = OptimizerSpec.of("plan", optimizer)
    plans = plan_tables(configs, () if spec is None else spec.row_state, coalesce=coalesce, ranks=ranks)
    tables = {member.name for each in plans for member in each.members}
    ids, rejected = dict(ids or {}), dict(rejected or {})
    _check_names("rows", rows, tables, "tables")
    _check_names("rejected", rejected, tables, "tables")
    _check_names("ids", ids, set(configs), "features")
    if missing := sorted(tables - rows.keys()):
        raise ValueError(f"plan: rows must have a number for every table, but {missing} are missing")
    found = output_device(device)
    load = _Load(configs, rows, samples, ids, distinct)
    owners = owners_of(plans, ranks)
    kinds = sum(len(load.kinds(each)) for each in plans)
    trained = sum(each.config.trainable for each in plans)
    # The router's header of a batch, and the announcement of gradients.
    sizes = 8 * (ranks - 1) * (3 + len(plans) + kinds + 3 * trained) if ranks > 1 else 0
    result = []
    for rank in range(ranks):
        estimates = []
        for number, each in enumerate(plans):
            own = {k: owner for (table, k), owner in owners.items() if table == number}
            estimates.append(_table(each, rank, ranks, load, own, rejected, found, wire_dtype.itemsize))
        result.append(RankEstimate(rank=rank, tables=tuple(estimates), sizes=sizes))
    return result


class _Load:
    """Rows, and ids of a rank's batch."""

    def __init__(
        self,
        configs: Mapping[str, EmbeddingConfig],
        rows: Mapping[str, int],
        samples: int,
        ids: Mapping[str, float],
        distinct: float,
    ) -> None:
        self._configs, self.rows, self._distinct = configs, rows, distinct
        self._positions = {name: math.ceil(samples * ids.get(name, 1)) for name in configs}

    def positions(self, plan: TablePlan) -> int:
        """Return the ids of a table in a batch, repetitions included."""
        return sum(self._positions[name] for name in plan.features)

    def kinds(self, plan: TablePlan) -> dict[tuple[int, bool], int]:
        """Return the distinct ids in a batch by member table and value of unknown ids."""
        positions: dict[tuple[int, bool], int] = {}
        for name, member in plan.features.items():
            kind = member, self._configs[name].unknown == "zeros"
            positions[kind] = positions.get(kind, 0) + self._positions[name]
        return {
            (member, zeros): min(math.ceil(n * self._distinct), self.rows[plan.members[member].name])
            for (member, zeros), n in positions.items()
        }


def _table(
    plan: TablePlan,
    rank: int,
    ranks: int,
    load: _Load,
    owners: Mapping[int, int],
    rejected: Mapping[str, int],
    device: torch.device,
    item: int,
) -> TableEstimate:
    """Return the estimate for a table on a rank.

    Args:
        plan: The table.
        rank: The rank.
        ranks: W.
        load: Rows and ids.
        owners: Owner of each member table, if each is on one rank.
        rejected: Ids that wait for admission by member table.
        device: Device of the engine.
        item: Bytes of a number on the wire.
    """
    kinds, sharding = load.kinds(plan), plan.sharding
    rows = {k: load.rows[member.name] for k, member in enumerate(plan.members)}
    waiting = {k: rejected.get(member.name, 0) for k, member in enumerate(plan.members)}
    distinct, others = sum(kinds.values()), ranks - 1
    dim = plan.layout.dim
    if ranks == 1:
        share, received = 1.0, load.positions(plan)
        sent = answered = given = 0.0
    elif sharding == "table":
        rows = {k: n for k, n in rows.items() if owners[k] == rank}
        waiting = {k: n for k, n in waiting.items() if owners[k] == rank}
        mine = sum(n for (k, _), n in kinds.items() if owners[k] == rank)
        share, received, sent = 1.0, ranks * mine, distinct - mine
        answered, given = others * mine * dim, sent * dim
    elif sharding == "row":
        share, received, sent = 1 / ranks, distinct, distinct * others / ranks
        answered = given = sent * dim
    else:  # every rank gets all ids
        share, received, sent = 1.0, ranks * distinct, others * distinct
        width = columns_of(dim, ranks)[rank] if sharding == "column" else 0
        answered = sent * width
        given = distinct * (dim - width) if sharding == "column" else sent * dim
    saved = [] if sharding == "column" else [math.ceil(n * share) for n in rows.values()]
    first, end = owned_buckets(rank, ranks) if sharding == "row" else (0, BUCKETS)
    buckets = end - first
    trained = plan.config.trainable
    own = math.ceil(sum(rows.values()) * share)
    wire = {"ids": 8 * sent, "counts": sent * trained, "rows": answered * item, "gradients": given * item * trained}
    return TableEstimate(
        members=tuple(member.name for member in plan.members),
        sharding=sharding,
        rows=own,
        memory=_memory(plan, layout_on(plan, rank, ranks), own, saved, received, waiting, share, buckets, device),
        wire={name: round(number) for name, number in wire.items()},
    )


def _memory(
    plan: TablePlan,
    layout: RecordLayout,
    rows: int,
    saved: Sequence[int],
    looked_up: int,
    waiting: Mapping[int, int],
    share: float,
    buckets: int,
    device: torch.device,
) -> dict[str, int]:
    """Return the bytes of each part of a table.

    Args:
        plan: The table.
        layout: Memory layout of a record.
        rows: Number of rows.
        saved: For each member table, the number of rows whose records a save reads from the blocks.
        looked_up: Number of ids that are looked up at once.
        waiting: Ids that wait for admission, by number of the member table.
        share: Share of them on the rank.
        buckets: Number of the rank's buckets.
        device: Device of the engine.
    """
    placement = plan.config.placement or Placement.on(device)
    more = looked_up if plan.config.trainable else 0
    embedding = rows * layout.width("embedding") * layout.part_dtype("embedding").itemsize
    state = rows * sum(layout.width(f.name) * layout.part_dtype(f.name).itemsize for f in layout.state)
    admission, rule = 0, plan.config.admission
    if isinstance(rule, MinFrequency):
        if rule.sketch_bytes is None:
            admission = bytes_for(math.ceil(sum(waiting.values()) * share), more)
        else:
            admission = len(plan.members) * -(-buckets * rule.sketch_bytes // BUCKETS)
    parts = {"id_map": bytes_for(rows, more), "blocks": 0, "cache": 0, "locations": 0, "disk": 0}
    of_save = 0
    if placement.blocks == "disk":
        parts |= bytes_on_disk(layout, rows, more, placement.cache_bytes)
        of_save = sum(bytes_of_save(layout.record_bytes, count) for count in saved)
    else:
        parts["blocks"] = blocks_for(layout, rows + more)
        parts["cache"] = bytes_of_cache(layout.record_bytes, placement.cache_bytes) if more else 0
    parts |= {"free_rows": 0, "admission": admission}
    records = {
        "embedding": embedding,
        "optimizer_state": state,
        "metadata": rows * META_BYTES,
        "padding": rows * (layout.record_bytes - META_BYTES) - embedding - state,
        "spare": parts["blocks"] - rows * layout.record_bytes,
    }
    return {
        **parts,
        "total": sum(parts.values()) - parts["disk"],
        "disk_of_save": of_save,
        **(dict.fromkeys(records, 0) if placement.blocks == "disk" else records),
    }


def _check_names(where: str, numbers: Mapping[str, Any], names: set[str], what: str) -> None:
    if unknown := sorted(numbers.keys() - names):
        raise ValueError(f"plan: {where} has {unknown}, but the {what} are {sorted(names)}")
    for name, number in numbers.items():
        if what == "features":
            check_number("plan", f"{where}[{name!r}]", number)
        else:
            check_integer("plan", f"{where}[{name!r}]", number, low=0)
        if number < 0:
            raise ValueError(f"plan: {where}[{name!r}] must be at least 0, got {number}")
