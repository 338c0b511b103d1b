"""Sequences of bags: ids [B, L, K], and RaggedTensors of two levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
from recis_hybrid.features import Feature, FeatureEngine, Mod
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.devices import on_devices
from tests.support.near import assert_near
from tests.support.rank_processes import Ranks

LISTS = [[[1, 2, 2], [3]], [], [[], [4, 1]], [[5]]]
WEIGHTS = [[[0.5, 1.0, 2.0], [3.0]], [], [[], [1.0, 0.25]], [[2.0]]]
CUBE = torch.tensor([[[1, 2], [3, 3]], [[4, 4], [5, 1]], [[2, 2], [1, 6]]])  # B = 3, L = 2, K = 2


def engine_of(combiner: Any, device: str = "cpu", **more: Any) -> EmbeddingEngine:
    config = EmbeddingConfig(dim=4, combiner=combiner, initializer=Normal(0, 1), **more)
    return EmbeddingEngine({"seq": config}, device=device)


def table_of(engine: EmbeddingEngine) -> Tensor:
    """Return the embeddings of ids 0 to 6, on the CPU."""
    table = engine.tables[0]
    ids = torch.arange(7, device=engine.device)
    table.insert(0, ids)
    return table.export(0, ids)["embedding"].cpu()


def pooled(vectors: Tensor, combiner: Any, weights: Tensor) -> Tensor:
    """Pool one bag ``[K, D]`` in plain torch."""
    if len(vectors) == 0:
        return torch.zeros(vectors.shape[1])
    if combiner == "max":
        return vectors.amax(0)
    norm = {"sum": torch.ones(()), "mean": weights.sum(), "sqrtn": weights.square().sum().sqrt()}[combiner]
    return (vectors * weights[:, None]).sum(0) / norm


@on_devices
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn", "max"])
def test_three_dimensional_ids(device: str, combiner: Any) -> None:
    engine = engine_of(combiner, device)
    weight = table_of(engine).requires_grad_()
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    outputs = engine({"seq": CUBE.to(device)})["seq"]
    assert outputs.shape == (3, 2, 4)
    expected = torch.stack(
        [torch.stack([pooled(weight[bag], combiner, torch.ones(2)) for bag in row]) for row in CUBE.tolist()]
    )
    assert_near(outputs.cpu(), expected)
    factor = torch.arange(24.0).view(3, 2, 4)
    (outputs * factor.to(device)).sum().backward()
    (expected * factor).sum().backward()
    optimizer.step()
    assert weight.grad is not None
    got = engine.tables[0].export(0, torch.arange(7, device=device))["embedding"].cpu()
    # Both ids in a bag of row 2 have the maximum. torch splits its gradient between them, but their row is the same.
    assert_near(got, weight.detach() - weight.grad)


@on_devices
@pytest.mark.parametrize("weighted", [False, True, "column"])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_two_level_ragged_ids(device: str, combiner: Any, weighted: bool | str) -> None:
    engine = engine_of(combiner, device, weights="w" if weighted == "column" else None)
    weight = table_of(engine).requires_grad_()
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    ids = RaggedTensor.from_lists(LISTS, weights=WEIGHTS if weighted is True else None).to(device)
    batch: Batch = {"seq": ids, "w": RaggedTensor.from_lists(WEIGHTS).to(device)}
    outputs = engine(batch)["seq"]
    bags = [
        (bag, shares) for row, each in zip(LISTS, WEIGHTS, strict=True) for bag, shares in zip(row, each, strict=True)
    ]
    expected = torch.stack(
        [
            pooled(
                weight[torch.tensor(bag, dtype=torch.int64)],
                combiner,
                torch.tensor(shares if weighted else [1.0] * len(bag)),
            )
            for bag, shares in bags
        ]
    )
    assert outputs.shape == (5, 4)
    assert_near(outputs.cpu(), expected)

    # Padded, as for a tower: rows of 2, 0, 2 and 1 bags.
    padded = RaggedTensor(outputs, ids.outer[0]).to_padded(length=3)
    assert padded.shape == (4, 3, 4)
    mask = torch.arange(3) < ids.outer[0].diff().cpu()[:, None]
    assert_near(padded.cpu()[mask], expected)
    assert not padded.cpu()[~mask].any()
    factor = torch.arange(48.0).view(4, 3, 4)
    (padded * factor.to(device)).sum().backward()
    (expected * factor[mask]).sum().backward()
    optimizer.step()
    assert weight.grad is not None
    got = engine.tables[0].export(0, torch.arange(7, device=device))["embedding"].cpu()
    assert_near(got, weight.detach() - weight.grad)


def test_shapes_with_other_combiners() -> None:
    ids = RaggedTensor.from_lists(LISTS)
    each = engine_of(None)
    weight = table_of(each)
    assert torch.equal(each({"seq": CUBE})["seq"], weight[CUBE])  # [B, L, K, D]
    assert torch.equal(each({"seq": ids})["seq"], weight[ids.values])  # [n, D]
    tile = engine_of("tile", max_length=2)
    weight = table_of(tile)
    assert torch.equal(tile({"seq": CUBE})["seq"], weight[CUBE].view(3, 2, 8))
    got = tile({"seq": ids})["seq"]
    assert got.shape == (5, 8)
    assert torch.equal(got[0], weight[[1, 2]].view(8))
    assert torch.equal(got[4], torch.cat([weight[5], torch.zeros(4)]))
    first = engine_of("sum", max_length=1)
    weight = table_of(first)
    assert torch.equal(first({"seq": CUBE})["seq"], weight[CUBE[..., 0]])
    assert torch.equal(
        first({"seq": ids})["seq"], torch.stack([weight[1], weight[3], 0 * weight[0], weight[4], weight[5]])
    )
    deep = RaggedTensor.from_lists([[[[1, 2]], []], [[[3], [4]]]])
    assert engine_of("sum")({"seq": deep})["seq"].shape == (3, 4)
    assert engine_of("sum")({"seq": CUBE[None]})["seq"].shape == (1, 3, 2, 4)
    assert engine_of("sum", weights="w")({"seq": CUBE, "w": torch.ones(3, 2, 2)})["seq"].shape == (3, 2, 4)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_sequences_yield_zeros(shape: tuple[int, ...]) -> None:
    for combiner in ("sum", "max", "mean"):
        outputs = engine_of(combiner)({"seq": torch.zeros(shape, dtype=torch.int64)})["seq"]
        assert torch.equal(outputs, torch.zeros(*shape[:2], 4))
        outputs.sum().backward()
    assert engine_of("sum")({"seq": RaggedTensor.from_lists([[], [[]]], dtype=torch.int64)})["seq"].tolist() == [
        [0.0] * 4
    ]


def test_lists_beyond_the_outer_offsets_are_ignored() -> None:
    # Shortening rows on a GPU does not change the number of lists.
    lists = RaggedTensor.unchecked(
        torch.tensor([1, 2, 3, 9]), torch.tensor([0, 2, 3, 4]), outer=(torch.tensor([0, 1, 2]),)
    )
    engine = engine_of("sum")
    assert engine({"seq": lists})["seq"].shape == (2, 4)
    assert engine.tables[0].ids(0).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (
            RaggedTensor.from_lists([[[1.0, 2.0, 3.0]], [], [[], [1.0, 2.0]], [[1.0]]]),
            "row 0 has 1 for 2 lists of ids",
        ),
        (RaggedTensor.from_lists([[[1.0, 2.0], [3.0]], [], [[], [1.0, 2.0]], [[1.0]]]), "list 0 has 2 for 3 ids"),
        (RaggedTensor.from_lists([[1.0], [2.0], [3.0], []]), "the weights have 4 rows and 1 levels, the ids 4 and 2"),
    ],
)
def test_weights_with_different_lists_are_refused(weights: RaggedTensor, text: str) -> None:
    with pytest.raises(ValueError, match=f"feature 'seq': 'w' must have one weight for each id .*: {text}"):
        engine_of("sum", weights="w")({"seq": RaggedTensor.from_lists(LISTS), "w": weights})


def test_sequences_from_files_to_vectors(tmp_path: Path) -> None:
    shifted = [[[id_ + 70 for id_ in bag] for bag in row] for row in LISTS]
    pq.write_table(pa.table({"plain": shifted, "ids": shifted, "w": WEIGHTS}), tmp_path / "a.parquet")
    dataset = ColumnDataset(tmp_path, ["plain", "ids", "w"], 4)
    (batch,) = list(dataset)
    features = FeatureEngine([Feature("plain", ops=[Mod(70)]), Feature("ids", ops=[Mod(70)])])
    engine = EmbeddingEngine(
        {"plain": EmbeddingConfig(dim=4, combiner="mean"), "ids": EmbeddingConfig(dim=4, combiner="sum", weights="w")}
    )
    found = engine(features(batch))
    direct = engine(
        {
            "plain": RaggedTensor.from_lists(LISTS),
            "ids": RaggedTensor.from_lists(LISTS),
            "w": RaggedTensor.from_lists(WEIGHTS, dtype=torch.float32),
        }
    )
    for name in ("plain", "ids"):
        assert found[name].shape == (5, 4)
        assert torch.equal(found[name], direct[name])


def sequences(group: dist.ProcessGroup) -> dict[str, Any]:
    """Do one step on this rank's share of the rows."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = EmbeddingEngine(
        {"cube": EmbeddingConfig(dim=4, combiner="mean"), "lists": EmbeddingConfig(dim=4, combiner="sqrtn")},
        group=group,
        reduce="sum",
        prefetch_depth=0,
    )
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    lists = RaggedTensor.from_lists(LISTS, weights=WEIGHTS)
    own = slice(4 * rank // ranks, 4 * (rank + 1) // ranks)
    outputs = engine({"cube": torch.cat([CUBE, CUBE[:1]])[own], "lists": lists[own]})
    sum(value.sum() for value in outputs.values()).backward()
    optimizer.step()
    return {
        "outputs": {name: value.detach() for name, value in outputs.items()},
        "tables": {name: engine.tables[0].export(number) for number, name in enumerate(("cube", "lists"))},
    }


def test_two_ranks_pool_sequences_like_one(ranks: Ranks) -> None:
    (one,) = ranks.run(1, sequences)
    two = ranks.run(2, sequences)
    assert one["outputs"]["cube"].shape == (4, 2, 4)
    assert one["outputs"]["lists"].shape == (5, 4)
    for name in ("cube", "lists"):
        assert_near(torch.cat([each["outputs"][name] for each in two]), one["outputs"][name])
        ids = torch.cat([each["tables"][name]["ids"] for each in two])
        rows = torch.cat([each["tables"][name]["embedding"] for each in two])[ids.argsort()]
        assert_near(rows, one["tables"][name]["embedding"])
