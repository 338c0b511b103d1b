"""Columns of batches, known to be of their kind."""

from __future__ import annotations

import torch

from recis_hybrid.ragged import Batch


def dense(batch: Batch, name: str = "row") -> torch.Tensor:
    column = batch[name]
    assert isinstance(column, torch.Tensor)
    return column
