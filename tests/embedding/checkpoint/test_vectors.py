"""Vectors loaded into tables: trained and read-only ones, in chunks, on several ranks; and refused rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st
from safetensors.torch import save_file

from recis_hybrid import optim
from recis_hybrid.columnio import read_vectors
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Unused
from recis_hybrid.ragged import RaggedTensor
from tests.support.devices import EDGE_IDS, on_accelerators
from tests.support.rank_processes import Ranks
from tests.support.sharded import merged, rows_of

DIM = 8


def engine_of(**more: Any) -> EmbeddingEngine:
    """Return an engine of a trained table and a read-only one that are coalesced with another table each."""
    configs = {
        name: EmbeddingConfig(dim=DIM, trainable=name not in ("item", "old"), unknown="zeros")
        for name in ("user", "item", "old", "query")
    }
    return EmbeddingEngine(configs, optimizer=optim.Adam, **more)


def vectors_of(ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randn(ids.numel(), DIM, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.sampled_from(EDGE_IDS) | st.integers(-(2**63), 2**63 - 1), unique=True), st.integers(1, 5))
def test_a_lookup_returns_loaded_vectors(listed: list[int], chunks: int) -> None:
    ids = torch.tensor(listed, dtype=torch.int64)
    vectors = vectors_of(ids)
    for table in ("item", "user"):
        engine = engine_of().eval()
        parts = zip(ids.tensor_split(chunks), vectors.tensor_split(chunks), strict=True)
        assert engine.load_rows(table, parts) == ids.numel()
        none = torch.zeros_like(ids)
        found = engine({"user": none, "item": none, "old": none, "query": none, table: ids})
        assert torch.equal(found[table], vectors)
        assert sum(map(len, engine.tables)) == ids.numel()


@on_accelerators
def test_vectors_on_accelerators(device: str) -> None:
    engine = engine_of(device=device).eval()
    ids = torch.tensor(EDGE_IDS)
    assert engine.load_rows("item", zip(ids.split(3), vectors_of(ids).to(device).split(3), strict=True)) == ids.numel()
    none = torch.zeros_like(ids)
    found = engine({"user": none, "item": ids, "old": none, "query": none})["item"]
    assert torch.equal(found.cpu(), vectors_of(ids))
    with pytest.raises(ValueError, match=f"got {EDGE_IDS[0]} in two chunks"):
        engine.load_rows("item", [(ids[:1], ONES[:1]), (ids[:1].to(device), ONES[:1])])


def test_arrays_of_other_libraries_and_dtypes() -> None:
    engine = engine_of()
    unsigned = np.array([2**64 - 1, 3], dtype=np.uint64)
    assert engine.load_rows("item", unsigned, np.ones((2, DIM), dtype=np.float64)) == 2
    assert engine.load_rows("item", [5], torch.ones(1, DIM, dtype=torch.bfloat16, requires_grad=True)) == 1
    assert rows_of(engine)["item"]["ids"].tolist() == [-1, 3, 5]
    assert rows_of(engine)["item"]["embedding"].eq(1).all()
    half = EmbeddingEngine({"item": EmbeddingConfig(dim=1, dtype=torch.float16)})
    half.load_rows("item", [1], torch.tensor([[65504.0]]))
    with pytest.raises(ValueError, match=r"got 70000\.0 for id 2; which torch\.float16 cannot hold; build the table"):
        half.load_rows("item", [2], torch.tensor([[70000.0]]))


def test_loading_keeps_other_rows_and_optimizer_state() -> None:
    engine = engine_of()
    optimizer = engine.make_optimizer(lr=0.1)
    ids = torch.arange(4)
    batch: Any = dict.fromkeys(("user", "item", "old", "query"), ids)
    for _ in range(2):
        sum(value.sum() for name, value in engine(batch).items() if name != "item").backward()
        optimizer.step()
        optimizer.zero_grad()
    before = rows_of(engine)
    vectors = vectors_of(torch.arange(2))
    engine.load_rows("user", torch.tensor([3, 9]), vectors)
    after = rows_of(engine)
    for name in ("query", "item", "old"):
        assert all(torch.equal(values, before[name][column]) for column, values in after[name].items())
    assert torch.equal(after["user"]["embedding"][:3], before["user"]["embedding"][:3])
    assert torch.equal(after["user"]["embedding"][3:], vectors)
    assert torch.equal(after["user"]["exp_avg"][:4], before["user"]["exp_avg"])
    assert not after["user"]["exp_avg"][4].any()
    assert after["user"]["seen_step"].tolist() == [2, 2, 2, 2, 2]
    assert engine.evict(Unused(1)) == 0


def test_loading_ignores_admission() -> None:
    engine = EmbeddingEngine({"user": EmbeddingConfig(dim=1, admission=MinFrequency(3), unknown="zeros")})
    engine.load_rows("user", [1], torch.ones(1, 1))
    assert engine({"user": torch.tensor([1, 2])})["user"].tolist() == [[1.0], [0.0]]


ONES = torch.ones(2, DIM)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("itme", [1], ONES[:1]), ValueError, r"there is no table 'itme'; the tables are \['item', 'old', 'query', 'u"),
        (("item", [1, 2], ONES[:1]), ValueError, r"must be floats \[n, dim\] = \[2, 8\], got torch.float32 \[1, 8\]"),
        (("item", [1, 2], ONES[:, :3]), ValueError, r"\[2, 8\], got torch.float32 \[2, 3\]; pass a vector for each id"),
        (("item", [1, 2], ONES.long()), ValueError, r"vectors must be floats \[n, dim\] = \[2, 8\], got torch.int64"),
        (("item", [7, 7], ONES), ValueError, "table 'item': load_rows: ids must be distinct, got 7 twice"),
        (("item", [0.5, 1.0], ONES), ValueError, r"ids must be integers \[n\], got torch.float64 \[2\]; hash strings"),
        (("item", [[1, 2]], ONES), ValueError, "must be a list of numbers"),
        (("item", RaggedTensor.from_strings(["a", "b"]), ONES), ValueError, "got RaggedTensor.*; hash strings first"),
        (("item", ["a", "b"], ONES), TypeError, "ids must hold numbers"),
        (("item", [1, 2], RaggedTensor.from_lists([[0.5], [1.0, 2.0]])), ValueError, "got RaggedTensor"),
        (("item", [1, 2], ONES * torch.tensor([[1], [torch.nan]])), ValueError, "finite, got nan for id 2; drop its"),
        (("item", [1, 2], ONES / torch.tensor([[0], [1]])), ValueError, "finite, got inf for id 1; drop its row"),
        (("item", 7), TypeError, "takes ids and vectors, or an iterable of such pairs, got 7"),
        (("item", torch.arange(2)), TypeError, r"iterable of pairs \(ids, vectors\).*, got a Tensor with a Tensor in"),
        (("item", [{"id": [1]}]), TypeError, "got a list with a dict in it"),
    ],
)
def test_refused_rows(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    engine = engine_of()
    with pytest.raises(error, match=message):
        engine.load_rows(*arguments)
    assert sum(map(len, engine.tables)) == 0


def test_an_id_in_two_chunks_is_refused() -> None:
    engine = engine_of()
    engine.load_rows("item", [1, 2], ONES)
    engine.load_rows("item", [([1], ONES[:1] * 2), ([2, 3], ONES * 3)])  # replaces the rows of the earlier call
    assert rows_of(engine)["item"]["embedding"][:, 0].tolist() == [2, 3, 3]
    with pytest.raises(ValueError, match="ids must be distinct, got 2 in two chunks"):
        engine.load_rows("item", [([2, 4], ONES), ([5, 2], ONES)])
    assert rows_of(engine)["item"]["ids"].tolist() == [1, 2, 3, 4]


IDS = torch.tensor([*EDGE_IDS, *range(1000, 1200)])


def load_on_ranks(group: dist.ProcessGroup, sharding: str, path: str) -> dict[str, Any]:
    narrow = "row" if sharding == "column" else sharding
    engine = EmbeddingEngine(
        {
            "item": EmbeddingConfig(dim=DIM, trainable=False, unknown="zeros", sharding=sharding),  # type: ignore[arg-type]
            "user": EmbeddingConfig(dim=DIM, unknown="zeros", sharding=sharding),  # type: ignore[arg-type]
            "narrow": EmbeddingConfig(dim=3, unknown="zeros", sharding=narrow),  # type: ignore[arg-type]
        },
        group=group,
    )

    vectors = vectors_of(IDS)
    written = {
        "item": engine.load_rows("item", read_vectors(path, ids="id", vectors="vector", chunk_rows=50)),
        "user": engine.load_rows("user", zip(IDS.tensor_split(3), vectors.tensor_split(3), strict=True)),
        "narrow": engine.load_rows("narrow", IDS, vectors[:, :3]),
    }
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = torch.arange(IDS.numel()).tensor_split(ranks)[rank]
    for train in (False, True):
        found = engine.train(train)(dict.fromkeys(("item", "user", "narrow"), IDS[mine]))
        for name, values in found.items():
            assert torch.equal(values, vectors[mine, : values.shape[1]]), (name, train)
    tables = rows_of(engine)
    assert {name: rows["ids"].numel() for name, rows in tables.items()} == written
    return {"tables": tables, "written": written}


@pytest.mark.parametrize("sharding", ["row", "table", "column", "replicated"])
def test_each_rank_keeps_its_rows(ranks: Ranks, tmp_path: Path, sharding: str) -> None:
    save_file({"id": IDS, "vector": vectors_of(IDS)}, tmp_path / "items.safetensors")
    for world in (2, 3) if sharding == "row" else (2,):
        results = ranks.run(world, load_on_ranks, sharding, str(tmp_path / "items.safetensors"))
        whole = merged(results, sharding=sharding)
        order = IDS.argsort()
        for name, rows in whole.items():
            assert torch.equal(rows["ids"], IDS[order])
            assert torch.equal(rows["embedding"], vectors_of(IDS)[order, : rows["embedding"].shape[1]]), name
        if sharding == "row":
            assert all(0 < result["written"]["item"] < IDS.numel() for result in results)


def load_own_rows_only(group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    EmbeddingEngine({"item": EmbeddingConfig(dim=DIM)}, group=group).load_rows("item", [rank], ONES[:1])


def fail_on_rank_1(group: dist.ProcessGroup) -> None:
    vectors = ONES * torch.nan if dist.get_rank(group) == 1 else ONES
    EmbeddingEngine({"item": EmbeddingConfig(dim=DIM)}, group=group).load_rows("item", [1, 2], vectors)


def test_all_ranks_raise_together(ranks: Ranks) -> None:
    ranks.start(2, load_own_rows_only)
    for result in ranks.results(2):
        assert "ExchangeError: table 'item': load_rows: every rank must pass the rows of all ranks" in str(result)
    ranks.start(2, fail_on_rank_1)
    first, second = map(str, ranks.results(2))
    assert "OtherRankError: rank 1 of 2 failed: table 'item': load_rows: vectors must be finite" in first
    assert "ValueError: table 'item': load_rows: vectors must be finite, got nan for id 1" in second
