"""A table's memory is freed with the last reference to it, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import Constant, EmbeddingConfig, EmbeddingEngine, HashTable


@pytest.fixture
def no_collector() -> Iterator[None]:
    # The first optimizer of a process makes torch import modules that keep a reference to it.
    optim.Adam(EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=optim.Adam).parameters())
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("trained", [False, True])
def test_a_dropped_table_is_freed_immediately(trained: bool) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=optim.Adam)
    optimizer = optim.Adam(engine.parameters(), lr=0.1)
    table = weakref.ref(engine.tables[0])
    values = engine({"id": torch.arange(5)})["id"]
    if trained:
        values.sum().backward()
        optimizer.step()
    del values, engine
    assert table() is not None  # the optimizer still refers to it
    del optimizer
    assert table() is None


@pytest.mark.usefixtures("no_collector")
def test_an_optimizer_keeps_a_table_alive_by_its_anchor() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, initializer=Constant(1.0), optimizer_overrides={"lr": 0.5})})
    optimizer = optim.SGD([engine.tables[0].anchor], lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
    table: HashTable = engine.tables[0]
    assert table.anchor is optimizer.param_groups[0]["params"][0]
    del engine
    assert table.anchor is optimizer.param_groups[0]["params"][0]
