"""Batch: what every stage takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from recis_hybrid.ragged.tensor import RaggedTensor

Batch: TypeAlias = dict[str, torch.Tensor | RaggedTensor]
"""Columns by name, all with the same number of rows B: a [B, ...] tensor or a RaggedTensor of B rows each."""


def batch_size(batch: Mapping[str, torch.Tensor | RaggedTensor]) -> int:
    """Returns the number of rows that all columns of a batch have.

    Args:
        batch: Columns by name.

    Raises:
        ValueError: The batch has no columns, or they disagree.

    Example:
        >>> batch_size({"user": torch.tensor([1, 2]), "clicks": RaggedTensor.from_lists([[7, 8], []])})
        2
    """
    sizes = {
        name: column.batch_size if isinstance(column, RaggedTensor) else column.shape[0]
        for name, column in batch.items()
    }
    if len(set(sizes.values())) != 1:
        raise ValueError(f"batch: its columns must have one number of rows, got {sizes or 'no columns'}")
    return next(iter(sizes.values()))


def batch_to(
    batch: Mapping[str, torch.Tensor | RaggedTensor],
    device: torch.device | str | int,
    *,
    non_blocking: bool = False,
) -> Batch:
    """Returns the batch with all of its columns on `device`; columns that are there already are not copied.

    Args:
        batch: Columns by name.
        device: Where to.
        non_blocking: As in `torch.Tensor.to`.
    """
    return {name: column.to(device, non_blocking=non_blocking) for name, column in batch.items()}
