"""Ranks with any share of the samples, even none, take part in one exchange for each logical table."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recis_hybrid import optim
from recis_hybrid.embedding import Constant, EmbeddingConfig, EmbeddingEngine
from recis_hybrid.ragged import RaggedTensor
from tests.support import sharded
from tests.support.rank_processes import Ranks
from tests.support.sharded import assert_same


def collectives(group: dist.ProcessGroup) -> list[str]:
    """Return the messages of a rank in one step of a table with two members and four features."""
    names = ("user", "item", "seen", "bought")
    configs = {name: EmbeddingConfig(dim=4, table="item" if name != "user" else None) for name in names}
    engine = EmbeddingEngine(configs, group=group)
    optimizer = optim.SGD(engine.parameters(), lr=0.1)
    batch = {name: torch.arange(6) for name in names}
    engine(batch)  # the first lookup also compares the ranks' settings
    optimizer.step()
    exchange, sent = engine._sharded.exchange, []  # type: ignore[union-attr]
    start = exchange.start

    def record(what: Any, *args: Any) -> Any:
        sent.append(what)
        return start(what, *args)

    exchange.start = record  # type: ignore[method-assign]
    torch.cat(list(engine(batch).values())).sum().backward()
    optimizer.step()
    return sent


def test_all_features_of_a_logical_table_share_one_exchange(ranks: Ranks) -> None:
    for sent in ranks.run(2, collectives):
        assert sent == ["sizes", "ids", "counts", "rows", "sizes", "gradients"]


def with_gaps(group: dist.ProcessGroup, seed: int) -> dict[str, Any]:
    """Distribute samples randomly: ranks without samples, features without ids, a batch that is empty everywhere."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    draw = random.Random(seed)
    engine = EmbeddingEngine(sharded.configs(), optimizer=sharded.OPTIMIZERS["Adagrad"], seed=3, group=group)
    optimizer = optim.Adagrad(engine.parameters(), lr=0.1)
    losses = []
    for step in range(5):
        samples = 0 if step == 2 else draw.randint(1, 12)
        cuts = sorted([0, samples, *(draw.randint(0, samples) for _ in range(3))])  # for four ranks, or for two
        cuts = [0, cuts[2], samples] if ranks == 2 else [0, samples] if ranks == 1 else cuts
        whole = sharded.part_of(sharded.global_batch(step), 0, samples)
        for name in ("item", "item_too", "best"):
            if draw.random() < 0.5:
                column = whole[name]
                assert isinstance(column, RaggedTensor)
                whole[name] = RaggedTensor(column.values[:0], torch.zeros_like(column.offsets))
                if name == "item":
                    weights = whole["item_weight"]
                    assert isinstance(weights, RaggedTensor)
                    whole["item_weight"] = RaggedTensor(weights.values[:0], torch.zeros_like(column.offsets))
        own_samples = cuts[rank + 1] - cuts[rank]
        values = engine(sharded.part_of(whole, cuts[rank], cuts[rank + 1]))
        loss = sum((value - 0.3).square().sum() for value in values.values()) / max(own_samples, 1)
        assert isinstance(loss, torch.Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach() * own_samples
        dist.all_reduce(total, group=group)
        losses.append(total.item())
    return {"losses": losses, "tables": sharded.rows_of(engine), "predictions": torch.zeros(0)}


@pytest.mark.parametrize("seed", range(6))
def test_ranks_without_samples_and_features_without_ids(ranks: Ranks, seed: int) -> None:
    one = ranks.run(1, with_gaps, seed)
    for world in (2, 4):
        assert_same(ranks.run(world, with_gaps, seed), one)


def subset(group: dist.ProcessGroup) -> tuple[int, dict[int, float]] | None:
    """Train only on ranks 1 and 3 of four."""
    pair = dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        return None
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=1, initializer=Constant(0.0))}, group=pair, reduce="sum")
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    engine({"id": torch.arange(dist.get_rank(), dist.get_rank() + 4)})["id"].sum().backward()
    optimizer.step()
    columns = sharded.rows_of(engine)["id"]
    return dist.get_rank(pair), dict(zip(columns["ids"].tolist(), columns["embedding"][:, 0].tolist(), strict=True))


def test_a_subset_of_ranks_may_share_tables(ranks: Ranks) -> None:
    results = ranks.run(4, subset)
    assert [result if result is None else result[0] for result in results] == [None, 0, None, 1]
    rows = {key: value for result in results if result is not None for key, value in result[1].items()}
    assert rows == {1: -1.0, 2: -1.0, 3: -2.0, 4: -2.0, 5: -1.0, 6: -1.0}
