"""Tables do not depend on later changes to a batch's tensors, on lookups of other tables or on inference mode."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import Constant, EmbeddingConfig, EmbeddingEngine
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.lookup import FeatureIds, Lookup
from recis_hybrid.ragged import RaggedTensor


def only_table(engine: EmbeddingEngine) -> HashTable:
    (table,) = engine.tables
    return table


def trained(engine: EmbeddingEngine, name: str = "id") -> list[float]:
    values: list[float] = only_table(engine).export(0)["embedding"].flatten().tolist()
    return values


@pytest.mark.parametrize("reused", [False, True])
def test_micro_batches_may_share_memory(reused: bool) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=1, initializer=Constant(0.0), weights="weight")})
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    offsets, weights = torch.zeros(3, dtype=torch.int64), torch.zeros(4)
    for bags, share in (([0, 1, 4], 1.0), ([0, 3, 4], 2.0)):
        offsets.copy_(torch.tensor(bags))
        weights.fill_(share)
        own_offsets, own_weights = (offsets, weights) if reused else (offsets.clone(), weights.clone())
        ids = RaggedTensor(torch.tensor([1, 2, 3, 4]), own_offsets)
        batch = {"id": ids, "weight": RaggedTensor(own_weights, own_offsets)}
        engine(batch)["id"].backward(torch.tensor([[1.0], [10.0]]))
        weights.fill_(100.0)
        offsets.mul_(10**6)
    optimizer.step()
    assert trained(engine) == [-3.0, -12.0, -12.0, -30.0]


def test_the_maximum_of_a_bag_uses_the_offsets_of_the_lookup() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=1, combiner="max", initializer=Constant(0.0))})
    ids, offsets = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 4])
    only_table(engine).insert(0, ids, {"embedding": torch.tensor([[1.0], [2.0], [3.0], [4.0]])})
    output = engine({"id": RaggedTensor(ids, offsets)})["id"]
    offsets.copy_(torch.tensor([0, 1, 4]))
    output.backward(torch.ones(2, 1))
    optim.SGD(engine.parameters(), lr=1.0).step()
    assert trained(engine) == [1.0, 1.0, 3.0, 3.0]


def test_a_feature_without_a_gradient_does_not_shift_the_bags_of_others() -> None:
    configs = {name: EmbeddingConfig(dim=1, table="t", initializer=Constant(0.0)) for name in ("a", "b")}
    engine = EmbeddingEngine(configs)
    column = RaggedTensor(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]))
    outputs = engine({"a": column, "b": column})
    column.offsets.mul_(10**6)
    outputs["a"].sum().backward()
    optim.SGD(engine.parameters(), lr=1.0).step()
    assert trained(engine) == [-1.0] * 3


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("combiner", ["sum", "mean", "max"])
@pytest.mark.parametrize("bad", [[0, 10**9, 3], [0, 2, 4], [0, 2, 1], [-1, 2, 3]])
def test_offsets_overwritten_after_validation_are_refused(
    bad: list[int], combiner: Literal["sum", "mean", "max"], train: bool
) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4, combiner=combiner)}).train(train)
    column = RaggedTensor(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]))
    before = engine({"id": column})["id"]
    column.offsets.copy_(torch.tensor(bad))
    with pytest.raises(RuntimeError, match="offsets must not decrease and must be within the . ids"):
        engine({"id": column})
    column.offsets.copy_(torch.tensor([0, 2, 3]))
    assert torch.equal(engine({"id": column})["id"], before)


def test_a_lookup_of_another_table_is_refused() -> None:
    engines = [EmbeddingEngine({"id": EmbeddingConfig(dim=2)}) for _ in range(2)]
    optimizers = [optim.SGD(engine.parameters(), lr=1.0) for engine in engines]
    values, ctx = engines[0].lookup({"id": torch.tensor([1, 2])})
    engines[1].lookup({"id": torch.tensor([100, 200])})
    before = engines[1].tables[0].export(0)["embedding"]
    with pytest.raises(RuntimeError, match="or the lookup is from another table; look up the batch again"):
        engines[1].apply_gradients(ctx, {"id": torch.ones(2, 2)}, optimizers[1])
    assert torch.equal(engines[1].tables[0].export(0)["embedding"], before)
    lookup: Lookup = ctx.lookups[0]
    with pytest.raises(RuntimeError, match="another table"):
        engines[1].tables[0].gather(lookup, torch.empty(16), [0])
    engines[0].apply_gradients(ctx, {"id": torch.ones(2, 2)}, optimizers[0])


@pytest.mark.parametrize("member", [-1, 1, 10**6])
@pytest.mark.parametrize("train", [True, False])
def test_an_unknown_member_table_is_refused(member: int, train: bool) -> None:
    table = only_table(EmbeddingEngine({"id": EmbeddingConfig(dim=2)}))
    with pytest.raises(IndexError, match=f"table id: member table must be 0 to 0, got {member}"):
        table.lookup([FeatureIds(torch.tensor([1]), 1, member)], train=train)
    assert len(table) == 0


def test_a_table_built_and_loaded_in_inference_mode_grows_outside_of_it() -> None:
    config = {"id": EmbeddingConfig(dim=2)}
    saved = EmbeddingEngine(config)
    saved({"id": torch.arange(10)})
    with torch.inference_mode():
        engine = EmbeddingEngine(config)
        engine.load_checkpoint_state(saved.checkpoint_state())
    output = engine({"id": torch.arange(5000)})["id"]
    output.sum().backward()
    optim.SGD(engine.parameters(), lr=1.0).step()
    assert len(only_table(engine)) == 5000


@pytest.mark.parametrize(("dtype", "more"), [(torch.float16, 5.0), (torch.bfloat16, 1e35)])
def test_stochastic_rounding_does_not_overflow(dtype: torch.dtype, more: float) -> None:
    most = torch.finfo(dtype).max
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=64, initializer=Constant(most), dtype=dtype)})
    engine({"id": torch.tensor([1])})["id"].backward(torch.full((1, 64), -more))
    optim.SGD(engine.parameters(), lr=1.0).step()
    assert trained(engine) == [most] * 64
