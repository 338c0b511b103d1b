"""Helpers for tests of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.embedding import (
    Constant,
    FeatureIds,
    HashTable,
    Lookup,
    MemberTable,
    Normal,
    RecordLayout,
    StateField,
)


def make_table(
    dim: int = 4, state: tuple[StateField, ...] = (), members: int = 1, device: str = "cpu", seed: int = 0, **more: Any
) -> HashTable:
    names = [MemberTable(f"t{k}", Normal(0.0, 0.1) if k % 2 == 0 else Constant(0.5)) for k in range(members)]
    layout = RecordLayout(dim, state, more.pop("dtype", torch.float32), more.pop("state_dtype", torch.float32))
    return HashTable(names, layout, torch.device(device), seed, **more)


def feature(
    ids: Sequence[int] | Tensor,
    offsets: list[int] | None = None,
    member: int = 0,
    combiner: int = 0,
    device: str = "cpu",
    weights: Tensor | None = None,
    tile: int = 0,
    unknown_zeros: bool = False,
) -> FeatureIds:
    tensor = torch.as_tensor(ids, dtype=torch.int64).to(device)
    starts = torch.tensor(offsets, dtype=torch.int64, device=device) if offsets else None
    vectors = (len(offsets) - 1) * max(tile, 1) if offsets else tensor.numel()
    shares = None if weights is None else weights.to(device)
    return FeatureIds(tensor, vectors, member, starts, shares, combiner, tile, unknown_zeros)


def gathered(table: HashTable, lookup: Lookup, winners: Tensor | None = None) -> list[Tensor]:
    """Return the vectors of each feature, float32 ``[V, dim]``."""
    dim, vectors = table.layout.dim, lookup.request.bags.vectors
    starts = [sum(vectors[:f]) * dim for f in range(len(vectors))]
    out = torch.full((max(sum(vectors), 1) * dim,), torch.nan, device=table.device)
    table.gather(lookup, out, starts, winners)
    return [out[start : start + count * dim].view(count, dim) for start, count in zip(starts, vectors, strict=True)]


def values_of(table: HashTable, ids: list[int], *, train: bool = True) -> Tensor:
    """Return the embeddings of ids of the first member table, on the CPU."""
    return gathered(table, table.lookup([feature(ids, device=table.device.type)], train=train))[0].cpu()
