"""Typed access to columns of batches."""

from __future__ import annotations

import torch

from recis_hybrid.ragged import Batch


def dense(batch: Batch, name: str = "row") -> torch.Tensor:
    column = batch[name]
    assert isinstance(column, torch.Tensor)
    return column
