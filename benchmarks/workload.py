"""Workload of the benchmarks: lookups and gradients of one training step of a click model.

26 features of 100,000 ids each, spread over the 64-bit space and drawn from a Zipf distribution with exponent 1.05. A
sample has one id per feature: 2,520 samples have 65,520 ids per step, and 157 have 4,082.
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
    """Batches, as ids and as row indices."""

    ids: list[Tensor]
    """All ids of each feature, int64; the position of an id is its row index."""
    rows: list[list[Tensor]]
    """Row indices by batch and feature, int64 ``[samples]``."""
    gradients: list[Tensor]
    """A fixed gradient for each feature, float32 ``[samples, dim]``."""

    @property
    def step_ids(self) -> int:
        """Number of ids in one step."""
        return len(self.ids) * self.gradients[0].size(0)

    def batch(self, number: int) -> dict[str, Tensor]:
        """Return a batch of 64-bit ids by feature."""
        rows = self.rows[number % BATCHES]
        return {name(f): ids[rows[f]] for f, ids in enumerate(self.ids)}


def name(feature: int) -> str:
    """Return the name of a feature."""
    return f"feature{feature:02d}"


def make(
    size: str, dim: int, device: torch.device, seed: int = 0, *, features: int = FEATURES, ids: int = IDS
) -> Workload:
    """Sample the workload, deterministically for given arguments; with fewer features, it has more samples."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, ids + 1) ** EXPONENT
    weights /= weights.sum()
    samples = SIZES[size] * FEATURES // features

    def draw() -> Tensor:
        # Frequent ids have random rows, so that they are not adjacent in a static table.
        return torch.from_numpy(random.choice(ids, size=samples, p=weights)).to(device)

    of_features = [torch.from_numpy(random.integers(-(2**63), 2**63 - 1, ids)).to(device) for _ in range(features)]
    permutations = [torch.from_numpy(random.permutation(ids)).to(device) for _ in range(features)]
    rows = [[permutation[draw()] for permutation in permutations] for _ in range(BATCHES)]
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(samples, dim, generator=generator).to(device) for _ in range(features)]
    return Workload(of_features, rows, gradients)
