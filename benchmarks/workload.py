"""Workload W: the lookups and gradients of one training step of a click model.

26 features of 100,000 ids each, spread over the 64-bit space and drawn by Zipf's law with exponent 1.05. A sample has
one id a feature: 2,520 samples make 65,520 ids a step, 157 make 4,082.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FEATURES = 26
IDS = 100_000
EXPONENT = 1.05
BATCHES = 8
SIZES = {"65k": 2520, "4k": 157}


@dataclass(frozen=True)
class Workload:
    """Batches, as ids and as row numbers."""

    ids: list[Tensor]
    """All ids of each feature, int64 ``[IDS]``; an id's index here is its row number."""
    rows: list[list[Tensor]]
    """Row numbers by batch and feature, int64 ``[samples]``."""
    gradients: list[Tensor]
    """A fixed gradient for each feature, float32 ``[samples, dim]``."""

    @property
    def step_ids(self) -> int:
        """Number of ids in one step."""
        return FEATURES * self.gradients[0].size(0)

    def batch(self, number: int) -> dict[str, Tensor]:
        """Return a batch of 64-bit ids by feature."""
        rows = self.rows[number % BATCHES]
        return {name(f): self.ids[f][rows[f]] for f in range(FEATURES)}


def name(feature: int) -> str:
    """Return the name of a feature."""
    return f"feature{feature:02d}"


def make(size: str, dim: int, device: torch.device, seed: int = 0) -> Workload:
    """Draw the workload; the same arguments give the same one."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, IDS + 1) ** EXPONENT
    weights /= weights.sum()
    samples = SIZES[size]

    def draw() -> Tensor:
        # Hot ids are spread at random, so that they are not adjacent in a static table.
        return torch.from_numpy(random.choice(IDS, size=samples, p=weights)).to(device)

    ids = [torch.from_numpy(random.integers(-(2**63), 2**63 - 1, IDS)).to(device) for _ in range(FEATURES)]
    deals = [torch.from_numpy(random.permutation(IDS)).to(device) for _ in range(FEATURES)]
    rows = [[deals[f][draw()] for f in range(FEATURES)] for _ in range(BATCHES)]
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(samples, dim, generator=generator).to(device) for _ in range(FEATURES)]
    return Workload(ids, rows, gradients)
