"""Compaction in parts: the table may change in between, every record is kept, and memory is freed."""

from __future__ import annotations

import pytest
import torch

from recis_hybrid.embedding import EmbeddingBlocks, EmbeddingConfig, EmbeddingEngine, StateField
from recis_hybrid.embedding.sweeps import CompactionSweep
from tests.support.chunks import tiny_chunks
from tests.support.devices import on_devices
from tests.support.rows import assert_every_row_is_used_or_free
from tests.support.tables import make_table

SUM = (StateField("sum", first_value=0.25),)


class Model:
    """A dict beside a table whose embeddings are the ids' numbers of writes."""

    def __init__(self, device: str) -> None:
        self.table = make_table(dim=4, state=SUM, device=device)
        self.table.store.blocks = EmbeddingBlocks(self.table.layout, self.table.device, block_rows=16)
        self.values: dict[int, float] = {}
        self.written = 0

    def write(self, ids: list[int]) -> None:
        self.written += 1
        value = float(self.written)
        self.table.insert(0, torch.tensor(ids, dtype=torch.int64), {"embedding": torch.full((len(ids), 4), value)})
        self.values |= dict.fromkeys(ids, value)

    def erase(self, ids: list[int]) -> None:
        assert self.table.erase(0, torch.tensor(ids, dtype=torch.int64)) == len(self.values.keys() & set(ids))
        self.values = {i: value for i, value in self.values.items() if i not in set(ids)}

    def check(self) -> None:
        columns = self.table.export(0)
        assert columns["ids"].tolist() == sorted(self.values)
        assert columns["embedding"][:, 0].tolist() == [self.values[i] for i in sorted(self.values)]
        assert_every_row_is_used_or_free(self.table)


@on_devices
@pytest.mark.parametrize("seed", range(4))
def test_a_table_changes_between_the_parts(device: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def some(most: int) -> list[int]:
        n = int(torch.randint(most + 1, (1,), generator=generator))
        return (torch.randperm(600, generator=generator)[:n] - 200).tolist()

    with tiny_chunks(4, 3):
        model = Model(device)
        compaction: CompactionSweep | None = None
        for step in range(60):
            action = int(torch.randint(5, (1,), generator=generator))
            if action == 0:
                model.write(some([5, 120][seed % 2]))
            elif action == 1:
                model.erase(some(300))
            elif action == 2 and step % 7 == 0:
                compaction = CompactionSweep([model.table], 1 + 20 * (step % 3))
            elif compaction is not None and next(compaction, None) is None:
                compaction = None
            model.check()
        for _ in CompactionSweep([model.table], 10):
            pass
        model.check()
        assert model.table.store.id_map.row_bound == len(model.table)
        assert len(model.table.store.blocks.blocks) == -(-len(model.table) // 16)


@on_devices
def test_each_part_moves_few_rows(device: str) -> None:
    model = Model(device)
    model.write(list(range(4000)))
    model.erase(list(range(0, 4000, 2)))
    capacity = model.table.store.blocks.capacity
    moved = list(CompactionSweep([model.table], 100))
    assert sum(moved) > 500
    # Shares are of equal size on average: 100 rows, of which half are moved.
    assert max(moved) <= 150
    assert model.table.store.id_map.row_bound == 2000
    assert model.table.store.blocks.capacity < capacity
    model.check()


@on_devices
@pytest.mark.parametrize("shrinks", [True, False])
def test_the_last_part_shrinks_a_map_that_is_small_for_it(device: str, shrinks: bool) -> None:
    model = Model(device)
    model.write(list(range(4000)))
    model.erase(list(range(500, 4000)))
    id_map = model.table.store.id_map
    capacity = id_map.capacity
    for _ in CompactionSweep([model.table], capacity // 16 - (not shrinks)):
        model.check()
    in_parts = id_map.capacity
    model.check()
    model.table.compact()
    assert id_map.capacity < capacity
    assert in_parts == (id_map.capacity if shrinks else capacity)
    model.check()


@on_devices
def test_ids_inserted_meanwhile_get_the_lowest_rows(device: str) -> None:
    """Otherwise the last blocks could not be freed."""
    model = Model(device)
    model.write(list(range(3000)))
    model.erase(list(range(0, 3000, 3)))
    new = 10_000
    for _ in CompactionSweep([model.table], 200):
        model.write(list(range(new, new + 20)))
        new += 20
    model.check()
    live = len(model.table)
    assert live <= model.table.store.id_map.row_bound <= live + 3000 // 20
    assert model.table.store.blocks.capacity <= live + 3000 // 20 + 16


@on_devices
def test_a_compaction_without_room_moves_nothing(device: str) -> None:
    """More ids come than have left, so no row is free in the end."""
    model = Model(device)
    model.write(list(range(1000)))
    model.erase(list(range(500)))
    compaction = CompactionSweep([model.table], 100)
    for _ in range(6):
        next(compaction)
    model.write(list(range(2000, 2600)))
    for _ in compaction:
        model.check()
    assert model.table.store.id_map.row_bound == len(model.table) == 1100


@on_devices
def test_a_compaction_ends_when_the_table_is_cleared(device: str) -> None:
    model = Model(device)
    model.write(list(range(1000)))
    model.erase(list(range(500)))
    compaction = CompactionSweep([model.table], 50)
    for _ in range(12):
        next(compaction)
    model.table.clear()
    model.values.clear()
    model.write([5, 6])
    assert next(compaction, None) is None
    model.check()


@on_devices
def test_a_later_compaction_finds_the_rows_of_an_unfinished_one(device: str) -> None:
    model = Model(device)
    model.write(list(range(1000)))
    model.erase(list(range(500)))
    for parts in (3, 5):
        compaction = CompactionSweep([model.table], 100)
        for _ in range(parts):
            next(compaction)
        model.check()
    model.table.compact()
    assert next(compaction, None) is None
    model.check()
    assert model.table.store.id_map.row_bound == 500


def test_a_part_is_refused_while_gradients_are_pending() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    ids = torch.arange(10)
    engine({"id": ids})
    engine.tables[0].erase(0, ids[:5])
    compaction = engine.compact(rows_per_call=2)
    next(compaction)
    engine({"id": ids[5:]})["id"].sum().backward()
    with pytest.raises(RuntimeError, match="compact would detach pending gradients"):
        next(compaction)
    engine.zero_grad()
    for _ in compaction:
        pass
    assert engine.tables[0].store.id_map.row_bound == 5
