"""Batch: the columns that every stage takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from recis_hybrid.ragged.tensor import RaggedTensor

Batch: TypeAlias = dict[str, torch.Tensor | RaggedTensor]
"""Columns by name, all with the same number of rows B: tensors ``[B, ...]`` or RaggedTensors of B rows."""


def batch_size(batch: Mapping[str, torch.Tensor | RaggedTensor]) -> int:
    """Return the number of rows of a batch.

    Args:
        batch: Columns by name.

    Raises:
        TypeError: If a column has no rows, such as a single number.
        ValueError: If the batch has no columns, or their numbers of rows differ.

    Example:
        >>> batch_size({"user": torch.tensor([1, 2]), "clicks": RaggedTensor.from_lists([[7, 8], []])})
        2
    """
    sizes = {
        name: column.batch_size if isinstance(column, RaggedTensor) else _rows(name, column)
        for name, column in batch.items()
    }
    if len(set(sizes.values())) != 1:
        raise ValueError(f"batch: all columns must have the same number of rows, got {sizes or 'no columns'}")
    return next(iter(sizes.values()))


def _rows(name: str, column: Any) -> int:
    shape = column.shape if hasattr(column, "shape") else (len(column),) if isinstance(column, list | tuple) else ()
    if not shape:
        raise TypeError(
            f"batch: column {name!r} must have a value or a list for each row, as a tensor [B, ...] or a RaggedTensor, "
            f"got a {type(column).__name__} without rows"
        )
    return int(shape[0])


def batch_to(
    batch: Mapping[str, torch.Tensor | RaggedTensor],
    device: torch.device | str | int,
    *,
    non_blocking: bool = False,
) -> Batch:
    """Return the batch with all columns on ``device``; columns that are already there are not copied.

    Args:
        batch: Columns by name.
        device: Target device.
        non_blocking: See ``torch.Tensor.to``.
    """
    return {name: column.to(device, non_blocking=non_blocking) for name, column in batch.items()}
