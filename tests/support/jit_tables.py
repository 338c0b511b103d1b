"""Engines and comparisons for tests of lookups inside jit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
from recis_hybrid.ragged import RaggedTensor


def engine_of(optimizer: Any, dim: int = 4, device: str = "cpu", **settings: Any) -> EmbeddingEngine:
    """Return an engine with one feature, ``item``."""
    config = EmbeddingConfig(dim=dim, initializer=Normal(0, 1), **settings)
    return EmbeddingEngine({"item": config}, optimizer=optimizer, seed=1, device=device)


class TorchTables:
    """``JaxTables`` by copies, for any device of torch: ids and gradients come as numpy or JAX arrays."""

    def __init__(self, engine: EmbeddingEngine, optimizer: Any = None) -> None:
        self.engine = engine
        self.optimizer = optimizer

    def lookup(self, ids: Mapping[str, Any], *, train: bool = True) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
        """Return the vectors, and the context of :meth:`apply_gradients`."""
        batch = {
            name: part if isinstance(part, RaggedTensor) else torch.from_numpy(np.asarray(part))
            for name, part in ids.items()
        }
        vectors, ctx = self.engine.train(train).lookup(batch)
        return {name: part.cpu().numpy() for name, part in vectors.items()}, ctx

    def apply_gradients(self, ctx: Any, gradients: Mapping[str, Any]) -> None:
        """Do one step of the optimizer."""
        device = self.engine.tables[0].device
        tensors = {name: torch.from_numpy(np.array(part)).to(device) for name, part in gradients.items()}
        self.engine.apply_gradients(ctx, tensors, self.optimizer)


def words(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return int64 ids as pairs of uint32 words."""
    ids = np.ascontiguousarray(ids, np.int64)
    return ids.view(np.uint32).reshape(*ids.shape, 2)


def rows_of(engine: Any) -> list[dict[str, torch.Tensor]]:
    """Return all records of an engine, by member table."""
    return [table.export(number) for table in engine.tables for number in range(len(table.members))]


def assert_equal_tables(one: EmbeddingEngine, other: EmbeddingEngine) -> None:
    """Compare ids, embeddings, optimizer state and metadata, bit by bit."""
    for first, second in zip(rows_of(one), rows_of(other), strict=True):
        assert sorted(first) == sorted(second)
        for name in first:
            assert torch.equal(first[name].cpu(), second[name].cpu()), name
