"""Statistics of an engine's tables: rows, memory, use by lookups, frequent ids and norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from recis_hybrid import distributed
from recis_hybrid.embedding.planner.coalesce import TablePlan
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.record_cache import CacheStatistics
from recis_hybrid.embedding.table.tracking import HotId


@dataclass(frozen=True, kw_only=True)
class MemberStatistics:
    """Statistics of a member table. Counts of ids cover training lookups since ``EmbeddingEngine.track``."""

    rows: int
    """Number of rows."""
    ids: int | None = None
    """Ids looked up, repetitions included; None if they are not tracked, as the other counts."""
    new_rows: int | None = None
    """Rows created by lookups."""
    rejected_ids: int | None = None
    """Ids without a row that were not admitted, repetitions included."""
    evicted_rows: int | None = None
    """Rows evicted, erased or cleared."""
    hottest: tuple[HotId, ...] = ()
    """The most frequent ids, most frequent first."""
    mean_norm: float | None = None
    """Mean L2 norm of the embeddings, not finite if a row is not, NaN without rows; None if not computed."""
    max_norm: float | None = None
    """Maximum L2 norm of the embeddings; likewise."""

    @property
    def hit_rate(self) -> float | None:
        """Share of the looked up ids that had a row, NaN if there were none; None if ids are not tracked.

        If a new id occurs several times in a lookup, all but its first occurrence are hits.
        """
        if self.ids is None or self.new_rows is None or self.rejected_ids is None:
            return None
        return 1 - (self.new_rows + self.rejected_ids) / self.ids if self.ids else math.nan


@dataclass(frozen=True, kw_only=True)
class TableStatistics:
    """Statistics of a logical table."""

    members: dict[str, MemberStatistics]
    """Its member tables by name."""
    load: float
    """Share of the IDMap's slots that are in use or erased; the highest of all ranks. Large maps grow from 0.61 on."""
    memory: dict[str, int]
    """Bytes of each part, as ``HashTable.memory``, summed over the ranks."""
    cache: CacheStatistics | None
    """Use of the record cache since the table was created or cleared, summed over the ranks; None without one."""


def statistics_of(
    tables: Sequence[HashTable], plans: Sequence[TablePlan], group: dist.ProcessGroup | None, *, norms: bool
) -> list[TableStatistics]:
    """Return the statistics of tables; collective if ranks share them.

    Args:
        tables: This rank's tables.
        plans: Their plans.
        group: The ranks that share the tables; None: they are not shared.
        norms: Whether to compute norms.

    Raises:
        RuntimeError: If only some ranks track ids.
    """
    own = [_figures(table, norms and plan.sharding != "column") for table, plan in zip(tables, plans, strict=True)]
    by_rank = [own] if group is None else distributed.exchange(own, group)
    tracks = {each["tracked"] for rank in by_rank for each in rank}
    if len(tracks) > 1:
        raise RuntimeError("stats: some ranks track ids and others do not; call engine.track with the same arguments")
    found = []
    for number, plan in enumerate(plans):
        parts = [rank[number] for rank in by_rank]
        # Every rank of these has every row.
        rows_of = parts[:1] if plan.sharding in ("replicated", "column") else parts
        members = {
            member.name: _member([part["members"][k] for part in rows_of], plan.sharding != "column")
            for k, member in enumerate(plan.members)
        }
        caches = [part["cache"] for part in parts if part["cache"] is not None]
        found.append(
            TableStatistics(
                members=members,
                load=max(part["load"] for part in parts),
                memory={name: sum(part["memory"][name] for part in parts) for name in parts[0]["memory"]},
                cache=CacheStatistics(*map(sum, zip(*caches, strict=True))) if caches else None,
            )
        )
    return found


def _figures(table: HashTable, norms: bool) -> dict[str, Any]:
    """Return this rank's figures of a table, as JSON values."""
    table.record_lookup()
    store, tracker = table.store, table.tracker
    rows = store.row_counts()
    counts = [{} for _ in rows] if tracker is None else tracker.figures(rows)
    hottest = [[] for _ in rows] if tracker is None else tracker.top()
    sums, highest = ([None] * len(rows),) * 2
    if norms:
        table.catch_up()
        sums, highest = (values.tolist() for values in store.row_norms())
    cache = table.cache_statistics()
    return {
        "tracked": tracker is not None,
        "load": store.id_map.load,
        "memory": store.memory(),
        "cache": None if cache is None else list(cache),
        "members": [
            {"rows": n, "counts": count, "hottest": [list(each) for each in hot], "norms": [total, most]}
            for n, count, hot, total, most in zip(rows, counts, hottest, sums, highest, strict=True)
        ],
    }


def _member(parts: Sequence[dict[str, Any]], whole: bool) -> MemberStatistics:
    """Return the statistics of a member table from the figures of the ranks that have different rows."""
    rows = sum(part["rows"] for part in parts)
    hottest = sorted((HotId(*each) for part in parts for each in part["hottest"]), key=lambda e: (-e.frequency, e.id))
    listed = max(len(part["hottest"]) for part in parts)
    norms = [part["norms"] for part in parts]
    mean = highest = None
    if norms[0][0] is not None:
        mean = sum(total for total, _ in norms) / rows if rows else math.nan
        highest = math.nan if math.isnan(mean) else max(most for _, most in norms)
    return MemberStatistics(
        rows=rows,
        **{name: sum(part["counts"][name] for part in parts) for name in parts[0]["counts"]},
        hottest=tuple(hottest[:listed]),
        mean_norm=mean,
        max_norm=highest,
    )
