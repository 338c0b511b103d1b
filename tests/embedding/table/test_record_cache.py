"""Tables with a GPU cache: lookups, statistics, memory and refusals; equality of training is tested with schedules."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from recis_hybrid import ops, optim
from recis_hybrid.embedding import (
    Admission,
    EmbeddingConfig,
    EmbeddingEngine,
    HashTable,
    MinFrequency,
    Placement,
    RecordLayout,
    Rows,
)
from recis_hybrid.embedding.table.record_cache import RecordCache
from recis_hybrid.embedding.table.record_layout import META
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ops.cache import BYTES_OF_A_WAY, WAYS
from recis_hybrid.ops.gather import RowGroups
from tests.support import emulated
from tests.support.caches import cached
from tests.support.devices import no_synchronization, on_accelerators
from tests.support.tables import make_table

MIB = 1 << 20


def engine_of(device: str, sets: int, **more: Any) -> tuple[EmbeddingEngine, HashTable, Any]:
    placement = cached(sets, optim.Adam, dim=4) if sets else None
    config = EmbeddingConfig(dim=4, placement=placement, **more)
    engine = EmbeddingEngine({"id": config}, optimizer=optim.Adam, device=device)
    return engine, engine.tables[0], engine.make_optimizer(lr=0.1)


def rows_of(table: HashTable) -> dict[str, Tensor]:
    return {name: values.cpu() for name, values in table.export(0).items()}


def assert_equal(found: HashTable, expected: HashTable) -> None:
    ours, theirs = rows_of(found), rows_of(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def squares(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["id"].square().sum()


@on_accelerators
def test_several_lookups_before_a_step_may_replace_the_rows_of_each_other(device: str) -> None:
    tables = []
    for where, sets in ((device, 1), ("cpu", 0)):
        engine, table, optimizer = engine_of(where, sets)
        for step in range(2):
            losses = [squares(engine({"id": torch.arange(15 * k, 15 * k + 25, device=where)})) for k in range(3)]
            engine({"id": torch.arange(50, device=where)})  # without a gradient
            engine.eval()({"id": torch.arange(60, device=where)})
            engine.train()
            for loss in losses[step % 2 :]:
                loss.backward()
            if step == 1:
                torch.nn.utils.clip_grad_norm_(engine.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        tables.append(table)
    assert_equal(*tables)


@on_accelerators
def test_rows_catch_up_in_the_cache_before_they_are_read(device: str) -> None:
    found = []
    for where, sets in ((device, 1), ("cpu", 0)):
        engine, table, optimizer = engine_of(where, sets)

        def halve(blocks: Blocks, count: Tensor, rows: Tensor, step: int) -> None:
            rows = rows[: int(count)]
            values = torch.empty(len(rows), 4, device=rows.device)
            ops.blocks.read(blocks, rows, 0, values)
            ops.blocks.write(blocks, rows, 0, values / 2)

        table.before_read = halve
        vectors = []
        for step in range(4):
            outputs = engine({"id": torch.arange(10 * step, 10 * step + 60, device=where)})
            vectors.append(outputs["id"].detach().cpu())
            squares(outputs).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((vectors, table))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0][0], found[1][0], strict=True))
    assert_equal(found[0][1], found[1][1])


@on_accelerators
def test_rows_that_changed_since_a_save_are_found_in_the_cache(device: str) -> None:
    changes = []
    for where, sets in ((device, 1), ("cpu", 0)):
        engine, table, optimizer = engine_of(where, sets)
        squares(engine({"id": torch.arange(30, device=where)})).backward()
        optimizer.step()
        log = table.watch()
        optimizer.zero_grad()
        squares(engine({"id": torch.arange(5, 12, device=where)})).backward()
        optimizer.step()
        changes.append(table.changed_rows(log)[0][0])
    assert changes[1]["ids"].numel() == 7
    assert [name for name, values in changes[1].items() if not torch.equal(changes[0][name].cpu(), values)] == []


@on_accelerators
def test_written_rows_that_are_cached_and_saved_are_written_back_again(device: str) -> None:
    tables = []
    for where, sets in ((device, 1), ("cpu", 0)):
        engine, table, optimizer = engine_of(where, sets)
        squares(engine({"id": torch.arange(30, device=where)})).backward()
        optimizer.step()
        meta = dict.fromkeys(META, torch.arange(1, 9))
        rows = table.rows(0, torch.arange(24, 27, device=where))
        table.store.blocks.whole()  # as a save does
        table.insert(0, torch.arange(8), {"embedding": torch.arange(32.0).view(8, 4)})
        table.store.blocks.whole()
        table.insert(0, torch.arange(8, 16), meta)
        table.store.blocks.whole()
        table.store.blocks.write(rows, "exp_avg", torch.ones(3, 4))
        for first in (100, 200):  # all others are replaced
            engine({"id": torch.arange(first, first + 32, device=where)})
        tables.append(table)
    assert_equal(*tables)


class OddIds:
    """Evicts the rows of odd ids."""

    def unwanted(self, rows: Rows) -> Tensor:
        return rows.ids % 2 == 1


@on_accelerators
@pytest.mark.parametrize(("id_map", "admission"), [("cpu", None), ("cpu", MinFrequency(4)), ("cuda", MinFrequency(4))])
def test_rows_are_erased_evicted_and_moved_as_without_a_cache(
    device: str, id_map: Literal["cpu", "cuda"], admission: Admission | None
) -> None:
    states = []
    for where in (device, "cpu"):
        placement = cached(1, optim.Adam, id_map, dim=4) if where == device else None
        config = EmbeddingConfig(dim=4, placement=placement, admission=admission)
        engine = EmbeddingEngine({"id": config}, optimizer=optim.Adam, device=where)
        optimizer, (table,) = optim.Adam(engine.parameters(), lr=0.1), engine.tables
        for step in range(4):
            if step == 2:
                table.erase(0, torch.arange(3, 9, device=where))
                assert engine.evict(OddIds()) > 0
            if step == 3:
                engine.compact()
            ids = torch.arange(step, step + 130) % 50
            squares(engine({"id": ids.to(where)})).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(engine.checkpoint_state().tables["id"].columns)
    assert [name for name, column in states[1].items() if not torch.equal(states[0][name].cpu(), column)] == []


@on_accelerators
def test_a_row_that_is_used_again_for_another_id_has_no_cached_record(device: str) -> None:
    engine, table, optimizer = engine_of(device, 4)
    twin, expected, its_optimizer = engine_of("cpu", 0)
    for ids in (range(20), range(100, 125), range(20)):
        for one, step in ((engine, optimizer), (twin, its_optimizer)):
            squares(one({"id": torch.tensor(ids, device=one.device)})).backward()
            step.step()
            step.zero_grad()
        assert_equal(table, expected)
        for each in (table, expected):
            each.erase(0, torch.tensor(ids))
            assert len(each) == 0
    assert table.store.id_map.row_bound == 25


@on_accelerators
def test_evaluation_reads_the_cache_and_leaves_it_unchanged(device: str) -> None:
    engine, table, optimizer = engine_of(device, 1)
    twin, _, its_optimizer = engine_of("cpu", 0)
    for one, step in ((engine, optimizer), (twin, its_optimizer)):
        squares(one({"id": torch.arange(50, device=one.device)})).backward()
        step.step()
        one.eval()
    cache = table.store.blocks.cache
    assert cache is not None
    before, use = cache._tags.clone(), table.cache_statistics()
    for first in (0, 30, 1000):
        ids = torch.arange(first, first + 45)
        assert torch.equal(engine({"id": ids.to(device)})["id"].cpu(), twin({"id": ids})["id"])
    assert torch.equal(cache._tags, before)
    assert table.cache_statistics() == use


@on_accelerators
def test_statistics_count_the_rows_of_training_lookups(device: str) -> None:
    engine, table, optimizer = engine_of(device, 2)
    use = table.cache_statistics()
    assert use == (0, 0, 0, 0)
    assert math.isnan(use.hit_rate)
    for first in (0, 0, 10):
        optimizer.zero_grad()
        ids = torch.arange(first, first + 40).repeat(3).to(device)
        squares(engine({"id": ids})).backward()
        optimizer.step()
    use = table.cache_statistics()
    assert use == (40 + 30, 40 + 10, 0, 0)
    assert use.hit_rate == 70 / 120
    engine({"id": torch.arange(2 * WAYS + 10, device=device)})
    use = table.cache_statistics()
    assert use is not None
    assert (use.hits, use.misses, use.bypassed) == (70 + 50, 50 + 24, 10)
    assert use.written_back == 0  # the lookup used all rows that had been changed
    table.export(0)
    table.compact()
    use = table.cache_statistics()
    assert use is not None
    assert use.written_back == 2 * WAYS
    engine({"id": torch.arange(5, device=device)})
    use = table.cache_statistics()
    assert use is not None
    assert use.misses == 50 + 24 + 5  # compaction empties the cache
    table.clear()
    assert table.cache_statistics() == (0, 0, 0, 0)
    assert make_table().cache_statistics() is None


@on_accelerators
def test_memory_and_place_are_described(device: str) -> None:
    placement = Placement(id_map="cuda", blocks="pinned", cache_bytes=MIB)
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4, placement=placement)}, device=device)
    assert engine.memory()["cache"] == 0
    assert "[cache of 1.0 MiB, not used yet]" in engine.describe()
    for _ in range(2):
        engine({"id": torch.arange(8, device=device)})
    assert MIB - WAYS * 64 < engine.memory()["cache"] <= MIB + 2048
    assert engine.memory()["total"] == sum(size for part, size in engine.memory().items() if part != "total")
    assert "[cache of 1.0 MiB, hit rate 50.0%]" in engine.describe()
    assert "cache" not in EmbeddingEngine({"id": EmbeddingConfig(dim=4)}).describe()


@on_accelerators
def test_a_warm_step_never_waits(device: str) -> None:
    engine, _, optimizer = engine_of(device, 1)

    def step(ids: Tensor) -> None:
        squares(engine({"id": ids})).backward()
        optimizer.step()
        optimizer.zero_grad()

    batches = [torch.arange(first, first + 45, device=device) for first in (0, 30, 10)]
    for ids in batches:
        step(ids)
    with no_synchronization(device):
        for ids in batches:
            step(ids)


def test_the_hit_rate_is_near_that_of_the_most_popular_rows() -> None:
    rows, ids, size, block_rows = 1 << 15, 1500, 32, 1 << 10
    cache = RecordCache(size, rows // 10 * (size + BYTES_OF_A_WAY), torch.device("cpu"))
    cache.allocate()
    host = torch.zeros(rows, size, dtype=torch.uint8)
    starts = range(host.data_ptr(), host.data_ptr() + host.numel(), block_rows * size)
    blocks = Blocks(torch.tensor([*starts, *cache.addresses(block_rows)]), 10, 16, size)
    random = np.random.default_rng(0)
    shares = np.arange(1, rows + 1) ** -1.05
    shares = (shares / shares.sum()).cumsum()
    row_of = random.permutation(rows)
    popular = found = 0
    numbers = torch.arange(ids)
    for number in range(400):
        if number == 200:
            before = cache.statistics()
        ranks = np.unique(np.searchsorted(shares, random.random(ids)))
        unique = torch.from_numpy(np.resize(row_of[ranks], ids))
        cache.admit(blocks, rows, RowGroups(torch.tensor([len(ranks)]), unique, numbers, numbers, None))
        if number >= 200:
            popular += int((ranks < cache.ways).sum())
            found += len(ranks)
    use = cache.statistics()
    rate, best = (use.hits - before.hits) / found, popular / found
    assert use.hits + use.misses - before.hits - before.misses == found
    # To replace the least recently used rows would give 0.52, of at best 0.65.
    assert 0.92 * best < rate < best


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="cache_bytes=64 needs blocks='pinned', .*got blocks='cuda'"):
        Placement(id_map="cuda", blocks="cuda", cache_bytes=64)
    with pytest.raises(ValueError, match="cache_bytes must be at least 0, got -1"):
        Placement(id_map="cuda", blocks="pinned", cache_bytes=-1)
    with pytest.raises(TypeError, match="cache_bytes must be an integer, got 1.5"):
        Placement(id_map="cuda", blocks="pinned", cache_bytes=1.5)  # type: ignore[arg-type]


@on_accelerators
def test_a_cache_too_small_for_a_set_is_refused(device: str) -> None:
    assert RecordLayout(4).record_bytes == 32
    least = WAYS * (32 + 12)
    placement = Placement(id_map="cuda", blocks="pinned", cache_bytes=least - 1)
    config = EmbeddingConfig(dim=4, placement=placement)
    with pytest.raises(ValueError, match=rf"table id: cache_bytes={least - 1} .* use at least {least}, or 0"):
        EmbeddingEngine({"id": config}, device=device)


@pytest.mark.emulated
def test_a_cache_larger_than_the_memory_is_refused_by_name_before_anything_is_changed() -> None:
    engine, table, _ = engine_of("emulated", 2)
    ids = torch.arange(5, device="emulated")
    for number in range(2, 7):  # the first allocation is that of the outputs
        with (
            emulated.failing_allocation(number),
            pytest.raises(RuntimeError, match=r"table id: a cache of cache_bytes=.*use a smaller Placement"),
        ):
            engine({"id": ids})
    assert len(table) == table.memory()["cache"] == 0
    engine({"id": ids})
    assert len(table) == 5
