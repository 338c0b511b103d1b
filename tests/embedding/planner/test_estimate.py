"""The plan of memory and traffic, beside engines that hold the rows."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st

from recis_hybrid import ops, optim
from recis_hybrid.embedding import (
    Admission,
    EmbeddingConfig,
    EmbeddingEngine,
    IdMap,
    MinFrequency,
    Placement,
    RankEstimate,
    plan,
)
from recis_hybrid.embedding.checkpoint.ordered_records import OrderedRecords
from recis_hybrid.embedding.table import blocks, disk_blocks
from recis_hybrid.embedding.table.disk_blocks import DiskBlocks
from recis_hybrid.embedding.table.id_map import bytes_for
from recis_hybrid.embedding.table.record_cache import RecordCache, bytes_of_cache
from recis_hybrid.saver import Saver
from tests.support.devices import on_accelerators
from tests.support.rank_processes import Ranks

ROWS = {"item": 9000, "user": 2500, "tag": 700, "frozen": 1}
SAMPLES = 600


def configs(sharding: Any = "row", admission: Admission | None = None) -> dict[str, EmbeddingConfig]:
    """Return configs of a coalesced table, one with lists read by two features, and a read-only one."""
    more: dict[str, Any] = {"sharding": sharding}
    return {
        "item": EmbeddingConfig(dim=12, admission=admission, **more),
        "user": EmbeddingConfig(dim=12, admission=admission, **more),
        "tags": EmbeddingConfig(dim=20, table="tag", dtype=torch.bfloat16, combiner="mean", **more),
        "seen": EmbeddingConfig(dim=20, table="tag", dtype=torch.bfloat16, combiner="mean", **more),
        "frozen": EmbeddingConfig(dim=8, trainable=False, **more),
    }


def batch_of(number: int, samples: int = SAMPLES) -> dict[str, torch.Tensor]:
    """Return the ids of a step: distinct within each table, and all rows of each after a few steps."""

    def ids(table: str, count: int, first: int = 0) -> torch.Tensor:
        return (torch.arange(count) + number * count + first) % ROWS[table]

    tags = ids("tag", samples)
    return {
        "item": ids("item", samples),
        "user": ids("user", samples),
        "tags": tags[: samples // 2],
        "seen": tags[samples // 2 :].view(-1, 1),
        "frozen": torch.zeros(samples, dtype=torch.int64),
    }


def trained(engine: EmbeddingEngine, steps: int, rank: int = 0, ranks: int = 1) -> dict[str, int]:
    """Train until all rows are there; return the bytes that the last step has sent."""
    optimizer, before = engine.make_optimizer(lr=0.1), {}
    for number in range(steps):
        before = asdict(engine.traffic)
        vectors = engine(batch_of(number * ranks + rank))
        sum(part.sum() for name, part in vectors.items() if name != "frozen").backward()  # type: ignore[union-attr]
        del vectors  # otherwise the next step also announces that this lookup has no more gradients
        optimizer.step()
    return {name: count - before[name] for name, count in asdict(engine.traffic).items()}


def planned(ranks: int, **more: Any) -> list[RankEstimate]:
    ids = {"tags": 0.5, "seen": 0.5}
    return plan(configs(**more), rows=ROWS, samples=SAMPLES, ids=ids, ranks=ranks, optimizer=optim.Adam)


def test_memory_on_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1 << 18)
    engine = EmbeddingEngine(configs(), optimizer=optim.Adam)
    trained(engine, 20)
    engine.tables[-1].load(0, torch.zeros(1, dtype=torch.int64), {})
    (rank,) = planned(1)
    for table, estimate in zip(engine.tables, rank.tables, strict=True):
        memory = table.memory()
        assert {part: estimate.memory[part] for part in memory} == memory
        assert estimate.rows == len(table)
        parts = ("embedding", "optimizer_state", "metadata", "padding", "spare")
        assert sum(estimate.memory[part] for part in parts) == memory["blocks"]
        width, item = table.layout.dim, table.layout.dtype.itemsize
        assert estimate.memory["embedding"] == len(table) * width * item
        assert estimate.memory["optimizer_state"] == (0 if table.read_only else len(table) * 2 * width * 4)
    assert rank.memory["total"] == engine.memory()["total"]
    assert rank.wire == dict.fromkeys(["sizes", "ids", "counts", "rows", "gradients", "total"], 0)


def test_ids_that_wait_for_admission() -> None:
    engine = EmbeddingEngine(configs(admission=MinFrequency(3)), optimizer=optim.Adam)
    for first in [*range(0, 6000, SAMPLES), 0]:
        ids = torch.arange(first, first + SAMPLES)
        engine({**batch_of(0), "item": ids, "user": ids[:0]})
    (rank,) = plan(
        configs(admission=MinFrequency(3)),
        rows={**ROWS, "item": 0, "user": 0},
        rejected={"item": 6000},
        samples=SAMPLES,
        ids={"user": 0},
    )
    assert rank.tables[0].memory["admission"] == engine.tables[0].memory()["admission"]
    assert rank.tables[0].memory["id_map"] == engine.tables[0].memory()["id_map"]


def on_rank(group: dist.ProcessGroup, sharding: str) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Return the memory of each table and the bytes of the last of several steps."""
    size = blocks._BLOCK_BYTES
    try:
        blocks._BLOCK_BYTES = 1 << 18
        engine = EmbeddingEngine(configs(sharding), optimizer=optim.Adam, group=group, prefetch_depth=0)
        sent = trained(engine, 12, dist.get_rank(group), 2)
        return [table.memory() for table in engine.tables if not table.read_only], sent
    finally:
        blocks._BLOCK_BYTES = size


