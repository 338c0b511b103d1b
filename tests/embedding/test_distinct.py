"""EmbeddingEngine.distinct: each row once, for every combiner, beside plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Normal
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.devices import EDGE_IDS, on_devices
from tests.support.near import assert_near
from tests.support.rank_processes import Ranks
from tests.support.sharded import configs, global_batch, part_of

ROOM = 64


def train_once(engine: EmbeddingEngine, batch: Batch, *, rows: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Train on one vector per id, with gradients that differ by position; return those vectors and the loss."""
    columns, index = batch, {}
    if rows:
        columns, index = engine.distinct(batch, engine.configs, lambda _, count: max(count + 1, ROOM))
    sparse = engine.make_optimizer(lr=0.5)
    vectors = engine(columns)
    each: dict[str, Tensor] = {}
    loss = torch.zeros((), device=engine.device)
    for number, (name, found) in enumerate(vectors.items()):
        place = index.get(name)
        if isinstance(place, RaggedTensor):
            place = place.values
        each[name] = (found if place is None else found[place.flatten()]).flatten(0, -2)
        weight = torch.linspace(-1, number + 1, each[name].numel(), device=engine.device).view(each[name].shape)
        loss = loss + (each[name] * weight).sum() / len(batch["user"])
    loss.backward()  # type: ignore[no-untyped-call]
    sparse.step()
    return {name: vector.detach().cpu() for name, vector in each.items()}, loss.detach().cpu()


def engine_of(device: str = "cpu", group: Any = False, *, combiners: bool = True) -> EmbeddingEngine:
    """Return an engine of all kinds of features; without ``combiners`` each id has a vector, in the same tables."""
    features = {n: c for n, c in configs().items() if n != "rare"}
    if not combiners:
        unpooled: dict[str, Any] = {"combiner": None, "weights": None}
        features = {
            name: EmbeddingConfig(**{field: getattr(config, field) for field in config.__dataclass_fields__} | unpooled)
            for name, config in features.items()
        }
    return EmbeddingEngine(features, optimizer=optim.SGD, seed=3, device=device, group=group)


def tables_of(engine: EmbeddingEngine) -> dict[str, dict[int, list[float]]]:
    return {
        member.name: dict(zip(columns["ids"].tolist(), columns["embedding"].tolist(), strict=True))
        for table in engine.tables
        for number, member in enumerate(table.members)
        for columns in [table.export(number)]
    }


@on_devices
def test_all_combiners_give_the_rows_of_an_engine_without_combiners(device: str) -> None:
    batch = {name: column.to(device) for name, column in global_batch(0).items()}
    ours, reference = engine_of(device), engine_of(device, combiners=False)
    got, loss = train_once(ours, batch, rows=True)
    expected, expected_loss = train_once(reference, batch, rows=False)
    for name, vectors in expected.items():
        assert torch.equal(got[name], vectors), name
    assert_near(loss, expected_loss)
    trained, wanted = tables_of(ours), tables_of(reference)
    assert {name: rows.keys() for name, rows in trained.items()} == {name: rows.keys() for name, rows in wanted.items()}
    for name, rows in wanted.items():
        assert_near(
            torch.tensor([trained[name][key] for key in rows]), torch.tensor(list(rows.values())), 8 * 64, where=name
        )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.one_of(st.sampled_from(EDGE_IDS), st.integers(-3, 3)), max_size=24), st.sampled_from([1, 2, 3]))
def test_ids_of_any_value_and_shape(ids: list[int], width: int) -> None:
    array = np.array(ids[: len(ids) // width * width], np.int64).reshape(-1, width)
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=3, initializer=Normal(0, 1))}, seed=1)
    batch, index = engine.distinct({"item": array}, ["item"], lambda _, count: count + 2)  # type: ignore[dict-item]
    vectors = engine(batch)["item"]
    count = len(np.unique(array))
    assert vectors.shape == (count + 2, 3)
    assert not vectors[count:].any()
    place = index["item"]
    assert isinstance(place, Tensor)
    assert place.dtype == torch.int32
    assert place.shape == array.shape
    expected = EmbeddingEngine({"item": EmbeddingConfig(dim=3, initializer=Normal(0, 1), combiner=None)}, seed=1)
    assert torch.equal(vectors[place.long()], expected({"item": torch.from_numpy(array)})["item"])


def test_lists_are_cut_to_max_length() -> None:
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, max_length=2)})
    ragged = RaggedTensor.from_lists([[1, 2, 3], [], [2]])
    _, index = engine.distinct({"item": ragged}, ["item"], lambda _, count: count + 1)
    assert isinstance(index["item"], RaggedTensor)
    assert index["item"].to_lists() == [[0, 1], [], [1]]
    batch, index = engine.distinct({"item": torch.tensor([[1, 2, 3]])}, ["item"], lambda _, count: count + 1)
    assert index["item"].tolist() == [[0, 1]]  # type: ignore[union-attr]
    engine(batch)
    assert engine.tables[0].export(0)["ids"].tolist() == [1, 2]


def test_an_id_counts_once_for_admission() -> None:
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, admission=MinFrequency(2))})
    for size in (0, 1):
        batch, _ = engine.distinct({"item": torch.tensor([7, 7, 7])}, ["item"], lambda _, count: count + 1)
        engine(batch)
        assert len(engine.tables[0]) == size


def test_optional_features_may_be_missing() -> None:
    engine = EmbeddingEngine({"a": EmbeddingConfig(dim=2), "b": EmbeddingConfig(dim=2, optional=True)})
    batch, index = engine.distinct({"a": torch.tensor([1])}, ["a", "b"], lambda _, count: count + 1)
    assert index.keys() == engine(batch).keys() == {"a"}


def test_refusals() -> None:
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2)})
    with pytest.raises(ValueError, match=r"room\('item', 2\) must be more than the number of distinct ids, got 2"):
        engine.distinct({"item": torch.tensor([1, 2, 1])}, ["item"], lambda _, count: count)
    with pytest.raises(KeyError, match=r"distinct: \['site'\] are not features"):
        engine.distinct({"item": torch.tensor([1])}, ["site"], lambda _, count: count + 1)
    with pytest.raises(TypeError, match="feature 'item': ids must be int64 or int32, got torch.float32"):
        engine.distinct({"item": torch.ones(2)}, ["item"], lambda _, count: count + 1)
    with pytest.raises(ValueError, match=r"feature 'item': ids must be .*, got \[\]"):
        engine.distinct({"item": torch.tensor(1)}, ["item"], lambda _, count: count + 1)


def on_a_rank(group: dist.ProcessGroup) -> tuple[dict[str, Any], list[float]]:
    """Train on an unequal share of the samples; return this rank's rows and its share of the samples."""
    rank = dist.get_rank(group)
    engine = engine_of(group=group)
    batch = part_of(global_batch(0), *((0, 18), (18, 24))[rank])
    train_once(engine, batch, rows=rank == 0)  # the other rank looks up its bags as they are
    return tables_of(engine), [engine.share]


def test_the_samples_of_a_rank_are_those_of_its_batch(ranks: Ranks) -> None:
    results = ranks.run(2, on_a_rank)
    assert [share for _, (share,) in results] == [0.75, 0.25]
