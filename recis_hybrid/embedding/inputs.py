"""From a Batch's columns to the ids that tables take."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.embedding.lookup import FeatureIds
from recis_hybrid.ragged import Batch, RaggedTensor

_NO_OFFSETS: dict[torch.device, Tensor] = {}


def feature_ids(batch: Batch, feature: str, device: torch.device, member: int, combiner: int) -> FeatureIds:
    """Reads a feature's column: ``[B]`` one id a bag, ``[B, L]`` L ids a bag, or a RaggedTensor.

    Raises:
        KeyError: If the batch lacks the column.
        TypeError: If it holds no integers.
        ValueError: If it has another number of dimensions.
    """
    if feature not in batch:
        raise KeyError(f"feature {feature!r}: the batch has no such column; it has {sorted(batch)}")
    column = batch[feature]
    values = column.values if isinstance(column, RaggedTensor) else column
    if values.dtype not in (torch.int64, torch.int32):
        hint = "hash it first (features.Hash)" if values.dtype == torch.uint8 else "cast it, or bucketize it first"
        raise TypeError(f"feature {feature!r}: ids must be int64 or int32, got {values.dtype}; {hint}")
    ids = values.to(device=device, dtype=torch.int64).contiguous()
    if isinstance(column, RaggedTensor):
        if column.weights is not None:
            raise ValueError(f"feature {feature!r}: weighted bags are not supported by the combiner; drop the weights")
        if ids.dim() != 1:
            raise ValueError(f"feature {feature!r}: ragged ids must be [N], got {list(ids.shape)}")
        offsets = column.offsets.to(device=device).contiguous()
        return FeatureIds(ids, offsets, offsets.numel() - 1, member, combiner)
    if ids.dim() == 1 or (ids.dim() == 2 and ids.size(1) == 1):
        return FeatureIds(ids.view(-1), _no_offsets(device), ids.size(0), member, combiner)
    if ids.dim() != 2:
        raise ValueError(f"feature {feature!r}: ids must be [B], [B, L] or a RaggedTensor, got {list(ids.shape)}")
    bags, length = ids.shape
    offsets = torch.arange(bags + 1, dtype=torch.int64, device=device) * length
    return FeatureIds(ids.view(-1), offsets, bags, member, combiner)


def _no_offsets(device: torch.device) -> Tensor:
    if device not in _NO_OFFSETS:
        _NO_OFFSETS[device] = torch.empty(0, dtype=torch.int64, device=device)
    return _NO_OFFSETS[device]
