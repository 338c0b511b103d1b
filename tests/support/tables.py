"""Shorthands for tests of tables."""

import torch
from torch import Tensor

from recis_hybrid.embedding import Constant, FeatureIds, HashTable, MemberTable, Normal, RecordLayout, StateField


def make_table(
    dim: int = 4, state: tuple[StateField, ...] = (), members: int = 1, device: str = "cpu", seed: int = 0
) -> HashTable:
    names = [MemberTable(f"t{k}", Normal(0.0, 0.1) if k % 2 == 0 else Constant(0.5)) for k in range(members)]
    return HashTable(names, RecordLayout(dim, state), torch.device(device), seed)


def feature(
    ids: list[int] | Tensor, offsets: list[int] | None = None, member: int = 0, combiner: int = 0, device: str = "cpu"
) -> FeatureIds:
    tensor = torch.as_tensor(ids, dtype=torch.int64).to(device)
    starts = torch.tensor(offsets or [], dtype=torch.int64, device=device)
    return FeatureIds(tensor, starts, len(offsets) - 1 if offsets else tensor.numel(), member, combiner)
