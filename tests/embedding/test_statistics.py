"""EmbeddingEngine.stats and track."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recis_hybrid import optim
from recis_hybrid.embedding import (
    EmbeddingConfig,
    EmbeddingEngine,
    MinFrequency,
    Normal,
    TableStatistics,
    Unused,
)
from recis_hybrid.embedding.table import store
from recis_hybrid.ragged import RaggedTensor
from tests.support import emulated
from tests.support.devices import no_synchronization, on_accelerators
from tests.support.near import assert_near
from tests.support.rank_processes import Ranks


def members_of(statistics: list[TableStatistics]) -> dict[str, Any]:
    return {name: member for table in statistics for name, member in table.members.items()}


def test_counts_follow_lookups_evictions_and_inserts() -> None:
    configs = {
        "item": EmbeddingConfig(dim=4),
        "seen": EmbeddingConfig(dim=4, table="item"),
        "user": EmbeddingConfig(dim=4),
        "rare": EmbeddingConfig(dim=2, admission=MinFrequency(2)),
    }
    engine = EmbeddingEngine(configs, optimizer=optim.SGD)
    optimizer = engine.make_optimizer(lr=0.1)

    def step(item: list[int], user: list[int], rare: list[int]) -> None:
        columns = {"item": item, "seen": item[:1] * len(item), "user": user, "rare": rare}
        vectors = engine({name: torch.tensor(ids) for name, ids in columns.items()})
        sum(values.sum() for values in vectors.values()).backward()  # type: ignore[union-attr]
        optimizer.step()

    step([1, 2], [1], [1])  # not counted
    assert {member.ids for member in members_of(engine.stats()).values()} == {None}
    assert {member.hit_rate for member in members_of(engine.stats()).values()} == {None}
    engine.track(hottest=2)
    assert math.isnan(members_of(engine.stats())["item"].hit_rate)
    step([1, 3, 3], [1, 1], [1, 7, 7, 8])  # the second lookup of 1, and 7 twice, are admitted
    engine.eval()
    step_before = members_of(engine.stats())
    engine({name: torch.tensor([99]) for name in configs})  # evaluation is not counted
    assert members_of(engine.stats()) == step_before
    engine.train()
    assert step_before["item"].rows == 3
    assert (step_before["item"].ids, step_before["item"].new_rows) == (6, 1)
    assert step_before["item"].hit_rate == 1 - 1 / 6
    assert step_before["item"].hottest == ((1, 4, 0), (3, 2, 0))
    assert (step_before["user"].ids, step_before["user"].new_rows, step_before["user"].hit_rate) == (2, 0, 1)
    rare = step_before["rare"]
    assert (rare.ids, rare.rows, rare.new_rows, rare.rejected_ids) == (4, 2, 2, 1)
    assert rare.hit_rate == 1 - 3 / 4
    assert rare.hottest == ((7, 2, 0), (1, 1, 0))

    step([3], [4], [8])
    assert engine.evict(Unused(steps=1)) == 2 + 1 + 2  # items 1 and 2, user 1, rare 1 and 7
    items, rares = (table for table in engine.tables if table.layout.dim in (4, 2))
    items.insert(0, torch.tensor([50, 51]))
    items.erase(0, torch.tensor([50]))
    rares.clear()
    after = members_of(engine.stats())
    assert (after["item"].rows, after["item"].new_rows, after["item"].evicted_rows) == (2, 1, 3)
    assert (after["user"].rows, after["user"].new_rows, after["user"].evicted_rows) == (1, 1, 1)
    assert (after["rare"].rows, after["rare"].new_rows, after["rare"].evicted_rows) == (0, 3, 3)

    engine.track(None)
    assert members_of(engine.stats())["item"].ids is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_load_and_memory(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(store, "_SLICE_BYTES", 16 * 4 * 20)  # many slices
    configs = {
        name: EmbeddingConfig(dim=20, dtype=dtype, initializer=Normal(0.0, float(scale)))
        for scale, name in enumerate(("a", "b", "empty"), 1)
    }
    engine = EmbeddingEngine(configs)
    engine({"a": torch.arange(500), "b": torch.arange(900), "empty": torch.empty(0, dtype=torch.int64)})
    ((table,), (found,)) = engine.tables, engine.stats(norms=True)
    for member, name in enumerate("ab"):
        norms = table.export(member)["embedding"].double().norm(dim=1)
        assert_near(found.members[name].mean_norm, norms.mean())
        assert_near(found.members[name].max_norm, norms.max())
    assert math.isnan(found.members["empty"].mean_norm or 0.0)
    assert found.memory == engine.memory()
    assert found.load == 1400 / table.store.id_map.capacity
    assert found.cache is None
    assert engine.stats()[0].members["a"].max_norm is None
    rows = table.rows(0, torch.tensor([7]))
    table.store.blocks.write(rows, "embedding", torch.full((1, 20), math.inf))
    found = engine.stats(norms=True)[0]
    assert (found.members["a"].mean_norm, found.members["a"].max_norm) == (math.inf, math.inf)
    assert math.isfinite(found.members["b"].max_norm or 0.0)
    table.store.blocks.write(rows, "embedding", torch.full((1, 20), math.nan))
    found = engine.stats(norms=True)[0]
    assert math.isnan(found.members["a"].mean_norm or 0.0)
    assert math.isnan(found.members["a"].max_norm or 0.0)


SHARDINGS = ("row", "table", "replicated", "column")


def ids_of(rank: int, number: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(10 * rank + number)
    return torch.randint(0, 40, (50,), generator=draw).clamp(min=10)  # 10 is frequent


def shared(group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Return the statistics of a table of each sharding after three steps, by rank."""
    engine = EmbeddingEngine(
        {name: EmbeddingConfig(dim=8, sharding=name) for name in SHARDINGS},  # type: ignore[arg-type]
        optimizer=optim.SGD,
        group=group,
    )
    optimizer = engine.make_optimizer(lr=0.0)
    engine.track(hottest=3)
    for number in range(3):
        ids = ids_of(dist.get_rank(group), number)
        sum(part.sum() for part in engine(dict.fromkeys(SHARDINGS, ids)).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    found = engine.stats(norms=True)
    if dist.get_rank(group) == 0:
        engine.track(None)
    message = ""
    if dist.get_world_size(group) > 1:
        with pytest.raises(RuntimeError) as error:
            engine.stats()
        message = str(error.value)
    return [
        {**vars(table), "members": {n: vars(m) for n, m in table.members.items()}, "error": message} for table in found
    ]


def test_statistics_cover_all_ranks(ranks: Ranks) -> None:
    (first, second) = ranks.run(2, shared)
    assert repr(first) == repr(second)
    exact = Counter(one for rank in range(2) for number in range(3) for one in ids_of(rank, number).tolist())
    whole = EmbeddingEngine({name: EmbeddingConfig(dim=8) for name in SHARDINGS})
    whole(dict.fromkeys(SHARDINGS, torch.tensor(list(exact))))
    for table in first:
        assert "some ranks track ids and others do not" in table["error"]
        for name, member in table["members"].items():
            assert (member["rows"], member["ids"], member["new_rows"]) == (len(exact), 300, len(exact)), name
            assert member["hottest"][0] == (10, exact[10], 0)
            assert [count for _, count, _ in member["hottest"]] == sorted(exact.values(), reverse=True)[:3]
            if name == "column":
                assert member["mean_norm"] is None
                continue
            norms = whole.tables[0].export(SHARDINGS.index(name))["embedding"].double().norm(dim=1)
            assert_near(member["mean_norm"], norms.mean())
            assert_near(member["max_norm"], norms.max())


def test_bad_arguments_are_refused() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    with pytest.raises(ValueError, match="hottest must be at least 0, got -1"):
        engine.track(hottest=-1)
    with pytest.raises(TypeError, match="hottest must be an integer"):
        engine.track(hottest="many")  # type: ignore[arg-type]
    engine.track()
    with pytest.raises(RuntimeError, match=r"inside jax.jit cannot be counted; call engine.track\(None\)"):
        engine.tables[0].lend(4, lambda: None)


@on_accelerators
@pytest.mark.parametrize(
    ("config", "counted"), [({}, 40), ({"combiner": "mean", "max_length": 3}, 6), ({"admission": MinFrequency(2)}, 40)]
)
def test_a_step_with_tracking_does_not_wait(device: str, config: dict[str, Any], counted: int) -> None:
    ids = RaggedTensor(torch.arange(40), torch.tensor([0, 10, 40])) if "combiner" in config else torch.arange(40)
    if device == "emulated":
        emulated.load()
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4, **config)}, optimizer=optim.Adam, device=device)
    optimizer, batch = engine.make_optimizer(lr=0.1), {"id": ids.to(device)}
    engine.track(hottest=5)

    def step() -> None:
        optimizer.zero_grad()
        engine(batch)["id"].square().sum().backward()
        optimizer.step()

    step()
    step()
    with no_synchronization(device):
        for _ in range(3):
            step()
    found = engine.stats()[0].members["id"]
    assert found.ids == 5 * counted
    assert [each.frequency for each in found.hottest] == [5] * 5
