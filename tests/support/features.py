"""Features computed by an engine, fused and unfused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recis_hybrid.features import Column, Feature, FeatureEngine
from recis_hybrid.ragged import Batch, RaggedTensor

fused_or_not = pytest.mark.parametrize("fuse", [True, False])


def run(ops: list[Any], fuse: bool, *columns: Any, name: str = "output") -> Any:
    """Return the result of a feature with the columns ``c0``, ``c1``, and so on as its sources."""
    names = [f"c{number}" for number in range(len(columns))]
    engine = FeatureEngine([Feature(name, ops=ops, source=names)], fuse=fuse)
    return engine(dict(zip(names, columns, strict=True)))[name]


def apply(ops: Any, *columns: Any) -> Any:
    """Return the result of one or several operations on columns; fused and unfused results must be equal."""
    chain = ops if isinstance(ops, list) else [ops]
    results = [run(chain, fuse, *columns) for fuse in (True, False)]
    plain_results = [
        (plain(one), plain(one.weights) if isinstance(one, RaggedTensor) else one.dtype) for one in results
    ]
    assert plain_results[0] == plain_results[1]
    return results[0]


def plain(column: torch.Tensor | RaggedTensor | None) -> Any:
    """Return a column as lists of numbers or strings."""
    if isinstance(column, RaggedTensor):
        return column.to_strings(decode=False) if column.dtype == torch.uint8 else column.to_lists()
    return None if column is None else column.tolist()


def assert_same(one: Batch, other: Batch) -> None:
    """Assert that two batches have bitwise equal columns in the same order."""
    assert list(one) == list(other)
    for name in one:
        a, b = Column.of(one[name]), Column.of(other[name])
        for left, right in zip(
            (a.values, a.offsets, a.weights, *a.outer), (b.values, b.offsets, b.weights, *b.outer), strict=True
        ):
            assert (left is None) == (right is None), name
            if left is not None and right is not None:
                assert left.dtype == right.dtype, name
                assert left.shape == right.shape, name
                assert torch.equal(_bits(left), _bits(right)), name


def moved_to(batch: Batch, device: str) -> Batch:
    """Return a batch on a device."""
    return {name: column.to(device) for name, column in batch.items()}


def without_unused_values(batch: Batch) -> Batch:
    """Return a batch on the CPU, without the unused values that a GPU leaves after the last row."""
    trimmed: Batch = {}
    for name, column in moved_to(batch, "cpu").items():
        if isinstance(column, RaggedTensor) and not column.outer:
            count = int(column.offsets[-1])
            weights = None if column.weights is None else column.weights[:count]
            column = RaggedTensor(column.values[:count], column.offsets, weights)
        trimmed[name] = column
    return trimmed


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.view({4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])