@pytest.mark.parametrize("sharding", ["row", "table", "column", "replicated"])
def test_two_ranks(monkeypatch: pytest.MonkeyPatch, ranks: Ranks, sharding: str) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1 << 18)
    # Hashing gives one rank some more rows and ids than the other, which may take one more block.
    tolerance = 0.06 if sharding == "row" else 0.0
    measured = ranks.run(2, on_rank, sharding)
    for (memories, sent), rank in zip(measured, planned(2, sharding=sharding), strict=True):
        for memory, estimate in zip(memories, rank.tables, strict=False):
            spare = (1 << 18) / memory["total"] if sharding == "row" else 0
            assert memory["total"] == pytest.approx(estimate.memory["total"], rel=tolerance + spare)
            assert memory["id_map"] == estimate.memory["id_map"]
        for kind, count in sent.items():
            assert count == pytest.approx(rank.wire[kind], rel=tolerance), kind
    total = sum(rank.wire["total"] for rank in planned(2, sharding=sharding))
    assert sum(sum(sent.values()) for _, sent in measured) == pytest.approx(total, rel=tolerance / 3)


@settings(max_examples=60, deadline=None)
@given(ids=st.integers(0, 20_000), more=st.integers(1, 4000))
def test_the_size_of_a_map_is_that_of_one_that_has_grown(ids: int, more: int) -> None:
    id_map = IdMap(torch.device("cpu"))
    for first in [*range(0, ids, more), ids]:
        known = torch.arange(max(first + min(more, ids - first) - more, 0), first + min(more, ids - first))
        id_map.reserve(more)
        id_map.find_or_insert([known], [0])
        id_map.commit()
    assert len(id_map) == ids
    # It may have grown one lookup earlier.
    assert bytes_for(max(ids - more, 0), more) <= id_map.nbytes <= bytes_for(ids + more, more)


@on_accelerators
def test_the_size_of_a_cache(device: str) -> None:
    for nbytes in (1 << 14, 100_000):
        cache = RecordCache(96, nbytes, torch.device(device))
        cache.allocate()
        assert bytes_of_cache(96, nbytes) == cache.nbytes
    assert bytes_of_cache(96, 0) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": {"item": 5}}, "rows must have a number for every table, but ['frozen', 'tag', 'user'] are missing"),
        ({"rows": {**ROWS, "other": 5}}, "rows has ['other'], but the tables are ['frozen', 'item', 'tag', 'user']"),
        ({"rows": {**ROWS, "item": -1}}, "rows['item'] must be at least 0, got -1"),
        ({"ids": {"tag": 2.0}}, "ids has ['tag'], but the features are"),
        ({"ids": {"tags": -2.0}}, "ids['tags'] must be at least 0, got -2.0"),
        ({"rejected": {"tags": 2}}, "rejected has ['tags'], but the tables are"),
        ({"distinct": 0.0}, "distinct must be above 0 and at most 1, got 0.0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(**{"configs": configs(), "rows": ROWS, "samples": 10, **arguments})


def test_the_copy_of_a_save_is_estimated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk_blocks, "_PIECE_BYTES_OF_SAVE", 1 << 12)
    placement = Placement(blocks="disk", path=tmp_path, cache_bytes=1 << 18)
    placed = {name: replace(config, placement=placement) for name, config in configs().items()}
    engine = EmbeddingEngine(placed, optimizer=optim.Adam)
    trained(engine, 40)
    sizes: list[int] = []
    distribute = OrderedRecords._ordered

    def watched(records: OrderedRecords) -> IO[bytes]:
        file = distribute(records)
        sizes.append(os.fstat(file.fileno()).st_size)
        return file

    monkeypatch.setattr(OrderedRecords, "_ordered", watched)
    Saver(tmp_path / "run").save(1, {"engine": engine})
    rows = {
        member.name: table.store.row_counts()[k] for table in engine.tables for k, member in enumerate(table.members)
    }
    (rank,) = plan(placed, rows=rows, samples=SAMPLES, optimizer=optim.Adam)
    assert sum(sizes) == rank.memory["disk_of_save"] > 0
    in_memory = plan(configs(), rows=rows, samples=SAMPLES, optimizer=optim.Adam)
    assert in_memory[0].memory["disk_of_save"] == 0


def test_memory_of_tables_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops.disk, "SEGMENT_BYTES", 1 << 16)
    placement = Placement(blocks="disk", path=tmp_path, cache_bytes=1 << 18)
    placed = {name: replace(config, placement=placement) for name, config in configs().items()}
    engine = EmbeddingEngine(placed, optimizer=optim.Adam)
    trained(engine, 40)
    engine.tables[-1].load(0, torch.zeros(1, dtype=torch.int64), {})
    ids = {"tags": 0.5, "seen": 0.5}
    (rank,) = plan(placed, rows=ROWS, samples=SAMPLES, ids=ids, optimizer=optim.Adam)
    for table, estimate in zip(engine.tables, rank.tables, strict=True):
        assert isinstance(table.store.blocks, DiskBlocks)
        table.store.blocks.snapshot()  # writes the buffers, which are not estimated
        memory = table.memory()
        record, on_disk = table.layout.record_bytes, memory.pop("disk")
        assert {part: estimate.memory[part] for part in memory} == memory
        assert len(table) * record <= on_disk <= estimate.memory["disk"]
        assert estimate.memory["disk"] <= 2 * len(table) * record + 16 * (1 << 16)
    parts = ("embedding", "optimizer_state", "metadata", "padding", "spare")
    assert [rank.memory[part] for part in parts] == [0] * 5
    assert rank.memory["total"] == engine.memory()["total"]
