"""Engines and comparisons for tests of lookups inside jit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal


def engine_of(optimizer: Any, dim: int = 4, **settings: Any) -> EmbeddingEngine:
    """Return an engine with one feature, ``item``."""
    config = EmbeddingConfig(dim=dim, initializer=Normal(0, 1), **settings)
    return EmbeddingEngine({"item": config}, optimizer=optimizer, seed=1)


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
            assert torch.equal(first[name], second[name]), name
